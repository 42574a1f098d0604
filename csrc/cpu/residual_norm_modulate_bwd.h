// Backward of residual_norm_modulate. With dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * (1 + scale)
// [* weight], d = dx_new + dx goes to residual; h the branch: dgate = d * norm_b(h) * act'(gate), and d * act(gate) goes
// through norm_b to h.
// Loop: chunks of tokens, each row through buffers of fp32, as in forward; every array is read or written once. Tokens
// with an index are walked in the stable order of their rows.
// Reduction order over tokens: eight rows, the chunk, the chunks of a sample in order, the samples in order. The sums of
// a chosen row k end where the row changes and where a chunk does: chunk c then writes slot c + k, which nobody else
// writes, for in sorted order neither c nor k goes back; at the end row k adds its slots in order. The same bits for any
// number of threads.
#pragma once

#include "residual_norm_modulate.h"

namespace zeroblock {
namespace {

// What is summed over tokens: dy, dy * xhat, and each times (1 + scale); dgate, and the gradient of branch_weight.
enum Summed : int { kDy, kDyXhat, kBias, kWeight, kGate, kBranchWeight, kSums };
constexpr int64_t kRowsInSum = 8;  // added up before they join the sum of the chunk

ZB_INLINE bool sums_tokens(const RowOperand& a) {
  const bool rows = a.grad != nullptr && (a.kind == RowKind::kOne || a.kind == RowKind::kSample);
  return rows || (a.dtable != nullptr && a.kind != RowKind::kIndexed);
}
ZB_INLINE bool sums_runs(const RowOperand& a) { return a.grad != nullptr && a.kind == RowKind::kIndexed; }

// The workspace: for each chunk a row of each sum that is wanted; for each sum of chosen rows, slots; then, as int32,
// the order of the tokens of each sample and where in it each row begins.
struct Sums {
  int64_t B, T, D, chunks, rows;  // rows to choose from, 0 without an index
  int slot[kSums], run[kSums];    // -1: not wanted
  int slots = 0, runs = 0;
  float* workspace;

  Sums(const ResidualNormModulate& p, float* memory)
      : B(p.B), T(p.T), D(p.D), chunks(chunks_per_sample(p.T)), rows(0), workspace(memory) {
    for (int k = 0; k < kSums; ++k) slot[k] = run[k] = -1;
    const RowOperand* const operands[] = {&p.gate, &p.shift, &p.scale};
    for (const RowOperand* a : operands) {
      if (sums_runs(*a) && a->count > rows) rows = a->count;
    }
    const bool normed = p.norm && p.dy != nullptr;
    if (normed && sums_tokens(p.scale)) slot[kDyXhat] = slots++;
    if (normed && (sums_tokens(p.shift) || (p.bias != nullptr && slot[kDyXhat] >= 0))) slot[kDy] = slots++;
    if (normed && p.dweight != nullptr) slot[kWeight] = slots++;
    if (normed && p.dbias != nullptr) slot[kBias] = slots++;
    if (sums_tokens(p.gate)) slot[kGate] = slots++;
    if (p.dbranch_weight != nullptr) slot[kBranchWeight] = slots++;
    if (normed && sums_runs(p.scale)) run[kDyXhat] = runs++;
    if (normed && (sums_runs(p.shift) || (p.bias != nullptr && run[kDyXhat] >= 0))) run[kDy] = runs++;
    if (sums_runs(p.gate)) run[kGate] = runs++;
  }

  ZB_INLINE Partials partials() const { return {workspace, slots, 0, T, D}; }
  ZB_INLINE int64_t run_slots() const { return chunks + rows; }
  ZB_INLINE float* run_slot(int which, int64_t b, int64_t k) const {
    return workspace + B * chunks * slots * D + ((run[which] * B + b) * run_slots() + k) * D;
  }
  ZB_INLINE int32_t* order() const {
    return reinterpret_cast<int32_t*>(workspace + B * (chunks * slots + run_slots() * runs) * D);
  }
  ZB_INLINE int32_t* begins(int64_t b) const { return order() + B * T + b * (rows + 1); }
  ZB_INLINE int64_t size() const {
    return B * (chunks * slots + run_slots() * runs) * D + (rows > 0 ? B * (T + rows + 1) : 0);
  }
  ZB_INLINE int64_t chosen_row(const int32_t* index, int64_t token) const {
    const int64_t k = index[token];
    return k < 0 ? 0 : k < rows ? k : rows - 1;
  }

  // A stable counting sort.
  void sort(const int32_t* index) const {
    for (int64_t b = 0; b < B; ++b) {
      int32_t* const begin = begins(b);
      std::memset(begin, 0, static_cast<size_t>(rows + 1) * sizeof(int32_t));
      for (int64_t t = 0; t < T; ++t) ++begin[chosen_row(index, b * T + t) + 1];
      for (int64_t k = 0; k < rows; ++k) begin[k + 1] += begin[k];
      for (int64_t t = 0; t < T; ++t) order()[b * T + begin[chosen_row(index, b * T + t)]++] = static_cast<int32_t>(t);
      for (int64_t k = rows; k > 0; --k) begin[k] = begin[k - 1];
      begin[0] = 0;
    }
  }
};

// The sums of one chunk while it is walked: `now` of the last rows, `total` of those before.
struct RunningSums {
  float *now[2 * kSums], *total[2 * kSums];
  int64_t rows = 0;

  RunningSums(const Sums& sums, const Buffers& buffers, int64_t chunk, int first) {
    const Partials partials = sums.partials();
    for (int k = 0; k < kSums; ++k) {
      const bool wanted = sums.slot[k] >= 0, run = sums.run[k] >= 0;
      now[k] = wanted ? buffers.row(first++) : nullptr;
      total[k] = wanted ? partials.sums(chunk, sums.slot[k]) : nullptr;
      now[kSums + k] = run ? buffers.row(first++) : nullptr;
      total[kSums + k] = run ? buffers.row(first++) : nullptr;
    }
    for (int k = 0; k < 2 * kSums; ++k) clear(now[k], sums.D), clear(total[k], sums.D);
  }
  ZB_INLINE static void clear(float* row, int64_t D) {
    if (row != nullptr) std::memset(row, 0, static_cast<size_t>(D) * sizeof(float));
  }
  ZB_INLINE void add(int which, int64_t i, Vec v, OneVec lanes) const { add_lanes(which, i, v, lanes); }
  ZB_INLINE void add(int which, int64_t i, Vec v, int lanes) const { add_lanes(which, i, v, lanes); }
  template <class Lanes>
  ZB_INLINE void add_lanes(int which, int64_t i, Vec v, Lanes lanes) const {
    accumulate(now[which], i, v, lanes);
    accumulate(now[kSums + which], i, v, lanes);
  }
  ZB_INLINE bool wants(int which) const { return now[which] != nullptr || now[kSums + which] != nullptr; }

  void fold(int64_t D) {
    rows = 0;
    for (int k = 0; k < 2 * kSums; ++k) {
      if (now[k] == nullptr) continue;
      each_column(0, D, [&](int64_t i, auto lanes) ZB_BODY {
        store(total[k] + i, load(total[k] + i, lanes) + load(now[k] + i, lanes), lanes);
        store(now[k] + i, zero(), lanes);
      });
    }
  }
  // Ends the sums of row k in chunk c of sample b.
  void flush(const Sums& sums, int64_t b, int64_t c, int64_t k) {
    fold(sums.D);
    for (int which = 0; which < kSums; ++which) {
      float* const row = total[kSums + which];
      if (row == nullptr) continue;
      std::memcpy(sums.run_slot(which, b, c + k), row, static_cast<size_t>(sums.D) * sizeof(float));
      clear(row, sums.D);
    }
  }
};

// The buffers of a chunk, and what is staged in them.
struct BackwardRows {
  const ResidualNormModulate& p;
  float *c, *dy, *d, *h, *mult, *scaled, *factor, *slope, *plain;
  OperandCursor gate, scale;
  static constexpr int kBuffers = 9;

  BackwardRows(const ResidualNormModulate& params, const Buffers& buffers)
      : p(params), gate(params.gate), scale(params.scale) {
    float** const rows[] = {&c, &dy, &d, &h, &mult, &scaled, &factor, &slope, &plain};
    for (int k = 0; k < kBuffers; ++k) *rows[k] = buffers.row(k);
  }
};

// d of one row, where dy reaches it.
ZB_INLINE void norm_row(BackwardRows& a, const RunningSums& sums, int64_t b, int64_t t) {
  const ResidualNormModulate& p = a.p;
  const int64_t D = p.D, row = b * p.T + t;
  const double inverse = 1.0 / static_cast<double>(D);
  const Vec one = set1(1.0f), mean = set1(p.mean != nullptr ? p.mean[row] : 0.0f), rstd = set1(p.rstd[row]);
  const bool affine = sums.wants(kWeight) || sums.wants(kBias);
  float *const c = a.c, *const d = a.dy, *const mult = a.mult, *const scaled = a.scaled;
  if (a.scale.move(p.index, b, t, p.T)) {
    stage_mult(p, a.scale, mult);
    if (affine) {
      a.scale.each(D, [&](int64_t i, Vec s, auto lanes) ZB_BODY { store(scaled + i, one + s, lanes); });
    }
  }
  each_value(p.x_dtype, row_at(p.x_dtype, p.x, row, D), D,
             [&](int64_t i, Vec v, auto lanes) ZB_BODY { store(c + i, v - mean, lanes); });
  each_value(p.y_dtype, row_at(p.y_dtype, p.dy, row, D), D, [&](int64_t i, Vec v, auto lanes) ZB_BODY {
    store(d + i, v, lanes);
    const Vec xhat = load(c + i, lanes) * rstd;
    sums.add(kDy, i, v, lanes);
    sums.add(kDyXhat, i, v * xhat, lanes);
    if (affine) {
      const Vec s = v * load(scaled + i, lanes);
      sums.add(kBias, i, s, lanes);
      sums.add(kWeight, i, s * xhat, lanes);
    }
  });
  if (p.shift.kind == RowKind::kToken && p.shift.grad != nullptr) {
    write_row(p.shift.dtype, row_at(p.shift.dtype, p.shift.grad, row, D), nullptr, D, false,
              [&](int64_t i, auto lanes) ZB_BODY { return load(d + i, lanes); });
  }
  if (p.scale.kind == RowKind::kToken && p.scale.grad != nullptr) {
    const ConstantRow ones(1.0f);
    const OperandRow<float> weight = channel_row(p.weight, ones.lanes), bias = channel_row(p.bias, kZeros);
    write_row(p.scale.dtype, row_at(p.scale.dtype, p.scale.grad, row, D), nullptr, D, false,
              [&](int64_t i, auto lanes) ZB_BODY {
                const Vec xhat = load(c + i, lanes) * rstd;
                return load(d + i, lanes) * fmadd(xhat, weight.at(i, lanes), bias.at(i, lanes));
              });
  }
  const double sum_g = p.rms ? 0.0 : sum_columns(D, [&](Vec acc, int64_t i, auto lanes) ZB_BODY {
    return fmadd(load(d + i, lanes), load(mult + i, lanes), acc);
  });
  const double sum_gc = sum_columns(D, [&](Vec acc, int64_t i, auto lanes) ZB_BODY {
    return fmadd(load(d + i, lanes) * load(mult + i, lanes), load(c + i, lanes), acc);
  });
  const Vec mean_g = set1(static_cast<float>(sum_g * inverse));
  const Vec mean_gxhat = set1(static_cast<float>(sum_gc * inverse * static_cast<double>(p.rstd[row])));
  const auto dx = [&](int64_t i, auto lanes) ZB_BODY {
    const Vec g = load(d + i, lanes) * load(mult + i, lanes);
    return fnmadd(load(c + i, lanes) * rstd, mean_gxhat, g - mean_g) * rstd;
  };
  if (p.dx_new == nullptr) {
    each_column(0, D, [&](int64_t i, auto lanes) ZB_BODY { store(a.d + i, dx(i, lanes), lanes); });
  } else {
    each_value(p.x_dtype, row_at(p.x_dtype, p.dx_new, row, D), D,
               [&](int64_t i, Vec v, auto lanes) ZB_BODY { store(a.d + i, dx(i, lanes) + v, lanes); });
  }
}

// From d to the branch and its gate.
ZB_INLINE void branch_row(BackwardRows& a, const RunningSums& sums, int64_t b, int64_t t, bool streamed) {
  const ResidualNormModulate& p = a.p;
  const int64_t D = p.D, row = b * p.T + t;
  const bool token_gate = p.gate.kind == RowKind::kToken && p.gate.grad != nullptr;
  const bool wants_gate = sums.wants(kGate) || token_gate, wants_weight = sums.wants(kBranchWeight);
  const float *const d = a.d, *const factor = a.factor, *const slope = a.slope, *const plain = a.plain;
  float* const h = a.h;
  if (a.gate.move(p.index, b, t, p.T)) stage_gate(p, a.gate, a.factor, a.slope, a.plain);
  const float branch_rstd = p.branch_rms ? p.branch_rstd[row] : 1.0f;
  const Vec rstd = set1(branch_rstd);
  if (wants_gate || wants_weight || p.branch_rms) {
    each_value(p.branch_dtype, row_at(p.branch_dtype, p.branch, row, D), D, [&](int64_t i, Vec v, auto lanes) ZB_BODY {
      const Vec hhat = v * rstd, product = load(d + i, lanes) * hhat;
      store(h + i, hhat, lanes);
      if (wants_gate) sums.add(kGate, i, product * load(slope + i, lanes), lanes);
      if (wants_weight) sums.add(kBranchWeight, i, product * load(plain + i, lanes), lanes);
    });
  }
  if (token_gate) {
    write_row(p.gate.dtype, row_at(p.gate.dtype, p.gate.grad, row, D), nullptr, D, false,
              [&](int64_t i, auto lanes)
                  ZB_BODY { return load(d + i, lanes) * load(h + i, lanes) * load(slope + i, lanes); });
  }
  if (p.dbranch == nullptr) return;
  void* const to = row_at(p.branch_dtype, p.dbranch, row, D);
  if (!p.branch_rms) {
    write_row(p.branch_dtype, to, nullptr, D, streamed,
              [&](int64_t i, auto lanes) ZB_BODY { return load(d + i, lanes) * load(factor + i, lanes); });
    return;
  }
  const double sum = sum_columns(D, [&](Vec acc, int64_t i, auto lanes) ZB_BODY {
    return fmadd(load(d + i, lanes) * load(factor + i, lanes), load(h + i, lanes), acc);
  });
  const Vec mean = set1(static_cast<float>(sum / static_cast<double>(D)));
  write_row(p.branch_dtype, to, nullptr, D, streamed, [&](int64_t i, auto lanes) ZB_BODY {
    return fnmadd(load(h + i, lanes), mean, load(d + i, lanes) * load(factor + i, lanes)) * rstd;
  });
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
      total[k] = batch ? partials.batch_sum(p.B, sums.slot[k], i, lanes)
                       : partials.sample_sum(b, sums.slot[k], i, lanes);
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

inline void residual_norm_modulate_bwd(const ResidualNormModulate& p, ParallelFor run) {
  const int64_t D = p.D, bytes = 12 * p.B * p.T * D;
  const Sums sums(p, p.workspace);
  const bool sorted = sums.rows > 0, normed = p.norm && p.dy != nullptr;
  if (sorted) sums.sort(p.index);
  const bool stream_residual = streams_rows(p.residual_dtype, p.dresidual, D, bytes);
  const bool stream_branch = streams_rows(p.branch_dtype, p.dbranch, D, bytes);
  const int64_t buffer_count = BackwardRows::kBuffers + sums.slots + 2 * sums.runs;
  each_chunk_with(run, p.B, p.T, D, buffer_count,
                  [&](const Buffers& buffers, int64_t chunk, int64_t b, int64_t begin, int64_t end) {
                    const int64_t c = chunk - b * sums.chunks;
                    BackwardRows rows(p, buffers);
                    RunningSums running(sums, buffers, chunk, BackwardRows::kBuffers);
                    int64_t current = -1;
                    for (int64_t s = begin; s < end; ++s) {
                      const int64_t t = sorted ? sums.order()[b * p.T + s] : s, row = b * p.T + t;
                      if (sorted) {
                        const int64_t k = sums.chosen_row(p.index, row);
                        if (k != current && current >= 0) running.flush(sums, b, c, current);
                        current = k;
                      }
                      if (normed) {
                        norm_row(rows, running, b, t);
                      } else {
                        each_value(p.x_dtype, row_at(p.x_dtype, p.dx_new, row, D), D,
                                   [&](int64_t i, Vec v, auto lanes) ZB_BODY { store(rows.d + i, v, lanes); });
                      }
                      if (p.dresidual != nullptr) {
                        write_row(p.residual_dtype, row_at(p.residual_dtype, p.dresidual, row, D), nullptr, D,
                                  stream_residual,
                                  [&](int64_t i, auto lanes) ZB_BODY { return load(rows.d + i, lanes); });
                      }
                      if (p.branch != nullptr) branch_row(rows, running, b, t, stream_branch);
                      if (++running.rows == kRowsInSum) running.fold(D);
                    }
                    running.fold(D);
                    if (current >= 0) running.flush(sums, b, c, current);
                  });
  if (sums.slots > 0) finish_tokens(p, sums, run);
  if (sorted) finish_rows(p, sums, run);
}

inline int64_t residual_norm_modulate_bwd_workspace(const ResidualNormModulate& p) { return Sums(p, nullptr).size(); }

}  // namespace
}  // namespace zeroblock
