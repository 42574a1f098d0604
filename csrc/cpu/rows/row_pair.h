// Forward of a norm over two rows of bf16 at a time, with operands per token: the rows are widened once into fp32 and
// walked from there.
#pragma once

#include "steps.h"

namespace zeroblock {
namespace {

ZB_INLINE void store_or_stream(bf16* p, Vec4 a, FourVecs, bool streamed) {
  if (streamed) {
    stream(p, a);
  } else {
    store(p, a, FourVecs{});
  }
}

struct RowStats {
  float mean, rstd;
};

// 1 / sqrt(variance + eps) in fp64: its error would be that of every element of the row. `squares` is the mean of the
// squares about a centre that misses the mean by `missed`. A variance beyond fp32 is NaN, as is one of NaN; the square
// of an rms norm is not, as in eager.
ZB_INLINE float inverse_root(double squares, double missed, bool rms, float eps) {
  const double above = squares - missed * missed, variance = above < 0 ? 0 : above;
  const double sum = (rms ? variance : variance + 0 * variance) + static_cast<double>(eps);
  return static_cast<float>(1.0 / _mm_cvtsd_f64(_mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(sum))));
}

// The sum of the squares about a centre.
template <class T>
ZB_INLINE double squares_about(const T* x, int64_t D, float centre) {
  const Vec c = set1(centre);
  return sum_columns(D, [&](Vec acc, int64_t i, auto lanes) ZB_BODY {
    const Vec d = keep_first(load(x + i, lanes) - c, lanes);
    return fmadd(d, d, acc);
  });
}

// A mean square about the mean, with its rounding, so small beside the mean of fp32 that rounding may have made it, as
// it does where all numbers are equal; sums of 16 bits do not round (sum_columns).
ZB_INLINE bool is_doubtful(const float*, double mean, double squares) { return squares < mean * mean * 1e-6; }
ZB_INLINE bool is_doubtful(const void*, double, double) { return false; }

// The statistics of such a row: it is summed from one of its numbers, so that the mean of equal ones is that number.
__attribute__((noinline)) inline RowStats careful_stats(const float* x, int64_t D, float eps) {
  const double count = static_cast<double>(D);
  const Vec pivot = set1(x[0]);
  const double sum = sum_columns(
      D, [&](Vec acc, int64_t i, auto lanes) { return acc + keep_first(load(x + i, lanes) - pivot, lanes); });
  const double mean = static_cast<double>(x[0]) + sum / count;
  const float rounded = static_cast<float>(mean);
  return {rounded, inverse_root(squares_about(x, D, rounded) / count, mean - rounded, false, eps)};
}
ZB_INLINE RowStats careful_stats(const void*, int64_t, float) { return {0.0f, 0.0f}; }

// The row of an operand for one chunk, in the order of pairs: fp32 is copied into it, bf16 has it as it is loaded.
class StagedOperand {
 public:
  ZB_INLINE OperandRow<float> take(OperandRow<float> row, int64_t D) {
    if (row.mask == 0) return row;
    for_lanes_by_4(D, [&](int64_t i, auto lanes) { store(row_ + i, in_pairs(load(row.p + i, lanes)), lanes); });
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

// Two rows side by side, in fp32.
struct RowPair {
  alignas(64) float row[2][kStagedRow];
  RowStats stats[2];

  // value(k, i, lanes): what stands in column i of row k, in fp32.
  template <class Value>
  ZB_INLINE void fill(int64_t D, bool rms, float eps, const Value& value) {
    Vec4 a = zero(), b = zero();
    for_lanes_by_4(D, [&](int64_t i, auto lanes) {
      const auto u = value(0, i, lanes), v = value(1, i, lanes);
      store(row[0] + i, u, lanes);
      store(row[1] + i, v, lanes);
      if (rms) return;
      add_to(a, u);
      add_to(b, v);
    });
    // The mean of equal numbers is that number: so few of bf16 are summed without rounding, and divided they are exact.
    const float means[2] = {sum(total(a)) / static_cast<float>(D), sum(total(b)) / static_cast<float>(D)};
    const Vec ma = set1(means[0]), mb = set1(means[1]);
    a = zero(), b = zero();
    for_lanes_by_4(D, [&](int64_t i, auto lanes) {
      const auto u = keep_first(load(row[0] + i, lanes) - ma, lanes);
      const auto v = keep_first(load(row[1] + i, lanes) - mb, lanes);
      add_product_to(a, u, u);
      add_product_to(b, v, v);
    });
    const double count = static_cast<double>(D);
    stats[0] = {means[0], inverse_root(sum(total(a)) / count, 0.0, rms, eps)};
    stats[1] = {means[1], inverse_root(sum(total(b)) / count, 0.0, rms, eps)};
  }

  // y = xhat * (1 + scale) + shift of row k.
  template <bool kAffine, class Scale, class Shift>
  ZB_INLINE void modulate(int64_t k, bf16* y, int64_t D, OperandRow<float> weight, OperandRow<float> bias,
                          OperandRow<Scale> scale, OperandRow<Shift> shift, bool streamed) const {
    const Vec mean = set1(stats[k].mean), rstd = set1(stats[k].rstd), one = set1(1.0f);
    for_lanes_by_4(D, [&](int64_t i, auto lanes) {
      auto xhat = (load(row[k] + i, lanes) - mean) * rstd;
      if constexpr (kAffine) xhat = fmadd(xhat, weight.at(i, lanes), bias.at(i, lanes));
      store_or_stream(y + i, fmadd(xhat, scale.at(i, lanes) + one, shift.at(i, lanes)), lanes, streamed);
    });
  }
};

}  // namespace
}  // namespace zeroblock
