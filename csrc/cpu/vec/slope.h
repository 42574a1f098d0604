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

ZB_INLINE Bits slope_bits(Vec slope) { return bits_of(slope + set1(kSlopeOffset)); }
ZB_INLINE Vec slope_of(Bits lower_halves) {
  return from_bits(with_bits(lower_halves, kSlopeUpperHalf)) - set1(kSlopeOffset);
}

template <class T>
ZB_INLINE void store_slope(T* p, Vec slope, OneVec) {
  store_lower_halves(p, slope_bits(slope));
}
template <class T>
ZB_INLINE void store_slope(T* p, Vec slope, int n) {
  store_lower_halves(p, slope_bits(slope), n);
}
template <class T>
ZB_INLINE Vec load_slope(const T* p, OneVec) {
  return slope_of(load_lower_halves(p));
}
template <class T>
ZB_INLINE Vec load_slope(const T* p, int n) {
  return slope_of(load_lower_halves(p, n));
}

// bf16 meets the slope of its pairs (vec4.h).
ZB_INLINE void store_slope(bf16* p, Vec4 slope, FourVecs) {
  for (int k = 0; k < 4; k += 2) {
    store_bits(p + k * kLanes, join_halves(slope_bits(slope.v[k]), slope_bits(slope.v[k + 1])));
  }
}
ZB_INLINE Vec4 load_slope(const bf16* p, FourVecs) {
  const Bits a = load_bits(p), b = load_bits(p + 2 * kLanes);
  return {slope_of(even_halves(a)), slope_of(odd_halves(a)), slope_of(even_halves(b)), slope_of(odd_halves(b))};
}
ZB_INLINE void store_slope(f16* p, Vec4 slope, FourVecs) {
  for (int k = 0; k < 4; ++k) store_slope(p + k * kLanes, slope.v[k], OneVec{});
}
ZB_INLINE Vec4 load_slope(const f16* p, FourVecs) {
  return each([&](int k) { return load_slope(p + k * kLanes, OneVec{}); });
}

}  // namespace
}  // namespace zeroblock
