// The module torchrec_mdr.ops._adam: Adam on the rows of a bank that are present, on CPU; see BankAdam in
// optim/bank_adam.py.
//
// A row is read and written once, which is all that a step costs. Where its gradient comes as factors it is summed in a
// thread's cache and never written.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rows_kernels.h"

namespace {

constexpr int64_t PIECE = 4096;  // elements a thread takes at a time

struct Settings {
  float rate, beta1, beta2, eps, decay;
};

// What moves: values, moments, and each row's count of steps.
struct State {
  float *values, *first, *second, *steps;
  int64_t num_rows, width;
};

// A row in a step: how many it has seen, its learning rate over the correction of the first moment, the root of the
// second's.
struct Row {
  int64_t number;
  double count;
  float rate, root;
};

// The rows that are present, each with its step counted.
std::vector<Row> count(const State& state, const bool* present, double rate, double beta1, double beta2) {
  std::vector<Row> rows;
  Row own{};
  for (int64_t number = 0; number < state.num_rows; ++number) {
    if (!present[number]) continue;
    const double steps = state.steps[number] += 1;
    if (rows.empty() || steps != own.count)  // mostly that of the row before; powers cost more than a short row
      own = {0, steps, float(rate / (1 - std::pow(beta1, steps))), float(1 / std::sqrt(1 - std::pow(beta2, steps)))};
    own.number = number;
    rows.push_back(own);
  }
  return rows;
}

// Moves `size` elements of a row from `begin` on.
INLINE void move(const State& state, const float* gradient, int64_t begin, int64_t size, const Row& row, Settings s) {
  float* __restrict p = state.values + begin;
  float* __restrict m = state.first + begin;
  float* __restrict v = state.second + begin;
  const float* __restrict g = gradient;
  for (int64_t i = 0; i < size; ++i) {
    const float slope = g[i] + s.decay * p[i];
    m[i] += (1 - s.beta1) * (slope - m[i]);
    v[i] = s.beta2 * v[i] + (1 - s.beta2) * slope * slope;
    p[i] -= row.rate * m[i] / (std::sqrt(v[i]) * row.root + s.eps);
  }
}

// What a call's outer products [rank, width] are the gradients of: a table, and its last vector where that lies apart.
struct Moved {
  State table, last;
  bool has_last;
};

// The columns [begin, end) of a row of both; rows of both have taken the same steps.
template <int BYTES>
INLINE void move_table(const Moved& moved, const Call<float>& call, int64_t begin, int64_t end, const Row& row,
                       Settings settings) {
  Kernels<float, BYTES>::outer(call, row.number, begin, end);
  const float* gradient = call.out[row.number];
  const State& state = moved.table;
  const int64_t size = state.width;  // elements of a table
  if (begin == 0 && end == call.width)  // in one run
    move(state, gradient, row.number * size, size, row, settings);
  else
    for (int64_t at = begin; at < size; at += call.width)
      move(state, gradient + at, row.number * size + at, end - begin, row, settings);
  if (moved.has_last)
    move(moved.last, gradient + size + begin, row.number * call.width + begin, end - begin, row, settings);
}

// The same code for a kind of processor.
struct Level {
  void (*move)(const State&, const float* gradient, int64_t begin, int64_t size, const Row&, Settings);
  void (*move_table)(const Moved&, const Call<float>&, int64_t begin, int64_t end, const Row&, Settings);
};

#define LEVEL(NAME, TARGET, BYTES)                                                                             \
  struct NAME {                                                                                                \
    using I = int64_t;                                                                                         \
    TARGET static void one(const State& state, const float* g, I begin, I size, const Row& row, Settings s) {  \
      move(state, g, begin, size, row, s);                                                                     \
    }                                                                                                          \
    TARGET static void table(const Moved& moved, const Call<float>& call, I begin, I end, const Row& row,      \
                             Settings s) {                                                                     \
      move_table<BYTES>(moved, call, begin, end, row, s);                                                      \
    }                                                                                                          \
  };

FOR_EACH_PROCESSOR(LEVEL)

Level choose(int64_t bytes) {
  switch (vector_bytes(bytes)) {
#define CASE(NAME, TARGET, BYTES) \
  case BYTES:                     \
    return {NAME::one, NAME::table};
    FOR_EACH_PROCESSOR(CASE)
  }
  return {Plain::one, Plain::table};
}

void step_dense(const State& state, const float* gradient, const std::vector<Row>& rows, Settings settings,
                int threads) {
  const Level level = choose(64);
  const int64_t pieces = (state.width + PIECE - 1) / PIECE, tasks = int64_t(rows.size()) * pieces;
  if (tasks < threads) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) {
    const Row& row = rows[task / pieces];
    const int64_t start = task % pieces * PIECE, begin = row.number * state.width + start;
    level.move(state, gradient + begin, begin, std::min<int64_t>(PIECE, state.width - start), row, settings);
  }
}

void step_factored(const Moved& moved, const Call<float>& factors, const std::vector<Row>& rows, Settings settings,
                   int threads) {
  const Level level = choose(factors.width * sizeof(float));
  const Pieces pieces(factors.width, rows.size(), threads);
  const int64_t tasks = int64_t(rows.size()) * pieces.count;
  const int64_t run = std::max<int64_t>(1, tasks / (16 * threads));  // rows in a row, as memory likes best
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> gradient(factors.rank * factors.width);  // of one row after the other: it stays in the cache
    Call<float> call = factors;
    call.out = {gradient.data(), 0};
#pragma omp for schedule(dynamic, run)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t piece = task % pieces.count, begin = piece * pieces.columns;
      const int64_t end = piece + 1 < pieces.count ? begin + pieces.columns : call.width;
      level.move_table(moved, call, begin, end, rows[task / pieces.count], settings);
    }
  }
}

float* floats(unsigned long long address) { return reinterpret_cast<float*>(address); }

// The state (values, moments, counts; which rows are present; their number), the settings, threads; then a gradient's
// address, or its factors: two matrices and their strides, the groups' permutation and ends, the gradient's rank and
// width, and, where its last vector belongs to another tensor, that one's values, moments and counts.
PyObject* step(PyObject*, PyObject* arguments) {
  unsigned long long values, first, second, steps, present, gradient, left = 0, right = 0, permutation = 0, ends = 0;
  unsigned long long last = 0, last_first = 0, last_second = 0, last_steps = 0;
  Py_ssize_t num_rows, width, left_stride = 0, right_stride = 0, rank = 0, columns = 0;
  double rate, beta1, beta2, eps, decay;
  int threads;
  if (!PyArg_ParseTuple(arguments, "(KKKKKnn)(ddddd)iK|(KnKnKKnn)(KKKK)", &values, &first, &second, &steps, &present,
                        &num_rows, &width, &rate, &beta1, &beta2, &eps, &decay, &threads, &gradient, &left,
                        &left_stride, &right, &right_stride, &permutation, &ends, &rank, &columns, &last,
                        &last_first, &last_second, &last_steps))
    return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  const Settings settings{float(rate), float(beta1), float(beta2), float(eps), float(decay)};
  const State state{floats(values), floats(first), floats(second), floats(steps), num_rows, width};
  const std::vector<Row> rows = count(state, reinterpret_cast<const bool*>(present), rate, beta1, beta2);
  if (gradient) {
    step_dense(state, floats(gradient), rows, settings, threads);
  } else {
    const Groups groups{reinterpret_cast<const int64_t*>(permutation), reinterpret_cast<const int32_t*>(ends), nullptr,
                        num_rows};
    Call<float> factors{};
    factors.left = {floats(left), left_stride};
    factors.right = {floats(right), right_stride};
    factors.groups = groups, factors.rank = rank, factors.width = columns;
    Moved moved{state, {floats(last), floats(last_first), floats(last_second), floats(last_steps), num_rows, columns},
                last != 0};
    if (moved.has_last)
      for (const Row& row : rows) moved.last.steps[row.number] += 1;
    step_factored(moved, factors, rows, settings, threads);
  }
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"step", step, METH_VARARGS, "A step over addresses; see optimizers.py."}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_adam", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__adam() { return PyModule_Create(&module); }
