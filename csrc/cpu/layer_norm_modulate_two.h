// layer_norm_modulate_two: one norm with two modulations, y = xhat * (1 + scale) + shift and y2 likewise, without
// weight and bias, one row of each operand for a sample. Forward writes y2 of a chunk while L2 has its rows. Backward
// is that of layer_norm_modulate with g = dy * (1 + scale) + dy2 * (1 + scale2): x is read once, and dx rounded once.
// Loop and reduction order are those of layer_norm_modulate.h: the sums of a modulation have the bits that it gives
// alone.
#pragma once

#include "layer_norm_modulate.h"

namespace zeroblock {
namespace {

// Of rows whose statistics are there: as norm_rows.h writes them.
template <class T>
ZB_LOOPS void modulate_rows(const T* x, T* y, int64_t D, int64_t rows, const float* mean, const float* rstd,
                            const SampleModulation* modulation, bool streamed) {
  for (int64_t r = 0; r < rows; ++r) {
    const Vec m = mean != nullptr ? set1(mean[r]) : zero(), root = set1(rstd[r]);
    each_step(y, D, [&](int64_t i, auto lanes) ZB_BODY {
      const auto modulate = modulation->at(r, i, lanes);
      const auto xs = load_step(x + r * D + i, lanes);
      Vec2 out;
      for (int k = 0; k < kParts<decltype(lanes)>; ++k) out.v[k] = modulate((part(xs, k) - m) * root, 0, k);
      store_step(y + r * D + i, out, lanes, streamed);
    });
  }
}

template <class T>
void layer_norm_modulate_two_fwd_of(T* type, const LayerNormModulateTwo& p, ParallelFor run) {
  const int64_t D = p.D;
  const double inverse = 1.0 / static_cast<double>(D);
  const ConstantRow one(1.0f);
  const Operand<float> scale = operand(p.scale, kZeros), shift = operand(p.shift, kZeros);
  const Operand<float> scale2 = operand(p.scale2, kZeros), shift2 = operand(p.shift2, kZeros);
  const OperandRow<float> weight = channel_row(nullptr, one.lanes), bias = channel_row(nullptr, kZeros);
  const int64_t bytes = 3 * p.B * p.T * D * static_cast<int64_t>(sizeof(T));
  const bool streamed = streams(static_cast<T*>(p.y), D, bytes) && streams(static_cast<T*>(p.y2), D, bytes);
  each_chunk(run, p.B, p.T, D, [&](int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    const int64_t first = b * p.T + t_begin, rows = t_end - t_begin;
    const T* const x = static_cast<const T*>(p.x) + first * D;
    T* const y = static_cast<T*>(p.y) + first * D;
    T* const y2 = static_cast<T*>(p.y2) + first * D;
    float* const mean = p.mean != nullptr ? p.mean + first : nullptr;
    float* const rstd = p.rstd + first;
    if (in_tiles(type, D)) {
      SampleModulation modulation;
      modulation.take(y, D, weight, bias, scale.row(b, 0), shift.row(b, 0));
      norm_chunk(D, rows, RowsAt<T>{x, D}, y, mean, rstd, p.rms, p.eps, &modulation, streamed);
      modulation.take(y, D, weight, bias, scale2.row(b, 0), shift2.row(b, 0));
      modulate_rows(x, y2, D, rows, mean, rstd, &modulation, streamed);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* const row = x + r * D;
      const RowStats stats = summed_stats(row, D, inverse, p.rms ? 0.0 : row_sum(row, D), p.rms, p.eps);
      if (mean != nullptr) mean[r] = stats.mean;
      rstd[r] = stats.rstd;
      modulate_row<false>(row, y + r * D, D, stats, {}, scale.row(b, 0), shift.row(b, 0), streamed);
      modulate_row<false>(row, y2 + r * D, D, stats, {}, scale2.row(b, 0), shift2.row(b, 0), streamed);
    }
  });
}

// Backward of a tile of rows; `sums` and `factor` of each modulation are staged as in modulate_bwd_tile.
template <class T>
struct TwoTile {
  int64_t D;
  const T *x, *dy, *dy2;
  T* dx;
  const float *mean, *rstd;  // of the first row; mean null for rms
  const float *factor, *factor2;
  ModulateSums sums, sums2;
  bool streamed;
};

template <int R, class T>
ZB_INLINE void two_bwd_tile(RowTile<R> tile, const TwoTile<T>& a) {
  const int64_t D = a.D;
  const auto nothing = [](int) { return zero(); };
  PerRow<R> rstd = per_row(tile, [&](int r) { return set1(a.rstd[r]); });
  PerRow<R> mean = per_row(tile, [&](int r) { return a.mean != nullptr ? set1(a.mean[r]) : zero(); });
  PerRow<R> sum_g = per_row(tile, nothing), sum_gc = per_row(tile, nothing);
  float row_g[R] = {}, row_gc[R] = {};
  const auto walk = [&](int64_t i, auto lanes) ZB_BODY {
    if (!a.streamed) prefetch(tile, a.dx, i);
    constexpr int parts = kParts<decltype(lanes)>;
    Vec2 xhat1 = {{zero(), zero()}}, xhat2 = xhat1, dy1 = xhat1, dy2 = xhat1;
    const auto f1 = load_step(a.factor + i, lanes), f2 = load_step(a.factor2 + i, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto d1s = load_step(tile.row(a.dy, r) + i, lanes), d2s = load_step(tile.row(a.dy2, r) + i, lanes);
      const auto xs = load_step(tile.row(a.x, r) + i, lanes);
      for (int k = 0; k < parts; ++k) {
        const Vec d1 = part(d1s, k), d2 = part(d2s, k), c = part(xs, k) - mean[r];
        const Vec g = fmadd(d2, part(f2, k), d1 * part(f1, k));
        sum_g[r] += g;
        sum_gc[r] = fmadd(g, c, sum_gc[r]);
        xhat1.v[k] = fmadd(d1 * c, rstd[r], xhat1.v[k]);
        xhat2.v[k] = fmadd(d2 * c, rstd[r], xhat2.v[k]);
        dy1.v[k] += d1;
        dy2.v[k] += d2;
      }
    }
    accumulate_step(a.sums.scaled_dy_xhat, i, xhat1, lanes);
    accumulate_step(a.sums.scaled_dy, i, dy1, lanes);
    accumulate_step(a.sums2.scaled_dy_xhat, i, xhat2, lanes);
    accumulate_step(a.sums2.scaled_dy, i, dy2, lanes);
  };
  const auto sum_rows = [&]() ZB_BODY {
    for (int r = 0; r < R; ++r) {
      row_g[r] += sum(sum_g[r]);
      row_gc[r] += sum(sum_gc[r]);
      sum_g[r] = sum_gc[r] = zero();
    }
  };
  for (int64_t begin = 0; begin < D; begin += kSummedColumns) {
    const int64_t size = D - begin < kSummedColumns ? D - begin : kSummedColumns;
    each_step(a.x, size, [&](int64_t i, auto lanes) ZB_BODY { walk(begin + i, lanes); });
    sum_rows();
  }
  const auto row_mean = [&](float row) { return set1(row / static_cast<float>(D)); };
  PerRow<R> mean_g = per_row(tile, [&](int r) { return a.mean != nullptr ? row_mean(row_g[r]) : zero(); });
  PerRow<R> mean_gxhat = per_row(tile, [&](int r) { return row_mean(row_gc[r]) * rstd[r]; });
  each_step_again(a.x, D, [&](int64_t i, auto lanes) ZB_BODY {
    prefetch(tile, a.x + R * D, i);
    prefetch(tile, a.dy + R * D, i);
    prefetch(tile, a.dy2 + R * D, i);
    const auto f1 = load_step(a.factor + i, lanes), f2 = load_step(a.factor2 + i, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto d1s = load_step(tile.row(a.dy, r) + i, lanes), d2s = load_step(tile.row(a.dy2, r) + i, lanes);
      const auto xs = load_step(tile.row(a.x, r) + i, lanes);
      Vec2 dx;
      for (int k = 0; k < kParts<decltype(lanes)>; ++k) {
        const Vec g = fmadd(part(d2s, k), part(f2, k), part(d1s, k) * part(f1, k));
        const Vec xhat = (part(xs, k) - mean[r]) * rstd[r];
        dx.v[k] = fnmadd(xhat, mean_gxhat[r], g - mean_g[r]) * rstd[r];
      }
      store_step(tile.row(a.dx, r) + i, dx, lanes, a.streamed);
    }
  });
}

// For each chunk the two sums of either modulation, and their factors, staged.
ZB_INLINE Partials two_partials(const LayerNormModulateTwo& p, float* workspace) { return {workspace, 4, 2, p.T, p.D}; }

template <class T>
void layer_norm_modulate_two_bwd_of(T* type, const LayerNormModulateTwo& p, ParallelFor run) {
  const int64_t D = p.D;
  const Operand<float> scale = operand(p.scale, kZeros), scale2 = operand(p.scale2, kZeros);
  T* const dx = static_cast<T*>(p.dx);
  const bool streamed = streams(dx, D, 4 * p.B * p.T * D * static_cast<int64_t>(sizeof(T)));
  const Partials partials = two_partials(p, p.workspace);
  each_chunk(run, p.B, p.T, D, [&](int64_t chunk, int64_t b, int64_t t_begin, int64_t t_end) {
    const ModulateSums sums = {partials.sums(chunk, kSumScaledDyXhat), partials.sums(chunk, kSumScaledDy), nullptr};
    const ModulateSums sums2 = {partials.sums(chunk, 2 + kSumScaledDyXhat), partials.sums(chunk, 2 + kSumScaledDy),
                                nullptr};
    stage_factor<false>(type, partials.staged(chunk, 0), D, scale.row(b, 0), OperandRow<float>{});
    stage_factor<false>(type, partials.staged(chunk, 1), D, scale2.row(b, 0), OperandRow<float>{});
    partials.clear(chunk);
    for_row_tiles(t_end - t_begin, D, [&](int64_t r, auto tile) ZB_BODY {
      const int64_t row = b * p.T + t_begin + r, start = row * D;
      two_bwd_tile(
          tile, TwoTile<T>{D, static_cast<const T*>(p.x) + start, static_cast<const T*>(p.dy) + start,
                           static_cast<const T*>(p.dy2) + start, dx + start, p.rms ? nullptr : p.mean + row,
                           p.rstd + row, partials.staged(chunk, 0), partials.staged(chunk, 1), sums, sums2, streamed});
    });
    sums.unstage(type, D);
    sums2.unstage(type, D);
  });
  // The two slots of the second modulation, as those of the first.
  Partials second = partials;
  if (second.workspace != nullptr) second.workspace += 2 * D;
  const auto grads = [](float* dshift, void* dscale) {
    return ModulateGrads{dshift, static_cast<float*>(dscale), nullptr, nullptr, nullptr, nullptr, false, kSumScaledDy};
  };
  finish_modulate(grads(p.dshift, p.dscale), p.scale, partials, p.B, run);
  finish_modulate(grads(p.dshift2, p.dscale2), p.scale2, second, p.B, run);
}

inline void layer_norm_modulate_two_fwd(const LayerNormModulateTwo& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* t) { layer_norm_modulate_two_fwd_of(t, p, run); });
}
inline void layer_norm_modulate_two_bwd(const LayerNormModulateTwo& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* t) { layer_norm_modulate_two_bwd_of(t, p, run); });
}
inline int64_t layer_norm_modulate_two_bwd_workspace(const LayerNormModulateTwo& p) {
  return two_partials(p, nullptr).size(p.B);
}

}  // namespace
}  // namespace zeroblock
