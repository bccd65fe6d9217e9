// Adam on the rows of a bank that are present, on CPU, in one pass; see BankAdam in optimizers.py.
//
// Plain C++ over addresses, like adapters/rows.cpp: built without torch, and threads are those of torch's OpenMP.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace {

constexpr int64_t PIECE = 4096;  // elements a thread takes at a time

struct Settings {
  float rate, beta1, beta2, eps, decay;
};

// A row in a step: how many it has seen, its learning rate over the correction of the first moment, the root of the
// second's.
struct Row {
  int64_t begin;
  double count;
  float rate, root;
};

FOR_EACH_PROCESSOR
void update(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t size,
            Row row, Settings s) {
  for (int64_t i = 0; i < size; ++i) {
    const float slope = g[i] + s.decay * p[i];
    m[i] += (1 - s.beta1) * (slope - m[i]);
    v[i] = s.beta2 * v[i] + (1 - s.beta2) * slope * slope;
    p[i] -= row.rate * m[i] / (std::sqrt(v[i]) * row.root + s.eps);
  }
}

float* floats(unsigned long long address) { return reinterpret_cast<float*>(address); }

PyObject* step(PyObject*, PyObject* arguments) {
  unsigned long long parameter, gradient, first, second, steps, present;
  Py_ssize_t num_rows, width;
  double rate, beta1, beta2, eps, decay;
  int threads;
  if (!PyArg_ParseTuple(arguments, "KKKKKKnndddddi", &parameter, &gradient, &first, &second, &steps, &present, &num_rows,
                        &width, &rate, &beta1, &beta2, &eps, &decay, &threads))
    return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  const Settings settings{float(rate), float(beta1), float(beta2), float(eps), float(decay)};
  std::vector<Row> rows;
  Row own{};
  for (int64_t row = 0; row < num_rows; ++row)
    if (reinterpret_cast<const bool*>(present)[row]) {
      const double count = floats(steps)[row] += 1;
      if (rows.empty() || count != own.count) {  // mostly that of the row before; powers cost more than a short row
        const double first_left = 1 - std::pow(beta1, count), second_left = 1 - std::pow(beta2, count);
        own = {0, count, float(rate / first_left), float(1 / std::sqrt(second_left))};
      }
      own.begin = row * width;
      rows.push_back(own);
    }
  const int64_t pieces = (width + PIECE - 1) / PIECE, tasks = int64_t(rows.size()) * pieces;
  if (tasks < threads) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) {
    const Row& row = rows[task / pieces];
    const int64_t start = task % pieces * PIECE, at = row.begin + start;
    update(floats(parameter) + at, floats(gradient) + at, floats(first) + at, floats(second) + at,
           std::min<int64_t>(PIECE, width - start), row, settings);
  }
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"step", step, METH_VARARGS, "A step over addresses; see optimizers.py."}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_adam", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__adam() { return PyModule_Create(&module); }
