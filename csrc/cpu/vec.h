// A thin vector of fp32 lanes for AVX2 (8) and AVX-512 (16), with exp and sigmoid of its own.
//
// Every kernel source is compiled once per instruction set. Everything here lives in an anonymous namespace and is
// force-inlined, and no std template is used: an inline function shared between the objects could be taken by the
// linker from the AVX-512 one and crash an older processor.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../zeroblock.h"

#define ZB_INLINE inline __attribute__((always_inline))
// For a loop nest: everything it calls, generic lambdas above all, becomes part of it. Its arguments come by value, so
// that the compiler can keep them in registers across stores.
#define ZB_LOOPS __attribute__((flatten, noinline))

namespace zeroblock {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

constexpr int kLanes = 16;

struct Vec {
  __m512 v;
};

ZB_INLINE Vec set1(float a) { return {_mm512_set1_ps(a)}; }
ZB_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
ZB_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
ZB_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
ZB_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
ZB_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
ZB_INLINE Vec fmsub(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }    // a * b - c
ZB_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
// NaN in x survives both: the instruction returns its second operand when either is NaN.
ZB_INLINE Vec min_with(float bound, Vec x) { return {_mm512_min_ps(_mm512_set1_ps(bound), x.v)}; }
ZB_INLINE Vec max_with(float bound, Vec x) { return {_mm512_max_ps(_mm512_set1_ps(bound), x.v)}; }
ZB_INLINE Vec round_nearest(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
ZB_INLINE Vec times_power_of_2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Keeps the sign; a NaN becomes +-bound.
ZB_INLINE Vec bound_magnitude(float bound, Vec x) { return {_mm512_range_ps(x.v, _mm512_set1_ps(bound), 2)}; }
ZB_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
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

ZB_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

ZB_INLINE __mmask16 tail_mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
ZB_INLINE Vec keep_first(Vec a, int n) { return {_mm512_maskz_mov_ps(tail_mask(n), a.v)}; }  // other lanes 0

ZB_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
ZB_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(tail_mask(n), p)}; }
ZB_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
ZB_INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, tail_mask(n), a.v); }
ZB_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }  // p aligned to 64 bytes

ZB_INLINE Vec widen_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
// Round to nearest even on the integer view (vcvtneps2bf16 would flush subnormals); a NaN, quiet as every result of
// arithmetic is, is cut off. The result is the upper half of every lane.
ZB_INLINE __m512i round_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
}
// Two instructions less, for results that carry an error of their own: ties, which such an error makes anyway or
// breaks, go away from zero. A NaN must have nothing in the lower half, as those of widened bf16 and of with_plain_nan:
// what is added would carry into its sign.
ZB_INLINE __m512i round_inexact_bf16(Vec a) {
  return _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x8000));
}
ZB_INLINE Vec with_plain_nan(Vec a) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(a.v, nan, _mm512_set1_ps(__builtin_nanf("")))};
}
ZB_INLINE __m256i narrow_bf16(Vec a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(a), 16)); }
ZB_INLINE Vec load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
ZB_INLINE Vec load(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(tail_mask(n), p)); }
ZB_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
ZB_INLINE void store(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, tail_mask(n), narrow_bf16(a)); }
ZB_INLINE void stream(bf16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }

ZB_INLINE Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
ZB_INLINE Vec load(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(tail_mask(n), p))}; }
ZB_INLINE __m256i narrow_f16(Vec a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
ZB_INLINE void store(f16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a)); }
ZB_INLINE void store(f16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, tail_mask(n), narrow_f16(a)); }
ZB_INLINE void stream(f16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a)); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;

struct Vec {
  __m256 v;
};

ZB_INLINE Vec set1(float a) { return {_mm256_set1_ps(a)}; }
ZB_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
ZB_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
ZB_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
ZB_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
ZB_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
ZB_INLINE Vec fmsub(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
ZB_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
ZB_INLINE Vec min_with(float bound, Vec x) { return {_mm256_min_ps(_mm256_set1_ps(bound), x.v)}; }
ZB_INLINE Vec max_with(float bound, Vec x) { return {_mm256_max_ps(_mm256_set1_ps(bound), x.v)}; }
ZB_INLINE Vec round_nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
ZB_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
ZB_INLINE Vec above_floor(Vec t) { return t - Vec{_mm256_floor_ps(t.v)}; }
// x of exp(-x): 2^n below is built for normal numbers only.
ZB_INLINE Vec bound_negated_exponent(Vec x) { return max_with(-87.0f, min_with(87.0f, x)); }
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

ZB_INLINE float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

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

ZB_INLINE Vec widen_bf16(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
ZB_INLINE __m256i round_bf16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
ZB_INLINE Vec with_plain_nan(Vec a) { return a; }
ZB_INLINE __m128i narrow_bf16(Vec a) {
  const __m256i h = _mm256_srli_epi32(round_bf16(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
ZB_INLINE Vec load(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
ZB_INLINE Vec load(const bf16* p, int n) { return widen_bf16(load_tail_16(p, n)); }
ZB_INLINE void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a)); }
ZB_INLINE void store(bf16* p, Vec a, int n) { store_tail_16(p, narrow_bf16(a), n); }
ZB_INLINE void stream(bf16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a)); }

ZB_INLINE __m128i narrow_f16(Vec a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
ZB_INLINE Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
ZB_INLINE Vec load(const f16* p, int n) { return {_mm256_cvtph_ps(load_tail_16(p, n))}; }
ZB_INLINE void store(f16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a)); }
ZB_INLINE void store(f16* p, Vec a, int n) { store_tail_16(p, narrow_f16(a), n); }
ZB_INLINE void stream(f16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a)); }

#else
#error "csrc/cpu kernels need AVX2 or AVX-512; setup.py compiles them with the flags of each"
#endif

// The value that storing to T and loading again would give (used where a rounded value feeds further arithmetic).
ZB_INLINE Vec round_to(Vec a, const float*) { return a; }
#if defined(__AVX512F__)
ZB_INLINE Vec round_to(Vec a, const bf16*) {
  return {_mm512_castsi512_ps(_mm512_and_si512(round_bf16(a), _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
ZB_INLINE Vec round_to(Vec a, const f16*) { return {_mm512_cvtph_ps(narrow_f16(a))}; }
#else
ZB_INLINE Vec round_to(Vec a, const bf16*) {
  return {_mm256_castsi256_ps(_mm256_and_si256(round_bf16(a), _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
ZB_INLINE Vec round_to(Vec a, const f16*) { return {_mm256_cvtph_ps(narrow_f16(a))}; }
#endif

ZB_INLINE Vec& operator+=(Vec& a, Vec b) { return a = a + b; }

// Takes the place of a tail's count where every lane takes part, so that one generic body serves both.
struct All {};
template <class T>
ZB_INLINE Vec load(const T* p, All) {
  return load(p);
}
template <class T>
ZB_INLINE void store(T* p, Vec a, All) {
  store(p, a);
}
ZB_INLINE Vec keep_first(Vec a, All) { return a; }

// Stores what has an error of its own above half an ulp of fp32; what round_inexact_bf16 says of NaN goes for it.
template <class T, class V, class Lanes>
ZB_INLINE void store_inexact(T* p, V a, Lanes lanes) {
  store(p, a, lanes);
}
#if defined(__AVX512F__)
ZB_INLINE __m256i narrow_inexact_bf16(Vec a) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_inexact_bf16(a), 16));
}
ZB_INLINE void store_inexact(bf16* p, Vec a, All) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_inexact_bf16(a));
}
ZB_INLINE void store_inexact(bf16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, tail_mask(n), narrow_inexact_bf16(a));
}
#endif

// body(i, lanes) for i = 0, kLanes, ... below n; lanes is All{}, or the number of elements left in the tail.
template <class Body>
ZB_INLINE void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, All{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// What follows takes a Vec, or several of them in step (wide.h).

// 2^f for f in [-1/2, 1/2], minimax: 2e-8 relative.
template <class V>
ZB_INLINE V exp2_centred(V f) {
  V p = fmadd(f, set1(1.53533620e-4f), set1(1.33988750e-3f));
  p = fmadd(p, f, set1(9.61843692e-3f));
  p = fmadd(p, f, set1(5.55033237e-2f));
  p = fmadd(p, f, set1(2.40226477e-1f));
  p = fmadd(p, f, set1(6.93147182e-1f));
  return fmadd(p, f, set1(1.0f));
}

// 2^(f - 1/2) for f in [0, 1), minimax: 8e-5 relative, for a result of 16 bits.
template <class V>
ZB_INLINE V exp2_shifted(V f) {
  V p = fmadd(f, set1(5.51716685e-2f), set1(1.59853622e-1f));
  p = fmadd(p, f, set1(4.92028624e-1f));
  return fmadd(p, f, set1(7.07053900e-1f));
}

// exp(x) for x in [-87, 88]: 2^n * 2^f with n = round(x log2 e); log2 e in two parts keeps f exact to the last bit.
template <class V>
ZB_INLINE V exp_bounded(V x) {
  const V n = round_nearest(x * set1(1.44269502f));
  V f = fmsub(x, set1(1.44269502f), n);
  f = fmadd(x, set1(1.92596299e-8f), f);
  return times_power_of_2(exp2_centred(f), n);
}

template <class V>
ZB_INLINE V clamp_exponent(V x) {
  return max_with(-87.0f, min_with(87.0f, x));
}

// 1 / (1 + exp(-x)). Clamping keeps exp and the reciprocal inside the normal range: at x = -87 the result is 1.6e-38.
template <class V>
ZB_INLINE V sigmoid(V x) {
  return reciprocal(set1(1.0f) + exp_bounded(clamp_exponent(set1(0.0f) - x)));
}

// The steps of a sigmoid whose x carries a rounding error of its own, as exact as a result stored as T deserves; x is
// bounded so that exp(-x) and its reciprocal stay inside the normal range.
#if defined(__AVX512F__)
// exp(-x) = 2^(k / 32) * exp(-g): k = round(-32 x log2 e), a table that two registers hold has the power, and |g| is at
// most ln 2 / 64, so that a polynomial of degree 2 or 1 serves. Adding 1.5 * 2^18 rounds to 32nds and leaves k in the
// low bits. At x = 0 the result is exactly 1, near it as exact as x: silu has a zero there.
template <class V>
struct NegatedExponent {
  V power, g;
  ZB_INLINE explicit NegatedExponent(V x) {
    const V bounded = bound_magnitude(87.0f, x);
    const V u = fmadd(bounded, set1(-1.44269502f), set1(393216.0f));
    power = power_of_2_in_32nds(u);
    g = fmadd(u - set1(393216.0f), set1(0.693147182f), bounded);
  }
};
// Minimax with p(0) = 1: 6e-8 relative, and half an ulp each for the table and the last step.
template <class V>
ZB_INLINE V exp_negated_for(V x, const float*) {
  const NegatedExponent<V> e(x);
  return fnmadd(e.power * e.g, fnmadd(e.g, set1(0.500004053f), set1(1.00001466f)), e.power);
}
template <class V, class T>
ZB_INLINE V exp_negated_for(V x, const T*) {  // within 2^-14
  const NegatedExponent<V> e(x);
  return fnmadd(e.power, e.g, e.power);
}
#else
template <class V>
ZB_INLINE V exp_negated_for(V x, const float*) {
  const V t = clamp_exponent(x) * set1(-1.44269502f), n = round_nearest(t);
  return times_power_of_2(exp2_centred(t - n), n);
}
// For 16-bit elements within 2^-13. With t = 1/2 - x * log2 e, 2^floor(t) and the rest of t cost three operations; the
// half that is added costs fp32 its last bit.
template <class V, class T>
ZB_INLINE V exp_negated_for(V x, const T*) {
  const V t = fmadd(bound_negated_exponent(x), set1(-1.44269502f), set1(0.5f));
  return times_power_of_2_floor(exp2_shifted(above_floor(t)), t);
}
#endif
template <class V>
ZB_INLINE V reciprocal_for(V a, const float*) {
  return V(set1(1.0f)) / a;
}
template <class V, class T>
ZB_INLINE V reciprocal_for(V a, const T*) {
  return reciprocal_estimate(a);
}
template <class V, class T>
ZB_INLINE V sigmoid_for(V x, const T* type) {
  return reciprocal_for(set1(1.0f) + exp_negated_for(x, type), type);
}

// x * sigmoid(x). The divider works beside the other units: the quotient takes half of what the reciprocal by Newton's
// method and the product would, and rounds once. Of 16 bits the estimate is as fast, here, and faster elsewhere.
template <class V>
ZB_INLINE V silu_for(V x, const float* type) {
  return x / (set1(1.0f) + exp_negated_for(x, type));
}
template <class V, class T>
ZB_INLINE V silu_for(V x, const T* type) {
  return x * sigmoid_for(x, type);
}

template <class Body>
ZB_INLINE void parallel(ParallelFor run, int64_t begin, int64_t end, int64_t grain, const Body& body) {
  run(
      begin, end, grain, [](void* ctx, int64_t b, int64_t e) { (*static_cast<const Body*>(ctx))(b, e); },
      const_cast<Body*>(&body));
}

// Calls f(T*) with a null pointer of the element type that dtype names.
template <class F>
ZB_INLINE void with_type(DType dtype, const F& f) {
  if (dtype == DType::kF32) {
    f(static_cast<float*>(nullptr));
  } else if (dtype == DType::kBF16) {
    f(static_cast<bf16*>(nullptr));
  } else {
    f(static_cast<f16*>(nullptr));
  }
}

}  // namespace
}  // namespace zeroblock
