// The two passes of a normalisation whose rows have their own domain's statistics, on CPU; adapters/statistics.py says
// what they compute. Each reads its rows once, which is all that such a pass costs.
//
// A call with `relu` has a ReLU behind the normalisation: forward (no u) results are cut off at zero, backward u counts
// where `gate`, the result, is above zero.

#pragma once

#include <algorithm>
#include <cstdint>

#include "rows_kernels.h"

namespace {

template <typename T, int BYTES>
struct Norms {
  using Own = Kernels<T, BYTES>;
  using Vector = typename Own::Vector;
  using Mask = typename Own::Mask;
  static constexpr int LANES = Own::LANES;
  static constexpr int WIDE = Own::WIDE;

  // the values, or zero in a ReLU's flat part; NaNs pass, as in PyTorch
  INLINE Vector open(Vector gate, Vector values) { return Vector(~Mask(gate <= 0) & Mask(values)); }
  INLINE T open(T gate, T value) { return gate <= 0 ? T(0) : value; }

  // sums[0] (+)= u[i], sums[1] (+)= u[i] (v[i] - centre) for C vectors of columns; without U, u is v[i] - centre
  template <int C, bool U, bool RELU>
  INLINE void add(const Chunk<T>& chunk, const T* centre, T* out, int64_t width, int64_t k) {
    Vector sums[2][C] = {}, middle[C];
    for (int c = 0; c < C; ++c) middle[c] = Own::vector(centre + k + c * LANES);
    for (int i = 0; i < chunk.count; ++i)
      for (int c = 0; c < C; ++c) {
        const int64_t at = k + c * LANES;
        const Vector right = Own::vector(chunk.right[i] + at) - middle[c];
        Vector left = U ? Own::vector(chunk.left[i] + at) : right;
        if (RELU) left = open(Own::vector(chunk.gate[i] + at), left);
        sums[0][c] += left;
        sums[1][c] += left * right;
      }
    for (int s = 0; s < 2; ++s)
      for (int c = 0; c < C; ++c) {
        Vector& total = Own::vector(out + s * width + k + c * LANES);
        total = chunk.more ? total + sums[s][c] : sums[s][c];
      }
  }

  template <bool U, bool RELU>
  INLINE void add_columns(const Chunk<T>& chunk, const T* centre, T* out, int64_t width, int64_t begin, int64_t end) {
    int64_t k = begin;
    for (; k + WIDE * LANES <= end; k += WIDE * LANES) add<WIDE, U, RELU>(chunk, centre, out, width, k);
    for (; k + LANES <= end; k += LANES) add<1, U, RELU>(chunk, centre, out, width, k);
    for (; k < end; ++k) {
      T first = 0, second = 0;
      for (int i = 0; i < chunk.count; ++i) {
        const T right = chunk.right[i][k] - centre[k];
        T left = U ? chunk.left[i][k] : right;
        if (RELU) left = open(chunk.gate[i][k], left);
        first += left;
        second += left * right;
      }
      out[k] = chunk.more ? out[k] + first : first;
      out[width + k] = chunk.more ? out[width + k] + second : second;
    }
  }

  // the columns [begin, end) of one group's sums [2, width]; left is u, right v, start the table of centres
  INLINE void moments(const Call<T>& call, int64_t group, int64_t begin, int64_t end) {
    const T* centre = call.start[call.groups.adapter(group)];
    T* out = call.out[group];
    by_chunk(call, group, [&](const Chunk<T>& chunk) ALWAYS {
      if (!call.left.data)
        add_columns<false, false>(chunk, centre, out, call.width, begin, end);
      else if (!call.relu)
        add_columns<true, false>(chunk, centre, out, call.width, begin, end);
      else
        add_columns<true, true>(chunk, centre, out, call.width, begin, end);
    });
  }

  // y[i] = table[0] u[i] + table[1] (v[i] - table[2]) + table[3] for R rows; without U or V, the rest
  template <int R, bool U, bool V, bool RELU>
  INLINE void blend_rows(const Call<T>& call, const int64_t* rows, int64_t adapter) {
    const T *u[R], *v[R], *gate[R], *table = call.start[adapter];
    T* y[R];
    for (int i = 0; i < R; ++i) {
      u[i] = call.left[rows[i]], v[i] = call.right[rows[i]], gate[i] = call.gate[rows[i]];
      y[i] = call.out[rows[i]];
    }
    const int64_t width = call.width;
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
      const Vector first = Own::vector(table + k), second = Own::vector(table + width + k);
      const Vector centre = Own::vector(table + 2 * width + k), last = Own::vector(table + 3 * width + k);
      for (int i = 0; i < R; ++i) {
        Vector sum = last;
        if (V) sum += second * (Own::vector(v[i] + k) - centre);
        if (U) sum += first * (RELU ? open(Own::vector(gate[i] + k), Own::vector(u[i] + k)) : Own::vector(u[i] + k));
        Own::vector(y[i] + k) = RELU && !U ? open(sum, sum) : sum;
      }
    }
    for (; k < width; ++k)
      for (int i = 0; i < R; ++i) {
        T sum = table[3 * width + k];
        if (V) sum += table[width + k] * (v[i][k] - table[2 * width + k]);
        if (U) sum += table[k] * (RELU ? open(gate[i][k], u[i][k]) : u[i][k]);
        y[i][k] = RELU && !U ? open(sum, sum) : sum;
      }
  }

  template <bool U, bool V, bool RELU>
  INLINE void blend_groups(const Call<T>& call, int64_t begin, int64_t end) {
    by_group(call.groups, begin, end, [&](auto count, const int64_t* rows, int64_t adapter) ALWAYS {
      blend_rows<decltype(count)::value, U, V, RELU>(call, rows, adapter);
    });
  }

  template <bool RELU>
  INLINE void blend_as(const Call<T>& call, int64_t begin, int64_t end) {
    if (!call.left.data) return blend_groups<false, true, RELU>(call, begin, end);
    if (!call.right.data) return blend_groups<true, false, RELU>(call, begin, end);
    blend_groups<true, true, RELU>(call, begin, end);
  }

  // the places [begin, end); left is u, right v, start the table
  INLINE void blend(const Call<T>& call, int64_t begin, int64_t end) {
    call.relu ? blend_as<true>(call, begin, end) : blend_as<false>(call, begin, end);
  }
};

}  // namespace
