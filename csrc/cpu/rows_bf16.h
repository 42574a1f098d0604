// Rows of bf16 by pairs: two neighbours of 16 bits are widened and rounded at a time, which leaves elements in the
// order of their pairs; operands of fp32 are brought into that order, and sums back out of it.
#pragma once

#include "rows.h"
#include "wide.h"

namespace zeroblock {
namespace {

constexpr int64_t kStagedRow = 2048;  // elements: two rows and four operands of fp32 are 48 KB

// Two vectors in step. Of bf16 they are one load of 32 elements: two neighbours of 16 bits share a lane of 32, a shift
// gives the even one and a mask the odd one, so that lanes hold the elements in the order of their pairs.
struct Pair {};
struct Two {
  Vec v[2];
};
#if defined(__AVX512F__)
using Bits = __m512i;
ZB_INLINE Bits load_bits(const bf16* p) { return _mm512_loadu_si512(p); }
ZB_INLINE Vec widen_even(Bits a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a, 16))}; }
ZB_INLINE Vec widen_odd(Bits a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
// Rounded to nearest even, all 32 at a time: up where the lower half exceeds 0x8000, or is just that and the upper half
// odd. A NaN must have an empty lower half: one that comes from bf16 or from arithmetic has, one of an fp32 operand
// after quiet().
ZB_INLINE Bits round_pair(Two a) {
  const Bits even = _mm512_castps_si512(a.v[0].v), odd = _mm512_castps_si512(a.v[1].v);
  const Bits upper = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd);
  const Bits lower = _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16));
  const Bits sticky = _mm512_ternarylogic_epi32(lower, upper, _mm512_set1_epi16(1), 0xf8);  // lower | (upper & 1)
  const __mmask32 up = _mm512_cmpgt_epu16_mask(sticky, _mm512_set1_epi16(static_cast<short>(0x8000)));
  return _mm512_mask_sub_epi16(upper, up, upper, _mm512_set1_epi16(-1));
}
ZB_INLINE void store_bits(bf16* p, Bits a) { _mm512_storeu_si512(p, a); }
ZB_INLINE void stream_bits(bf16* p, Bits a) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), a); }
ZB_INLINE Vec quiet(Vec a) {
  return {_mm512_mask_mov_ps(a.v, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), set1(__builtin_nanf("")).v)};
}
ZB_INLINE Two interleave(Two a) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {{{_mm512_permutex2var_ps(a.v[0].v, first, a.v[1].v)}, {_mm512_permutex2var_ps(a.v[0].v, second, a.v[1].v)}}};
}
#else
using Bits = __m256i;
ZB_INLINE Bits load_bits(const bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ZB_INLINE Vec widen_even(Bits a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16))}; }
ZB_INLINE Vec widen_odd(Bits a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
ZB_INLINE Bits round_pair(Two a) { return narrow_pair(a.v[0], a.v[1]); }
ZB_INLINE void store_bits(bf16* p, Bits a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
ZB_INLINE void stream_bits(bf16* p, Bits a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), a); }
ZB_INLINE Vec quiet(Vec a) { return a; }  // round_bf16 looks after NaN here
ZB_INLINE Two interleave(Two a) {
  const __m256 low = _mm256_unpacklo_ps(a.v[0].v, a.v[1].v), high = _mm256_unpackhi_ps(a.v[0].v, a.v[1].v);
  return {{{_mm256_permute2f128_ps(low, high, 0x20)}, {_mm256_permute2f128_ps(low, high, 0x31)}}};
}
#endif

// One step of a row: of elements that are widened as they are used, or as it is.
template <class Lanes>
constexpr int kParts = 1;
template <>
constexpr int kParts<Pair> = 2;
template <class T, class Lanes>
ZB_INLINE Vec get(const T* p, Lanes lanes) {
  return load(p, lanes);
}
ZB_INLINE Bits get(const bf16* p, Pair) { return load_bits(p); }
ZB_INLINE Two get(const float* p, Pair) { return {{load(p), load(p + kLanes)}}; }  // of a row in the order of pairs
ZB_INLINE Vec part(Vec a, int) { return a; }
ZB_INLINE Vec part(Two a, int k) { return a.v[k]; }
ZB_INLINE Vec part(Bits a, int k) { return k == 0 ? widen_even(a) : widen_odd(a); }

template <class T, class Lanes>
ZB_INLINE void put_parts(T* p, Two a, Lanes lanes, bool streamed) {
  put(p, a.v[0], lanes, streamed);
}
ZB_INLINE void put_parts(bf16* p, Two a, Pair, bool streamed) {
  if (streamed) {
    stream_bits(p, round_pair(a));
  } else {
    store_bits(p, round_pair(a));
  }
}
// The same, giving back what was stored.
template <class T, class Lanes>
ZB_INLINE Vec put_and_get(T* p, Two a, Lanes lanes, bool streamed) {
  put(p, a.v[0], lanes, streamed);
  return round_to(a.v[0], p);
}
ZB_INLINE Bits put_and_get(bf16* p, Two a, Pair, bool streamed) {
  const Bits bits = round_pair(a);
  if (streamed) {
    stream_bits(p, bits);
  } else {
    store_bits(p, bits);
  }
  return bits;
}

// Puts a step aside for get().
template <class T, class Lanes>
ZB_INLINE void hold(T* p, Vec a, Lanes lanes) {
  store(p, a, lanes);
}
ZB_INLINE void hold(bf16* p, Bits a, Pair) { store_bits(p, a); }
template <class Lanes>
ZB_INLINE void hold_parts(float* p, Two a, Lanes lanes) {
  store(p, a.v[0], lanes);
}
ZB_INLINE void hold_parts(float* p, Two a, Pair) {
  store(p, a.v[0]);
  store(p + kLanes, a.v[1]);
}
ZB_INLINE void hold(float* p, Two a, Pair) {
  store(p, a.v[0]);
  store(p + kLanes, a.v[1]);
}

// f(i, lanes) over [0, D) for rows of T: by pairs, where they are bf16, as long as it goes.
template <class T, class F>
ZB_INLINE void each_step(const T*, int64_t D, const F& f) {
  each_column(0, D, f);
}
template <class F>
ZB_INLINE void each_step(const bf16*, int64_t D, const F& f) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= D; i += 2 * kLanes) f(i, Pair{});
  for (; i < D; i += kLanes) f(i, static_cast<int>(D - i < kLanes ? D - i : kLanes));
}
// The same a second time: from the end, for long rows of fp32 have pushed their beginning out of L1.
template <class T, class F>
ZB_INLINE void each_step_again(const T*, int64_t D, const F& f) {
  int64_t i = D / kLanes * kLanes;
  if (i < D) f(i, static_cast<int>(D - i));
  while (i > 0) f(i -= kLanes, All{});
}
template <class F>
ZB_INLINE void each_step_again(const bf16* type, int64_t D, const F& f) {
  each_step(type, D, f);
}

// A step of a row of fp32 in the order of those of a row of T, ready for round_pair().
ZB_INLINE Two in_step(OperandRow<float> row, int64_t i, Pair) {
  Two out;
  if (row.mask == 0) return {{quiet(load(row.p)), quiet(load(row.p))}};
  deinterleave(quiet(load(row.p + i)), quiet(load(row.p + i + kLanes)), out.v[0], out.v[1]);
  return out;
}
template <class Lanes>
ZB_INLINE Vec in_step(OperandRow<float> row, int64_t i, Lanes lanes) {
  return row.at(i, lanes);
}

// What row r of a tile has at a step: of an operand with a row for each token, or of one row for all of them, staged.
template <bool kToken, class M, class Lanes>
ZB_INLINE auto either_step(const OperandTile<kToken, M>& a, OperandRow<float> staged, int r, int64_t i, Lanes lanes) {
  if constexpr (kToken) {
    return get(a.p + r * a.stride_t + i, lanes);
  } else {
    return get(staged.p + (i & staged.mask), lanes);
  }
}

// Adds a step to a row of accumulators in the order of the steps, and brings such a row back into memory's.
template <class Lanes>
ZB_INLINE void accumulate_step(float* acc, int64_t i, Two a, Lanes lanes) {
  accumulate(acc, i, a.v[0], lanes);
}
ZB_INLINE void accumulate_step(float* acc, int64_t i, Two a, Pair) {
  accumulate(acc, i, a.v[0], All{});
  accumulate(acc, i + kLanes, a.v[1], All{});
}
template <class T>
ZB_INLINE void unstage(T* type, float* row, int64_t D) {
  each_step(type, D, [&](int64_t i, auto lanes) ZB_BODY {
    if constexpr (kParts<decltype(lanes)> == 2) hold(row + i, interleave(get(row + i, lanes)), lanes);
  });
}

// A row of fp32 in the order of the steps of rows of T.
template <class T>
ZB_INLINE void stage(T* type, float* to, OperandRow<float> row, int64_t D) {
  each_step(type, D, [&](int64_t i, auto lanes) ZB_BODY { hold(to + i, in_step(row, i, lanes), lanes); });
}

constexpr bool is_float(const float*) { return true; }
constexpr bool is_float(const void*) { return false; }

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

// Two rows side by side, widened once: what a norm with operands per token walks over.
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
