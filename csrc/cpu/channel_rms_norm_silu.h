// channel_rms_norm_silu: the RMS norm over the channels of each pixel, modulation and SiLU. What both directions share,
// and forward.
//
// Math: z = x * |rstd| * a + b with a = weight * (1 + scale), b = bias * (1 + scale) + shift; y = z * sigmoid(z). rstd
// is 1 / sqrt(mean(x^2) + eps), or sqrt(C) / max(norm, eps), negative where that divisor is eps. Loop, [N, S, C]:
// chunks of pixels, shared between the threads; four rows at a time, twice, in L1 the second time. [N, C, S]: tiles of
// pixels, whose channels come as runs from all over memory: the first walk over a tile leaves it dense beside the sums
// of squares, so that the second does not depend on what S makes the caches keep; the second, which reads no memory,
// has the next tile fetched meanwhile. Reduction order: blocks of kSummedChannels. Zero path: none; the caller decides
// (add_bias.h).
#pragma once

#include "group_norm_silu_bwd.h"
#include "rows/norm_rows.h"

namespace zeroblock {
namespace {

constexpr int64_t kSummedChannels = 32;  // squares added to one fp32 sum before it is added to the pixel's
// A dense tile, in L2: longer runs of a channel are worth more than what of L2 it leaves (measured: python
// benchmarks/run.py --group memory_bound --filter channel_rms_norm_silu, as is kRunsAhead).
constexpr int64_t kTileBytes = int64_t{192} << 10;
constexpr int64_t kMaxPixels = 512, kMinPixels = 16;
constexpr int64_t kRunsAhead = 2;   // channels: how far ahead a run is prefetched
constexpr int64_t kKeptRow = 1024;  // channels of four rows of dz in 16 KB

// rstd of four pixels from their sums of squares.
struct PixelScale {
  bool inside;
  float eps, root, inverse;
  explicit PixelScale(const ChannelRmsNormSilu& p)
      : inside(p.eps_inside),
        eps(p.eps),
        root(static_cast<float>(__builtin_sqrt(static_cast<double>(p.C)))),
        inverse(1.0f / static_cast<float>(p.C)) {}
  ZB_INLINE __m128 operator()(__m128 squares) const {
    const __m128 bound = _mm_set1_ps(eps);
    if (inside) {
      const __m128 mean = _mm_mul_ps(squares, _mm_set1_ps(inverse));
      return _mm_div_ps(_mm_set1_ps(1.0f), _mm_sqrt_ps(_mm_add_ps(mean, bound)));
    }
    const __m128 norm = _mm_sqrt_ps(squares);
    const __m128 minus = _mm_and_ps(_mm_cmple_ps(norm, bound), _mm_set1_ps(-0.0f));
    return _mm_or_ps(_mm_div_ps(_mm_set1_ps(root), _mm_max_ps(bound, norm)), minus);  // a NaN is the second's
  }
};
ZB_INLINE __m128 magnitude(__m128 a) { return _mm_andnot_ps(_mm_set1_ps(-0.0f), a); }
// a and b of the channels of each sample, [N, 2, C].
struct PixelAffine {
  float *a, *b;
  PixelAffine(float* base, int64_t n, int64_t C) : a(base + n * 2 * C), b(a + C) {}
};
inline void pixel_affines(const GroupNormSilu& p, float* base) {
  for (int64_t n = 0; n < p.N; ++n) {
    const PixelAffine to(base, n, p.C);
    for (int64_t c = 0; c < p.C; ++c) to.a[c] = channel_gain(p, n, c), to.b[c] = channel_offset(p, n, c);
    for_lanes(p.C, [&](int64_t c, auto lanes) {
      store(to.a + c, with_plain_nan(load(to.a + c, lanes)), lanes);
      store(to.b + c, with_plain_nan(load(to.b + c, lanes)), lanes);
    });
  }
}

template <bool kSilu, class T, class V, class Lanes>
ZB_INLINE void store_result_or_stream(T* p, V a, Lanes lanes, bool) {
  store_result<kSilu>(p, a, lanes);
}
template <bool kSilu, class T>
ZB_INLINE void store_result_or_stream(T* p, Vec a, OneVec lanes, bool streamed) {
  streamed ? stream(p, a) : store_result<kSilu>(p, a, lanes);
}
ZB_INLINE void stream_all(bf16* p, Vec4 a) { stream(p, a); }
template <class T>
ZB_INLINE void stream_all(T* p, Vec4 a) {
  for (int k = 0; k < 4; ++k) stream(p + k * kLanes, a.v[k]);
}
template <bool kSilu, class T>
ZB_INLINE void store_result_or_stream(T* p, Vec4 a, FourVecs lanes, bool streamed) {
  streamed ? stream_all(p, a) : store_result<kSilu>(p, a, lanes);
}

// ---- [N, S, C] ------------------------------------------------------------------------------------------------------

// R rows in step, four or one: the only row stands for all four.
template <int R>
ZB_INLINE FourRows rows_in_step(int64_t C) {
  return {R == 4 ? C : 0};
}
template <int R>
ZB_INLINE Vec over_rows(Vec4 a) {
  return R == 4 ? total(a) : a.v[0];
}

template <int R, bool kSilu, class T>
ZB_INLINE void norm_rows_of_pixels(const T* x, T* y, float* rstd, int64_t C, PixelAffine affine, PixelScale scale,
                                   bool streamed) {
  const FourRows rows = rows_in_step<R>(C);
  Vec4 squares = zero();
  for (int64_t begin = 0; begin < C; begin += kSummedChannels * kLanes) {
    Vec4 part = zero();
    for_lanes(smaller(kSummedChannels * kLanes, C - begin), [&](int64_t c, auto lanes) ZB_BODY {
      const Vec4 v = rows.load(x + begin + c, lanes);
      part = fmadd(v, v, part);
    });
    squares = squares + part;
  }
  const __m128 found = scale(lane_sums(squares));
  store_row_sums<R>(rstd, found);
  const Vec4 r = spread(magnitude(found));
  for_lanes(C, [&](int64_t c, auto lanes) ZB_BODY {
    Vec4 z = fmadd(rows.load(x + c, lanes) * r, load(affine.a + c, lanes), load(affine.b + c, lanes));
    if constexpr (kSilu) z = silu_for(z, y);
    for (int k = 0; k < R; ++k) store_result_or_stream<kSilu>(y + c + k * C, z.v[k], lanes, streamed);
  });
}

template <bool kSilu, class T>
ZB_LOOPS void norm_chunk_of_pixels(const T* x, T* y, float* rstd, int64_t rows, int64_t C, PixelAffine affine,
                                   PixelScale scale, bool streamed) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    norm_rows_of_pixels<4, kSilu>(x + row * C, y + row * C, rstd + row, C, affine, scale, streamed);
  }
  for (; row < rows; ++row) {
    norm_rows_of_pixels<1, kSilu>(x + row * C, y + row * C, rstd + row, C, affine, scale, streamed);
  }
}

// ---- [N, C, S] ------------------------------------------------------------------------------------------------------

// Pixels of a tile whose elements, of `bytes` each, are kept: whole steps of four vectors where they fit.
inline int64_t pixels_of_tile(int64_t C, int64_t bytes) {
  const int64_t fit = kTileBytes / (C * bytes), step = fit >= 64 ? 64 : kMinPixels;
  return larger(kMinPixels, smaller(kMaxPixels, fit / step * step));
}

// Elements that a step of for_lanes_by_4 takes.
ZB_INLINE constexpr int64_t step_of(FourVecs) { return 4 * kLanes; }
ZB_INLINE constexpr int64_t step_of(OneVec) { return kLanes; }
ZB_INLINE constexpr int64_t step_of(int n) { return n; }
// Has what a step reads fetched, `away` elements from p: hardware does not see a run coming, for it is in another page
// than the one before. It may lie beyond the tensor, where nothing is fetched.
template <int kHint, class T, class Lanes>
ZB_INLINE void prefetch(const T* p, int64_t away, Lanes lanes) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(away) * sizeof(T);
  for (uintptr_t i = 0; i < static_cast<uintptr_t>(step_of(lanes)) * sizeof(T); i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(from + i), static_cast<_mm_hint>(kHint));
  }
}
template <class T, class Lanes>
ZB_INLINE void copy_step(T* to, const T* from, Lanes lanes) {
  std::memcpy(to, from, static_cast<size_t>(step_of(lanes)) * sizeof(T));
}
// How far from the run of channel c that of the channel lies which is read kRunsAhead later.
ZB_INLINE int64_t run_ahead(int64_t c, int64_t C, int64_t S) { return smaller(kRunsAhead, C - 1 - c) * S; }

template <bool kKeep, bool kSilu, class T>
ZB_LOOPS void norm_tile_of_pixels(const T* x, T* y, float* rstd, int64_t pixels, int64_t C, int64_t S,
                                  PixelAffine affine, PixelScale scale, bool streamed) {
  alignas(64) T kept[kKeep ? kTileBytes / sizeof(T) : 1];
  alignas(64) float squares[kMaxPixels], part[kMaxPixels];
  fill(squares, kMaxPixels, 0.0f);
  for (int64_t begin = 0; begin < C; begin += kSummedChannels) {
    fill(part, pixels, 0.0f);
    for (int64_t c = begin; c < smaller(begin + kSummedChannels, C); ++c) {
      const T* const run = x + c * S;
      const int64_t ahead = run_ahead(c, C, S);
      for_lanes_by_4(pixels, [&](int64_t i, auto lanes) ZB_BODY {
        prefetch<_MM_HINT_T0>(run + i, ahead, lanes);
        if (kKeep) copy_step(kept + c * pixels + i, run + i, lanes);
        const auto value = load(run + i, lanes);
        store(part + i, fmadd(value, value, load(part + i, lanes)), lanes);
      });
    }
    for_lanes(pixels, [&](int64_t i, auto lanes)
                          ZB_BODY { store(squares + i, load(squares + i, lanes) + load(part + i, lanes), lanes); });
  }
  float* const r = part;
  for (int64_t i = 0; i < pixels; i += 4) {
    const __m128 found = scale(_mm_load_ps(squares + i));
    _mm_store_ps(squares + i, found);
    _mm_store_ps(r + i, magnitude(found));
  }
  to_memory_order(squares, 1, pixels, y);
  std::memcpy(rstd, squares, static_cast<size_t>(pixels) * sizeof(float));
  for (int64_t c = 0; c < C; ++c) {
    const Vec a = set1(affine.a[c]), b = set1(affine.b[c]);
    const T* const v = kKeep ? kept + c * pixels : x + c * S;
    for_lanes_by_4(pixels, [&](int64_t i, auto lanes) ZB_BODY {
      if (kKeep) prefetch<_MM_HINT_T1>(x + c * S + i, pixels, lanes);
      auto z = fmadd(load(v + i, lanes) * load(r + i, lanes), decltype(load(v + i, lanes))(a),
                     decltype(load(v + i, lanes))(b));
      if constexpr (kSilu) z = silu_for(z, y);
      store_result_or_stream<kSilu>(y + c * S + i, z, lanes, streamed);
    });
  }
}

// ---- both -----------------------------------------------------------------------------------------------------------

// The cut of each sample into tiles, or into chunks of rows.
struct PixelTiles {
  bool by_rows, kept;
  int64_t pixels, count;
  PixelTiles(const GroupNormSilu& p, int64_t bytes)
      : by_rows(group_norm_by_rows(p)),
        kept(by_rows ? p.C <= kKeptRow : kMinPixels * p.C * bytes <= kTileBytes),
        pixels(by_rows ? kChunkRows : pixels_of_tile(p.C, bytes)),
        count((p.S + pixels - 1) / pixels) {}
  // f(item, n, first, size): the pixels first .. first + size of sample n.
  template <class F>
  ZB_INLINE void each(const GroupNormSilu& p, ParallelFor run, const F& f) const {
    parallel(run, 0, p.N * count, group_norm_grain(smaller(pixels, p.S) * p.C), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / count, first = (item - n * count) * pixels;
        f(item, n, first, smaller(pixels, p.S - first));
      }
      _mm_sfence();  // streamed stores become visible before the other threads go on
    });
  }
  // Whether results are streamed: every row or channel of them starts on the boundary of a register.
  template <class T>
  bool streamed(const GroupNormSilu& p, const T* out, int64_t tensors) const {
    return streams(out, by_rows ? p.C : p.S, tensors * p.N * p.C * p.S * static_cast<int64_t>(sizeof(T)));
  }
};

inline int64_t pixel_bytes(DType dtype, bool backward) { return (dtype == DType::kF32 ? 4 : 2) + (backward ? 4 : 0); }

template <bool kSilu, class T>
void channel_rms_norm_silu_fwd_of(const ChannelRmsNormSilu& p, ParallelFor run, T*) {
  const int64_t C = p.C, S = p.S;
  const PixelTiles tiles(p, pixel_bytes(p.dtype, false));
  const PixelScale scale(p);
  T* const y = static_cast<T*>(p.y);
  const bool streamed = tiles.streamed(p, y, 2);
  pixel_affines(p, p.workspace);
  tiles.each(p, run, [&](int64_t, int64_t n, int64_t first, int64_t size) {
    const PixelAffine affine(p.workspace, n, C);
    const int64_t at = n * S * C + first * (tiles.by_rows ? C : 1);
    const T* const x = static_cast<const T*>(p.x) + at;
    float* const rstd = p.rstd + n * S + first;
    if (tiles.by_rows) {
      norm_chunk_of_pixels<kSilu>(x, y + at, rstd, size, C, affine, scale, streamed);
    } else if (tiles.kept) {
      norm_tile_of_pixels<true, kSilu>(x, y + at, rstd, size, C, S, affine, scale, streamed);
    } else {
      norm_tile_of_pixels<false, kSilu>(x, y + at, rstd, size, C, S, affine, scale, streamed);
    }
  });
}

inline void channel_rms_norm_silu_fwd(const ChannelRmsNormSilu& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* type) {
    p.silu ? channel_rms_norm_silu_fwd_of<true>(p, run, type) : channel_rms_norm_silu_fwd_of<false>(p, run, type);
  });
}

inline int64_t channel_rms_norm_silu_fwd_workspace(const ChannelRmsNormSilu& p) { return 2 * p.N * p.C; }

}  // namespace
}  // namespace zeroblock
