// residual_norm_modulate: x_new = residual + act(gate) * norm_b(branch); y = norm(x_new) [* weight + bias] * (1 +
// scale)
// + shift: every part optional, operands of every form and type (zeroblock.h), arithmetic in fp32, each result rounded
// once, y from x_new as stored. The plain forms have kernels of their own, which keep a row in registers.
// Loop: chunks of tokens, shared between the threads; a row goes through buffers of fp32 that L1 or L2 holds, so that
// each array is read or written once. Operands are staged where their row changes, or read in place where each token
// has its own. Zero path: none.
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

// The operands of a token in buffers, renewed where a row changes.
class StagedOperands {
 public:
  static constexpr int kBuffers = 3;
  StagedOperands(const ResidualNormModulate& p, const Buffers& buffers, int first)
      : p_(p),
        gate_(p.gate),
        shift_(p.shift),
        scale_(p.scale),
        factor_(buffers.row(first)),
        mult_(buffers.row(first + 1)),
        add_(buffers.row(first + 2)) {}

  ZB_INLINE StagedRow gate(int64_t b, int64_t t) {
    if (p_.branch != nullptr && gate_.move(p_.index, b, t, p_.T)) stage_gate(p_, gate_, factor_, nullptr, nullptr);
    return {factor_};
  }
  struct Modulation {
    StagedRow mult, add;
  };
  ZB_INLINE Modulation modulation(int64_t b, int64_t t) {
    const bool scale_moved = scale_.move(p_.index, b, t, p_.T), shift_moved = shift_.move(p_.index, b, t, p_.T);
    if (scale_moved) stage_mult(p_, scale_, mult_);
    if (shift_moved || (scale_moved && p_.bias != nullptr)) stage_add(p_, scale_, shift_, add_);
    return {{mult_}, {add_}};
  }

 private:
  const ResidualNormModulate& p_;
  OperandCursor gate_, shift_, scale_;
  float *const factor_, *const mult_, *const add_;
};

// The same where they are.
template <class M>
class OperandsInPlace {
 public:
  OperandsInPlace(const ResidualNormModulate& p, const Buffers&, int)
      : p_(p), gate_(p.gate), shift_(p.shift), scale_(p.scale) {}

  ZB_INLINE RowInPlace<M> gate(int64_t b, int64_t t) {
    gate_.move(p_.index, b, t, p_.T);
    return gate_.template in_place<M>(ones_.lanes);
  }
  struct Modulation {
    OnePlus<RowInPlace<M>> mult;
    RowInPlace<M> add;
  };
  ZB_INLINE Modulation modulation(int64_t b, int64_t t) {
    scale_.move(p_.index, b, t, p_.T);
    shift_.move(p_.index, b, t, p_.T);
    return {{scale_.template in_place<M>(kZeros)}, shift_.template in_place<M>(kZeros)};
  }

 private:
  const ResidualNormModulate& p_;
  OperandCursor gate_, shift_, scale_;
  const ConstantRow ones_{1.0f};
};

// Whether the operands are read in place: of type `dtype`, one of them for each token, and nothing is multiplied in.
inline bool in_place(const ResidualNormModulate& p, DType dtype) {
  bool tokens = false;
  const RowOperand* const operands[] = {&p.gate, &p.shift, &p.scale};
  for (const RowOperand* a : operands) {
    if (a->kind != RowKind::kNone && a->dtype != dtype) return false;
    tokens = tokens || a->kind == RowKind::kToken;
  }
  return tokens && !p.tanh && p.branch_weight == nullptr && p.weight == nullptr && p.bias == nullptr;
}

// f(M*) with the type of operands that are read in place, void where they are staged. `uniform`: the activations are of
// type T.
template <class T, class F>
ZB_INLINE void with_operands(T* type, DType dtype, const ResidualNormModulate& p, bool uniform, const F& f) {
  if (uniform && in_place(p, dtype)) return f(type);
  if constexpr (sizeof(T) != sizeof(float)) {
    if (uniform && in_place(p, DType::kF32)) return f(static_cast<float*>(nullptr));
  }
  f(static_cast<void*>(nullptr));
}
template <class M>
struct OperandsOf {
  using Type = OperandsInPlace<M>;
};
template <>
struct OperandsOf<void> {
  using Type = StagedOperands;
};

// x_new = residual + factor * h * rstd, in fp32 as it is stored; its sum. Written to `to` and x, unless null.
template <class T, class Row>
ZB_INLINE double gated_row(const T* residual, const T* h, Row factor, float rstd, T* to, float* x, int64_t D,
                           bool streamed) {
  const Vec scaled = set1(rstd);
  return sum_columns(D, [&](Vec acc, int64_t i, auto lanes) ZB_BODY {
    const Vec v = fmadd(load(h + i, lanes) * scaled, factor.at(i, lanes), load(residual + i, lanes));
    if (to != nullptr) store_or_stream(to + i, v, lanes, streamed);
    if (x == nullptr) return acc;
    const Vec kept = to != nullptr ? round_to(v, to) : v;
    store(x + i, kept, lanes);
    return acc + kept;
  });
}

// A row of x_new with its branch, or of the residual, in fp32 as it is stored; its sum, where there is a norm.
template <class T, class Row>
ZB_INLINE double forward_row(T* type, const ResidualNormModulate& p, int64_t row, Row factor, float* r, float* h,
                             float* x, bool uniform, bool streamed) {
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
    float* const kept = p.norm ? x : nullptr;
    return gated_row(typed(type, residual), typed(type, branch), factor, rstd, typed(type, to), kept, D, streamed);
  }
  gated_row(r, h, factor, rstd, static_cast<float*>(nullptr), x, D, false);
  write_row(p.x_dtype, to, x, D, streamed, [&](int64_t i, auto lanes) ZB_BODY { return load(x + i, lanes); });
  return row_sum(x, D);
}

template <class T, class M>
void residual_norm_modulate_fwd_of(T* type, M*, const ResidualNormModulate& p, bool uniform, ParallelFor run) {
  const int64_t D = p.D, bytes = 8 * p.B * p.T * D;
  const double inverse = 1.0 / static_cast<double>(D);
  const bool stream_x = streams_rows(p.x_dtype, p.x_new, D, bytes), stream_y = streams_rows(p.y_dtype, p.y, D, bytes);
  each_chunk_with(run, p.B, p.T, D, 6, [&](const Buffers& buffers, int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    float *const x = buffers.row(0), *const h = buffers.row(1), *const r = buffers.row(2);
    typename OperandsOf<M>::Type operands(p, buffers, 3);
    for (int64_t t = t_begin; t < t_end; ++t) {
      const int64_t row = b * p.T + t;
      const double sum = forward_row(type, p, row, operands.gate(b, t), r, h, x, uniform, stream_x);
      if (!p.norm) continue;
      const RowStats stats = summed_stats(x, D, inverse, sum, p.rms, p.eps);
      if (p.mean != nullptr) p.mean[row] = stats.mean;
      p.rstd[row] = stats.rstd;
      const auto modulation = operands.modulation(b, t);
      const Vec mean = set1(stats.mean), rstd = set1(stats.rstd);
      write_row(p.y_dtype, row_at(p.y_dtype, p.y, row, D), nullptr, D, stream_y, [&](int64_t i, auto lanes) ZB_BODY {
        return fmadd((load(x + i, lanes) - mean) * rstd, modulation.mult.at(i, lanes), modulation.add.at(i, lanes));
      });
    }
  });
}

inline void residual_norm_modulate_fwd(const ResidualNormModulate& p, ParallelFor run) {
  const bool uniform = is_of(p.branch_dtype, p.residual_dtype, p.branch) && is_of(p.x_dtype, p.residual_dtype, p.x_new);
  with_type(p.residual_dtype, [&](auto* type) {
    with_operands(type, p.residual_dtype, p, uniform,
                  [&](auto* operand) { residual_norm_modulate_fwd_of(type, operand, p, uniform, run); });
  });
}

}  // namespace
}  // namespace zeroblock
