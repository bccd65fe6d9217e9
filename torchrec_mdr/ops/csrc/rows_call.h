// What a kernel is called with, and the orders in which it takes rows: run by run, four at a time, chunk by chunk.

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
  Matrix<const T> last;                      // in up, one more vector of each table, which lies apart; or null
  Matrix<T> out;
  Groups groups;
  int64_t rank, width;
  bool relu;  // see rows_norms.h
};

template <int R>
using Count = std::integral_constant<int, R>;

// Runs `each(place, stop, adapter, coming)` for what each group with an adapter has of the places [begin, end); coming is
// the adapter after that, or the same one.
template <typename Each>
INLINE void by_run(const Groups& groups, int64_t begin, int64_t end, Each each) {
  int64_t group = std::upper_bound(groups.ends, groups.ends + groups.size, int32_t(begin)) - groups.ends;
  while (begin < end && group < groups.size) {
    const int64_t adapter = groups.adapter(group), stop = std::min<int64_t>(groups.ends[group], end);
    while (++group < groups.size && groups.ends[group] <= stop) continue;
    const int64_t coming = group < groups.size ? groups.adapter(group) : adapter;
    if (adapter >= 0) each(begin, stop, adapter, coming < 0 ? adapter : coming);
    begin = stop;
  }
}

// Runs `each(row)` for the rows of the places [begin, end) that have no adapter: those of no group, or of a group
// without one.
template <typename Each>
INLINE void by_rest(const Groups& groups, int64_t begin, int64_t end, Each each) {
  if (groups.adapters)
    for (int64_t group = 0; group < groups.size; ++group)
      if (groups.adapter(group) < 0)
        for (int64_t place = std::max(begin, groups.begin(group)); place < std::min<int64_t>(end, groups.ends[group]);
             ++place)
          each(groups.row(place));
  const int64_t grouped = groups.size ? groups.ends[groups.size - 1] : 0;
  for (int64_t place = std::max(begin, grouped); place < end; ++place) each(groups.row(place));
}

// Runs `each(Count<R>, rows, adapter, coming)` over the places [begin, end): R rows of one group, ROWS or what is left of
// it, and behind them the ROWS that come next, of any group; coming is the adapter of the next R.
template <typename Each>
INLINE void by_group(const Groups& groups, int64_t begin, int64_t end, Each each) {
  by_run(groups, begin, end, [&](int64_t place, int64_t stop, int64_t adapter, int64_t coming) ALWAYS {
    int64_t rows[2 * ROWS];
    while (place < stop) {
      const int count = int(std::min<int64_t>(ROWS, stop - place));
      for (int i = 0; i < count + ROWS; ++i) rows[i] = groups.row(std::min(place + i, end - 1));
      place += count;
      const int64_t next = place < stop ? adapter : coming;
      if (count == 4)
        each(Count<4>(), rows, adapter, next);
      else if (count == 3)
        each(Count<3>(), rows, adapter, next);
      else if (count == 2)
        each(Count<2>(), rows, adapter, next);
      else
        each(Count<1>(), rows, adapter, next);
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

}  // namespace
