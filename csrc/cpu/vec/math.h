// exp, the sigmoid and SiLU, of one vector or of several in step (vec4.h): V is Vec or Vec4.
#pragma once

#include "vec.h"

namespace zeroblock {
namespace {

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

// Keeps exp(x), exp(-x) and what is one more than it inside the normal range.
template <class V>
ZB_INLINE V clamp_exponent(V x) {
  return max_with(-87.0f, min_with(87.0f, x));
}

// 1 / (1 + exp(-x)). Clamping keeps exp and the reciprocal inside the normal range: at x = -87 the result is 1.6e-38.
template <class V>
ZB_INLINE V sigmoid(V x) {
  return reciprocal(set1(1.0f) + exp_bounded(clamp_exponent(set1(0.0f) - x)));
}

// exp_negated_for, reciprocal_for and sigmoid_for are as exact as a result of type T needs, for an x that carries a
// rounding error of its own.
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
  const V t = fmadd(clamp_exponent(x), set1(-1.44269502f), set1(0.5f));
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

// x * sigmoid(x). fp32 divides: the divider works beside the other units, takes half the time of the reciprocal by
// Newton's method and a product, and rounds once. 16 bits take the estimate, which is no slower here and faster where
// dividers are slow (measured: python benchmarks/run.py --group memory_bound --filter group_norm_silu).
template <class V>
ZB_INLINE V silu_for(V x, const float* type) {
  return x / (set1(1.0f) + exp_negated_for(x, type));
}
template <class V, class T>
ZB_INLINE V silu_for(V x, const T* type) {
  return x * sigmoid_for(x, type);
}

}  // namespace
}  // namespace zeroblock
