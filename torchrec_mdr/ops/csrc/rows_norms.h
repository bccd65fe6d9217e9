// The two passes of a normalisation whose rows have their own domain's statistics, on CPU; ops/statistics.py says
// what they compute. Each reads its rows once, which is all that such a pass costs, and one after the other: rows taken
// together take twice as long where they do not come from the cache.
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
  static constexpr int64_t COLUMNS = 512;  // summed at a time

  // the values, or zero in a ReLU's flat part; NaNs pass, as in PyTorch
  INLINE Vector open(Vector gate, Vector values) { return Vector(~Mask(gate <= 0) & Mask(values)); }
  INLINE T open(T gate, T value) { return gate <= 0 ? T(0) : value; }

  // sums[0] (+)= u, sums[1] (+)= u (v - centre) for columns of one row; without U, u is v - centre
  template <bool U, bool RELU>
  INLINE void add(const T* u, const T* v, const T* gate, const T* centre, T* sums, int64_t size, bool more) {
    int64_t k = 0;
    for (; k + LANES <= size; k += LANES) {
      const Vector right = Own::vector(v + k) - Own::vector(centre + k);
      Vector left = U ? Own::vector(u + k) : right;
      if (RELU) left = open(Own::vector(gate + k), left);
      Vector &first = Own::vector(sums + k), &second = Own::vector(sums + COLUMNS + k);
      first = more ? first + left : left;
      second = more ? second + left * right : left * right;
    }
    for (; k < size; ++k) {
      const T right = v[k] - centre[k];
      T left = U ? u[k] : right;
      if (RELU) left = open(gate[k], left);
      sums[k] = more ? sums[k] + left : left;
      sums[COLUMNS + k] = more ? sums[COLUMNS + k] + left * right : left * right;
    }
  }

  template <bool U, bool RELU>
  INLINE void add_chunk(const Chunk<T>& chunk, const T* centre, T* out, int64_t width) {
    T sums[2 * COLUMNS];
    if (!chunk.count) std::fill_n(sums, 2 * COLUMNS, T(0));
    for (int64_t begin = 0; begin < width; begin += COLUMNS) {
      const int64_t size = std::min(COLUMNS, width - begin);
      for (int i = 0; i < chunk.count; ++i)
        add<U, RELU>(chunk.left[i] + begin, chunk.right[i] + begin, chunk.gate[i] + begin, centre + begin, sums, size,
                     i > 0);
      for (int s = 0; s < 2; ++s)
        for (int64_t k = 0; k < size; ++k) {
          T& total = out[s * width + begin + k];
          total = chunk.more ? total + sums[s * COLUMNS + k] : sums[s * COLUMNS + k];
        }
    }
  }

  // the sums [2, width] of the places [begin, end) of a group; left is u, right v, start the table of centres
  INLINE void centered_sums(const Call<T>& call, int64_t group, int64_t begin, int64_t end, T* out) {
    const T* centre = call.start[call.groups.adapter(group)];
    by_chunk(call, begin, end, [&](const Chunk<T>& chunk) ALWAYS {
      if (!call.left.data)
        add_chunk<false, false>(chunk, centre, out, call.width);
      else if (!call.relu)
        add_chunk<true, false>(chunk, centre, out, call.width);
      else
        add_chunk<true, true>(chunk, centre, out, call.width);
    });
  }

  // y = table[0] u + table[1] (v - table[2]) + table[3] for one row; without U or V, the rest
  template <bool U, bool V, bool RELU>
  INLINE void blend_row(const T* u, const T* v, const T* gate, const T* table, T* y, int64_t width) {
    const T *first = table, *second = first + width, *centre = second + width, *last = centre + width;
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
      Vector sum = Own::vector(last + k);
      if (V) sum += Own::vector(second + k) * (Own::vector(v + k) - Own::vector(centre + k));
      if (U) {
        const Vector own = Own::vector(u + k);
        sum += Own::vector(first + k) * (RELU ? open(Own::vector(gate + k), own) : own);
      }
      Own::vector(y + k) = RELU && !U ? open(sum, sum) : sum;
    }
    for (; k < width; ++k) {
      T sum = last[k];
      if (V) sum += second[k] * (v[k] - centre[k]);
      if (U) sum += first[k] * (RELU ? open(gate[k], u[k]) : u[k]);
      y[k] = RELU && !U ? open(sum, sum) : sum;
    }
  }

  template <bool U, bool V, bool RELU>
  INLINE void blend_groups(const Call<T>& call, int64_t begin, int64_t end) {
    by_run(call.groups, begin, end, [&](int64_t place, int64_t stop, int64_t adapter, int64_t) ALWAYS {
      for (; place < stop; ++place) {
        const int64_t row = call.groups.row(place);
        blend_row<U, V, RELU>(call.left[row], call.right[row], call.gate[row], call.start[adapter], call.out[row],
                              call.width);
      }
    });
    by_rest(call.groups, begin, end, [&](int64_t row) ALWAYS { std::fill_n(call.out[row], call.width, T(0)); });
  }

  template <bool RELU>
  INLINE void blend_as(const Call<T>& call, int64_t begin, int64_t end) {
    if (!call.left.data) return blend_groups<false, true, RELU>(call, begin, end);
    if (!call.right.data) return blend_groups<true, false, RELU>(call, begin, end);
    blend_groups<true, true, RELU>(call, begin, end);
  }

  // the places [begin, end); left is u, right v, start the table
  INLINE void affine_by_domain(const Call<T>& call, int64_t begin, int64_t end) {
    call.relu ? blend_as<true>(call, begin, end) : blend_as<false>(call, begin, end);
  }
};

}  // namespace
