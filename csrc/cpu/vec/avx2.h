// The instructions of AVX2, FMA and F16C under the names that the kernels use; avx512.h has the same names, and says
// what each does. Included by vec.h alone.
#pragma once

#include "element.h"

namespace zeroblock {
namespace {

constexpr int kLanes = 8;

struct Vec {
  __m256 v;
};

// ---- arithmetic -----------------------------------------------------------------------------------------------------

ZB_INLINE Vec set1(float a) { return {_mm256_set1_ps(a)}; }
ZB_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
ZB_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
ZB_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
ZB_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
ZB_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
ZB_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
ZB_INLINE Vec fmsub(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
ZB_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
ZB_INLINE Vec min_with(float bound, Vec x) { return {_mm256_min_ps(_mm256_set1_ps(bound), x.v)}; }
ZB_INLINE Vec max_with(float bound, Vec x) { return {_mm256_max_ps(_mm256_set1_ps(bound), x.v)}; }
ZB_INLINE Vec magnitude(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
ZB_INLINE Vec where_negative(Vec a, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, a.v)}; }
ZB_INLINE Vec zero_times_below(float bound, Vec x, Vec y) {
  const __m256 below = _mm256_cmp_ps(x.v, _mm256_set1_ps(bound), _CMP_LT_OQ);
  if (_mm256_movemask_ps(below) == 0) return y;
  return {_mm256_blendv_ps(y.v, _mm256_mul_ps(x.v, _mm256_setzero_ps()), below)};
}
ZB_INLINE Vec round_nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
ZB_INLINE Vec above_floor(Vec t) { return t - Vec{_mm256_floor_ps(t.v)}; }
// n integral, in [-126, 127]: builds 2^n in the exponent field.
ZB_INLINE Vec times_power_of_2(Vec a, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent))};
}
ZB_INLINE Vec times_power_of_2_floor(Vec a, Vec t) { return times_power_of_2(a, {_mm256_floor_ps(t.v)}); }
// 12-bit estimate and one Newton step; one step is short of fp32, so that the exact one divides.
ZB_INLINE Vec reciprocal_estimate(Vec a) {
  const Vec r = {_mm256_rcp_ps(a.v)};
  return fmadd(r, fnmadd(a, r, set1(1.0f)), r);
}
ZB_INLINE Vec reciprocal(Vec a) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)}; }

// ---- sums of lanes --------------------------------------------------------------------------------------------------

ZB_INLINE __m128 quarter_sums(Vec a) { return _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1)); }
ZB_INLINE float sum(Vec a) {
  __m128 s = quarter_sums(a);
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
ZB_INLINE Vec broadcast(__m128 a) { return {_mm256_broadcastss_ps(a)}; }

struct Sum64 {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  ZB_INLINE void add_product(Vec a, Vec b) {
    low = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), _mm256_cvtps_pd(_mm256_castps256_ps128(b.v)),
                          low);
    high = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)),
                           _mm256_cvtps_pd(_mm256_extractf128_ps(b.v, 1)), high);
  }
  ZB_INLINE double total() const {
    alignas(32) double lanes[4];
    _mm256_store_pd(lanes, _mm256_add_pd(low, high));
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
};

// ---- fp32 in memory -------------------------------------------------------------------------------------------------

ZB_INLINE __m256i tail_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
ZB_INLINE Vec keep_first(Vec a, int n) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(tail_mask(n)))}; }
ZB_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
ZB_INLINE Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, tail_mask(n))}; }
ZB_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
ZB_INLINE void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, tail_mask(n), a.v); }
ZB_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }  // p aligned to 32 bytes

// AVX2 has no 16-bit masks: a tail goes through 16 bytes on the stack.
ZB_INLINE __m128i load_tail_16(const void* p, int n) {
  __m128i h = _mm_setzero_si128();
  std::memcpy(&h, p, static_cast<size_t>(n) * 2);
  return h;
}
ZB_INLINE void store_tail_16(void* p, __m128i h, int n) { std::memcpy(p, &h, static_cast<size_t>(n) * 2); }

// ---- bf16 -----------------------------------------------------------------------------------------------------------

ZB_INLINE Vec widen_bf16(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
ZB_INLINE __m256i round_bf16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
ZB_INLINE Vec with_plain_nan(Vec a) { return a; }  // round_bf16 takes any NaN
ZB_INLINE __m128i narrow_bf16(Vec a) {
  const __m256i h = _mm256_srli_epi32(round_bf16(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
ZB_INLINE Vec round_to(Vec a, const bf16*) {
  return {_mm256_castsi256_ps(_mm256_and_si256(round_bf16(a), _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
ZB_INLINE Vec load(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
ZB_INLINE Vec load(const bf16* p, int n) { return widen_bf16(load_tail_16(p, n)); }
ZB_INLINE void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a)); }
ZB_INLINE void store(bf16* p, Vec a, int n) { store_tail_16(p, narrow_bf16(a), n); }
ZB_INLINE void stream(bf16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a)); }

// ---- f16 ------------------------------------------------------------------------------------------------------------

ZB_INLINE __m128i narrow_f16(Vec a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
ZB_INLINE Vec round_to(Vec a, const f16*) { return {_mm256_cvtph_ps(narrow_f16(a))}; }
ZB_INLINE Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
ZB_INLINE Vec load(const f16* p, int n) { return {_mm256_cvtph_ps(load_tail_16(p, n))}; }
ZB_INLINE void store(f16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a)); }
ZB_INLINE void store(f16* p, Vec a, int n) { store_tail_16(p, narrow_f16(a), n); }
ZB_INLINE void stream(f16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a)); }

// ---- a register of bits ---------------------------------------------------------------------------------------------

using Bits = __m256i;
ZB_INLINE Bits load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
ZB_INLINE void store_bits(void* p, Bits a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
ZB_INLINE void stream_bits(void* p, Bits a) { _mm256_stream_si256(static_cast<__m256i*>(p), a); }
ZB_INLINE Bits either_bit(Bits a, Bits b) { return _mm256_or_si256(a, b); }
ZB_INLINE bool has_no_bit(Bits a, uint64_t mask) {
  return _mm256_testz_si256(a, _mm256_set1_epi64x(static_cast<int64_t>(mask)));
}
ZB_INLINE Bits bits_of(Vec a) { return _mm256_castps_si256(a.v); }
ZB_INLINE Vec from_bits(Bits a) { return {_mm256_castsi256_ps(a)}; }
ZB_INLINE Bits with_bits(Bits a, int bits) { return _mm256_or_si256(a, _mm256_set1_epi32(bits)); }
ZB_INLINE __m128i lower_halves(Bits a) {
  const __m256i h = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
ZB_INLINE void store_lower_halves(void* p, Bits a) { _mm_storeu_si128(static_cast<__m128i*>(p), lower_halves(a)); }
ZB_INLINE void store_lower_halves(void* p, Bits a, int n) { store_tail_16(p, lower_halves(a), n); }
ZB_INLINE Bits load_lower_halves(const void* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
ZB_INLINE Bits load_lower_halves(const void* p, int n) { return _mm256_cvtepu16_epi32(load_tail_16(p, n)); }
ZB_INLINE Bits join_halves(Bits even, Bits odd) { return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa); }
ZB_INLINE Bits even_halves(Bits a) { return _mm256_and_si256(a, _mm256_set1_epi32(0xffff)); }
ZB_INLINE Bits odd_halves(Bits a) { return _mm256_srli_epi32(a, 16); }
template <int size>
ZB_INLINE Bits without_minus_zero(Bits a, bool* found) {
  const Bits minus_zero = size == 2 ? _mm256_cmpeq_epi16(a, _mm256_set1_epi16(static_cast<int16_t>(0x8000)))
                                    : _mm256_cmpeq_epi32(a, _mm256_set1_epi32(static_cast<int32_t>(0x80000000u)));
  *found = _mm256_testz_si256(minus_zero, minus_zero) == 0;
  return _mm256_andnot_si256(minus_zero, a);
}

// ---- pairs of bf16 --------------------------------------------------------------------------------------------------

ZB_INLINE Vec widen_even(Bits a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16))}; }
ZB_INLINE Vec widen_odd(Bits a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
ZB_INLINE Bits narrow_pair(Vec even, Vec odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(even), 16), round_bf16(odd), 0xaa);
}
ZB_INLINE Bits narrow_plain_pair(Vec even, Vec odd) { return narrow_pair(even, odd); }
ZB_INLINE Bits narrow_inexact_pair(Vec even, Vec odd) { return narrow_pair(even, odd); }
ZB_INLINE Vec across_halves(__m256 a) {  // the halves' quarters 0, 2, 1, 3
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8))};
}
ZB_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
  even = across_halves(_mm256_shuffle_ps(a.v, b.v, 0x88));
  odd = across_halves(_mm256_shuffle_ps(a.v, b.v, 0xdd));
}
ZB_INLINE void interleave(Vec even, Vec odd, Vec& a, Vec& b) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  a = {_mm256_permute2f128_ps(low, high, 0x20)};
  b = {_mm256_permute2f128_ps(low, high, 0x31)};
}

ZB_INLINE void transpose(Vec* v) {
  __m256 t[8], s[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v), t[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), s[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), s[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i].v = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20), v[i + 4].v = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
  }
}

}  // namespace
}  // namespace zeroblock
