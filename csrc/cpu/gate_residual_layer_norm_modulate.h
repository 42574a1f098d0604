// gate_residual_layer_norm_modulate: x_new = residual + gate * branch; y = layer_norm(x_new) * (1 + scale) + shift.
// [B, T, D] in fp32, bf16 or fp16, arithmetic in fp32. x_new is rounded to its type before its statistics are taken, so
// that y is exactly layer_norm_modulate(x_new).
// Backward is that of layer_norm_modulate with dx_new added, then dbranch = gate * dresidual and dgate = sum over T of
// dresidual * branch, in the same walk; where the caches do not hold the arrays, the walk before it prefetches what
// only this one reads (measured: python benchmarks/run.py --group memory_bound --filter gate_residual_layer_norm).
// Loop, reduction order and zero path are those of layer_norm_modulate.h.
#pragma once

#include "gate_residual.h"
#include "layer_norm_modulate.h"

namespace zeroblock {
namespace {

// The longest row of a streamed x_new that is held back, in L1, for its statistics and for y; a longer one is stored
// the ordinary way. A third of an L1 of 48 KB.
constexpr int64_t kHeldBytes = 16384;

// Copies whole vectors past the caches.
ZB_INLINE void stream_copy(void* to, const void* from, int64_t bytes) {
  for (int64_t k = 0; k < bytes; k += 32) {
    const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + k));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + k), v);
  }
}

// bf16 with an operand per token.
template <class Gate, class Scale, class Shift>
void gate_residual_layer_norm_modulate_staged(const GateResidualLayerNormModulate& p, ParallelFor run,
                                              const Operand<Gate>& gate, const Operand<Scale>& scale,
                                              const Operand<Shift>& shift, bool stream_x, bool stream_y) {
  const int64_t D = p.D;
  each_chunk(run, p.B, p.T, D, [&](int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    RowPair pair;
    StagedOperand gate_row, scale_row, shift_row;
    const OperandRow<Gate> gate_taken = gate_row.take(gate.row(b, t_begin), D);
    const OperandRow<Scale> scale_taken = scale_row.take(scale.row(b, t_begin), D);
    const OperandRow<Shift> shift_taken = shift_row.take(shift.row(b, t_begin), D);
    for (int64_t t = t_begin; t < t_end; t += 2) {
      const int64_t row = b * p.T + t, second = t + 1 < t_end ? 1 : 0;  // 0: the last row stands for both
      const OperandRow<Gate> g[2] = {staged_row(gate, gate_taken, b, t), staged_row(gate, gate_taken, b, t + second)};
      pair.fill(D, false, p.eps, [&](int64_t k, int64_t i, auto lanes) {
        const int64_t at = (row + k * second) * D + i;
        const auto x = fmadd(g[k].at(i, lanes), load(static_cast<const bf16*>(p.branch) + at, lanes),
                             load(static_cast<const bf16*>(p.residual) + at, lanes));
        store_or_stream(static_cast<bf16*>(p.x_new) + at, x, lanes, stream_x);
        return round_to(x, static_cast<const bf16*>(nullptr));
      });
      for (int64_t k = 0; k <= second; ++k) {
        p.mean[row + k] = pair.stats[k].mean;
        p.rstd[row + k] = pair.stats[k].rstd;
        pair.modulate<false>(k, static_cast<bf16*>(p.y) + (row + k) * D, D, {}, {},
                             staged_row(scale, scale_taken, b, t + k), staged_row(shift, shift_taken, b, t + k),
                             stream_y);
      }
    }
  });
}

// Rows of x_new, computed as norm_rows.h takes them. A streamed one is held back for the two stages that read it again.
template <bool kHold, class T>
struct GatedRows {
  static constexpr int64_t kHeld = kInPairs<T> ? 12 : 3;  // three tiles of rows
  const T* residual;
  const T* branch;
  const float* gate;
  T* x_new;
  T* held;  // read only when kHold
  int64_t D;
  template <class Lanes>
  ZB_INLINE auto operand(int64_t i, Lanes lanes) const {
    return load_step(gate + i, lanes);
  }
  template <class GateStep, class Lanes>
  ZB_INLINE auto take(const GateStep& g, int64_t row, int64_t i, Lanes lanes) const {
    const auto h = load_step(branch + row * D + i, lanes), x = load_step(residual + row * D + i, lanes);
    Vec2 out;
    for (int k = 0; k < kParts<Lanes>; ++k) out.v[k] = fmadd(part(g, k), part(h, k), part(x, k));
    const auto kept = store_step_rounded(x_new + row * D + i, out, lanes, kHold);
    if (kHold) keep_step(held + row % kHeld * D + i, kept, lanes);
    return kept;
  }
  ZB_INLINE const T* rows(int64_t row) const { return kHold ? held + row % kHeld * D : x_new + row * D; }
};

template <bool kHold, class T>
void gate_residual_layer_norm_modulate_tiles(const GateResidualLayerNormModulate& p, ParallelFor run,
                                             const Operand<float>& gate, const Operand<float>& scale,
                                             const Operand<float>& shift, bool stream_y) {
  using Source = GatedRows<kHold, T>;
  const int64_t D = p.D;
  const ConstantRow one(1.0f);
  each_chunk(run, p.B, p.T, D, [&](int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    const int64_t row = b * p.T + t_begin;
    T* const y = static_cast<T*>(p.y) + row * D;
    alignas(64) T held[kHold ? Source::kHeld * kStagedRow : 1];
    alignas(64) float gate_row[kStagedRow];
    SampleModulation modulation;
    stage(y, gate_row, gate.row(b, 0), D);
    modulation.take(y, D, channel_row(nullptr, one.lanes), channel_row(nullptr, kZeros), scale.row(b, 0),
                    shift.row(b, 0));
    norm_chunk(D, t_end - t_begin,
               Source{static_cast<const T*>(p.residual) + row * D, static_cast<const T*>(p.branch) + row * D, gate_row,
                      static_cast<T*>(p.x_new) + row * D, held, D},
               y, p.mean + row, p.rstd + row, false, p.eps, &modulation, stream_y);
  });
}

template <class T, class Gate, class Scale, class Shift>
void gate_residual_layer_norm_modulate_fwd_of(T* type, Gate*, Scale*, Shift*, const GateResidualLayerNormModulate& p,
                                              ParallelFor run) {
  const int64_t D = p.D, row_bytes = D * static_cast<int64_t>(sizeof(T)), bytes = 4 * p.B * p.T * row_bytes;
  const ConstantRow one(1.0f);
  const Operand<Gate> gate = operand(p.gate, reinterpret_cast<const Gate*>(one.lanes));
  const Operand<Scale> scale = operand(p.scale, reinterpret_cast<const Scale*>(kZeros));
  const Operand<Shift> shift = operand(p.shift, reinterpret_cast<const Shift*>(kZeros));
  const bool stream_y = streams(static_cast<T*>(p.y), D, bytes);
  bool stream_x = streams(static_cast<T*>(p.x_new), D, bytes);
  if constexpr (is_float(static_cast<Gate*>(nullptr)) && is_float(static_cast<Scale*>(nullptr)) &&
                is_float(static_cast<Shift*>(nullptr))) {
    if (in_tiles(static_cast<T*>(nullptr), D) && !is_per_token(p.gate) && !is_per_token(p.scale) &&
        !is_per_token(p.shift)) {
      return with_bool(stream_x, [&](auto hold) {
        gate_residual_layer_norm_modulate_tiles<hold.value, T>(p, run, gate, scale, shift, stream_y);
      });
    }
  }
  if constexpr (kInPairs<T> && !(is_float(static_cast<Gate*>(nullptr)) && is_float(static_cast<Scale*>(nullptr)) &&
                                 is_float(static_cast<Shift*>(nullptr)))) {
    if (D <= kStagedRow && !is_wide(type, p.scale) && !is_wide(type, p.shift)) {
      return gate_residual_layer_norm_modulate_staged(p, run, gate, scale, shift, stream_x, stream_y);
    }
  }
  stream_x = stream_x && row_bytes <= kHeldBytes && row_bytes % 32 == 0;
  const double inverse = 1.0 / static_cast<double>(D);
  each_chunk(run, p.B, p.T, D, [&](int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    alignas(64) char held[kHeldBytes];
    for (int64_t t = t_begin; t < t_end; ++t) {
      const int64_t row = b * p.T + t;
      const T* const residual = static_cast<const T*>(p.residual) + row * D;
      const T* const branch = static_cast<const T*>(p.branch) + row * D;
      T* const x_new = static_cast<T*>(p.x_new) + row * D;
      T* const x = stream_x ? reinterpret_cast<T*>(held) : x_new;
      const OperandRow<Gate> g = gate.row(b, t);
      const double sum = sum_columns(D, [&](Vec acc, int64_t i, auto lanes) ZB_BODY {
        store(x + i, fmadd(g.at(i, lanes), load(branch + i, lanes), load(residual + i, lanes)), lanes);
        return acc + load(x + i, lanes);  // as rounded
      });
      const RowStats stats = summed_stats(x, D, inverse, sum, false, p.eps);
      p.mean[row] = stats.mean;
      p.rstd[row] = stats.rstd;
      modulate_row<false>(x, static_cast<T*>(p.y) + row * D, D, stats, Affine{}, scale.row(b, t), shift.row(b, t),
                          stream_y);
      if (stream_x) stream_copy(x_new, x, row_bytes);
    }
  });
}

// Workspace: for each chunk the modulation's two sums and the gate's; its factor and the gate, staged.
constexpr int64_t kFactorRow = 0, kGateRow = 1;
ZB_INLINE Partials gated_partials(const GateResidualLayerNormModulate& p, float* workspace) {
  const bool wanted = p.dshift != nullptr || (p.dscale != nullptr && !is_per_token(p.scale)) ||
                      (p.dgate != nullptr && !is_per_token(p.gate));
  return {workspace, wanted ? 3 : 0, 2, p.T, p.D};
}

template <bool kTokenScale, bool kTokenGate, class T, class Scale, class Gate>
void gate_residual_layer_norm_modulate_bwd_of(T*, Scale*, Gate*, const GateResidualLayerNormModulate& p,
                                              ParallelFor run) {
  const int64_t D = p.D;
  const ConstantRow one(1.0f);
  const Operand<Gate> gate = operand(p.gate, reinterpret_cast<const Gate*>(one.lanes));
  const Operand<Scale> scale = operand(p.scale, reinterpret_cast<const Scale*>(kZeros));
  const bool wants_xhat_sum = !kTokenScale && p.dscale != nullptr;
  const bool wants_sum = !kTokenScale && (p.dshift != nullptr || p.dscale != nullptr);
  const bool wants_dy = kTokenScale && p.dshift != nullptr;
  T* const dresidual = static_cast<T*>(p.dresidual);
  T* const dbranch = static_cast<T*>(p.dbranch);
  T* const token_dgate = kTokenGate ? static_cast<T*>(p.dgate) : nullptr;
  const bool wants_gate = p.dgate != nullptr && !kTokenGate;
  const int64_t bytes = 6 * p.B * p.T * D * static_cast<int64_t>(sizeof(T));
  const bool streamed = streams(dresidual, D, bytes) && streams(dbranch, D, bytes) && streams(token_dgate, D, bytes);
  const Partials partials = gated_partials(p, p.workspace);
  each_chunk(run, p.B, p.T, D, [&](int64_t chunk, int64_t b, int64_t t_begin, int64_t t_end) {
    float* const gate_sum = wants_gate ? partials.sums(chunk, kSumExtra) : nullptr;
    const ModulateSums sums = {wants_xhat_sum ? partials.sums(chunk, kSumScaledDyXhat) : nullptr,
                               wants_sum ? partials.sums(chunk, kSumScaledDy) : nullptr,
                               wants_dy ? partials.sums(chunk, kSumScaledDy) : nullptr};
    float* const factor = partials.staged(chunk, kFactorRow);
    float* const gate_row = partials.staged(chunk, kGateRow);
    if constexpr (!kTokenScale) stage_factor<false>(dresidual, factor, D, scale.row(b, 0), Affine{}.weight);
    if constexpr (!kTokenGate) stage(dresidual, gate_row, gate.row(b, 0), D);
    partials.clear(chunk);
    for_row_tiles(t_end - t_begin, D, [&](int64_t r, auto tile) ZB_BODY {
      const int64_t t = t_begin + r, row = b * p.T + t, start = row * D;
      const T* const branch = static_cast<const T*>(p.branch) + start;
      const T* const dx_new = p.dx_new != nullptr ? static_cast<const T*>(p.dx_new) + start : nullptr;
      const auto g = gate.template tile<kTokenGate>(b, t);
      const ModulateTile<kTokenScale, T, Scale> inputs = {
          D,
          static_cast<const T*>(p.x_new) + start,
          static_cast<const T*>(p.dy) + start,
          p.mean + row,
          p.rstd + row,
          {factor, -1},
          scale.template tile<kTokenScale>(b, t),
          Affine{},
          sums,
          kTokenScale && p.dscale != nullptr ? static_cast<Scale*>(p.dscale) + start : nullptr,
          {streamed && p.dgate != nullptr ? branch : nullptr, streamed ? dx_new : nullptr}};
      Vec2 gate_part = {{zero(), zero()}};
      modulate_bwd_tile<false>(
          tile, inputs,
          [&](int64_t i, int k, Vec2 grad, auto lanes) ZB_BODY {
            constexpr int parts = kParts<decltype(lanes)>;
            if (dx_new != nullptr) {
              const auto direct = load_step(tile.row(dx_new, k) + i, lanes);
              for (int j = 0; j < parts; ++j) grad.v[j] += part(direct, j);
            }
            store_step(tile.row(dresidual + start, k) + i, grad, lanes, streamed);
            Vec2 out;
            if (dbranch != nullptr) {
              const auto gates = either_step(g, {gate_row, -1}, k, i, lanes);
              for (int j = 0; j < parts; ++j) out.v[j] = grad.v[j] * part(gates, j);
              store_step(tile.row(dbranch + start, k) + i, out, lanes, streamed);
            }
            if (p.dgate == nullptr) return;
            const auto h = load_step(tile.row(branch, k) + i, lanes);
            if (kTokenGate) {
              for (int j = 0; j < parts; ++j) out.v[j] = grad.v[j] * part(h, j);
              store_step(tile.row(token_dgate + start, k) + i, out, lanes, streamed);
            } else {
              for (int j = 0; j < parts; ++j) gate_part.v[j] = fmadd(grad.v[j], part(h, j), gate_part.v[j]);
            }
          },
          [&](int64_t i, auto lanes) ZB_BODY {
            if (gate_sum == nullptr) return;
            accumulate_step(gate_sum, i, gate_part, lanes);
            gate_part = {{zero(), zero()}};
          });
    });
    sums.unstage(dresidual, D);
    if (gate_sum != nullptr) unstage(dresidual, gate_sum, D);
  });
  const ModulateGrads grads = {p.dshift,    kTokenScale ? nullptr : static_cast<float*>(p.dscale),
                               nullptr,     nullptr,
                               nullptr,     nullptr,
                               kTokenScale, kSumScaledDy};
  finish_modulate(grads, p.scale, partials, p.B, run);
  if (wants_gate) finish_dgate(static_cast<float*>(p.dgate), partials, kSumExtra, p.B, run);
}

inline void gate_residual_layer_norm_modulate_fwd(const GateResidualLayerNormModulate& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* t) {
    with_operand_type(t, p.gate, [&](auto* gate) {
      with_operand_type(t, p.scale, [&](auto* scale) {
        with_operand_type(
            t, p.shift, [&](auto* shift) { gate_residual_layer_norm_modulate_fwd_of(t, gate, scale, shift, p, run); });
      });
    });
  });
}

inline void gate_residual_layer_norm_modulate_bwd(const GateResidualLayerNormModulate& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* t) {
    float* const f = nullptr;
    const bool token_gate = is_per_token(p.gate);
    if (is_per_token(p.scale)) {
      with_operand_type(t, p.scale, [&](auto* scale) {
        if (token_gate) {
          gate_residual_layer_norm_modulate_bwd_of<true, true>(t, scale, t, p, run);
        } else {
          gate_residual_layer_norm_modulate_bwd_of<true, false>(t, scale, f, p, run);
        }
      });
    } else {
      if (token_gate) {
        gate_residual_layer_norm_modulate_bwd_of<false, true>(t, f, t, p, run);
      } else {
        gate_residual_layer_norm_modulate_bwd_of<false, false>(t, f, f, p, run);
      }
    }
  });
}

inline int64_t gate_residual_layer_norm_modulate_bwd_workspace(const GateResidualLayerNormModulate& p) {
  return gated_partials(p, nullptr).size(p.B);
}

}  // namespace
}  // namespace zeroblock
