// gate_residual: y = residual + gate * branch; backward dbranch = gate * dy, dgate = sum over T of dy * branch.
// [B, T, D] in fp32, bf16 or fp16, arithmetic in fp32, y rounded once. Loop: chunks of tokens, shared between the
// threads. Reduction order of dgate: four rows at a time, added to the chunk's sum in the workspace, then over the
// chunks in order: the same bits for any number of threads. Zero path: none; the caller decides (add_bias.h).
#pragma once

#include "rows/steps.h"

namespace zeroblock {
namespace {

// The gate of a row in the order of pairs: an fp32 one is staged, a bf16 one has it as it is loaded.
ZB_INLINE const float* gate_in_pairs(const float* staged, const float*) { return staged; }
ZB_INLINE const bf16* gate_in_pairs(const float*, const bf16* row) { return row; }

// Rows of bf16 in pairs; a gate of fp32 is staged once per chunk.
template <class Gate>
void gate_residual_pairs(const GateResidual& p, ParallelFor run, const Operand<Gate>& gate, bool streamed) {
  const int64_t D = p.D;
  each_chunk(run, p.B, p.T, D, [&](int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    alignas(64) float gate_row[kStagedRow];
    if constexpr (is_float(static_cast<Gate*>(nullptr))) {
      stage(static_cast<bf16*>(nullptr), gate_row, gate.row(b, t_begin), D);
    }
    for (int64_t t = t_begin; t < t_end; ++t) {
      const int64_t row = (b * p.T + t) * D;
      const bf16* const residual = static_cast<const bf16*>(p.residual) + row;
      const bf16* const branch = static_cast<const bf16*>(p.branch) + row;
      bf16* const y = static_cast<bf16*>(p.y) + row;
      const Gate* const gate_of_row = gate_in_pairs(gate_row, gate.row(b, t).p);
      each_step(y, D, [&](int64_t i, auto lanes) ZB_BODY {
        const auto g = load_step(gate_of_row + i, lanes);
        const auto h = load_step(branch + i, lanes), x = load_step(residual + i, lanes);
        Vec2 out;
        for (int k = 0; k < kParts<decltype(lanes)>; ++k) out.v[k] = fmadd(part(g, k), part(h, k), part(x, k));
        store_step(y + i, out, lanes, streamed);
      });
    }
  });
}

template <class T, class Gate>
void gate_residual_fwd_of(T*, Gate*, const GateResidual& p, ParallelFor run) {
  const int64_t D = p.D;
  const ConstantRow scalar(p.scalar_gate != nullptr ? *p.scalar_gate : 1.0f);
  const Operand<Gate> gate = operand(p.gate, reinterpret_cast<const Gate*>(scalar.lanes));
  T* const y = static_cast<T*>(p.y);
  const bool streamed = streams(y, D, 3 * p.B * p.T * D * static_cast<int64_t>(sizeof(T)));
  if constexpr (kInPairs<T>) {
    if (D <= kStagedRow) return gate_residual_pairs(p, run, gate, streamed);
  }
  each_chunk(run, p.B, p.T, D, [&](int64_t, int64_t b, int64_t t_begin, int64_t t_end) {
    for (int64_t t = t_begin; t < t_end; ++t) {
      const int64_t row = (b * p.T + t) * D;
      const T* const residual = static_cast<const T*>(p.residual) + row;
      const T* const branch = static_cast<const T*>(p.branch) + row;
      const OperandRow<Gate> g = gate.row(b, t);
      each_column(0, D, [&](int64_t i, auto lanes) ZB_BODY {
        const Vec out = fmadd(g.at(i, lanes), load(branch + i, lanes), load(residual + i, lanes));
        store_or_stream(y + row + i, out, lanes, streamed);
      });
    }
  });
}

// Second stage of a per-sample dgate: over the chunks of each sample.
inline void finish_dgate(float* dgate, const Partials& partials, int64_t slot, int64_t B, ParallelFor run) {
  const int64_t D = partials.D;
  each_column_block(run, B, D, chunks_per_sample(partials.T), [&](int64_t b, int64_t begin, int64_t end) {
    each_column(begin, end, [&](int64_t i, auto lanes) ZB_BODY {
      store(dgate + b * D + i, partials.sample_sum(b, slot, i, lanes), lanes);
    });
  });
}

// Workspace: for each chunk the sums of a per-sample dgate, and the gate, staged.
ZB_INLINE Partials dgate_partials(const GateResidual& p, float* workspace) {
  return {workspace, p.dgate != nullptr ? 1 : 0, 1, p.T, p.D};
}

// dgate is elementwise for a per-token gate, [B, D] for a per-sample one and a single number for a scalar one. The last
// is a sum of B T D terms that may cancel, so it is taken in fp64, where the products are exact.
enum class GateForm { kSample, kToken, kScalar };

template <GateForm kForm, class T, class Gate>
void gate_residual_bwd_of(T*, Gate*, const GateResidual& p, ParallelFor run) {
  const int64_t D = p.D, chunks = p.B * chunks_per_sample(p.T);
  const ConstantRow scalar(p.scalar_gate != nullptr ? *p.scalar_gate : 1.0f);
  const Operand<Gate> gate = operand(p.gate, reinterpret_cast<const Gate*>(scalar.lanes));
  const bool wants_dgate = p.dgate != nullptr;
  T* const dbranch = static_cast<T*>(p.dbranch);
  T* const dgate = kForm == GateForm::kToken ? static_cast<T*>(p.dgate) : nullptr;
  const int64_t bytes = (dgate != nullptr ? 4 : 3) * p.B * p.T * D * static_cast<int64_t>(sizeof(T));
  const bool streamed = streams(dbranch, D, bytes) && streams(dgate, D, bytes);
  const Partials partials = dgate_partials(p, p.workspace);
  double* const exact = reinterpret_cast<double*>(p.workspace);
  each_chunk(run, p.B, p.T, D, [&](int64_t chunk, int64_t b, int64_t t_begin, int64_t t_end) {
    float* const dgate_sum = partials.sums(chunk, 0);
    Sum64 sum;
    OperandRow<float> sample_gate = {scalar.lanes, 0};
    if constexpr (kForm == GateForm::kSample) {
      sample_gate = {partials.staged(chunk, 0), -1};
      stage(dbranch, partials.staged(chunk, 0), gate.row(b, 0), D);
      partials.clear(chunk);
    }
    for_row_tiles(t_end - t_begin, D, [&](int64_t r, auto tile) ZB_BODY {
      const int64_t t = t_begin + r, start = (b * p.T + t) * D;
      const T* const dy = static_cast<const T*>(p.dy) + start;
      const T* const branch = static_cast<const T*>(p.branch) + start;
      const auto g = gate.template tile<kForm == GateForm::kToken>(b, t);
      each_step(dbranch, D, [&](int64_t i, auto lanes) ZB_BODY {
        constexpr int parts = kParts<decltype(lanes)>;
        Vec2 sums = {{zero(), zero()}};
#pragma GCC unroll 4
        for (int k = 0; k < tile.rows; ++k) {
          const auto d = load_step(tile.row(dy, k) + i, lanes);
          Vec2 out;
          if (dbranch != nullptr) {
            const auto gates = either_step(g, sample_gate, k, i, lanes);
            for (int j = 0; j < parts; ++j) out.v[j] = part(d, j) * part(gates, j);
            store_step(tile.row(dbranch + start, k) + i, out, lanes, streamed);
          }
          if (!wants_dgate) continue;
          const auto h = load_step(tile.row(branch, k) + i, lanes);
          for (int j = 0; j < parts; ++j) {
            if (kForm == GateForm::kToken) out.v[j] = part(d, j) * part(h, j);
            if (kForm == GateForm::kSample) sums.v[j] = fmadd(part(d, j), part(h, j), sums.v[j]);
            if (kForm == GateForm::kScalar) sum.add_product(part(d, j), part(h, j));
          }
          if (kForm == GateForm::kToken) store_step(tile.row(dgate + start, k) + i, out, lanes, streamed);
        }
        if (wants_dgate && kForm == GateForm::kSample) accumulate_step(dgate_sum, i, sums, lanes);
      });
    });
    if (wants_dgate && kForm == GateForm::kSample) unstage(dbranch, dgate_sum, D);
    if (wants_dgate && kForm == GateForm::kScalar) exact[chunk] = sum.total();
  });
  if (!wants_dgate || kForm == GateForm::kToken) return;
  if (kForm == GateForm::kSample) {
    finish_dgate(static_cast<float*>(p.dgate), partials, 0, p.B, run);
  } else {
    double total = 0.0;
    for (int64_t c = 0; c < chunks; ++c) total += exact[c];
    *static_cast<float*>(p.dgate) = static_cast<float>(total);
  }
}

inline void gate_residual_fwd(const GateResidual& p, ParallelFor run) {
  with_type(p.dtype,
            [&](auto* t) { with_operand_type(t, p.gate, [&](auto* m) { gate_residual_fwd_of(t, m, p, run); }); });
}

inline void gate_residual_bwd(const GateResidual& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* t) {
    float* const f = nullptr;
    if (is_per_token(p.gate)) {
      gate_residual_bwd_of<GateForm::kToken>(t, t, p, run);
    } else if (p.scalar_gate != nullptr) {
      gate_residual_bwd_of<GateForm::kScalar>(t, f, p, run);
    } else {
      gate_residual_bwd_of<GateForm::kSample>(t, f, p, run);
    }
  });
}

inline int64_t gate_residual_bwd_workspace(const GateResidual& p) {
  if (is_per_token(p.gate)) return 0;
  if (p.scalar_gate == nullptr) return dgate_partials(p, nullptr).size(p.B);
  return p.dgate == nullptr ? 0 : 2 * p.B * chunks_per_sample(p.T);  // a double per chunk
}

}  // namespace
}  // namespace zeroblock
