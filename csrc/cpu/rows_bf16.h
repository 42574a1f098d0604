// Rows of bf16, forward, where they are short enough for L1: two neighbours of 16 bits are widened and narrowed at a
// time (wide.h), which leaves elements in the order of their pairs; operands of fp32 are brought into that order once
// per chunk. A norm widens its row once, not once per walk, and takes two rows side by side: the sums and roots of one
// alone are a chain that a short row does not hide.
#pragma once

#include "rows.h"
#include "wide.h"

namespace zeroblock {
namespace {

constexpr int64_t kStagedRow = 2048;  // elements: two rows and four operands of fp32 are 48 KB

template <class T>
constexpr bool kStages = false;
template <>
constexpr bool kStages<bf16> = true;

ZB_INLINE void put(bf16* p, Wide a, Four, bool streamed) {
  if (streamed) {
    stream(p, a);
  } else {
    store(p, a, Four{});
  }
}

struct RowStats {
  float mean, rstd;
};

// 1 / sqrt(a) in fp64: its error would be that of every element of the row.
ZB_INLINE float inverse_root(double a) {
  return static_cast<float>(1.0 / _mm_cvtsd_f64(_mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(a))));
}

// The operand rows of one chunk in the order of pairs: those of fp32 are copied, per-token ones are in it by nature.
class StagedOperand {
 public:
  ZB_INLINE OperandRow<float> take(OperandRow<float> row, int64_t D) {
    if (row.mask == 0) return row;
    for_wide_lanes(D, [&](int64_t i, auto lanes) { store(row_ + i, in_pairs(load(row.p + i, lanes)), lanes); });
    return {row_, -1};
  }
  ZB_INLINE OperandRow<bf16> take(OperandRow<bf16> row, int64_t) { return row; }

 private:
  alignas(64) float row_[kStagedRow];
};

// The operand's row of token t, given the one that `take` gave at the chunk's first token.
ZB_INLINE OperandRow<float> staged_row(const Operand<float>&, OperandRow<float> taken, int64_t, int64_t) {
  return taken;
}
ZB_INLINE OperandRow<bf16> staged_row(const Operand<bf16>& rows, OperandRow<bf16>, int64_t b, int64_t t) {
  return rows.row(b, t);
}

struct StagedPair {
  alignas(64) float row[2][kStagedRow];
  RowStats stats[2];

  // value(k, i, lanes): what stands in column i of row k, in fp32.
  template <class Value>
  ZB_INLINE void fill(int64_t D, bool rms, float eps, const Value& value) {
    Wide a = zero(), b = zero();
    for_wide_lanes(D, [&](int64_t i, auto lanes) {
      const auto u = value(0, i, lanes), v = value(1, i, lanes);
      store(row[0] + i, u, lanes);
      store(row[1] + i, v, lanes);
      if (rms) return;
      add_to(a, u);
      add_to(b, v);
    });
    const float inverse = 1.0f / static_cast<float>(D);
    const float means[2] = {sum(total(a)) * inverse, sum(total(b)) * inverse};
    const Vec ma = set1(means[0]), mb = set1(means[1]);
    a = zero(), b = zero();
    for_wide_lanes(D, [&](int64_t i, auto lanes) {
      const auto u = keep_first(load(row[0] + i, lanes) - ma, lanes);
      const auto v = keep_first(load(row[1] + i, lanes) - mb, lanes);
      add_product_to(a, u, u);
      add_product_to(b, v, v);
    });
    const double count = static_cast<double>(D);
    stats[0] = {means[0], inverse_root(sum(total(a)) / count + eps)};
    stats[1] = {means[1], inverse_root(sum(total(b)) / count + eps)};
  }

  // y = xhat * (1 + scale) + shift of row k.
  template <bool kAffine, class S, class H>
  ZB_INLINE void modulate(int64_t k, bf16* y, int64_t D, OperandRow<float> weight, OperandRow<float> bias,
                          OperandRow<S> scale, OperandRow<H> shift, bool streamed) const {
    const Vec mean = set1(stats[k].mean), rstd = set1(stats[k].rstd), one = set1(1.0f);
    for_wide_lanes(D, [&](int64_t i, auto lanes) {
      auto xhat = (load(row[k] + i, lanes) - mean) * rstd;
      if constexpr (kAffine) xhat = fmadd(xhat, weight.at(i, lanes), bias.at(i, lanes));
      put(y + i, fmadd(xhat, scale.at(i, lanes) + one, shift.at(i, lanes)), lanes, streamed);
    });
  }
};

}  // namespace
}  // namespace zeroblock
