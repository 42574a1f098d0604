// Backward of residual_norm_modulate. With dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * (1 + scale)
// [* weight], d = dx_new + dx goes to residual; h the branch: dgate = d * norm_b(h) * act'(gate), and d * act(gate)
// goes through norm_b to h. Loop: chunks of tokens, each row through buffers of fp32, as in forward; every array is
// read or written once. Tokens with an index are walked in the stable order of their rows. Reduction order over tokens:
// eight rows, the chunk, the chunks of a sample in order, the samples in order. The sums of a chosen row k end where
// the row changes and where a chunk does: chunk c then writes slot c + k, which nobody else writes, for in sorted order
// neither c nor k goes back; at the end row k adds its slots in order. The same bits for any number of threads.
#pragma once

#include "residual_norm_sums.h"

namespace zeroblock {
namespace {

// One row of each array, of type T: where it is, or in a buffer of fp32.
template <class T>
struct BackwardRow {
  const T *x, *dy, *dx_new, *branch;
  T *dresidual, *dbranch;
};

// The operands of a row, and where in place the gradients of those that each token has go, or null.
struct StagedRows {
  static constexpr bool kInPlace = false;
  StagedRow factor, slope, plain, mult, scaled;
};
template <class M>
struct RowsInPlace {
  static constexpr bool kInPlace = true;
  RowInPlace<M> factor;
  OnePlus<RowInPlace<M>> mult;
  M *dgate, *dshift, *dscale;
  bool streamed;
  template <class Lanes>
  ZB_INLINE void put(M* to, int64_t i, Vec v, Lanes lanes) const {
    if (to != nullptr) store_or_stream(to + i, v, lanes, streamed);
  }
};

// The buffers of a chunk, and what is staged in them.
struct Staged {
  float *d, *mult, *scaled, *factor, *slope, *plain, *x, *dy, *dx_new, *branch, *dresidual, *dbranch;
  OperandCursor gate, scale;
  static constexpr int kBuffers = 12;

  Staged(const ResidualNormModulate& p, const Buffers& buffers) : gate(p.gate), scale(p.scale) {
    float** const rows[] = {&d, &mult, &scaled, &factor, &slope,     &plain,
                            &x, &dy,   &dx_new, &branch, &dresidual, &dbranch};
    for (int k = 0; k < kBuffers; ++k) *rows[k] = buffers.row(k);
  }

  // The operands of token t, staged where their rows change.
  ZB_INLINE StagedRows rows(void*, const ResidualNormModulate& p, int64_t b, int64_t t, bool affine, bool) {
    if (p.norm && p.dy != nullptr && scale.move(p.index, b, t, p.T)) {
      stage_mult(p, scale, mult);
      if (affine) stage_scaled(scale, scaled, p.D);
    }
    if (p.branch != nullptr && gate.move(p.index, b, t, p.T)) stage_gate(p, gate, factor, slope, plain);
    return {{factor}, {slope}, {plain}, {mult}, {scaled}};
  }
  // In place.
  template <class M>
  ZB_INLINE RowsInPlace<M> rows(M*, const ResidualNormModulate& p, int64_t b, int64_t t, bool, bool streamed) {
    const auto grad = [&](const RowOperand& a) {
      return a.kind == RowKind::kToken && a.grad != nullptr ? static_cast<M*>(a.grad) + (b * p.T + t) * p.D : nullptr;
    };
    scale.move(p.index, b, t, p.T);
    gate.move(p.index, b, t, p.T);
    return {gate.in_place<M>(ones.lanes),
            {scale.in_place<M>(kZeros)},
            grad(p.gate),
            grad(p.shift),
            grad(p.scale),
            streamed};
  }
  const ConstantRow ones{1.0f};
};

// dx = rstd * (g - mean_g - xhat * mean_gxhat) of one row, and the sums over tokens of its modulation.
template <class Mult>
struct NormGradient {
  Vec mean, rstd, mean_g, mean_gxhat;
  Mult mult;
  template <class T, class Lanes>
  ZB_INLINE Vec at(const BackwardRow<T>& r, int64_t i, Lanes lanes) const {
    const Vec xhat = (load(r.x + i, lanes) - mean) * rstd, g = load(r.dy + i, lanes) * mult.at(i, lanes);
    return fnmadd(xhat, mean_gxhat, g - mean_g) * rstd;
  }
};

template <class T, class Rows>
ZB_INLINE auto norm_row(const ResidualNormModulate& p, const BackwardRow<T>& r, const Rows& a, const RunningSums& sums,
                        int64_t row) {
  const int64_t D = p.D;
  const double inverse = 1.0 / static_cast<double>(D);
  const Vec mean = set1(p.mean != nullptr ? p.mean[row] : 0.0f), rstd = set1(p.rstd[row]);
  const bool affine = sums.wants(kWeight) || sums.wants(kBias);
  const RunningSums::Sum dy = sums.sum(kDy), dy_xhat = sums.sum(kDyXhat), dbias = sums.sum(kBias),
                         dweight = sums.sum(kWeight);
  double sum_g = 0, sum_gxhat = 0;
  for (int64_t begin = 0; begin < D; begin += kSummedColumns) {
    Vec part_g = zero(), part_gxhat = zero();
    each_column(begin, begin + kSummedColumns < D ? begin + kSummedColumns : D, [&](int64_t i, auto lanes) ZB_BODY {
      const Vec v = load(r.dy + i, lanes), xhat = keep_first((load(r.x + i, lanes) - mean) * rstd, lanes);
      const Vec g = v * a.mult.at(i, lanes);
      part_g += g;
      part_gxhat = fmadd(g, xhat, part_gxhat);
      dy.add(i, v, lanes);
      dy_xhat.add(i, v * xhat, lanes);
      if constexpr (Rows::kInPlace) {
        a.put(a.dshift, i, v, lanes);
        a.put(a.dscale, i, v * xhat, lanes);
      } else if (affine) {
        const Vec s = v * a.scaled.at(i, lanes);
        dbias.add(i, s, lanes);
        dweight.add(i, s * xhat, lanes);
      }
    });
    sum_g += static_cast<double>(sum(part_g));
    sum_gxhat += static_cast<double>(sum(part_gxhat));
  }
  if (!Rows::kInPlace && p.shift.kind == RowKind::kToken && p.shift.grad != nullptr) {
    write_row(p.shift.dtype, row_at(p.shift.dtype, p.shift.grad, row, D), nullptr, D, false,
              [&](int64_t i, auto lanes) ZB_BODY { return load(r.dy + i, lanes); });
  }
  if (!Rows::kInPlace && p.scale.kind == RowKind::kToken && p.scale.grad != nullptr) {
    const ConstantRow ones(1.0f);
    const OperandRow<float> weight = channel_row(p.weight, ones.lanes), bias = channel_row(p.bias, kZeros);
    write_row(p.scale.dtype, row_at(p.scale.dtype, p.scale.grad, row, D), nullptr, D, false,
              [&](int64_t i, auto lanes) ZB_BODY {
                const Vec xhat = (load(r.x + i, lanes) - mean) * rstd;
                return load(r.dy + i, lanes) * fmadd(xhat, weight.at(i, lanes), bias.at(i, lanes));
              });
  }
  const Vec mean_g = set1(p.rms ? 0.0f : static_cast<float>(sum_g * inverse));
  const Vec mean_gxhat = set1(static_cast<float>(sum_gxhat * inverse));
  return NormGradient<decltype(a.mult)>{mean, rstd, mean_g, mean_gxhat, a.mult};
}

// d of one row, given as d(i, lanes), to residual, branch and gate. `kept`: a buffer.
template <class T, class Rows, class At>
ZB_INLINE void gated_row_bwd(const ResidualNormModulate& p, const BackwardRow<T>& r, const Rows& a, float* kept,
                             const RunningSums& sums, int64_t row, bool stream_residual, bool stream_branch,
                             const At& d_at) {
  const int64_t D = p.D;
  const bool token_gate = p.gate.kind == RowKind::kToken && p.gate.grad != nullptr;
  const RunningSums::Sum dgate = sums.sum(kGate), dweight = sums.sum(kBranchWeight);
  const bool wants_gate = sums.wants(kGate), wants_weight = sums.wants(kBranchWeight), rms = p.branch_rms;
  const bool reads_branch = r.branch != nullptr && (wants_gate || wants_weight || token_gate || rms);
  const bool keeps = (token_gate && !Rows::kInPlace) || (rms && r.dbranch != nullptr);
  const Vec rstd = set1(rms ? p.branch_rstd[row] : 1.0f);
  Vec projection = zero();
  double total = 0;
  for (int64_t begin = 0; begin < D; begin += kSummedColumns) {
    each_column(begin, begin + kSummedColumns < D ? begin + kSummedColumns : D, [&](int64_t i, auto lanes) ZB_BODY {
      const Vec d = d_at(i, lanes);
      if (r.dresidual != nullptr) store_or_stream(r.dresidual + i, d, lanes, stream_residual);
      if (keeps) store(kept + i, d, lanes);
      if (!rms && r.dbranch != nullptr) store_or_stream(r.dbranch + i, d * a.factor.at(i, lanes), lanes, stream_branch);
      if (!reads_branch) return;
      const Vec hhat = load(r.branch + i, lanes) * rstd, product = d * hhat;
      if constexpr (Rows::kInPlace) {
        if (wants_gate) dgate.add(i, product, lanes);
        a.put(a.dgate, i, product, lanes);
      } else {
        if (wants_gate) dgate.add(i, product * a.slope.at(i, lanes), lanes);
        if (wants_weight) dweight.add(i, product * a.plain.at(i, lanes), lanes);
      }
      if (rms) projection = fmadd(keep_first(product, lanes), a.factor.at(i, lanes), projection);
    });
    total += static_cast<double>(sum(projection));
    projection = zero();
  }
  if constexpr (!Rows::kInPlace) {
    if (token_gate) {
      write_row(p.gate.dtype, row_at(p.gate.dtype, p.gate.grad, row, D), nullptr, D, false,
                [&](int64_t i, auto lanes) ZB_BODY {
                  return load(kept + i, lanes) * (load(r.branch + i, lanes) * rstd) * a.slope.at(i, lanes);
                });
    }
  }
  if (!rms || r.dbranch == nullptr) return;
  const Vec mean = set1(static_cast<float>(total / static_cast<double>(D)));
  each_column(0, D, [&](int64_t i, auto lanes) ZB_BODY {
    const Vec hhat = load(r.branch + i, lanes) * rstd;
    const Vec dh = fnmadd(hhat, mean, load(kept + i, lanes) * a.factor.at(i, lanes)) * rstd;
    store_or_stream(r.dbranch + i, dh, lanes, stream_branch);
  });
}

template <class T, class Rows>
ZB_LOOPS void backward_row(const ResidualNormModulate& p, const BackwardRow<T>& r, const Rows& a, float* kept,
                           const RunningSums& sums, int64_t row, bool stream_residual, bool stream_branch) {
  if (!(p.norm && p.dy != nullptr)) {
    gated_row_bwd(p, r, a, kept, sums, row, stream_residual, stream_branch,
                  [&](int64_t i, auto lanes) ZB_BODY { return load(r.dx_new + i, lanes); });
    return;
  }
  const auto dx = norm_row(p, r, a, sums, row);
  if (r.dx_new == nullptr) {
    gated_row_bwd(p, r, a, kept, sums, row, stream_residual, stream_branch,
                  [&](int64_t i, auto lanes) ZB_BODY { return dx.at(r, i, lanes); });
  } else {
    gated_row_bwd(p, r, a, kept, sums, row, stream_residual, stream_branch,
                  [&](int64_t i, auto lanes) ZB_BODY { return dx.at(r, i, lanes) + load(r.dx_new + i, lanes); });
  }
}

// Rows of several types, through buffers.
inline void mixed_row(const ResidualNormModulate& p, const StagedRows& rows, const Staged& a, const RunningSums& sums,
                      int64_t row, bool stream_residual, bool stream_branch) {
  const int64_t D = p.D;
  const auto widened = [&](DType dtype, const void* from, float* to) -> const float* {
    if (from == nullptr) return nullptr;
    widen_row(dtype, from, row, to, D);
    return to;
  };
  const bool normed = p.norm && p.dy != nullptr;
  const BackwardRow<float> r = {
      normed ? widened(p.x_dtype, p.x, a.x) : nullptr, normed ? widened(p.y_dtype, p.dy, a.dy) : nullptr,
      widened(p.x_dtype, p.dx_new, a.dx_new),          widened(p.branch_dtype, p.branch, a.branch),
      p.dresidual != nullptr ? a.dresidual : nullptr,  p.dbranch != nullptr ? a.dbranch : nullptr};
  backward_row(p, r, rows, a.d, sums, row, false, false);
  const auto put = [&](DType dtype, void* to, const float* from, bool streamed) {
    if (to == nullptr) return;
    write_row(dtype, row_at(dtype, to, row, D), nullptr, D, streamed,
              [&](int64_t i, auto lanes) ZB_BODY { return load(from + i, lanes); });
  };
  put(p.residual_dtype, p.dresidual, a.dresidual, stream_residual);
  put(p.branch_dtype, p.dbranch, a.dbranch, stream_branch);
}

// dscale of the sums of dy and dy * xhat.
template <class Lanes>
ZB_INLINE Vec scale_gradient(const ResidualNormModulate& p, Vec dy, Vec dy_xhat, int64_t i, Lanes lanes) {
  const Vec weighted = p.weight != nullptr ? dy_xhat * load(p.weight + i, lanes) : dy_xhat;
  return p.bias != nullptr ? fmadd(load(p.bias + i, lanes), dy, weighted) : weighted;
}

// Over the chunks of each sample, then over the samples.
inline void finish_tokens(const ResidualNormModulate& p, const Sums& sums, ParallelFor run) {
  const Partials partials = sums.partials();
  const int64_t D = p.D, chunks = sums.chunks;
  const auto put = [&](const RowOperand& a, bool batch, int64_t b, int64_t i, Vec v, auto lanes) ZB_BODY {
    float* const grad = static_cast<float*>(a.grad);
    if (!batch && grad != nullptr && a.kind == RowKind::kSample) store(grad + b * D + i, v, lanes);
    if (batch && grad != nullptr && a.kind == RowKind::kOne) store(grad + i, v, lanes);
    if (batch && a.dtable != nullptr && a.kind != RowKind::kIndexed) store(a.dtable + i, v, lanes);
  };
  const auto finish = [&](bool batch, int64_t b, int64_t i, auto lanes) ZB_BODY {
    Vec total[kSums];
    for (int k = 0; k < kSums; ++k) {
      total[k] = zero();
      if (sums.slot[k] < 0) continue;
      total[k] =
          batch ? partials.batch_sum(p.B, sums.slot[k], i, lanes) : partials.sample_sum(b, sums.slot[k], i, lanes);
      if (!batch && chunks > 0) store(partials.sums(b * chunks, sums.slot[k]) + i, total[k], lanes);
    }
    if (sums_tokens(p.shift)) put(p.shift, batch, b, i, total[kDy], lanes);
    if (sums_tokens(p.scale)) {
      put(p.scale, batch, b, i, scale_gradient(p, total[kDy], total[kDyXhat], i, lanes), lanes);
    }
    if (sums_tokens(p.gate)) put(p.gate, batch, b, i, total[kGate], lanes);
    if (!batch) return;
    if (p.dweight != nullptr) store(p.dweight + i, total[kWeight], lanes);
    if (p.dbias != nullptr) store(p.dbias + i, total[kBias], lanes);
    if (p.dbranch_weight != nullptr) store(p.dbranch_weight + i, total[kBranchWeight], lanes);
  };
  for (int stage = 0; stage < 2; ++stage) {
    const bool batch = stage == 1;
    each_column_block(run, batch ? 1 : p.B, D, sums.slots * (batch ? p.B : chunks),
                      [&](int64_t b, int64_t begin, int64_t end) {
                        each_column(begin, end, [&](int64_t i, auto lanes) ZB_BODY { finish(batch, b, i, lanes); });
                      });
  }
}

// Over the slots of each row that tokens chose, then over all of them for the table.
inline void finish_rows(const ResidualNormModulate& p, const Sums& sums, ParallelFor run) {
  const int64_t D = p.D, K = sums.rows;
  each_column_block(run, p.B * K, D, 1 + sums.chunks * sums.runs / K, [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t b = row / K, k = row - b * K, from = sums.begins(b)[k], to = sums.begins(b)[k + 1];
    const int64_t first = from / kChunkRows, count = to > from ? (to - 1) / kChunkRows - first + 1 : 0;
    each_column(begin, end, [&](int64_t i, auto lanes) ZB_BODY {
      const auto total = [&](int which) ZB_BODY {
        if (sums.run[which] < 0 || count == 0) return zero();
        return sum_partials(sums.run_slot(which, b, first + k) + i, count, D, lanes);
      };
      const auto put = [&](const RowOperand& a, Vec v) ZB_BODY {
        if (sums_runs(a) && k < a.count) store(static_cast<float*>(a.grad) + (b * a.count + k) * D + i, v, lanes);
      };
      put(p.shift, total(kDy));
      put(p.scale, scale_gradient(p, total(kDy), total(kDyXhat), i, lanes));
      put(p.gate, total(kGate));
    });
  });
  const RowOperand* const operands[] = {&p.shift, &p.scale, &p.gate};
  for (const RowOperand* a : operands) {
    if (!sums_runs(*a) || a->dtable == nullptr) continue;
    each_column_block(run, 1, D, p.B * a->count, [&](int64_t, int64_t begin, int64_t end) {
      each_column(begin, end, [&](int64_t i, auto lanes) ZB_BODY {
        store(a->dtable + i, sum_partials(static_cast<const float*>(a->grad) + i, p.B * a->count, D, lanes), lanes);
      });
    });
  }
}

// Whether the gradient of a row of each token, if there is one, may be streamed.
ZB_INLINE bool stream_tokens(const RowOperand& a, int64_t D, int64_t bytes) {
  return a.kind != RowKind::kToken || a.grad == nullptr || streams_rows(a.dtype, a.grad, D, bytes);
}

template <class T, class M>
void residual_norm_modulate_bwd_of(T* type, M* operand, const ResidualNormModulate& p, bool uniform, ParallelFor run) {
  const int64_t D = p.D, bytes = 12 * p.B * p.T * D;
  const Sums sums(p, p.workspace);
  const bool sorted = sums.rows > 0;
  if (sorted) sums.sort(p.index);
  const bool stream_residual = streams_rows(p.residual_dtype, p.dresidual, D, bytes);
  const bool stream_branch = streams_rows(p.branch_dtype, p.dbranch, D, bytes);
  const bool stream_operands = bytes > kStreamBytes && stream_tokens(p.gate, D, bytes) &&
                               stream_tokens(p.shift, D, bytes) && stream_tokens(p.scale, D, bytes);
  const int64_t buffer_count = Staged::kBuffers + sums.slots + 2 * sums.runs;
  each_chunk_with(run, p.B, p.T, D, buffer_count,
                  [&](const Buffers& buffers, int64_t chunk, int64_t b, int64_t begin, int64_t end) {
                    const int64_t c = chunk - b * sums.chunks;
                    Staged staged(p, buffers);
                    RunningSums running(sums, buffers, chunk, Staged::kBuffers);
                    const bool affine = running.wants(kWeight) || running.wants(kBias);
                    int64_t current = -1;
                    for (int64_t s = begin; s < end; ++s) {
                      const int64_t t = sorted ? sums.order()[b * p.T + s] : s, row = b * p.T + t;
                      if (sorted) {
                        const int64_t k = sums.chosen_row(p.index, row);
                        if (k != current && current >= 0) running.flush(sums, b, c, current);
                        current = k;
                      }
                      const auto rows = staged.rows(operand, p, b, t, affine, stream_operands);
                      if (uniform) {
                        const auto at = [&](const void* array) {
                          return array == nullptr ? nullptr : typed(type, array) + row * D;
                        };
                        const BackwardRow<T> r = {at(p.x),      at(p.dy),        at(p.dx_new),
                                                  at(p.branch), at(p.dresidual), at(p.dbranch)};
                        backward_row(p, r, rows, staged.d, running, row, stream_residual, stream_branch);
                      } else if constexpr (!decltype(rows)::kInPlace) {
                        mixed_row(p, rows, staged, running, row, stream_residual, stream_branch);
                      }
                      if (++running.rows == kRowsInSum) running.fold(D);
                    }
                    running.fold(D);
                    if (current >= 0) running.flush(sums, b, c, current);
                  });
  if (sums.slots > 0) finish_tokens(p, sums, run);
  if (sorted) finish_rows(p, sums, run);
}

inline void residual_norm_modulate_bwd(const ResidualNormModulate& p, ParallelFor run) {
  const bool uniform = is_of(p.y_dtype, p.x_dtype, p.dy) && is_of(p.branch_dtype, p.x_dtype, p.branch) &&
                       is_of(p.residual_dtype, p.x_dtype, p.dresidual);
  with_type(p.x_dtype, [&](auto* type) {
    with_operands(type, p.x_dtype, p, uniform,
                  [&](auto* operand) { residual_norm_modulate_bwd_of(type, operand, p, uniform, run); });
  });
}

inline int64_t residual_norm_modulate_bwd_workspace(const ResidualNormModulate& p) { return Sums(p, nullptr).size(); }

}  // namespace
}  // namespace zeroblock
