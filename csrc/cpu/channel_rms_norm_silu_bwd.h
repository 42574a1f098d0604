// channel_rms_norm_silu, backward.
//
// Math: with dz = dy * act'(z), xhat = x * |rstd| and m the mean over the channels of a * dz * xhat, or 0 where rstd is
// negative, for there it is a constant:
//   dx = |rstd| * (a * dz - xhat * m); the sums of dz and of dz * xhat over the pixels are what the gradients of
//   weight, bias, scale and shift take (group_norm_silu_bwd.h).
// Loop: as in channel_rms_norm_silu.h, two walks; the first keeps dz, and of a tile x, for the second, so that x, dy
// and dx pass once; of a tile, the second has the next one fetched. Reduction order: over the channels in order; over
// the pixels, a chunk or tile, then these in order. Zero path: as forward.
#pragma once

#include "channel_rms_norm_silu.h"

namespace zeroblock {
namespace {

// What is subtracted of x: the mean m of its pixel times rstd^2, from the sum over channels; 0 where rstd is negative.
ZB_INLINE __m128 pixel_slope(__m128 sum, __m128 rstd, float inverse) {
  const __m128 slope = _mm_mul_ps(_mm_mul_ps(_mm_mul_ps(sum, _mm_set1_ps(inverse)), rstd), rstd);
  return _mm_andnot_ps(_mm_cmplt_ps(rstd, _mm_setzero_ps()), slope);
}

// Sums over pixels, [C] each.
struct PixelSums {
  float *dz, *dz_xhat;
  PixelSums(float* base, int64_t item, int64_t C) : dz(base + item * 2 * C), dz_xhat(dz + C) {}
};

template <bool kSilu, class V, class T, class Lanes>
ZB_INLINE V slope_times(V z, V dy, const T* type, Lanes) {
  return kSilu ? dy * silu_slope(z, type) : dy;
}

// dz of rows of at most kKeptRow channels is kept for the second walk; of longer ones it is computed again.
template <int R, bool kKeep, bool kSilu, class T>
ZB_INLINE void norm_rows_of_pixels_bwd(const T* x, const T* dy, T* dx, const float* rstd, int64_t C, PixelAffine affine,
                                       PixelSums sums, float* kept, bool streamed) {
  const FourRows rows = rows_in_step<R>(C), kept_rows = {kKeptRow};
  const __m128 signed_r = R == 4 ? _mm_loadu_ps(rstd) : _mm_set_ss(*rstd);
  const Vec4 r = spread(magnitude(R == 4 ? signed_r : _mm_set1_ps(*rstd)));
  const auto dz_at = [&](int64_t c, auto lanes, Vec4 xhat) ZB_BODY {
    const Vec4 z = fmadd(xhat, load(affine.a + c, lanes), load(affine.b + c, lanes));
    return slope_times<kSilu>(z, rows.load(dy + c, lanes), dy, lanes);
  };
  Vec4 along = zero();
  for_lanes(C, [&](int64_t c, auto lanes) ZB_BODY {
    const Vec4 xhat = rows.load(x + c, lanes) * r, dz = dz_at(c, lanes, xhat), product = dz * xhat;
    if (kKeep) kept_rows.store(kept + c, dz, lanes);
    along = fmadd(product, load(affine.a + c, lanes), along);
    store(sums.dz + c, load(sums.dz + c, lanes) + over_rows<R>(dz), lanes);
    store(sums.dz_xhat + c, load(sums.dz_xhat + c, lanes) + over_rows<R>(product), lanes);
  });
  const Vec4 slope = spread(pixel_slope(lane_sums(along), signed_r, 1.0f / static_cast<float>(C)));
  for_lanes(C, [&](int64_t c, auto lanes) ZB_BODY {
    const Vec4 v = rows.load(x + c, lanes), dz = kKeep ? kept_rows.load(kept + c, lanes) : dz_at(c, lanes, v * r);
    const Vec4 out = fnmadd(v, slope, dz * load(affine.a + c, lanes) * r);
    for (int k = 0; k < R; ++k) store_result_or_stream<kSilu>(dx + c + k * C, out.v[k], lanes, streamed);
  });
}

template <bool kKeep, bool kSilu, class T>
ZB_LOOPS void norm_chunk_of_pixels_bwd(const T* x, const T* dy, T* dx, const float* rstd, int64_t rows, int64_t C,
                                       PixelAffine affine, PixelSums sums, bool streamed) {
  alignas(64) float kept[kKeep ? 4 * kKeptRow : 1];
  fill(sums.dz, 2 * C, 0.0f);
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const int64_t i = row * C;
    norm_rows_of_pixels_bwd<4, kKeep, kSilu>(x + i, dy + i, dx + i, rstd + row, C, affine, sums, kept, streamed);
  }
  for (; row < rows; ++row) {
    const int64_t i = row * C;
    norm_rows_of_pixels_bwd<1, kKeep, kSilu>(x + i, dy + i, dx + i, rstd + row, C, affine, sums, kept, streamed);
  }
}

template <bool kKeep, bool kSilu, class T>
ZB_LOOPS void norm_tile_of_pixels_bwd(const T* x, const T* dy, T* dx, const float* rstd, int64_t pixels, int64_t C,
                                      int64_t S, PixelAffine affine, PixelSums sums, bool streamed) {
  constexpr int64_t bytes = sizeof(T) + sizeof(float);
  alignas(64) T kept_x[kKeep ? kTileBytes / bytes : 1];
  alignas(64) float kept_dz[kKeep ? kTileBytes / bytes : 1];
  alignas(64) float along[kMaxPixels], r[kMaxPixels], signed_r[kMaxPixels];
  const auto dz_of = [&](auto xhat, const T* gradient, Vec a, Vec b, auto lanes) ZB_BODY {
    using V = decltype(xhat);
    return slope_times<kSilu>(fmadd(xhat, V(a), V(b)), load(gradient, lanes), gradient, lanes);
  };
  fill(along, pixels, 0.0f);
  fill(signed_r, kMaxPixels, 0.0f);
  std::memcpy(signed_r, rstd, static_cast<size_t>(pixels) * sizeof(float));
  to_element_order(signed_r, 1, pixels, dx);
  for (int64_t i = 0; i < pixels; i += 4) _mm_store_ps(r + i, magnitude(_mm_load_ps(signed_r + i)));
  for (int64_t c = 0; c < C; ++c) {
    const Vec a = set1(affine.a[c]), b = set1(affine.b[c]);
    Vec sum_dz = zero(), sum_dz_xhat = zero();
    const int64_t ahead = run_ahead(c, C, S);
    for_lanes_by_4(pixels, [&](int64_t i, auto lanes) ZB_BODY {
      prefetch<_MM_HINT_T0>(x + c * S + i, ahead, lanes);
      prefetch<_MM_HINT_T0>(dy + c * S + i, ahead, lanes);
      if (kKeep) copy_step(kept_x + c * pixels + i, x + c * S + i, lanes);
      const auto v = load(x + c * S + i, lanes);
      const auto xhat = v * load(r + i, lanes), dz = dz_of(xhat, dy + c * S + i, a, b, lanes), product = dz * xhat;
      if (kKeep) store(kept_dz + c * pixels + i, dz, lanes);
      sum_dz += total(dz);
      sum_dz_xhat += total(product);
      store(along + i, fmadd(product, decltype(product)(a), load(along + i, lanes)), lanes);
    });
    sums.dz[c] = sum(sum_dz), sums.dz_xhat[c] = sum(sum_dz_xhat);
  }
  for (int64_t i = 0; i < pixels; i += 4) {
    const __m128 slope = pixel_slope(_mm_load_ps(along + i), _mm_load_ps(signed_r + i), 1.0f / static_cast<float>(C));
    _mm_store_ps(along + i, slope);
  }
  for (int64_t c = 0; c < C; ++c) {
    const Vec a = set1(affine.a[c]), b = set1(affine.b[c]);
    for_lanes_by_4(pixels, [&](int64_t i, auto lanes) ZB_BODY {
      if (kKeep) prefetch<_MM_HINT_T1>(x + c * S + i, pixels, lanes);
      if (kKeep) prefetch<_MM_HINT_T1>(dy + c * S + i, pixels, lanes);
      const auto v = kKeep ? load(kept_x + c * pixels + i, lanes) : load(x + c * S + i, lanes);
      const auto rs = load(r + i, lanes);
      auto dz = v;
      if constexpr (kKeep) {
        dz = load(kept_dz + c * pixels + i, lanes);
      } else {
        dz = dz_of(v * rs, dy + c * S + i, a, b, lanes);
      }
      const auto out = fnmadd(v, load(along + i, lanes), dz * decltype(v)(a) * rs);
      store_result_or_stream<kSilu>(dx + c * S + i, out, lanes, streamed);
    });
  }
}

// Workspace: the sums of each sample, [2, N, C]; the affine, [N, 2, C]; the sums of each tile, [N, tiles, 2, C].
template <bool kSilu, class T>
void channel_rms_norm_silu_bwd_of(const ChannelRmsNormSilu& p, ParallelFor run, T*) {
  const int64_t C = p.C, S = p.S;
  const PixelTiles tiles(p, pixel_bytes(p.dtype, true));
  T* const dx = static_cast<T*>(p.dx);
  const bool streamed = tiles.streamed(p, dx, 3);
  float* const affines = p.workspace + 2 * p.N * C;
  float* const partial = affines + 2 * p.N * C;
  pixel_affines(p, affines);
  tiles.each(p, run, [&](int64_t item, int64_t n, int64_t first, int64_t size) {
    const PixelAffine affine(affines, n, C);
    const PixelSums sums(partial, item, C);
    const int64_t at = n * S * C + first * (tiles.by_rows ? C : 1);
    const T *const x = static_cast<const T*>(p.x) + at, *const dy = static_cast<const T*>(p.dy) + at;
    const float* const rstd = p.rstd + n * S + first;
    with_bool(tiles.kept, [&](auto keep) {
      constexpr bool kKeep = decltype(keep)::value;
      if (tiles.by_rows) {
        norm_chunk_of_pixels_bwd<kKeep, kSilu>(x, dy, dx + at, rstd, size, C, affine, sums, streamed);
      } else {
        norm_tile_of_pixels_bwd<kKeep, kSilu>(x, dy, dx + at, rstd, size, C, S, affine, sums, streamed);
      }
    });
  });
  const ChannelSums sums(p);
  for (int64_t n = 0; n < p.N; ++n) {
    for_lanes(C, [&](int64_t c, auto lanes) {
      Kahan dz, dz_xhat;
      for (int64_t k = 0; k < tiles.count; ++k) {
        const PixelSums tile(partial, n * tiles.count + k, C);
        dz.add(load(tile.dz + c, lanes));
        dz_xhat.add(load(tile.dz_xhat + c, lanes));
      }
      store(sums.dz + n * C + c, dz.total, lanes);
      store(sums.dz_xhat + n * C + c, dz_xhat.total, lanes);
    });
  }
  group_norm_vector_gradients(p);
}

inline void channel_rms_norm_silu_bwd(const ChannelRmsNormSilu& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* type) {
    p.silu ? channel_rms_norm_silu_bwd_of<true>(p, run, type) : channel_rms_norm_silu_bwd_of<false>(p, run, type);
  });
}

inline int64_t channel_rms_norm_silu_bwd_workspace(const ChannelRmsNormSilu& p) {
  return 2 * p.N * p.C * (2 + PixelTiles(p, pixel_bytes(p.dtype, true)).count);
}

}  // namespace
}  // namespace zeroblock
