// layer_norm_modulate: y = (xhat [* weight + bias]) * (1 + scale) + shift, xhat = (x - mean) * rstd; rms: mean = 0.
// Backward: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * (1 + scale) [* weight]; dscale, dshift,
// dweight and dbias are sums of dy and dy * xhat over tokens. [B, T, D] in fp32, bf16 or fp16, arithmetic in fp32.
// Loop: chunks of tokens, shared between the threads. Forward walks a row three times (mean, centred squares, output),
// or three tiles of rows once (rows/norm_rows.h). Backward walks four rows at a time twice (sums, then dx), the second
// time from the end; the second walk prefetches the next four rows, the first what the second will touch. In fp32 that
// costs up to 20 % on warm arrays and saves up to 20 % on cold ones, as a training step leaves them (measured: python
// benchmarks/run.py --group memory_bound --filter layer_norm_modulate, --sample-ms 0 for cold ones).
// Reduction order over tokens: four rows, their chunk's sums in the workspace, then the chunks in order: the same bits
// for any number of threads. Zero path: none; the caller decides (add_bias.h).
#pragma once

#include "rows/norm_rows.h"

namespace zeroblock {
namespace {

template <class T>
ZB_INLINE double row_sum(const T* x, int64_t D) {
  return sum_columns(D, [&](Vec acc, int64_t i, auto lanes) ZB_BODY { return acc + load(x + i, lanes); });
}

// Mean and rstd of a row, given its sum (ignored for rms) and 1 / D.
template <class T>
ZB_INLINE RowStats summed_stats(const T* x, int64_t D, double inverse, double sum, bool rms, float eps) {
  const double mean = rms ? 0.0 : sum * inverse;
  const float rounded = static_cast<float>(mean);
  const double squares = squares_about(x, D, rounded) * inverse;
  if (!rms && is_doubtful(x, mean, squares)) return careful_stats(x, D, eps);
  return {rounded, inverse_root(squares, mean - rounded, rms, eps)};
}

// weight and bias of the channels; present only when kAffine.
struct Affine {
  OperandRow<float> weight, bias;
};

template <bool kAffine, class T, class Scale, class Shift>
ZB_INLINE void modulate_row(const T* x, T* y, int64_t D, RowStats stats, const Affine& affine, OperandRow<Scale> scale,
                            OperandRow<Shift> shift, bool streamed) {
  const Vec mean = set1(stats.mean), rstd = set1(stats.rstd), one = set1(1.0f);
  each_column(0, D, [&](int64_t i, auto lanes) ZB_BODY {
    Vec xhat = (load(x + i, lanes) - mean) * rstd;
    if (kAffine) xhat = fmadd(xhat, affine.weight.at(i, lanes), affine.bias.at(i, lanes));
    store_or_stream(y + i, fmadd(xhat, one + scale.at(i, lanes), shift.at(i, lanes)), lanes, streamed);
  });
}

// bf16 with an operand per token.
template <bool kAffine, class Scale, class Shift>
void layer_norm_modulate_staged(const LayerNormModulate& p, ParallelFor run, const Affine& affine,
                                const Operand<Scale>& scale, const Operand<Shift>& shift, bool streamed) {
  const int64_t D = p.D;
  each_chunk(run, p.B, p.T, D, [&](int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    RowPair pair;
    StagedOperand weight_row, bias_row, scale_row, shift_row;
    const OperandRow<float> weight = weight_row.take(affine.weight, D), bias = bias_row.take(affine.bias, D);
    const OperandRow<Scale> scale_taken = scale_row.take(scale.row(b, t_begin), D);
    const OperandRow<Shift> shift_taken = shift_row.take(shift.row(b, t_begin), D);
    for (int64_t t = t_begin; t < t_end; t += 2) {
      const int64_t row = b * p.T + t, second = t + 1 < t_end ? 1 : 0;  // 0: the last row stands for both
      const bf16* const x = static_cast<const bf16*>(p.x) + row * D;
      pair.fill(D, p.rms, p.eps, [&](int64_t k, int64_t i, auto lanes) { return load(x + k * second * D + i, lanes); });
      for (int64_t k = 0; k <= second; ++k) {
        if (p.mean != nullptr) p.mean[row + k] = pair.stats[k].mean;
        p.rstd[row + k] = pair.stats[k].rstd;
        pair.modulate<kAffine>(k, static_cast<bf16*>(p.y) + (row + k) * D, D, weight, bias,
                               staged_row(scale, scale_taken, b, t + k), staged_row(shift, shift_taken, b, t + k),
                               streamed);
      }
    }
  });
}

// One scale and one shift for all rows of a sample.
template <class T>
void layer_norm_modulate_tiles(const LayerNormModulate& p, ParallelFor run, const Affine& affine,
                               const Operand<float>& scale, const Operand<float>& shift, bool streamed) {
  const int64_t D = p.D;
  each_chunk(run, p.B, p.T, D, [&](int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    const int64_t row = b * p.T + t_begin;
    T* const y = static_cast<T*>(p.y) + row * D;
    SampleModulation modulation;
    modulation.take(y, D, affine.weight, affine.bias, scale.row(b, 0), shift.row(b, 0));
    norm_chunk(D, t_end - t_begin, RowsAt<T>{static_cast<const T*>(p.x) + row * D, D}, y,
               p.mean != nullptr ? p.mean + row : nullptr, p.rstd + row, p.rms, p.eps, &modulation, streamed);
  });
}

template <bool kAffine, class T, class Scale, class Shift>
void layer_norm_modulate_fwd_of(T* type, Scale*, Shift*, const LayerNormModulate& p, ParallelFor run) {
  const int64_t D = p.D;
  const ConstantRow one(1.0f);
  const Operand<Scale> scale = operand(p.scale, reinterpret_cast<const Scale*>(kZeros));
  const Operand<Shift> shift = operand(p.shift, reinterpret_cast<const Shift*>(kZeros));
  const Affine affine = {channel_row(p.weight, one.lanes), channel_row(p.bias, kZeros)};
  const bool streamed = streams(static_cast<T*>(p.y), D, 2 * p.B * p.T * D * static_cast<int64_t>(sizeof(T)));
  if constexpr (is_float(static_cast<Scale*>(nullptr)) && is_float(static_cast<Shift*>(nullptr))) {
    if (in_tiles(static_cast<T*>(nullptr), D) && !is_per_token(p.scale) && !is_per_token(p.shift)) {
      return layer_norm_modulate_tiles<T>(p, run, affine, scale, shift, streamed);
    }
  }
  if constexpr (kInPairs<T> && !(is_float(static_cast<Scale*>(nullptr)) && is_float(static_cast<Shift*>(nullptr)))) {
    if (D <= kStagedRow && !is_wide(type, p.scale) && !is_wide(type, p.shift)) {
      return layer_norm_modulate_staged<kAffine>(p, run, affine, scale, shift, streamed);
    }
  }
  const double inverse = 1.0 / static_cast<double>(D);
  each_chunk(run, p.B, p.T, D, [&](int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    for (int64_t t = t_begin; t < t_end; ++t) {
      const int64_t row = b * p.T + t;
      const T* const x = static_cast<const T*>(p.x) + row * D;
      const RowStats stats = summed_stats(x, D, inverse, p.rms ? 0.0 : row_sum(x, D), p.rms, p.eps);
      if (p.mean != nullptr) p.mean[row] = stats.mean;
      p.rstd[row] = stats.rstd;
      modulate_row<kAffine>(x, static_cast<T*>(p.y) + row * D, D, stats, affine, scale.row(b, t), shift.row(b, t),
                            streamed);
    }
  });
}

// Slots of the partial sums over tokens: scaled_dy * xhat, scaled_dy, and a third of the caller's. scaled_dy is dy * (1
// + scale) for a scale per token, and dy for a scale per sample, which finish_modulate multiplies in after the sum.
constexpr int64_t kSumScaledDyXhat = 0, kSumScaledDy = 1, kSumExtra = 2;

// Where the sums of a chunk are added up; null for those that are not wanted.
struct ModulateSums {
  float *scaled_dy_xhat, *scaled_dy, *dy;
  template <class T>
  ZB_INLINE void unstage(T* type, int64_t D) const {
    float* const rows[] = {scaled_dy_xhat, scaled_dy, dy};
    for (float* row : rows) {
      if (row != nullptr) zeroblock::unstage(type, row, D);
    }
  }
};

// (1 + scale) [* weight] of one sample, staged for rows of T.
template <bool kAffine, class T>
ZB_INLINE void stage_factor(T* type, float* to, int64_t D, OperandRow<float> scale, OperandRow<float> weight) {
  each_step(type, D, [&](int64_t i, auto lanes) ZB_BODY {
    const auto s = in_step(scale, i, lanes), w = in_step(weight, i, lanes);
    Vec2 factor;
    for (int k = 0; k < kParts<decltype(lanes)>; ++k) {
      factor.v[k] = set1(1.0f) + part(s, k);
      if (kAffine) factor.v[k] = factor.v[k] * part(w, k);
    }
    keep_step(to + i, factor, lanes);
  });
}

// Columns that backward sums in one chain of each vector lane.
constexpr int64_t kSummedColumns = 4096;

// What backward of a tile of rows reads. A scale per sample comes as `factor`, (1 + scale) [* weight] staged by
// stage_factor; a scale per token as it is, and the weight beside it.
template <bool kTokenScale, class T, class Scale>
struct ModulateTile {
  int64_t D;
  const T* x;
  const T* dy;
  const float* mean;  // of the first row; null for rms
  const float* rstd;
  OperandRow<float> factor;
  OperandTile<kTokenScale, Scale> scale;
  Affine affine;
  ModulateSums sums;
  Scale* dscale;                           // per-token only, or null
  const T* later[2] = {nullptr, nullptr};  // what the second walk touches besides: prefetched by the first, or null
};

// Adds to the sums, whose order is that of the steps, then calls emit(i, r, dx, lanes) for each row of each step and
// step(i, lanes) after the last row. Row after row: all four at once have more in hand than there are registers.
template <bool kAffine, bool kTokenScale, int R, class T, class Scale, class Emit, class Step>
ZB_INLINE void modulate_bwd_tile(RowTile<R> tile, const ModulateTile<kTokenScale, T, Scale>& a, const Emit& emit,
                                 const Step& step) {
  const int64_t D = a.D;
  const Vec one = set1(1.0f);
  const auto nothing = [](int) { return zero(); };
  PerRow<R> rstd = per_row(tile, [&](int r) { return set1(a.rstd[r]); });
  PerRow<R> mean = per_row(tile, [&](int r) { return a.mean != nullptr ? set1(a.mean[r]) : zero(); });
  PerRow<R> sum_g = per_row(tile, nothing), sum_gc = per_row(tile, nothing);  // c = x - mean
  float row_g[R] = {}, row_gc[R] = {};
  const auto walk = [&](int64_t i, auto lanes) ZB_BODY {
    for (const T* later : a.later) {
      if (later != nullptr) prefetch(tile, later, i);
    }
    constexpr int parts = kParts<decltype(lanes)>;
    Vec2 sum_xhat = {{zero(), zero()}}, sum_scaled = sum_xhat, sum_dy = sum_xhat, dscale = sum_xhat;
    const auto weight = in_step(a.affine.weight, i, lanes), bias = in_step(a.affine.bias, i, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto dys = load_step(tile.row(a.dy, r) + i, lanes), xs = load_step(tile.row(a.x, r) + i, lanes);
      const auto scale = either_step(a.scale, a.factor, r, i, lanes);
      for (int k = 0; k < parts; ++k) {
        const Vec d = part(dys, k), c = part(xs, k) - mean[r];
        const Vec scaled_dy = kTokenScale ? d * (one + part(scale, k)) : d, scaled_dy_c = scaled_dy * c;
        const Vec to_g = kTokenScale ? (kAffine ? part(weight, k) : one) : part(scale, k);  // g = scaled_dy * to_g
        sum_g[r] = fmadd(scaled_dy, to_g, sum_g[r]);
        sum_gc[r] = fmadd(scaled_dy_c, to_g, sum_gc[r]);
        sum_xhat.v[k] = fmadd(scaled_dy_c, rstd[r], sum_xhat.v[k]);
        sum_scaled.v[k] += scaled_dy;
        if (kTokenScale) {
          sum_dy.v[k] += d;
          const Vec xhat = c * rstd[r];
          dscale.v[k] = d * (kAffine ? fmadd(xhat, part(weight, k), part(bias, k)) : xhat);
        }
      }
      if (kTokenScale && a.dscale != nullptr) store_step(tile.row(a.dscale, r) + i, dscale, lanes, false);
    }
    if (a.sums.scaled_dy_xhat != nullptr) accumulate_step(a.sums.scaled_dy_xhat, i, sum_xhat, lanes);
    if (a.sums.scaled_dy != nullptr) accumulate_step(a.sums.scaled_dy, i, sum_scaled, lanes);
    if (kTokenScale && a.sums.dy != nullptr) accumulate_step(a.sums.dy, i, sum_dy, lanes);
  };
  const auto sum_rows = [&]() ZB_BODY {
    for (int r = 0; r < R; ++r) {
      row_g[r] += sum(sum_g[r]);
      row_gc[r] += sum(sum_gc[r]);
      sum_g[r] = sum_gc[r] = zero();
    }
  };
  if (D <= kSummedColumns) {
    each_step(a.x, D, walk);
    sum_rows();
  } else {
    for (int64_t begin = 0; begin < D; begin += kSummedColumns) {
      const int64_t size = D - begin < kSummedColumns ? D - begin : kSummedColumns;
      each_step(a.x, size, [&](int64_t i, auto lanes) ZB_BODY { walk(begin + i, lanes); });
      sum_rows();
    }
  }
  // dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), xhat = c * rstd
  const auto row_mean = [&](float row) { return set1(row / static_cast<float>(D)); };
  PerRow<R> mean_g = per_row(tile, [&](int r) { return a.mean != nullptr ? row_mean(row_g[r]) : zero(); });
  PerRow<R> mean_g_rstd = per_row(tile, [&](int r) { return mean_g[r] * rstd[r]; });
  PerRow<R> mean_gxhat = per_row(tile, [&](int r) { return row_mean(row_gc[r]) * rstd[r]; });
  PerRow<R> mean_gc_rstd3 = per_row(tile, [&](int r) { return mean_gxhat[r] * rstd[r] * rstd[r]; });
  const bool tiny = D <= 2;
  each_step_again(a.x, D, [&](int64_t i, auto lanes) ZB_BODY {
    prefetch(tile, a.x + R * D, i);
    prefetch(tile, a.dy + R * D, i);
    const auto weight = in_step(a.affine.weight, i, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto dys = load_step(tile.row(a.dy, r) + i, lanes), xs = load_step(tile.row(a.x, r) + i, lanes);
      const auto scale = either_step(a.scale, a.factor, r, i, lanes);
      Vec2 dx;
      for (int k = 0; k < kParts<decltype(lanes)>; ++k) {
        const Vec scaled_dy = kTokenScale ? part(dys, k) * (one + part(scale, k)) : part(dys, k);
        const Vec g = kTokenScale ? (kAffine ? scaled_dy * part(weight, k) : scaled_dy) : scaled_dy * part(scale, k);
        const Vec c = part(xs, k) - mean[r];
        dx.v[k] = fnmadd(c, mean_gc_rstd3[r], fmsub(g, rstd[r], mean_g_rstd[r]));
        if constexpr (is_tail(static_cast<decltype(lanes)*>(nullptr))) {
          // Of one or two elements little or nothing is left: it must not be the rounding of a factor.
          if (tiny) dx.v[k] = fnmadd(c * rstd[r], mean_gxhat[r], g - mean_g[r]) * rstd[r];
        }
      }
      emit(i, r, dx, lanes);
    }
    step(i, lanes);
  });
}

// The [B, D] and [D] gradients that come out of the partial sums; null when not wanted.
struct ModulateGrads {
  float *dshift, *dscale, *dweight, *dbias;
  const float *weight, *bias;
  bool token_scale;
  int64_t dshift_slot;  // the slot that summed dy
};

// Second stage: over the chunks of a sample, then (weight and bias) over the samples.
inline void finish_modulate(const ModulateGrads& out, const Rows& scale_rows, const Partials& partials, int64_t B,
                            ParallelFor run) {
  const int64_t D = partials.D, chunks = chunks_per_sample(partials.T);
  const bool affine = out.dweight != nullptr || out.dbias != nullptr, needs_xhat_sum = affine || out.dscale != nullptr;
  const ConstantRow one(1.0f);
  const Rows absent = {nullptr, false, 0, 0, true};
  const Operand<float> scale = operand(out.token_scale ? absent : scale_rows, kZeros);
  const OperandRow<float> weight = channel_row(out.weight, one.lanes), bias = channel_row(out.bias, kZeros);
  if (!needs_xhat_sum && out.dshift == nullptr) return;
  each_column_block(run, B, D, 2 * chunks, [&](int64_t b, int64_t begin, int64_t end) {
    each_column(begin, end, [&](int64_t i, auto lanes) ZB_BODY {
      if (out.dshift != nullptr) {
        store(out.dshift + b * D + i, partials.sample_sum(b, out.dshift_slot, i, lanes), lanes);
      }
      if (!needs_xhat_sum) return;
      const Vec sum_xhat = partials.sample_sum(b, kSumScaledDyXhat, i, lanes);
      const Vec sum_scaled = partials.sample_sum(b, kSumScaledDy, i, lanes);
      if (out.dscale != nullptr) {
        store(out.dscale + b * D + i, fmadd(weight.at(i, lanes), sum_xhat, bias.at(i, lanes) * sum_scaled), lanes);
      }
      if (affine && chunks > 0) {
        const Vec factor = set1(1.0f) + scale.row(b, 0).at(i, lanes);
        store(partials.sums(b * chunks, kSumScaledDyXhat) + i, sum_xhat * factor, lanes);
        store(partials.sums(b * chunks, kSumScaledDy) + i, sum_scaled * factor, lanes);
      }
    });
  });
  if (!affine) return;
  each_column_block(run, 1, D, B, [&](int64_t, int64_t begin, int64_t end) {
    each_column(begin, end, [&](int64_t i, auto lanes) ZB_BODY {
      if (out.dweight != nullptr) store(out.dweight + i, partials.batch_sum(B, kSumScaledDyXhat, i, lanes), lanes);
      if (out.dbias != nullptr) store(out.dbias + i, partials.batch_sum(B, kSumScaledDy, i, lanes), lanes);
    });
  });
}

// A per-token scale leaves only the affine gradients and dshift to be summed, the latter in a slot of its own.
ZB_INLINE Partials modulate_partials(const LayerNormModulate& p, float* workspace) {
  const bool token_scale = is_per_token(p.scale);
  const bool wanted =
      p.dweight != nullptr || p.dbias != nullptr || p.dshift != nullptr || (p.dscale != nullptr && !token_scale);
  return {workspace, wanted ? (token_scale ? 3 : 2) : 0, token_scale ? 0 : 1, p.T, p.D};
}

template <bool kAffine, bool kTokenScale, class T, class Scale>
void layer_norm_modulate_bwd_of(T*, Scale*, const LayerNormModulate& p, ParallelFor run) {
  const int64_t D = p.D;
  const ConstantRow one(1.0f);
  const Operand<Scale> scale = operand(p.scale, reinterpret_cast<const Scale*>(kZeros));
  const Affine affine = {channel_row(p.weight, one.lanes), channel_row(p.bias, kZeros)};
  const bool affine_grads = p.dweight != nullptr || p.dbias != nullptr;
  const bool wants_xhat_sum = affine_grads || (!kTokenScale && p.dscale != nullptr);
  const bool wants_sum = wants_xhat_sum || (!kTokenScale && p.dshift != nullptr);
  const bool wants_dy = kTokenScale && p.dshift != nullptr;
  T* const dx = static_cast<T*>(p.dx);
  const bool streamed = streams(dx, D, 3 * p.B * p.T * D * static_cast<int64_t>(sizeof(T)));
  const Partials partials = modulate_partials(p, p.workspace);
  each_chunk(run, p.B, p.T, D, [&](int64_t chunk, int64_t b, int64_t t_begin, int64_t t_end) {
    const ModulateSums sums = {wants_xhat_sum ? partials.sums(chunk, kSumScaledDyXhat) : nullptr,
                               wants_sum ? partials.sums(chunk, kSumScaledDy) : nullptr,
                               wants_dy ? partials.sums(chunk, kSumExtra) : nullptr};
    float* const factor = kTokenScale ? nullptr : partials.staged(chunk, 0);
    if constexpr (!kTokenScale) stage_factor<kAffine>(dx, factor, D, scale.row(b, 0), affine.weight);
    partials.clear(chunk);
    for_row_tiles(t_end - t_begin, D, [&](int64_t r, auto tile) ZB_BODY {
      const int64_t t = t_begin + r, row = b * p.T + t, start = row * D;
      const ModulateTile<kTokenScale, T, Scale> inputs = {
          D,
          static_cast<const T*>(p.x) + start,
          static_cast<const T*>(p.dy) + start,
          p.rms ? nullptr : p.mean + row,
          p.rstd + row,
          {factor, -1},
          scale.template tile<kTokenScale>(b, t),
          affine,
          sums,
          kTokenScale && p.dscale != nullptr ? static_cast<Scale*>(p.dscale) + start : nullptr,
          {streamed ? nullptr : dx + start, nullptr}};
      modulate_bwd_tile<kAffine>(
          tile, inputs,
          [&](int64_t i, int k, Vec2 grad, auto lanes)
              ZB_BODY { store_step(tile.row(dx + start, k) + i, grad, lanes, streamed); },
          [](int64_t, auto) ZB_BODY {});
    });
    sums.unstage(dx, D);
  });
  const ModulateGrads grads = {p.dshift,    kTokenScale ? nullptr : static_cast<float*>(p.dscale),
                               p.dweight,   p.dbias,
                               p.weight,    p.bias,
                               kTokenScale, kTokenScale ? kSumExtra : kSumScaledDy};
  finish_modulate(grads, p.scale, partials, p.B, run);
}

inline void layer_norm_modulate_fwd(const LayerNormModulate& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* t) {
    with_operand_type(t, p.scale, [&](auto* scale) {
      with_operand_type(t, p.shift, [&](auto* shift) {
        with_bool(p.weight != nullptr || p.bias != nullptr,
                  [&](auto affine) { layer_norm_modulate_fwd_of<affine.value>(t, scale, shift, p, run); });
      });
    });
  });
}

inline void layer_norm_modulate_bwd(const LayerNormModulate& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* t) {
    with_bool(p.weight != nullptr || p.bias != nullptr, [&](auto affine) {
      if (is_per_token(p.scale)) {
        with_operand_type(t, p.scale,
                          [&](auto* scale) { layer_norm_modulate_bwd_of<affine.value, true>(t, scale, p, run); });
      } else {
        layer_norm_modulate_bwd_of<affine.value, false>(t, static_cast<float*>(nullptr), p, run);
      }
    });
  });
}

inline int64_t layer_norm_modulate_bwd_workspace(const LayerNormModulate& p) {
  return modulate_partials(p, nullptr).size(p.B);
}

}  // namespace
}  // namespace zeroblock
