// The module torchrec_mdr.adapters._rows: the kernels of rows_kernels.h and rows_norms.h, by this processor's vectors
// and threads.
//
// Plain C++ over addresses: built without torch, and threads are those of torch's OpenMP.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>

#include "rows_kernels.h"
#include "rows_norms.h"

namespace {

constexpr int64_t ALONE = 1 << 15;  // multiplications that are not worth a second thread

// Kernels over rows take places, those over groups a group and columns.
template <typename T>
struct Level {
  using Rows = void (*)(const Call<T>&, int64_t begin, int64_t end);
  using Columns = void (*)(const Call<T>&, int64_t group, int64_t begin, int64_t end);
  Rows down, up, blend;
  Columns outer, moments;
};

// The same code for a kind of processor.
#define LEVEL(NAME, TARGET, BYTES)                                                                     \
  template <typename T>                                                                                \
  struct NAME {                                                                                        \
    using C = const Call<T>&;                                                                          \
    using I = int64_t;                                                                                 \
    TARGET static void down(C call, I begin, I end) { Kernels<T, BYTES>::down(call, begin, end); }     \
    TARGET static void up(C call, I begin, I end) { Kernels<T, BYTES>::up(call, begin, end); }         \
    TARGET static void blend(C call, I begin, I end) { Norms<T, BYTES>::blend(call, begin, end); }     \
    TARGET static void outer(C call, I g, I begin, I end) { Kernels<T, BYTES>::outer(call, g, begin, end); } \
    TARGET static void moments(C call, I g, I begin, I end) { Norms<T, BYTES>::moments(call, g, begin, end); } \
    static constexpr Level<T> level{down, up, blend, outer, moments};                                  \
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

enum class Product { down, up, outer, blend, moments };

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

template <typename T>
void compute(Product product, const Call<T>& call, int64_t num_rows, int threads, int bytes) {
  const Level<T> level = choose<T>(std::min<int64_t>(bytes, call.width * sizeof(T)));
  if (num_rows * call.rank * call.width < ALONE) threads = 1;
  switch (product) {
    case Product::down: return over_rows<T>(level.down, call, num_rows, threads);
    case Product::up: return over_rows<T>(level.up, call, num_rows, threads);
    case Product::blend: return over_rows<T>(level.blend, call, num_rows, threads);
    case Product::outer: return over_groups<T>(level.outer, call, threads);
    case Product::moments: return over_groups<T>(level.moments, call, threads);
  }
}

template <typename T>
Matrix<T> matrix(unsigned long long address, Py_ssize_t stride) {
  return {reinterpret_cast<T*>(address), stride};
}

PyObject* product(PyObject*, PyObject* arguments) {
  unsigned long long left, right, start, gate, out, permutation, ends, adapters;
  Py_ssize_t left_stride, right_stride, start_stride, gate_stride, out_stride, num_groups, num_rows, rank, width;
  int which, relu, is_double, threads, bytes;
  if (!PyArg_ParseTuple(arguments, "iKnKnKnKnKnKKKnnnnppii", &which, &left, &left_stride, &right, &right_stride, &start,
                        &start_stride, &gate, &gate_stride, &out, &out_stride, &permutation, &ends, &adapters,
                        &num_groups, &num_rows, &rank, &width, &relu, &is_double, &threads, &bytes))
    return nullptr;
  const Groups groups{reinterpret_cast<const int64_t*>(permutation), reinterpret_cast<const int32_t*>(ends),
                      reinterpret_cast<const int64_t*>(adapters), num_groups};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Call<T> call{matrix<const T>(left, left_stride), matrix<const T>(right, right_stride),
                       matrix<const T>(start, start_stride), matrix<const T>(gate, gate_stride),
                       matrix<T>(out, out_stride), groups, rank, width, bool(relu)};
    compute<T>(Product(which), call, num_rows, threads, bytes);
  };
  Py_BEGIN_ALLOW_THREADS;
  is_double ? run(double()) : run(float());
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"product", product, METH_VARARGS, "A product over addresses; see kernels.py."}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rows", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__rows() { return PyModule_Create(&module); }
