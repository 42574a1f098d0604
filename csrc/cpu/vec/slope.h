// Derivatives of an activation kept in the 16 bits of an element, for a second pass that would otherwise start over.
//
// SiLU's slope lies in [-0.1, 1.1]. Adding 384.125 leaves (slope + 1/8) * 2^15, rounded, in the lower half of the lane:
// within 2^-16, less than what rounding the gradient to 16 bits costs. A NaN is lost; the sums over it are not.
#pragma once

#include "vec4.h"

namespace zeroblock {
namespace {

constexpr float kSlopeOffset = 384.125f;
constexpr int kSlopeUpperHalf = 0x43c00000;  // the bits of 384

#if defined(__AVX512F__)
ZB_INLINE __m256i slope_bits(Vec slope) {
  return _mm512_cvtepi32_epi16(_mm512_castps_si512((slope + set1(kSlopeOffset)).v));
}
ZB_INLINE Vec slope_of(__m512i lower_halves) {
  const __m512i bits = _mm512_or_si512(lower_halves, _mm512_set1_epi32(kSlopeUpperHalf));
  return Vec{_mm512_castsi512_ps(bits)} - set1(kSlopeOffset);
}
template <class T>
ZB_INLINE void store_slope(T* p, Vec slope, OneVec) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), slope_bits(slope));
}
template <class T>
ZB_INLINE void store_slope(T* p, Vec slope, int n) {
  _mm256_mask_storeu_epi16(p, tail_mask(n), slope_bits(slope));
}
template <class T>
ZB_INLINE Vec load_slope(const T* p, OneVec) {
  return slope_of(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
template <class T>
ZB_INLINE Vec load_slope(const T* p, int n) {
  return slope_of(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(tail_mask(n), p)));
}
ZB_INLINE void store_slope(bf16* p, Vec4 slope, FourVecs) {
  const Vec4 a = slope + set1(kSlopeOffset);
  for (int k = 0; k < 4; k += 2) {
    const __m512i even = _mm512_castps_si512(a.v[k].v), odd = _mm512_castps_si512(a.v[k + 1].v);
    _mm512_storeu_si512(p + k * kLanes, _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16)));
  }
}
ZB_INLINE Vec4 load_slope(const bf16* p, FourVecs) {
  const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 2 * kLanes), even = _mm512_set1_epi32(0xffff);
  return {slope_of(_mm512_and_si512(a, even)), slope_of(_mm512_srli_epi32(a, 16)), slope_of(_mm512_and_si512(b, even)),
          slope_of(_mm512_srli_epi32(b, 16))};
}
#else
ZB_INLINE __m128i slope_bits(Vec slope) {
  const __m256i h = _mm256_and_si256(_mm256_castps_si256((slope + set1(kSlopeOffset)).v), _mm256_set1_epi32(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
ZB_INLINE Vec slope_of(__m256i lower_halves) {
  const __m256i bits = _mm256_or_si256(lower_halves, _mm256_set1_epi32(kSlopeUpperHalf));
  return Vec{_mm256_castsi256_ps(bits)} - set1(kSlopeOffset);
}
template <class T>
ZB_INLINE void store_slope(T* p, Vec slope, OneVec) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), slope_bits(slope));
}
template <class T>
ZB_INLINE void store_slope(T* p, Vec slope, int n) {
  store_tail_16(p, slope_bits(slope), n);
}
template <class T>
ZB_INLINE Vec load_slope(const T* p, OneVec) {
  return slope_of(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <class T>
ZB_INLINE Vec load_slope(const T* p, int n) {
  return slope_of(_mm256_cvtepu16_epi32(load_tail_16(p, n)));
}
ZB_INLINE void store_slope(bf16* p, Vec4 slope, FourVecs) {
  const Vec4 a = slope + set1(kSlopeOffset);
  for (int k = 0; k < 4; k += 2) {
    const __m256i even = _mm256_castps_si256(a.v[k].v), odd = _mm256_castps_si256(a.v[k + 1].v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + k * kLanes),
                        _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa));
  }
}
ZB_INLINE Vec4 load_slope(const bf16* p, FourVecs) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2 * kLanes));
  const __m256i even = _mm256_set1_epi32(0xffff);
  return {slope_of(_mm256_and_si256(a, even)), slope_of(_mm256_srli_epi32(a, 16)), slope_of(_mm256_and_si256(b, even)),
          slope_of(_mm256_srli_epi32(b, 16))};
}
#endif

ZB_INLINE void store_slope(f16* p, Vec4 slope, FourVecs) {
  for (int k = 0; k < 4; ++k) store_slope(p + k * kLanes, slope.v[k], OneVec{});
}
ZB_INLINE Vec4 load_slope(const f16* p, FourVecs) {
  return each([&](int k) { return load_slope(p + k * kLanes, OneVec{}); });
}

}  // namespace
}  // namespace zeroblock
