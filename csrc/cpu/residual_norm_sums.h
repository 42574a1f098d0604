// What backward of residual_norm_modulate sums over tokens, and where: see residual_norm_modulate_bwd.h.
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
  // One of them, as a loop takes it: by value, for stores must not be taken to change its pointers.
  struct Sum {
    float *tokens, *run;
    template <class Lanes>
    ZB_INLINE void add(int64_t i, Vec v, Lanes lanes) const {
      accumulate(tokens, i, v, lanes);
      accumulate(run, i, v, lanes);
    }
  };
  ZB_INLINE Sum sum(int which) const { return {now[which], now[kSums + which]}; }
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

}  // namespace
}  // namespace zeroblock
