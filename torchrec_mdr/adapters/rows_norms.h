// The two passes of a normalisation whose rows have their own domain's statistics, on CPU; adapters/statistics.py says
// what they compute. Each reads its rows once, which is all that such a pass costs.

#pragma once

#include <algorithm>
#include <cstdint>

#include "rows_kernels.h"

namespace {

template <typename T, int BYTES>
struct Norms {
  using Own = Kernels<T, BYTES>;
  using Vector = typename Own::Vector;
  static constexpr int LANES = Own::LANES;
  static constexpr int WIDE = Own::WIDE;

  // sums[0] (+)= u[i], sums[1] (+)= u[i] (v[i] - centre) for C vectors of columns; without u it is v[i] - centre
  template <int C, bool SQUARES>
  INLINE void add(const T* const* u, const T* const* v, int count, const T* centre, T* out, int64_t width, int64_t k,
                  bool more) {
    Vector sums[2][C] = {}, middle[C];
    for (int c = 0; c < C; ++c) middle[c] = Own::vector(centre + k + c * LANES);
    for (int i = 0; i < count; ++i)
      for (int c = 0; c < C; ++c) {
        const Vector right = Own::vector(v[i] + k + c * LANES) - middle[c];
        const Vector left = SQUARES ? right : Own::vector(u[i] + k + c * LANES);
        sums[0][c] += left;
        sums[1][c] += left * right;
      }
    for (int s = 0; s < 2; ++s)
      for (int c = 0; c < C; ++c) {
        Vector& total = Own::vector(out + s * width + k + c * LANES);
        total = more ? total + sums[s][c] : sums[s][c];
      }
  }

  template <bool SQUARES>
  INLINE void add_columns(const T* const* u, const T* const* v, int count, const T* centre, T* out, int64_t width,
                          int64_t begin, int64_t end, bool more) {
    int64_t k = begin;
    for (; k + WIDE * LANES <= end; k += WIDE * LANES) add<WIDE, SQUARES>(u, v, count, centre, out, width, k, more);
    for (; k + LANES <= end; k += LANES) add<1, SQUARES>(u, v, count, centre, out, width, k, more);
    for (; k < end; ++k) {
      T first = 0, second = 0;
      for (int i = 0; i < count; ++i) {
        const T right = v[i][k] - centre[k], left = SQUARES ? right : u[i][k];
        first += left;
        second += left * right;
      }
      out[k] = more ? out[k] + first : first;
      out[width + k] = more ? out[width + k] + second : second;
    }
  }

  // the columns [begin, end) of one group's sums [2, width]; left is u, right v, start the table of centres
  INLINE void moments(const Call<T>& call, int64_t group, int64_t begin, int64_t end) {
    const T* centre = call.start[call.groups.adapter(group)];
    T* out = call.out[group];
    by_chunk(call, group, [&](const T* const* u, const T* const* v, int count, bool more) ALWAYS {
      if (call.left.data)
        add_columns<false>(u, v, count, centre, out, call.width, begin, end, more);
      else
        add_columns<true>(u, v, count, centre, out, call.width, begin, end, more);
    });
  }

  // y[i] = table[0] u[i] + table[1] (v[i] - table[2]) + table[3] for R rows; without u, the rest
  template <int R>
  INLINE void blend_rows(const Call<T>& call, const int64_t* rows, int64_t adapter) {
    const T *u[R], *v[R], *table = call.start[adapter];
    T* y[R];
    for (int i = 0; i < R; ++i) u[i] = call.left[rows[i]], v[i] = call.right[rows[i]], y[i] = call.out[rows[i]];
    const int64_t width = call.width;
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
      const Vector first = Own::vector(table + k), second = Own::vector(table + width + k);
      const Vector centre = Own::vector(table + 2 * width + k), last = Own::vector(table + 3 * width + k);
      for (int i = 0; i < R; ++i) {
        Vector sum = second * (Own::vector(v[i] + k) - centre) + last;
        if (call.left.data) sum += first * Own::vector(u[i] + k);
        Own::vector(y[i] + k) = sum;
      }
    }
    for (; k < width; ++k)
      for (int i = 0; i < R; ++i) {
        const T sum = table[width + k] * (v[i][k] - table[2 * width + k]) + table[3 * width + k];
        y[i][k] = call.left.data ? sum + table[k] * u[i][k] : sum;
      }
  }

  INLINE void blend(const Call<T>& call, int64_t begin, int64_t end) {
    by_group(call.groups, begin, end, [&](auto count, const int64_t* rows, int64_t adapter) ALWAYS {
      blend_rows<decltype(count)::value>(call, rows, adapter);
    });
  }
};

}  // namespace
