// residual_norm_modulate: x_new = residual + act(gate) * norm_b(branch); y = norm(x_new) [* weight + bias] * (1 + scale)
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
ZB_INLINE void stage_gate(const ResidualNormModulate& p, const OperandCursor& gate, float* factor, float* slope,
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
ZB_INLINE void stage_mult(const ResidualNormModulate& p, const OperandCursor& scale, float* mult) {
  const ConstantRow ones(1.0f);
  const OperandRow<float> weight = channel_row(p.weight, ones.lanes);
  const Vec one = set1(1.0f);
  scale.each(p.D, [&](int64_t i, Vec s, auto lanes)
                      ZB_BODY { store(mult + i, (one + s) * weight.at(i, lanes), lanes); });
}

// bias * (1 + scale) + shift.
ZB_INLINE void stage_add(const ResidualNormModulate& p, const OperandCursor& scale, const OperandCursor& shift,
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

// One row of x_new, kept in fp32 as it is stored; 1 / rms of the branch.
ZB_INLINE float gated_row(const ResidualNormModulate& p, int64_t row, const float* factor, float* h, float* x,
                          bool streamed) {
  const int64_t D = p.D;
  float rstd = 1.0f;
  each_value(p.branch_dtype, row_at(p.branch_dtype, p.branch, row, D), D,
             [&](int64_t i, Vec v, auto lanes) ZB_BODY { store(h + i, v, lanes); });
  if (p.branch_rms) {
    rstd = inverse_root(squares_about(h, D, 0.0f) / static_cast<double>(D), 0.0, true, p.branch_eps);
    p.branch_rstd[row] = rstd;
  }
  const Vec scaled = set1(rstd);
  void* const to = row_at(p.x_dtype, p.x_new, row, D);
  with_type(p.residual_dtype, [&](auto* type) {
    const auto* const residual =
        static_cast<decltype(type)>(const_cast<void*>(row_at(p.residual_dtype, p.residual, row, D)));
    write_row(p.x_dtype, to, x, D, streamed, [&](int64_t i, auto lanes) ZB_BODY {
      return fmadd(load(h + i, lanes) * scaled, load(factor + i, lanes), load(residual + i, lanes));
    });
  });
  return rstd;
}

inline void residual_norm_modulate_fwd(const ResidualNormModulate& p, ParallelFor run) {
  const int64_t D = p.D, bytes = 8 * p.B * p.T * D;
  const double inverse = 1.0 / static_cast<double>(D);
  const bool stream_x = streams_rows(p.x_dtype, p.x_new, D, bytes), stream_y = streams_rows(p.y_dtype, p.y, D, bytes);
  each_chunk_with(run, p.B, p.T, D, 5, [&](const Buffers& buffers, int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    float *const x = buffers.row(0), *const h = buffers.row(1), *const factor = buffers.row(2);
    float *const mult = buffers.row(3), *const add = buffers.row(4);
    OperandCursor gate(p.gate), shift(p.shift), scale(p.scale);
    for (int64_t t = t_begin; t < t_end; ++t) {
      const int64_t row = b * p.T + t;
      if (p.branch != nullptr) {
        if (gate.move(p.index, b, t, p.T)) stage_gate(p, gate, factor, nullptr, nullptr);
        gated_row(p, row, factor, h, x, stream_x);
      } else {
        each_value(p.residual_dtype, row_at(p.residual_dtype, p.residual, row, D), D,
                   [&](int64_t i, Vec v, auto lanes) ZB_BODY { store(x + i, v, lanes); });
      }
      if (!p.norm) continue;
      const RowStats stats = summed_stats(x, D, inverse, p.rms ? 0.0 : row_sum(x, D), p.rms, p.eps);
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

}  // namespace
}  // namespace zeroblock
