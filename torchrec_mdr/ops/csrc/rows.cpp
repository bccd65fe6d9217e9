// The module torchrec_mdr.ops._rows: the kernels of rows_kernels.h and rows_norms.h, by this processor's vectors
// and threads.
//
// Plain C++ over addresses: built without torch, and threads are those of torch's OpenMP.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows_kernels.h"
#include "rows_norms.h"

namespace {

constexpr int64_t BLOCK = 512;      // rows that a thread sums at a time
constexpr int64_t ALONE = 1 << 15;  // multiplications that are not worth a second thread

// Kernels over rows take places, those over groups a group and columns or places.
template <typename T>
struct Level {
  using Rows = void (*)(const Call<T>&, int64_t begin, int64_t end);
  using Columns = void (*)(const Call<T>&, int64_t group, int64_t begin, int64_t end);
  using Block = void (*)(const Call<T>&, int64_t group, int64_t begin, int64_t end, T* out);
  Rows down, up, affine_by_domain;
  Columns outer;
  Block centered_sums;
};

// The same code for a kind of processor.
#define LEVEL(NAME, TARGET, BYTES)                                                                     \
  template <typename T>                                                                                \
  struct NAME {                                                                                        \
    using C = const Call<T>&;                                                                          \
    using I = int64_t;                                                                                 \
    TARGET static void down(C call, I begin, I end) { Kernels<T, BYTES>::down(call, begin, end); }     \
    TARGET static void up(C call, I begin, I end) { Kernels<T, BYTES>::up(call, begin, end); }         \
    TARGET static void affine_by_domain(C call, I begin, I end) { Norms<T, BYTES>::affine_by_domain(call, begin, end); }     \
    TARGET static void outer(C call, I g, I begin, I end) { Kernels<T, BYTES>::outer(call, g, begin, end); } \
    TARGET static void centered_sums(C call, I g, I begin, I end, T* out) {                                  \
      Norms<T, BYTES>::centered_sums(call, g, begin, end, out);                                              \
    }                                                                                                  \
    static constexpr Level<T> level{down, up, affine_by_domain, outer, centered_sums};                                  \
  };

FOR_EACH_PROCESSOR(LEVEL)

// The best that this processor has, with vectors of so many bytes at most.
template <typename T>
Level<T> choose(int64_t bytes) {
  switch (vector_bytes(bytes)) {
#define CASE(NAME, TARGET, BYTES) \
  case BYTES:                     \
    return NAME<T>::level;
    FOR_EACH_PROCESSOR(CASE)
  }
  return Plain<T>::level;
}

enum class Product { down, up, outer, affine_by_domain, centered_sums };

template <typename T>
void over_rows(typename Level<T>::Rows kernel, const Call<T>& call, int64_t num_rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; ++part)
    kernel(call, num_rows * part / threads, num_rows * (part + 1) / threads);
}

template <typename T>
void over_groups(typename Level<T>::Columns kernel, const Call<T>& call, int threads) {
  const Pieces pieces(call.width, call.groups.size, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < call.groups.size * pieces.count; ++task) {
    const int64_t piece = task % pieces.count, begin = piece * pieces.columns;
    kernel(call, task / pieces.count, begin, piece + 1 < pieces.count ? begin + pieces.columns : call.width);
  }
}

// Sums of large groups are those of their blocks: threads share them evenly, and rows are read from end to end.
template <typename T>
void over_blocks(typename Level<T>::Block kernel, const Call<T>& call, int threads) {
  struct Part {
    int64_t group, begin, end, sum;  // which of `sums`; -1 for the group's own
  };
  std::vector<Part> parts;
  int64_t count = 0;
  for (int64_t group = 0; group < call.groups.size; ++group) {
    const int64_t first = call.groups.begin(group), end = call.groups.ends[group];
    for (int64_t begin = first; begin == first || begin < end; begin += BLOCK)
      parts.push_back({group, begin, std::min(begin + BLOCK, end), begin == first ? -1 : count++});
  }
  const int64_t size = call.rank * call.width;
  std::vector<T> sums(count * size);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < int64_t(parts.size()); ++i) {
    const Part& part = parts[i];
    kernel(call, part.group, part.begin, part.end, part.sum < 0 ? call.out[part.group] : &sums[part.sum * size]);
  }
  for (const Part& part : parts)
    for (int64_t k = 0; part.sum >= 0 && k < size; ++k) call.out[part.group][k] += sums[part.sum * size + k];
}

template <typename T>
void compute(Product product, const Call<T>& call, int64_t num_rows, int threads, int bytes) {
  const Level<T> level = choose<T>(std::min<int64_t>(bytes, call.width * sizeof(T)));
  if (num_rows * call.rank * call.width < ALONE) threads = 1;
  switch (product) {
    case Product::down: return over_rows<T>(level.down, call, num_rows, threads);
    case Product::up: return over_rows<T>(level.up, call, num_rows, threads);
    case Product::affine_by_domain: return over_rows<T>(level.affine_by_domain, call, num_rows, threads);
    case Product::outer: return over_groups<T>(level.outer, call, threads);
    case Product::centered_sums: return over_blocks<T>(level.centered_sums, call, threads);
  }
}

template <typename T>
Matrix<T> matrix(unsigned long long address, Py_ssize_t stride) {
  return {reinterpret_cast<T*>(address), stride};
}

PyObject* product(PyObject*, PyObject* arguments) {
  unsigned long long left, right, start, gate, last, out, permutation, ends, adapters;
  Py_ssize_t left_stride, right_stride, start_stride, gate_stride, last_stride, out_stride;
  Py_ssize_t num_groups, num_rows, rank, width;
  int which, relu, is_double, threads, bytes;
  if (!PyArg_ParseTuple(arguments, "iKnKnKnKnKnKnKKKnnnnppii", &which, &left, &left_stride, &right, &right_stride, &start,
                        &start_stride, &gate, &gate_stride, &last, &last_stride, &out, &out_stride, &permutation, &ends, &adapters,
                        &num_groups, &num_rows, &rank, &width, &relu, &is_double, &threads, &bytes))
    return nullptr;
  const Groups groups{reinterpret_cast<const int64_t*>(permutation), reinterpret_cast<const int32_t*>(ends),
                      reinterpret_cast<const int64_t*>(adapters), num_groups};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Call<T> call{matrix<const T>(left, left_stride), matrix<const T>(right, right_stride),
                       matrix<const T>(start, start_stride), matrix<const T>(gate, gate_stride),
                       matrix<const T>(last, last_stride),
                       matrix<T>(out, out_stride), groups, rank, width, bool(relu)};
    compute<T>(Product(which), call, num_rows, threads, bytes);
  };
  Py_BEGIN_ALLOW_THREADS;
  is_double ? run(double()) : run(float());
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"product", product, METH_VARARGS, "A product over addresses; see cpu_kernels.py."}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rows", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__rows() { return PyModule_Create(&module); }
