// The instructions of AVX-512 (F, BW, DQ, VL) under the names that the kernels use; avx2.h has the same names.
// Included by vec.h alone.
#pragma once

#include "element.h"

namespace zeroblock {
namespace {

constexpr int kLanes = 16;

struct Vec {
  __m512 v;
};

// ---- arithmetic -----------------------------------------------------------------------------------------------------

ZB_INLINE Vec set1(float a) { return {_mm512_set1_ps(a)}; }
ZB_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
ZB_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
ZB_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
ZB_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
ZB_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
ZB_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
ZB_INLINE Vec fmsub(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }    // a * b - c
ZB_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
// NaN in x survives both: the instruction returns its second operand when either is NaN.
ZB_INLINE Vec min_with(float bound, Vec x) { return {_mm512_min_ps(_mm512_set1_ps(bound), x.v)}; }
ZB_INLINE Vec max_with(float bound, Vec x) { return {_mm512_max_ps(_mm512_set1_ps(bound), x.v)}; }
// Keeps the sign; a NaN becomes +-bound.
ZB_INLINE Vec bound_magnitude(float bound, Vec x) { return {_mm512_range_ps(x.v, _mm512_set1_ps(bound), 2)}; }
ZB_INLINE Vec magnitude(Vec a) { return {_mm512_abs_ps(a.v)}; }
ZB_INLINE Vec where_negative(Vec a, Vec yes, Vec no) {
  return {_mm512_mask_mov_ps(no.v, _mm512_movepi32_mask(_mm512_castps_si512(a.v)), yes.v)};
}
// 0 * x where x is below the bound, else y. Such an x is seldom: one comparison and a branch.
ZB_INLINE Vec zero_times_below(float bound, Vec x, Vec y) {
  const __mmask16 below = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_LT_OQ);
  return below == 0 ? y : Vec{_mm512_mask_mul_ps(y.v, below, x.v, _mm512_setzero_ps())};
}
ZB_INLINE Vec round_nearest(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
ZB_INLINE Vec times_power_of_2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// 2^(k / 32) for the k that is in the low bits of u. The upper bits of k go to the exponent by a shift, which the table
// allows for: entry j is 2^(j / 32) less what the shift adds to its mantissa, j << 18.
ZB_INLINE Vec power_of_2_in_32nds(Vec u) {
  const __m512i k = _mm512_castps_si512(u.v);
  const __m512i first =
      _mm512_setr_epi32(0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
                        0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6);
  const __m512i second =
      _mm512_setr_epi32(0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
                        0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutex2var_epi32(first, k, second), _mm512_slli_epi32(k, 18)))};
}
// Relative error 2^-14: enough for a result that is rounded to 16 bits.
ZB_INLINE Vec reciprocal_estimate(Vec a) { return {_mm512_rcp14_ps(a.v)}; }
// The estimate and one Newton step: 1 ulp for |a| in [2^-126, 2^126].
template <class V>
ZB_INLINE V reciprocal(V a) {
  const V r = reciprocal_estimate(a);
  return fmadd(r, fnmadd(a, r, set1(1.0f)), r);
}

// ---- sums of lanes --------------------------------------------------------------------------------------------------

ZB_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
// Four partial sums of the lanes.
ZB_INLINE __m128 quarter_sums(Vec a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
ZB_INLINE Vec broadcast(__m128 a) { return {_mm512_broadcastss_ps(a)}; }  // of its lowest lane

// Lane sums in fp64 of products of fp32 numbers, which are exact there.
struct Sum64 {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  ZB_INLINE void add_product(Vec a, Vec b) {
    low = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(_mm512_castps512_ps256(b.v)),
                          low);
    high = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)),
                           _mm512_cvtps_pd(_mm512_extractf32x8_ps(b.v, 1)), high);
  }
  ZB_INLINE double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

// ---- fp32 in memory -------------------------------------------------------------------------------------------------

ZB_INLINE __mmask16 tail_mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
ZB_INLINE Vec keep_first(Vec a, int n) { return {_mm512_maskz_mov_ps(tail_mask(n), a.v)}; }  // other lanes 0

ZB_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
ZB_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(tail_mask(n), p)}; }
ZB_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
ZB_INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, tail_mask(n), a.v); }
ZB_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }  // p aligned to 64 bytes

// ---- bf16 -----------------------------------------------------------------------------------------------------------

ZB_INLINE Vec widen_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
// Rounds to nearest even on the integer view (vcvtneps2bf16 would flush subnormals); a NaN, quiet as every result of
// arithmetic is, is truncated. The result is the upper half of every lane.
ZB_INLINE __m512i round_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
}
// Rounds half away from zero, two instructions less; allowed for a value that already carries an error of more than
// half an ulp of fp32. A NaN must have an empty lower half, as those of widened bf16 and of with_plain_nan have: what
// is added would carry into its sign.
ZB_INLINE __m512i round_inexact_bf16(Vec a) {
  return _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x8000));
}
// A NaN becomes the one whose lower half is empty.
ZB_INLINE Vec with_plain_nan(Vec a) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(a.v, nan, _mm512_set1_ps(__builtin_nanf("")))};
}
ZB_INLINE __m256i narrow_bf16(Vec a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(a), 16)); }
ZB_INLINE __m256i narrow_inexact_bf16(Vec a) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_inexact_bf16(a), 16));
}
ZB_INLINE Vec round_to(Vec a, const bf16*) {
  return {_mm512_castsi512_ps(_mm512_and_si512(round_bf16(a), _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
ZB_INLINE Vec load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
ZB_INLINE Vec load(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(tail_mask(n), p)); }
ZB_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
ZB_INLINE void store(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, tail_mask(n), narrow_bf16(a)); }
ZB_INLINE void stream(bf16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }

// ---- f16 ------------------------------------------------------------------------------------------------------------

ZB_INLINE Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
ZB_INLINE Vec load(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(tail_mask(n), p))}; }
ZB_INLINE __m256i narrow_f16(Vec a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
ZB_INLINE Vec round_to(Vec a, const f16*) { return {_mm512_cvtph_ps(narrow_f16(a))}; }
ZB_INLINE void store(f16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a)); }
ZB_INLINE void store(f16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, tail_mask(n), narrow_f16(a)); }
ZB_INLINE void stream(f16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a)); }

// ---- a register of bits ---------------------------------------------------------------------------------------------

using Bits = __m512i;
ZB_INLINE Bits load_bits(const void* p) { return _mm512_loadu_si512(p); }
ZB_INLINE void store_bits(void* p, Bits a) { _mm512_storeu_si512(p, a); }
ZB_INLINE void stream_bits(void* p, Bits a) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), a); }
ZB_INLINE Bits either_bit(Bits a, Bits b) { return _mm512_or_si512(a, b); }
ZB_INLINE bool has_no_bit(Bits a, uint64_t mask) {
  return _mm512_test_epi64_mask(a, _mm512_set1_epi64(static_cast<int64_t>(mask))) == 0;
}
ZB_INLINE Bits bits_of(Vec a) { return _mm512_castps_si512(a.v); }
ZB_INLINE Vec from_bits(Bits a) { return {_mm512_castsi512_ps(a)}; }
ZB_INLINE Bits with_bits(Bits a, int bits) { return _mm512_or_si512(a, _mm512_set1_epi32(bits)); }
// The lower halves of the lanes, to 16 bits each in memory and back; a whole vector or the first n.
ZB_INLINE void store_lower_halves(void* p, Bits a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
}
ZB_INLINE void store_lower_halves(void* p, Bits a, int n) {
  _mm256_mask_storeu_epi16(p, tail_mask(n), _mm512_cvtepi32_epi16(a));
}
ZB_INLINE Bits load_lower_halves(const void* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ZB_INLINE Bits load_lower_halves(const void* p, int n) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(tail_mask(n), p));
}
// Lower halves side by side in one lane, and apart again.
ZB_INLINE Bits join_halves(Bits even, Bits odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16));
}
ZB_INLINE Bits even_halves(Bits a) { return _mm512_and_si512(a, _mm512_set1_epi32(0xffff)); }
ZB_INLINE Bits odd_halves(Bits a) { return _mm512_srli_epi32(a, 16); }
// -0 becomes +0, in elements of `size` bytes; *found says whether there was one.
template <int size>
ZB_INLINE Bits without_minus_zero(Bits a, bool* found) {
  if constexpr (size == 2) {
    const __mmask32 minus_zero = _mm512_cmpeq_epi16_mask(a, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
    *found = minus_zero != 0;
    return _mm512_maskz_mov_epi16(~minus_zero, a);
  } else {
    const __mmask16 minus_zero = _mm512_cmpeq_epi32_mask(a, _mm512_set1_epi32(static_cast<int32_t>(0x80000000u)));
    *found = minus_zero != 0;
    return _mm512_maskz_mov_epi32(static_cast<__mmask16>(~minus_zero), a);
  }
}

// ---- pairs of bf16 --------------------------------------------------------------------------------------------------
// Two neighbours of 16 bits share a lane of 32: a shift gives the even one and a mask the odd one, fewer instructions
// than widening each half.

ZB_INLINE Vec widen_even(Bits a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a, 16))}; }
ZB_INLINE Vec widen_odd(Bits a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
ZB_INLINE Bits narrow_pair(Vec even, Vec odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(round_bf16(even), 16), round_bf16(odd));
}
// The same all 32 at a time: up where the lower half exceeds 0x8000, or is just that and the upper half odd. A NaN must
// be that of with_plain_nan or of widened bf16.
ZB_INLINE Bits narrow_plain_pair(Vec even, Vec odd) {
  const Bits even_bits = _mm512_castps_si512(even.v), odd_bits = _mm512_castps_si512(odd.v);
  const Bits upper = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even_bits, 16), odd_bits);
  const Bits lower = _mm512_mask_blend_epi16(0xaaaaaaaau, even_bits, _mm512_slli_epi32(odd_bits, 16));
  const Bits sticky = _mm512_ternarylogic_epi32(lower, upper, _mm512_set1_epi16(1), 0xf8);  // lower | (upper & 1)
  const __mmask32 up = _mm512_cmpgt_epu16_mask(sticky, _mm512_set1_epi16(static_cast<short>(0x8000)));
  return _mm512_mask_sub_epi16(upper, up, upper, _mm512_set1_epi16(-1));
}
ZB_INLINE Bits narrow_inexact_pair(Vec even, Vec odd) {
  const __m512i upper_halves =
      _mm512_setr_epi32(0x210001, 0x230003, 0x250005, 0x270007, 0x290009, 0x2b000b, 0x2d000d, 0x2f000f, 0x310011,
                        0x330013, 0x350015, 0x370017, 0x390019, 0x3b001b, 0x3d001d, 0x3f001f);
  return _mm512_permutex2var_epi16(round_inexact_bf16(even), upper_halves, round_inexact_bf16(odd));
}
// Lanes of a and b in memory's order to even and odd ones, and back.
ZB_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = {_mm512_permutex2var_ps(a.v, first, b.v)};
  odd = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(1)), b.v)};
}
ZB_INLINE void interleave(Vec even, Vec odd, Vec& a, Vec& b) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = {_mm512_permutex2var_ps(even.v, first, odd.v)};
  b = {_mm512_permutex2var_ps(even.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd.v)};
}

// v[i] lane j <-> v[j] lane i.
ZB_INLINE void transpose(Vec* v) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i].v = _mm512_shuffle_ps(t[i], t[i + 2], 0x44), v[i + 1].v = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    v[i + 2].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44), v[i + 3].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(v[i].v, v[i + 4].v, 0x88), b = _mm512_shuffle_f32x4(v[i].v, v[i + 4].v, 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(v[i + 8].v, v[i + 12].v, 0x88);
    const __m512 d = _mm512_shuffle_f32x4(v[i + 8].v, v[i + 12].v, 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, c, 0x88), t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88), t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i].v = t[i];
}

}  // namespace
}  // namespace zeroblock
