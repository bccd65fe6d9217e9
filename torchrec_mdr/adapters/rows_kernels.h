// Products of rows with their own adapter's small table, on CPU; adapters/kernels.py says what they compute.
//
// Matrix libraries take one product a group, and a batch of four rows for each of a thousand adapters drowns in calls.
// Here rows are taken four at a time, wherever they lie in memory, and a tile of 4 x 4 vectors is summed in registers.
// A row's result depends on that row and its table alone, a table's sum on its own rows in their order: neither
// on the number of threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "processor.h"

namespace {

constexpr int ROWS = 4;    // taken together in down and up, where a group has so many
constexpr int CHUNK = 32;  // rows summed in registers before they are added to a table: fewer roundings in a row

// A matrix whose rows are contiguous and begin `stride` elements apart; stride 0 repeats one row.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

// Columns are cut into pieces of whole cache lines where there are few groups, which differ in size: how many, and of how
// many columns.
struct Pieces {
  int64_t count, columns;
  Pieces(int64_t width, int64_t num_groups, int threads) {
    const int64_t wanted = 4 * threads / std::max<int64_t>(1, num_groups);
    count = std::max<int64_t>(1, std::min(width / 64, wanted));
    columns = width / count / 16 * 16;
  }
};

// How rows fall into groups: see DomainGroups. permutation and adapters may be null.
struct Groups {
  const int64_t* permutation;
  const int32_t* ends;
  const int64_t* adapters;
  int64_t size;
  int64_t row(int64_t place) const { return permutation ? permutation[place] : place; }
  int64_t adapter(int64_t group) const { return adapters ? adapters[group] : group; }
  int64_t begin(int64_t group) const { return group ? ends[group - 1] : 0; }
};

// One call: matrices of rows, tables [N, rank, width] as matrices of N rows, what is written, and sizes.
template <typename T>
struct Call {
  Matrix<const T> left, right, start, gate;  // the last two may be null, and in norms left and right, too
  Matrix<T> out;
  Groups groups;
  int64_t rank, width;
  bool relu;  // see rows_norms.h
};

template <int R>
using Count = std::integral_constant<int, R>;

// Runs `each(place, stop, adapter)` for what each group has of the places [begin, end).
template <typename Each>
INLINE void by_run(const Groups& groups, int64_t begin, int64_t end, Each each) {
  int64_t group = std::upper_bound(groups.ends, groups.ends + groups.size, int32_t(begin)) - groups.ends;
  for (; begin < end && group < groups.size; ++group) {
    const int64_t stop = std::min<int64_t>(groups.ends[group], end);
    if (begin < stop) each(begin, stop, groups.adapter(group));
    begin = stop;
  }
}

// Runs `each(Count<R>, rows, adapter)` over the places [begin, end): R rows of one group, ROWS or what is left of it, and
// behind them the ROWS that come next, of any group.
template <typename Each>
INLINE void by_group(const Groups& groups, int64_t begin, int64_t end, Each each) {
  by_run(groups, begin, end, [&](int64_t place, int64_t stop, int64_t adapter) ALWAYS {
    int64_t rows[2 * ROWS];
    while (place < stop) {
      const int count = int(std::min<int64_t>(ROWS, stop - place));
      for (int i = 0; i < count + ROWS; ++i) rows[i] = groups.row(std::min(place + i, end - 1));
      place += count;
      if (count == 4)
        each(Count<4>(), rows, adapter);
      else if (count == 3)
        each(Count<3>(), rows, adapter);
      else if (count == 2)
        each(Count<2>(), rows, adapter);
      else
        each(Count<1>(), rows, adapter);
    }
  });
}

// Asks for the columns [begin, end) of rows that come next, one row after the other and some lines of the cache at a
// time: what is computed meanwhile hides that they lie in memory.
template <typename T>
struct Fetch {
  static constexpr int64_t LINE = 64 / sizeof(T);
  const T* const* rows;
  int64_t count, begin, end, row = 0, column = begin;
  inline ALWAYS void operator()(int64_t lines) {
    for (; lines > 0 && row < count; --lines) {
      __builtin_prefetch(rows[row] + column, 0, 2);
      column += LINE;
      if (column >= end) column = begin, ++row;
    }
  }
};

// Where some rows of a group lie, and the right ones that come next; `more` says whether rows of it were summed before.
template <typename T>
struct Chunk {
  const T *left[CHUNK], *right[CHUNK], *gate[CHUNK], *next[CHUNK];
  int count, coming;
  bool more;
};

// Runs `each(chunk)` over the places [begin, end). Once at least: no rows have a sum of zeros.
template <typename T, typename Each>
INLINE void by_chunk(const Call<T>& call, int64_t begin, int64_t end, Each each) {
  Chunk<T> chunk;
  int64_t place = begin;
  do {
    chunk.count = int(std::min<int64_t>(CHUNK, end - place));
    chunk.more = place > begin;
    for (int i = 0; i < chunk.count; ++i) {
      const int64_t row = call.groups.row(place + i);
      chunk.left[i] = call.left[row], chunk.right[i] = call.right[row], chunk.gate[i] = call.gate[row];
    }
    place += chunk.count;
    chunk.coming = int(std::min<int64_t>(CHUNK, end - place));
    for (int i = 0; i < chunk.coming; ++i) chunk.next[i] = call.right[call.groups.row(place + i)];
    each(chunk);
  } while (place < end);
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
  INLINE void down_rows(const Call<T>& call, const int64_t* rows, int64_t adapter) {
    const T* x[R + ROWS];
    T* z[R];
    for (int i = 0; i < R + ROWS; ++i) x[i] = call.left[rows[i]];
    for (int i = 0; i < R; ++i) z[i] = call.out[rows[i]];
    Fetch<T> fetch{x + R, ROWS, 0, call.width};
    const int64_t lines = ROWS * WIDE * call.width / (fetch.LINE * call.rank) + 1;
    int64_t j = 0;
    for (; j + WIDE <= call.rank; j += WIDE) {
      fetch(lines);
      dots<R, WIDE>(x, call.right[adapter], call.width, z, j);
    }
    for (; j < call.rank; ++j) dots<R, 1>(x, call.right[adapter], call.width, z, j);
  }

  INLINE void down(const Call<T>& call, int64_t begin, int64_t end) {
    by_group(call.groups, begin, end, [&](auto count, const int64_t* rows, int64_t adapter) ALWAYS {
      down_rows<decltype(count)::value>(call, rows, adapter);
    });
  }

  // y[i] = start[i] + sum_j z[i][j] table[j], for R rows and C vectors of columns; start may be y, so those columns that
  // are DONE, of a last vector that reaches back over them, stay as they are
  template <int R, int C, bool DONE = false>
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
    const Mask fresh = *reinterpret_cast<const Mask*>(EDGE.lanes + (DONE ? call.width % LANES : LANES));
    for (int i = 0; i < R; ++i)
      for (int c = 0; c < C; ++c) {
        Vector& out = vector(y[i] + k + c * LANES);
        out = DONE ? Vector((fresh & Mask(sums[i][c])) | (~fresh & Mask(out))) : sums[i][c];
      }
  }

  template <int R>
  INLINE void up_rows(const Call<T>& call, const int64_t* rows, int64_t adapter) {
    const T *z[R], *start[R + ROWS], *table = call.right[adapter];
    T* y[R];
    for (int i = 0; i < R; ++i) z[i] = call.left[rows[i]], y[i] = call.out[rows[i]];
    for (int i = 0; i < R + ROWS; ++i) start[i] = call.start[rows[i]];
    Fetch<T> fetch{start + R, call.start.stride ? ROWS : 0, 0, call.width};
    int64_t k = 0;
    for (; k + WIDE * LANES <= call.width; k += WIDE * LANES) {
      fetch(ROWS * WIDE * BYTES / 64);
      sums<R, WIDE>(z, table, start, call, y, k);
    }
    for (; k + LANES <= call.width; k += LANES) sums<R, 1>(z, table, start, call, y, k);
    if (k < call.width && call.width >= LANES) return sums<R, 1, true>(z, table, start, call, y, call.width - LANES);
    for (; k < call.width; ++k)
      for (int i = 0; i < R; ++i) {
        T sum = call.start.data ? start[i][k] : T(0);
        for (int64_t j = 0; j < call.rank; ++j) sum += z[i][j] * table[j * call.width + k];
        y[i][k] = sum;
      }
  }

  INLINE void up(const Call<T>& call, int64_t begin, int64_t end) {
    by_group(call.groups, begin, end, [&](auto count, const int64_t* rows, int64_t adapter) ALWAYS {
      up_rows<decltype(count)::value>(call, rows, adapter);
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
