// residual_norm_modulate: x_new = residual + act(gate) * norm_b(branch); y = norm(x_new) [* weight + bias] * (1 +
// scale)
// + shift: every part optional, operands of every form and type (zeroblock.h), arithmetic in fp32, each result rounded
// once, y from x_new as stored. The plain forms have kernels of their own, which keep a row in registers.
// Loop: chunks of tokens, shared between the threads; a row goes through buffers of fp32 that L1 or L2 holds, so that
// each array is read or written once. Operands are staged where their row changes. Zero path: none.
#pragma once

#include "layer_norm_modulate.h"
#include "rows/row_operand.h"

namespace zeroblock {
namespace {

// act(gate) * branch_weight; `slope`, unless null, gets act'(gate) * branch_weight and `plain` act(gate).
inline void stage_gate(const ResidualNormModulate& p, const OperandCursor& gate, float* factor, float* slope,
                       float* plain) {
  const ConstantRow ones(1.0f);
  const OperandRow<float> weight = channel_row(p.branch_weight, ones.lanes);
  const Vec one = set1(1.0f);
  if (p.gate.kind == RowKind::kNone) {
    each_column(0, p.D, [&](int64_t i, auto lanes) ZB_BODY {
      store(factor + i, weight.at(i, lanes), lanes);
      if (plain != nullptr) store(plain + i, one, lanes);
    });
    return;
  }
  gate.each(p.D, [&](int64_t i, Vec g, auto lanes) ZB_BODY {
    const Vec w = weight.at(i, lanes), act = p.tanh ? tanh_of(g) : g;
    store(factor + i, act * w, lanes);
    if (slope != nullptr) store(slope + i, p.tanh ? fnmadd(act, act, one) * w : w, lanes);
    if (plain != nullptr) store(plain + i, act, lanes);
  });
}

// (1 + scale) [* weight].
inline void stage_mult(const ResidualNormModulate& p, const OperandCursor& scale, float* mult) {
  const ConstantRow ones(1.0f);
  const OperandRow<float> weight = channel_row(p.weight, ones.lanes);
  const Vec one = set1(1.0f);
  scale.each(p.D,
             [&](int64_t i, Vec s, auto lanes) ZB_BODY { store(mult + i, (one + s) * weight.at(i, lanes), lanes); });
}

inline void stage_scaled(const OperandCursor& scale, float* scaled, int64_t D) {
  const Vec one = set1(1.0f);
  scale.each(D, [&](int64_t i, Vec s, auto lanes) ZB_BODY { store(scaled + i, one + s, lanes); });
}

// bias * (1 + scale) + shift.
inline void stage_add(const ResidualNormModulate& p, const OperandCursor& scale, const OperandCursor& shift,
                      float* add) {
  if (p.bias != nullptr) {
    scale.each(p.D, [&](int64_t i, Vec s, auto lanes) ZB_BODY {
      const Vec b = load(p.bias + i, lanes);
      store(add + i, fmadd(b, s, b), lanes);
    });
    if (p.shift.kind == RowKind::kNone) return;
    shift.each(p.D, [&](int64_t i, Vec s, auto lanes) ZB_BODY { store(add + i, load(add + i, lanes) + s, lanes); });
  } else {
    shift.each(p.D, [&](int64_t i, Vec s, auto lanes) ZB_BODY { store(add + i, s, lanes); });
  }
}

// Rows of one type are used where they are; of several types, as fp32 that buffers hold.
ZB_INLINE bool is_of(DType type, DType of, const void* p) { return p == nullptr || type == of; }

template <class T>
ZB_INLINE T* typed(T*, const void* row) {
  return static_cast<T*>(const_cast<void*>(row));
}

ZB_INLINE void widen_row(DType dtype, const void* p, int64_t row, float* to, int64_t D) {
  each_value(dtype, row_at(dtype, p, row, D), D,
             [&](int64_t i, Vec v, auto lanes) ZB_BODY { store(to + i, v, lanes); });
}

// x_new = residual + factor * h * rstd, in fp32 as it is stored; its sum. Written to `to` as well, unless null.
template <class T>
ZB_INLINE double gated_row(const T* residual, const T* h, const float* factor, float rstd, T* to, float* x, int64_t D,
                           bool streamed) {
  const Vec scaled = set1(rstd);
  return sum_columns(D, [&](Vec acc, int64_t i, auto lanes) ZB_BODY {
    const Vec v = fmadd(load(h + i, lanes) * scaled, load(factor + i, lanes), load(residual + i, lanes));
    if (to != nullptr) store_or_stream(to + i, v, lanes, streamed);
    const Vec kept = to != nullptr ? round_to(v, to) : v;
    store(x + i, kept, lanes);
    return acc + kept;
  });
}

// A row of x_new with its branch, or of the residual, in fp32 as it is stored; its sum.
template <class T>
ZB_INLINE double forward_row(T* type, const ResidualNormModulate& p, int64_t row, const float* factor, float* r,
                             float* h, float* x, bool uniform, bool streamed) {
  const int64_t D = p.D;
  const void* const residual = row_at(p.residual_dtype, p.residual, row, D);
  if (p.branch == nullptr) {
    return sum_columns(D, [&](Vec acc, int64_t i, auto lanes) ZB_BODY {
      const Vec v = load(typed(type, residual) + i, lanes);
      store(x + i, v, lanes);
      return acc + v;
    });
  }
  const void* const branch = row_at(p.branch_dtype, p.branch, row, D);
  if (!uniform) widen_row(p.residual_dtype, p.residual, row, r, D), widen_row(p.branch_dtype, p.branch, row, h, D);
  float rstd = 1.0f;
  if (p.branch_rms) {
    const double squares = uniform ? squares_about(typed(type, branch), D, 0.0f) : squares_about(h, D, 0.0f);
    p.branch_rstd[row] = rstd = inverse_root(squares / static_cast<double>(D), 0.0, true, p.branch_eps);
  }
  void* const to = row_at(p.x_dtype, p.x_new, row, D);
  if (uniform) {
    return gated_row(typed(type, residual), typed(type, branch), factor, rstd, typed(type, to), x, D, streamed);
  }
  gated_row(r, h, factor, rstd, static_cast<float*>(nullptr), x, D, false);
  write_row(p.x_dtype, to, x, D, streamed, [&](int64_t i, auto lanes) ZB_BODY { return load(x + i, lanes); });
  return row_sum(x, D);
}

template <class T>
void residual_norm_modulate_fwd_of(T* type, const ResidualNormModulate& p, ParallelFor run) {
  const int64_t D = p.D, bytes = 8 * p.B * p.T * D;
  const double inverse = 1.0 / static_cast<double>(D);
  const bool stream_x = streams_rows(p.x_dtype, p.x_new, D, bytes), stream_y = streams_rows(p.y_dtype, p.y, D, bytes);
  const bool uniform = is_of(p.branch_dtype, p.residual_dtype, p.branch) && is_of(p.x_dtype, p.residual_dtype, p.x_new);
  each_chunk_with(run, p.B, p.T, D, 6, [&](const Buffers& buffers, int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    float *const x = buffers.row(0), *const h = buffers.row(1), *const factor = buffers.row(2);
    float *const mult = buffers.row(3), *const add = buffers.row(4), *const r = buffers.row(5);
    OperandCursor gate(p.gate), shift(p.shift), scale(p.scale);
    for (int64_t t = t_begin; t < t_end; ++t) {
      const int64_t row = b * p.T + t;
      if (p.branch != nullptr && gate.move(p.index, b, t, p.T)) stage_gate(p, gate, factor, nullptr, nullptr);
      const double sum = forward_row(type, p, row, factor, r, h, x, uniform, stream_x);
      if (!p.norm) continue;
      const RowStats stats = summed_stats(x, D, inverse, sum, p.rms, p.eps);
      if (p.mean != nullptr) p.mean[row] = stats.mean;
      p.rstd[row] = stats.rstd;
      const bool scale_moved = scale.move(p.index, b, t, p.T), shift_moved = shift.move(p.index, b, t, p.T);
      if (scale_moved) stage_mult(p, scale, mult);
      if (shift_moved || (scale_moved && p.bias != nullptr)) stage_add(p, scale, shift, add);
      const Vec mean = set1(stats.mean), rstd = set1(stats.rstd);
      write_row(p.y_dtype, row_at(p.y_dtype, p.y, row, D), nullptr, D, stream_y, [&](int64_t i, auto lanes) ZB_BODY {
        return fmadd((load(x + i, lanes) - mean) * rstd, load(mult + i, lanes), load(add + i, lanes));
      });
    }
  });
}

inline void residual_norm_modulate_fwd(const ResidualNormModulate& p, ParallelFor run) {
  with_type(p.residual_dtype, [&](auto* type) { residual_norm_modulate_fwd_of(type, p, run); });
}

}  // namespace
}  // namespace zeroblock
