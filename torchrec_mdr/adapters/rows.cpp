// Products of rows with their own adapter's small table, on CPU; adapters/kernels.py says what they compute.
//
// Matrix libraries take one product a group, and a batch of four rows for each of a thousand adapters drowns in calls.
// Here rows are taken four at a time, wherever they lie in memory, and a tile of 4 x 4 vectors is summed in registers.
// A row's result depends on that row and its table alone, a table's sum on its own rows in their order: neither
// on the number of threads. Plain C++ over addresses: built without torch, and threads are those of torch's OpenMP.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>

#define ALWAYS __attribute__((always_inline))
#define INLINE static inline ALWAYS

namespace {

constexpr int ROWS = 4;    // taken together in down and up
constexpr int CHUNK = 32;  // rows whose outer products are summed before the sum is stored
constexpr int64_t ALONE = 1 << 15;  // multiplications that are not worth a second thread

// A matrix whose rows are contiguous and begin `stride` elements apart; stride 0 repeats one row.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

// How rows fall into groups: see DomainGroups. permutation and adapters may be null.
struct Groups {
  const int64_t* permutation;
  const int32_t* ends;
  const int64_t* adapters;
  int64_t size;
  int64_t row(int64_t place) const { return permutation ? permutation[place] : place; }
  int64_t adapter(int64_t group) const { return adapters ? adapters[group] : group; }
};

// One call: matrices of rows, tables [N, rank, width] as matrices of N rows, what is written, and sizes.
template <typename T>
struct Call {
  Matrix<const T> left, right, start;  // start.data may be null
  Matrix<T> out;
  Groups groups;
  int64_t rank, width;
};

// Runs `each(rows, count, table)` over the places [begin, end), up to ROWS of one group at a time.
template <typename Each>
INLINE void by_group(const Groups& groups, int64_t begin, int64_t end, Each each) {
  int64_t group = std::upper_bound(groups.ends, groups.ends + groups.size, int32_t(begin)) - groups.ends;
  int64_t rows[ROWS];
  for (int64_t place = begin; place < end;) {
    while (group < groups.size && groups.ends[group] <= place) ++group;
    if (group == groups.size) return;
    const int64_t stop = std::min<int64_t>(groups.ends[group], end);
    while (place < stop) {
      const int count = int(std::min<int64_t>(ROWS, stop - place));
      for (int i = 0; i < count; ++i) rows[i] = groups.row(place + i);
      each(rows, count, groups.adapter(group));
      place += count;
    }
  }
}

// The sum of a vector of COUNT elements, half to half: in sequence it would cost more than the products.
template <int COUNT, typename T, typename Vector>
INLINE T total(Vector vector) {
  if constexpr (COUNT == 2) {
    return vector[0] + vector[1];
  } else {
    typedef T Half __attribute__((vector_size(COUNT / 2 * sizeof(T)), aligned(alignof(T)), may_alias));
    const Half* halves = reinterpret_cast<const Half*>(&vector);
    return total<COUNT / 2, T, Half>(halves[0] + halves[1]);
  }
}

// The kernels for vectors of BYTES, tiles R rows by C vectors.
template <typename T, int BYTES>
struct Kernels {
  typedef T Vector __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
  static constexpr int LANES = BYTES / sizeof(T);
  static constexpr int WIDE = BYTES == 64 ? 4 : 2;  // vectors of a tile beside its ROWS, as registers allow

  INLINE const Vector& vector(const T* at) { return *reinterpret_cast<const Vector*>(at); }
  INLINE Vector& vector(T* at) { return *reinterpret_cast<Vector*>(at); }

  // z[i][j] = table[j] . x[i] for R rows and C of the table's vectors
  template <int R, int C>
  INLINE void dots(const T* const* x, const T* table, int64_t width, T* const* z, int64_t j) {
    Vector sums[R][C] = {};
    table += j * width;
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
      Vector theirs[C];
      for (int c = 0; c < C; ++c) theirs[c] = vector(table + c * width + k);
      for (int i = 0; i < R; ++i) {
        const Vector own = vector(x[i] + k);
        for (int c = 0; c < C; ++c) sums[i][c] += own * theirs[c];
      }
    }
    for (int i = 0; i < R; ++i)
      for (int c = 0; c < C; ++c) {
        T sum = total<LANES, T, Vector>(sums[i][c]);
        for (int64_t last = k; last < width; ++last) sum += x[i][last] * table[c * width + last];
        z[i][j + c] = sum;
      }
  }

  template <int R>
  INLINE void down_rows(const Call<T>& call, const int64_t* rows, int64_t adapter) {
    const T* x[R];
    T* z[R];
    for (int i = 0; i < R; ++i) x[i] = call.left[rows[i]], z[i] = call.out[rows[i]];
    int64_t j = 0;
    for (; j + WIDE <= call.rank; j += WIDE) dots<R, WIDE>(x, call.right[adapter], call.width, z, j);
    for (; j < call.rank; ++j) dots<R, 1>(x, call.right[adapter], call.width, z, j);
  }

  INLINE void down(const Call<T>& call, int64_t begin, int64_t end) {
    by_group(call.groups, begin, end, [&](const int64_t* rows, int count, int64_t adapter) ALWAYS {
      if (count == ROWS) return down_rows<ROWS>(call, rows, adapter);
      for (int i = 0; i < count; ++i) down_rows<1>(call, rows + i, adapter);
    });
  }

  // y[i] = start[i] + sum_j z[i][j] table[j], for R rows and C vectors of columns
  template <int R, int C>
  INLINE void sums(const T* const* z, const T* table, const T* const* start, const Call<T>& call, T* const* y,
                   int64_t k) {
    Vector sums[R][C] = {};
    if (call.start.data)
      for (int i = 0; i < R; ++i)
        for (int c = 0; c < C; ++c) sums[i][c] = vector(start[i] + k + c * LANES);
    for (int64_t j = 0; j < call.rank; ++j) {
      Vector theirs[C];
      for (int c = 0; c < C; ++c) theirs[c] = vector(table + j * call.width + k + c * LANES);
      for (int i = 0; i < R; ++i)
        for (int c = 0; c < C; ++c) sums[i][c] += z[i][j] * theirs[c];
    }
    for (int i = 0; i < R; ++i)
      for (int c = 0; c < C; ++c) vector(y[i] + k + c * LANES) = sums[i][c];
  }

  template <int R>
  INLINE void up_rows(const Call<T>& call, const int64_t* rows, int64_t adapter) {
    const T *z[R], *start[R], *table = call.right[adapter];
    T* y[R];
    for (int i = 0; i < R; ++i) z[i] = call.left[rows[i]], start[i] = call.start[rows[i]], y[i] = call.out[rows[i]];
    int64_t k = 0;
    for (; k + WIDE * LANES <= call.width; k += WIDE * LANES) sums<R, WIDE>(z, table, start, call, y, k);
    for (; k + LANES <= call.width; k += LANES) sums<R, 1>(z, table, start, call, y, k);
    for (; k < call.width; ++k)
      for (int i = 0; i < R; ++i) {
        T sum = call.start.data ? start[i][k] : T(0);
        for (int64_t j = 0; j < call.rank; ++j) sum += z[i][j] * table[j * call.width + k];
        y[i][k] = sum;
      }
  }

  INLINE void up(const Call<T>& call, int64_t begin, int64_t end) {
    by_group(call.groups, begin, end, [&](const int64_t* rows, int count, int64_t adapter) ALWAYS {
      if (count == ROWS) return up_rows<ROWS>(call, rows, adapter);
      for (int i = 0; i < count; ++i) up_rows<1>(call, rows + i, adapter);
    });
  }

  // table[j] (+)= sum_i z[i][j] x[i] for J of its vectors and C vectors of columns
  template <int J, int C>
  INLINE void outers(const T* const* z, const T* const* x, int count, int64_t j, T* table, int64_t width, int64_t k,
                     bool more) {
    Vector sums[J][C] = {};
    table += j * width + k;
    if (more)
      for (int r = 0; r < J; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = vector(table + r * width + c * LANES);
    for (int i = 0; i < count; ++i) {
      Vector own[C];
      for (int c = 0; c < C; ++c) own[c] = vector(x[i] + k + c * LANES);
      for (int r = 0; r < J; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] += z[i][j + r] * own[c];
    }
    for (int r = 0; r < J; ++r)
      for (int c = 0; c < C; ++c) vector(table + r * width + c * LANES) = sums[r][c];
  }

  template <int J>
  INLINE void outer_rows(const T* const* z, const T* const* x, int count, int64_t j, T* table, int64_t width,
                         int64_t begin, int64_t end, bool more) {
    int64_t k = begin;
    for (; k + WIDE * LANES <= end; k += WIDE * LANES) outers<J, WIDE>(z, x, count, j, table, width, k, more);
    for (; k + LANES <= end; k += LANES) outers<J, 1>(z, x, count, j, table, width, k, more);
    for (; k < end; ++k)
      for (int r = 0; r < J; ++r) {
        T sum = more ? table[(j + r) * width + k] : T(0);
        for (int i = 0; i < count; ++i) sum += z[i][j + r] * x[i][k];
        table[(j + r) * width + k] = sum;
      }
  }

  // the columns [begin, end) of one group's table
  INLINE void outer(const Call<T>& call, int64_t group, int64_t begin, int64_t end) {
    const Groups& groups = call.groups;
    T* table = call.out[group];
    int64_t place = group ? groups.ends[group - 1] : 0;
    const T *z[CHUNK], *x[CHUNK];
    bool more = false;
    do {  // once at least: a group without rows has a sum of zeros
      const int count = int(std::min<int64_t>(CHUNK, groups.ends[group] - place));
      for (int i = 0; i < count; ++i) {
        const int64_t row = groups.row(place + i);
        z[i] = call.left[row], x[i] = call.right[row];
      }
      int64_t j = 0;
      for (; j + ROWS <= call.rank; j += ROWS) outer_rows<ROWS>(z, x, count, j, table, call.width, begin, end, more);
      for (; j < call.rank; ++j) outer_rows<1>(z, x, count, j, table, call.width, begin, end, more);
      place += count;
      more = true;
    } while (place < groups.ends[group]);
  }
};

template <typename T>
struct Level {
  void (*down)(const Call<T>&, int64_t begin, int64_t end);
  void (*up)(const Call<T>&, int64_t begin, int64_t end);
  void (*outer)(const Call<T>&, int64_t group, int64_t begin, int64_t end);
};

// The same code for a kind of processor.
#define LEVEL(NAME, TARGET, BYTES)                                                               \
  template <typename T>                                                                          \
  struct NAME {                                                                                  \
    using Own = Kernels<T, BYTES>;                                                               \
    TARGET static void down(const Call<T>& call, int64_t b, int64_t e) { Own::down(call, b, e); } \
    TARGET static void up(const Call<T>& call, int64_t b, int64_t e) { Own::up(call, b, e); }     \
    TARGET static void outer(const Call<T>& call, int64_t group, int64_t b, int64_t e) {         \
      Own::outer(call, group, b, e);                                                             \
    }                                                                                            \
    static constexpr Level<T> level{down, up, outer};                                            \
  };

LEVEL(Plain, , 16)
#if defined(__x86_64__)
LEVEL(Avx2, __attribute__((target("avx2,fma"))), 32)
LEVEL(Avx512, __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), 64)
#endif

// The best that this processor has, or the one asked for by its vectors' bytes.
template <typename T>
Level<T> choose(int bytes) {
#if defined(__x86_64__)
  const bool has_512 = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (bytes >= 64 && has_512) return Avx512<T>::level;
  if (bytes >= 32 && has_2) return Avx2<T>::level;
#endif
  return Plain<T>::level;
}

enum class Product { down, up, outer };

template <typename T>
void compute(Product product, const Call<T>& call, int64_t num_rows, int threads, int bytes) {
  const Level<T> level = choose<T>(bytes);
  if (num_rows * call.rank * call.width < ALONE) threads = 1;
  if (product != Product::outer) {
    const auto kernel = product == Product::down ? level.down : level.up;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; ++part)
      kernel(call, num_rows * part / threads, num_rows * (part + 1) / threads);
    return;
  }
  // groups differ in size: few of them are cut by columns, too, in pieces of whole cache lines
  const int64_t wanted = 4 * threads / std::max<int64_t>(1, call.groups.size);
  const int64_t pieces = std::max<int64_t>(1, std::min(call.width / 64, wanted));
  const int64_t columns = ((call.width + pieces - 1) / pieces + 15) / 16 * 16;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < call.groups.size * pieces; ++task) {
    const int64_t begin = task % pieces * columns;
    if (begin < call.width) level.outer(call, task / pieces, begin, std::min(call.width, begin + columns));
  }
}

template <typename T>
Matrix<T> matrix(unsigned long long address, Py_ssize_t stride) {
  return {reinterpret_cast<T*>(address), stride};
}

PyObject* product(PyObject*, PyObject* arguments) {
  unsigned long long left, right, start, out, permutation, ends, adapters;
  Py_ssize_t left_stride, right_stride, start_stride, out_stride, num_groups, num_rows, rank, width;
  int which, is_double, threads, bytes;
  if (!PyArg_ParseTuple(arguments, "iKnKnKnKnKKKnnnnpii", &which, &left, &left_stride, &right, &right_stride, &start,
                        &start_stride, &out, &out_stride, &permutation, &ends, &adapters, &num_groups, &num_rows, &rank,
                        &width, &is_double, &threads, &bytes))
    return nullptr;
  const Groups groups{reinterpret_cast<const int64_t*>(permutation), reinterpret_cast<const int32_t*>(ends),
                      reinterpret_cast<const int64_t*>(adapters), num_groups};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Call<T> call{matrix<const T>(left, left_stride), matrix<const T>(right, right_stride),
                       matrix<const T>(start, start_stride), matrix<T>(out, out_stride), groups, rank, width};
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
