// Forward of a norm over rows that L1 holds, in one walk instead of three: tiles of rows move through three stages
// (sum, centred squares, output), and one walk over the columns does all three, each for another tile. The roots of one
// tile, the loads of the next and the arithmetic of the third so overlap. bf16 has four rows in a tile, which share the
// loads of per-sample operands; fp32, which waits for memory, has one.
#pragma once

#include "row_pair.h"

namespace zeroblock {
namespace {

// Longer fp32 rows leave L1 too little room for three of them, and are walked one at a time (measured: python
// benchmarks/run.py --group memory_bound --filter layer_norm_modulate).
constexpr bool in_tiles(const float*, int64_t D) { return D <= 1024; }
constexpr bool in_tiles(const bf16*, int64_t D) { return D <= kStagedRow; }
constexpr bool in_tiles(const void*, int64_t) { return false; }

// The lane sums of four vectors, as the lanes of one register, and its lanes as four vectors.
ZB_INLINE __m128 lane_sums(const Vec4& a) {
  return _mm_hadd_ps(_mm_hadd_ps(quarter_sums(a.v[0]), quarter_sums(a.v[1])),
                     _mm_hadd_ps(quarter_sums(a.v[2]), quarter_sums(a.v[3])));
}
template <int k>
ZB_INLINE Vec lane(__m128 a) {
  return broadcast(_mm_permute_ps(a, k * 0x55));
}
ZB_INLINE Vec4 spread(__m128 a) { return {lane<0>(a), lane<1>(a), lane<2>(a), lane<3>(a)}; }

// One number for each of the R rows of a tile, from its four sums: one for each row, or all four of the only row.
template <int R>
ZB_INLINE __m128 row_sums(const Vec4& a) {
  return R == 4 ? lane_sums(a) : lane_sums({total(a), zero(), zero(), zero()});
}
template <int R>
ZB_INLINE void store_row_sums(float* p, __m128 a) {
  if (R == 4) {
    _mm_storeu_ps(p, a);
  } else {
    _mm_store_ss(p, a);
  }
}
// Means in fp32, and what rounding took from them.
struct Means {
  __m128 rounded = _mm_setzero_ps();
  __m256d missed = _mm256_setzero_pd();
};
ZB_INLINE Means means(__m128 sums, double inverse) {
  const __m256d mean = _mm256_mul_pd(_mm256_cvtps_pd(sums), _mm256_set1_pd(inverse));
  const __m128 rounded = _mm256_cvtpd_ps(mean);
  return {rounded, _mm256_sub_pd(mean, _mm256_cvtps_pd(rounded))};
}
// As inverse_root, of sums of squares.
ZB_INLINE __m128 inverse_roots(__m128 squares, __m256d missed, bool rms, double inverse, float eps) {
  const __m256d mean_square = _mm256_mul_pd(_mm256_cvtps_pd(squares), _mm256_set1_pd(inverse));
  __m256d variance = _mm256_max_pd(_mm256_setzero_pd(), _mm256_fnmadd_pd(missed, missed, mean_square));  // a NaN stays
  if (!rms) variance = _mm256_fmadd_pd(_mm256_setzero_pd(), variance, variance);
  const __m256d root = _mm256_sqrt_pd(_mm256_add_pd(variance, _mm256_set1_pd(static_cast<double>(eps))));
  return _mm256_cvtpd_ps(_mm256_div_pd(_mm256_set1_pd(1.0), root));
}

// y = xhat * mult + add: scale and shift of one sample with weight and bias folded in, staged once per chunk.
struct SampleModulation {
  alignas(64) float mult[kStagedRow];
  alignas(64) float add[kStagedRow];

  template <class T>
  ZB_INLINE void take(T* type, int64_t D, OperandRow<float> weight, OperandRow<float> bias, OperandRow<float> scale,
                      OperandRow<float> shift) {
    each_step(type, D, [&](int64_t i, auto lanes) ZB_BODY {
      Vec2 m = {{zero(), zero()}}, a = m;
      for (int k = 0; k < kParts<decltype(lanes)>; ++k) {
        const Vec factor = set1(1.0f) + part(in_step(scale, i, lanes), k);
        m.v[k] = with_plain_nan(part(in_step(weight, i, lanes), k) * factor);
        a.v[k] = with_plain_nan(fmadd(part(in_step(bias, i, lanes), k), factor, part(in_step(shift, i, lanes), k)));
      }
      keep_step(mult + i, m, lanes);
      keep_step(add + i, a, lanes);
    });
  }
  // The two at one step, which all rows of a tile share.
  template <class Lanes>
  struct Step {
    decltype(load_step(static_cast<const float*>(nullptr), Lanes{})) m, a;
    ZB_INLINE Vec operator()(Vec n, int, int k) const { return fmadd(n, part(m, k), part(a, k)); }
  };
  template <class Lanes>
  ZB_INLINE Step<Lanes> at(int64_t, int64_t i, Lanes lanes) const {
    return {load_step(mult + i, lanes), load_step(add + i, lanes)};
  }
};

// One walk over the columns for up to three tiles of R rows: sums of what the source has at `first`, centred squares of
// `second`, output of `third`. A row's sum runs in kChains accumulators, R * kChains = 4 at most.
template <int R, int kChains, class T>
struct NormTiles {
  int64_t D;
  Vec4 sums, squares;

  template <bool kSum, bool kSquare, bool kOut, class Source, class Modulation>
  ZB_INLINE void walk(const Source& source, int64_t first, const T* second, __m128 second_mean, const T* third,
                      __m128 third_mean, __m128 third_rstd, T* y, int64_t row, const Modulation& modulation,
                      bool streamed) {
    Vec4 s = zero(), q = zero();
    const Vec4 mean2 = spread(second_mean), mean3 = spread(third_mean), rstd3 = spread(third_rstd);
    const int64_t stride = D;
    const auto step = [&](int64_t i, auto lanes, int chain) ZB_BODY {
      constexpr int parts = kParts<decltype(lanes)>;
      const auto operand = source.operand(i, lanes);
      for (int r = 0; r < R; ++r) {
        Vec& sum = s.v[r * kChains + chain];
        Vec& square = q.v[r * kChains + chain];
        if (kSum) {
          const auto x = source.take(operand, first + r, i, lanes);
          for (int k = 0; k < parts; ++k) sum = sum + part(x, k);
        }
        if (kSquare) {
          const auto x = load_step(second + r * stride + i, lanes);
          for (int k = 0; k < parts; ++k) {
            const Vec d = without_tail(part(x, k) - mean2.v[r], lanes);
            square = fmadd(d, d, square);
          }
        }
      }
      if (kOut) {
        Vec2 out[R];
        const auto modulate = modulation.at(row, i, lanes);
        for (int r = 0; r < R; ++r) {
          const auto x = load_step(third + r * stride + i, lanes);
          for (int k = 0; k < parts; ++k) out[r].v[k] = modulate((part(x, k) - mean3.v[r]) * rstd3.v[r], r, k);
        }
        for (int r = 0; r < R; ++r) store_step(y + r * stride + i, out[r], lanes, streamed);
      }
    };
    if constexpr (kChains == 4) {
      int64_t i = 0;
      for (; i + 4 * kLanes <= D; i += 4 * kLanes) {
        step(i, OneVec{}, 0);
        step(i + kLanes, OneVec{}, 1);
        step(i + 2 * kLanes, OneVec{}, 2);
        step(i + 3 * kLanes, OneVec{}, 3);
      }
      each_column(i, D, [&](int64_t j, auto lanes) ZB_BODY { step(j, lanes, 0); });
    } else {
      each_step(y, D, [&](int64_t i, auto lanes) ZB_BODY { step(i, lanes, 0); });
    }
    sums = s;
    squares = q;
  }

 private:
  template <class Lanes>
  ZB_INLINE static Vec without_tail(Vec a, Lanes lanes) {
    return keep_first(a, lanes);
  }
  ZB_INLINE static Vec without_tail(Vec a, TwoVecs) { return a; }
};

// Rows [begin, end) of one sample, a multiple of R. source.take(operand, row, ..) gives a step of a row, once and in
// order; source.rows(row) is where the two later stages read it again. source.operand is what the rows of a tile share.
template <int R, int kChains, class T, class Source, class Modulation>
ZB_INLINE void norm_rows(int64_t D, int64_t begin, int64_t end, Source& source, T* y, float* mean, float* rstd,
                         bool rms, float eps, const Modulation& modulation, bool streamed) {
  NormTiles<R, kChains, T> tiles = {D, zero(), zero()};
  const __m128 none = _mm_setzero_ps();
  const double inverse = 1.0 / static_cast<double>(D);
  Means mean2, mean3;
  __m128 rstd3 = none;
  for (int64_t row = begin; row < end + 2 * R; row += R) {  // of the first tile; the others are R and 2 R behind
    const bool has_first = row < end, has_second = row - R >= begin && row - R < end, has_third = row - 2 * R >= begin;
    const T* const x2 = has_second ? source.rows(row - R) : nullptr;
    const T* const x3 = has_third ? source.rows(row - 2 * R) : nullptr;
    T* const out = has_third ? y + (row - 2 * R) * D : nullptr;
    Vec4 sums = zero(), squares = zero();
    if (has_first && has_second && has_third) {
      tiles.template walk<true, true, true>(source, row, x2, mean2.rounded, x3, mean3.rounded, rstd3, out, row - 2 * R,
                                            modulation, streamed);
      sums = tiles.sums, squares = tiles.squares;
    } else {
      if (has_first) {
        tiles.template walk<true, false, false>(source, row, x2, none, x3, none, none, out, 0, modulation, streamed);
        sums = tiles.sums;
      }
      if (has_second) {
        tiles.template walk<false, true, false>(source, row, x2, mean2.rounded, x3, none, none, out, 0, modulation,
                                                streamed);
        squares = tiles.squares;
      }
      if (has_third) {
        tiles.template walk<false, false, true>(source, row, x2, none, x3, mean3.rounded, rstd3, out, row - 2 * R,
                                                modulation, streamed);
      }
    }
    mean3 = mean2;
    if (has_second) {
      const __m128 sums_of_squares = row_sums<R>(squares);
      rstd3 = inverse_roots(sums_of_squares, mean2.missed, rms, inverse, eps);
      if (!rms && is_doubtful(y, static_cast<double>(_mm_cvtss_f32(mean2.rounded)),
                              static_cast<double>(_mm_cvtss_f32(sums_of_squares)) * inverse)) {
        const RowStats stats = careful_stats(x2, D, eps);  // a type with doubts has one row in a tile
        mean3.rounded = _mm_set_ss(stats.mean), rstd3 = _mm_set_ss(stats.rstd);
      }
      store_row_sums<R>(rstd + row - R, rstd3);
      if (mean != nullptr) store_row_sums<R>(mean + row - R, mean3.rounded);
    }
    mean2 = rms || !has_first ? Means{} : means(row_sums<R>(sums), inverse);
  }
}

// All rows of a chunk: bf16 in tiles of four, the rest of them one by one with the same order of additions.
template <class T, class Source, class Modulation>
ZB_LOOPS void norm_chunk(int64_t D, int64_t rows, Source source, T* y, float* mean, float* rstd, bool rms, float eps,
                         const Modulation* modulation, bool streamed) {
  if constexpr (kInPairs<T>) {
    const int64_t whole_tiles = rows / 4 * 4;
    norm_rows<4, 1>(D, 0, whole_tiles, source, y, mean, rstd, rms, eps, *modulation, streamed);
    norm_rows<1, 1>(D, whole_tiles, rows, source, y, mean, rstd, rms, eps, *modulation, streamed);
  } else {
    norm_rows<1, 4>(D, 0, rows, source, y, mean, rstd, rms, eps, *modulation, streamed);
  }
}

// Rows that are there to be read.
template <class T>
struct RowsAt {
  const T* x;
  int64_t D;
  template <class Lanes>
  ZB_INLINE int operand(int64_t, Lanes) const {
    return 0;
  }
  template <class Lanes>
  ZB_INLINE auto take(int, int64_t row, int64_t i, Lanes lanes) const {
    return load_step(x + row * D + i, lanes);
  }
  ZB_INLINE const T* rows(int64_t row) const { return x + row * D; }
};

}  // namespace
}  // namespace zeroblock
