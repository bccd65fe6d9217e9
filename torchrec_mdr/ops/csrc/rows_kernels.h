// Products of rows with their own adapter's small table, on CPU; ops/products.py says what they compute.
//
// Matrix libraries take one product a group, and a batch of four rows for each of a thousand adapters drowns in calls.
// Here rows are taken four at a time, wherever they lie in memory, and a tile of 4 x 4 vectors is summed in registers.
// A row's result depends on that row and its table alone, a table's sum on its own rows in their order: neither
// on the number of threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "rows_call.h"

namespace {

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

// LANES zeros, then LANES times all bits: a mask for each number of last lanes.
template <typename T, int LANES>
struct Edge {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Bits lanes[2 * LANES] = {};
  constexpr Edge() {
    for (int lane = LANES; lane < 2 * LANES; ++lane) lanes[lane] = -1;
  }
};

// The kernels for vectors of BYTES, tiles R rows by C vectors.
template <typename T, int BYTES>
struct Kernels {
  typedef T Vector __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
  static constexpr int LANES = BYTES / sizeof(T);
  static constexpr Edge<T, LANES> EDGE{};
  typedef typename Edge<T, LANES>::Bits Mask __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
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
    if (k < width && width >= LANES) {  // the last vector reaches back over columns that are done: zero in it
      const Mask fresh = *reinterpret_cast<const Mask*>(EDGE.lanes + width - k);
      for (int i = 0; i < R; ++i) {
        const Vector own = Vector(Mask(vector(x[i] + width - LANES)) & fresh);
        for (int c = 0; c < C; ++c) sums[i][c] += own * vector(table + (c + 1) * width - LANES);
      }
      k = width;
    }
    for (int i = 0; i < R; ++i)
      for (int c = 0; c < C; ++c) {
        T sum = total<LANES, T, Vector>(sums[i][c]);
        for (int64_t narrow = k; narrow < width; ++narrow) sum += x[i][narrow] * table[c * width + narrow];
        z[i][j + c] = sum;
      }
  }

  template <int R>
  INLINE void down_rows(const Call<T>& call, const int64_t* rows, int64_t adapter, int64_t coming) {
    const T* x[R + ROWS];
    T* z[R];
    for (int i = 0; i < R + ROWS; ++i) x[i] = call.left[rows[i]];
    for (int i = 0; i < R; ++i) z[i] = call.out[rows[i]];
    const T* next = call.right[coming];
    Fetch<T> fetch_rows{x + R, ROWS, 0, call.width}, fetch_table{&next, coming != adapter, 0, call.rank * call.width};
    const int64_t lines = WIDE * call.width / Fetch<T>::LINE + 1;  // of WIDE vectors of the table
    int64_t j = 0;
    for (; j + WIDE <= call.rank; j += WIDE) {
      fetch_rows(lines * ROWS / call.rank + 1);
      fetch_table(lines);
      dots<R, WIDE>(x, call.right[adapter], call.width, z, j);
    }
    for (; j < call.rank; ++j) dots<R, 1>(x, call.right[adapter], call.width, z, j);
  }

  INLINE void down(const Call<T>& call, int64_t begin, int64_t end) {
    by_group(call.groups, begin, end, [&](auto count, const int64_t* rows, int64_t adapter, int64_t coming) ALWAYS {
      down_rows<decltype(count)::value>(call, rows, adapter, coming);
    });
    by_rest(call.groups, begin, end, [&](int64_t row) ALWAYS { std::fill_n(call.out[row], call.rank, T(0)); });
  }

  // y[i] = start[i] + sum_j z[i][j] table[j], for R rows and C vectors of columns, and last, if any, for one more j; start
  // may be y, so those columns that are DONE, of a last vector that reaches back over them, stay as they are
  template <int R, int C, bool DONE = false>
  INLINE void sums(const T* const* z, const T* table, const T* last, const T* const* start, const Call<T>& call,
                   T* const* y, int64_t k) {
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
    if (call.last.data)
      for (int c = 0; c < C; ++c) {
        const Vector theirs = vector(last + k + c * LANES);
        for (int i = 0; i < R; ++i) sums[i][c] += z[i][call.rank] * theirs;
      }
    const Mask fresh = *reinterpret_cast<const Mask*>(EDGE.lanes + (DONE ? call.width % LANES : LANES));
    for (int i = 0; i < R; ++i)
      for (int c = 0; c < C; ++c) {
        Vector& out = vector(y[i] + k + c * LANES);
        out = DONE ? Vector((fresh & Mask(sums[i][c])) | (~fresh & Mask(out))) : sums[i][c];
      }
  }

  template <int R>
  INLINE void up_rows(const Call<T>& call, const int64_t* rows, int64_t adapter, int64_t coming) {
    const T *z[R], *start[R + ROWS], *table = call.right[adapter], *last = call.last[adapter];
    T* y[R];
    for (int i = 0; i < R; ++i) z[i] = call.left[rows[i]], y[i] = call.out[rows[i]];
    for (int i = 0; i < R + ROWS; ++i) start[i] = call.start[rows[i]];
    const T *next = call.right[coming], *next_last = call.last[coming];
    Fetch<T> fetch_rows{start + R, call.start.stride ? ROWS : 0, 0, call.width};
    Fetch<T> fetch_table{&next, coming != adapter, 0, call.rank * call.width};
    Fetch<T> fetch_last{&next_last, call.last.data && coming != adapter, 0, call.width};
    constexpr int64_t LINES = WIDE * BYTES / 64;  // of one row's columns
    int64_t k = 0;
    for (; k + WIDE * LANES <= call.width; k += WIDE * LANES) {
      fetch_rows(ROWS * LINES);
      fetch_table(call.rank * LINES);
      fetch_last(LINES);
      sums<R, WIDE>(z, table, last, start, call, y, k);
    }
    for (; k + LANES <= call.width; k += LANES) sums<R, 1>(z, table, last, start, call, y, k);
    if (k < call.width && call.width >= LANES)
      return sums<R, 1, true>(z, table, last, start, call, y, call.width - LANES);
    for (; k < call.width; ++k)
      for (int i = 0; i < R; ++i) {
        T sum = call.start.data ? start[i][k] : T(0);
        for (int64_t j = 0; j < call.rank; ++j) sum += z[i][j] * table[j * call.width + k];
        if (call.last.data) sum += z[i][call.rank] * last[k];
        y[i][k] = sum;
      }
  }

  INLINE void up(const Call<T>& call, int64_t begin, int64_t end) {
    by_group(call.groups, begin, end, [&](auto count, const int64_t* rows, int64_t adapter, int64_t coming) ALWAYS {
      up_rows<decltype(count)::value>(call, rows, adapter, coming);
    });
    by_rest(call.groups, begin, end, [&](int64_t row) ALWAYS {
      const T* start = call.start[row];
      T* out = call.out[row];
      if (!call.start.data)
        std::fill_n(out, call.width, T(0));
      else if (start != out)
        std::copy_n(start, call.width, out);
    });
  }

  // table[j] (+)= sum_i z[i][j] x[i] for J of its vectors and C vectors of columns; z is left, x right
  template <int J, int C>
  INLINE void outers(const Chunk<T>& chunk, int64_t j, T* table, int64_t width, int64_t k) {
    Vector sums[J][C] = {};
    for (int i = 0; i < chunk.count; ++i) {
      Vector own[C];
      for (int c = 0; c < C; ++c) own[c] = vector(chunk.right[i] + k + c * LANES);
      for (int r = 0; r < J; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] += chunk.left[i][j + r] * own[c];
    }
    table += j * width + k;
    for (int r = 0; r < J; ++r)
      for (int c = 0; c < C; ++c) {
        Vector& out = vector(table + r * width + c * LANES);
        out = chunk.more ? out + sums[r][c] : sums[r][c];
      }
  }

  template <int J>
  INLINE void outer_rows(const Chunk<T>& chunk, int64_t j, T* table, int64_t width, int64_t begin, int64_t end,
                         Fetch<T>& fetch, int64_t lines) {
    int64_t k = begin;
    for (; k + WIDE * LANES <= end; k += WIDE * LANES) {
      fetch(lines);
      outers<J, WIDE>(chunk, j, table, width, k);
    }
    for (; k + LANES <= end; k += LANES) outers<J, 1>(chunk, j, table, width, k);
    for (; k < end && width < LANES; ++k)
      for (int r = 0; r < J; ++r) {
        T sum = 0, &out = table[(j + r) * width + k];
        for (int i = 0; i < chunk.count; ++i) sum += chunk.left[i][j + r] * chunk.right[i][k];
        out = chunk.more ? out + sum : sum;
      }
  }

  // the last LANES columns, over all rows at once: those of them that are done come out the same
  template <int J>
  INLINE void outer_last(const Call<T>& call, int64_t group, int64_t j) {
    Vector sums[J] = {};
    by_chunk(call, call.groups.begin(group), call.groups.ends[group], [&](const Chunk<T>& chunk) ALWAYS {
      Vector own[J] = {};
      for (int i = 0; i < chunk.count; ++i)
        for (int r = 0; r < J; ++r) own[r] += chunk.left[i][j + r] * vector(chunk.right[i] + call.width - LANES);
      for (int r = 0; r < J; ++r) sums[r] += own[r];
    });
    for (int r = 0; r < J; ++r) vector(call.out[group] + (j + r + 1) * call.width - LANES) = sums[r];
  }

  // the columns [begin, end) of one group's table
  INLINE void outer(const Call<T>& call, int64_t group, int64_t begin, int64_t end) {
    const int64_t rank = call.rank, width = call.width;
    T* table = call.out[group];
    for (int64_t j = 0; j < rank; ++j)  // where groups are small, waiting for their tables is most of the time
      for (int64_t k = begin; k < end; k += 64 / sizeof(T)) __builtin_prefetch(table + j * width + k, 1, 2);
    by_chunk(call, call.groups.begin(group), call.groups.ends[group], [&](const Chunk<T>& chunk) ALWAYS {
      Fetch<T> fetch{chunk.next, chunk.coming, begin, end};
      const int64_t lines = CHUNK * WIDE * BYTES / 64 * ROWS / rank + 1;
      int64_t j = 0;
      for (; j + ROWS <= rank; j += ROWS) outer_rows<ROWS>(chunk, j, table, width, begin, end, fetch, lines);
      for (; j < rank; ++j) outer_rows<1>(chunk, j, table, width, begin, end, fetch, lines);
    });
    if (end < width || width < LANES || (end - begin) % LANES == 0) return;
    int64_t j = 0;
    for (; j + ROWS <= rank; j += ROWS) outer_last<ROWS>(call, group, j);
    for (; j < rank; ++j) outer_last<1>(call, group, j);
  }
};

}  // namespace
