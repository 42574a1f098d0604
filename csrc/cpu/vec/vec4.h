// Four vectors in step, for kernels with a sigmoid: one chain of some twenty dependent instructions leaves most of a
// processor's units idle, four chains side by side keep them busy.
#pragma once

#include "math.h"

namespace zeroblock {
namespace {

struct Vec4 {
  Vec v[4];
  Vec4() = default;
  ZB_INLINE Vec4(Vec a) : v{a, a, a, a} {}  // implicit: a Vec operand serves all four
  ZB_INLINE Vec4(Vec a, Vec b, Vec c, Vec d) : v{a, b, c, d} {}
};

template <class F>
ZB_INLINE Vec4 each(const F& f) {
  return {f(0), f(1), f(2), f(3)};
}

ZB_INLINE Vec4 operator+(Vec4 a, Vec4 b) {
  return each([&](int k) { return a.v[k] + b.v[k]; });
}
ZB_INLINE Vec4 operator-(Vec4 a, Vec4 b) {
  return each([&](int k) { return a.v[k] - b.v[k]; });
}
ZB_INLINE Vec4 operator*(Vec4 a, Vec4 b) {
  return each([&](int k) { return a.v[k] * b.v[k]; });
}
ZB_INLINE Vec4 operator/(Vec4 a, Vec4 b) {
  return each([&](int k) { return a.v[k] / b.v[k]; });
}
ZB_INLINE Vec4 fmadd(Vec4 a, Vec4 b, Vec4 c) {
  return each([&](int k) { return fmadd(a.v[k], b.v[k], c.v[k]); });
}
ZB_INLINE Vec4 fmsub(Vec4 a, Vec4 b, Vec4 c) {
  return each([&](int k) { return fmsub(a.v[k], b.v[k], c.v[k]); });
}
ZB_INLINE Vec4 fnmadd(Vec4 a, Vec4 b, Vec4 c) {
  return each([&](int k) { return fnmadd(a.v[k], b.v[k], c.v[k]); });
}
ZB_INLINE Vec4 min_with(float bound, Vec4 x) {
  return each([&](int k) { return min_with(bound, x.v[k]); });
}
ZB_INLINE Vec4 max_with(float bound, Vec4 x) {
  return each([&](int k) { return max_with(bound, x.v[k]); });
}
ZB_INLINE Vec4 round_nearest(Vec4 a) {
  return each([&](int k) { return round_nearest(a.v[k]); });
}
ZB_INLINE Vec4 times_power_of_2(Vec4 a, Vec4 n) {
  return each([&](int k) { return times_power_of_2(a.v[k], n.v[k]); });
}
ZB_INLINE Vec4 reciprocal_estimate(Vec4 a) {
  return each([&](int k) { return reciprocal_estimate(a.v[k]); });
}
#if defined(__AVX512F__)
ZB_INLINE Vec4 bound_magnitude(float bound, Vec4 x) {
  return each([&](int k) { return bound_magnitude(bound, x.v[k]); });
}
ZB_INLINE Vec4 power_of_2_in_32nds(Vec4 u) {
  return each([&](int k) { return power_of_2_in_32nds(u.v[k]); });
}
#else
ZB_INLINE Vec4 times_power_of_2_floor(Vec4 a, Vec4 t) {
  return each([&](int k) { return times_power_of_2_floor(a.v[k], t.v[k]); });
}
ZB_INLINE Vec4 above_floor(Vec4 t) {
  return each([&](int k) { return above_floor(t.v[k]); });
}
ZB_INLINE Vec4 reciprocal(Vec4 a) {
  return each([&](int k) { return reciprocal(a.v[k]); });
}
#endif

ZB_INLINE Vec4 round_to(Vec4 a, const bf16* type) {
  return each([&](int k) { return round_to(a.v[k], type); });
}

// The sum of the four; a Vec is its own.
ZB_INLINE Vec total(Vec4 a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
ZB_INLINE Vec total(Vec a) { return a; }

ZB_INLINE Vec total_product(Vec4 a, Vec4 b) {
  return fmadd(a.v[0], b.v[0], a.v[1] * b.v[1]) + fmadd(a.v[2], b.v[2], a.v[3] * b.v[3]);
}
ZB_INLINE Vec total_product(Vec a, Vec b) { return a * b; }

// Sums kept in four accumulators; a single vector goes to the first.
ZB_INLINE void add_to(Vec4& sums, Vec4 a) { sums = sums + a; }
ZB_INLINE void add_to(Vec4& sums, Vec a) { sums.v[0] = sums.v[0] + a; }
ZB_INLINE void add_product_to(Vec4& sums, Vec4 a, Vec4 b) { sums = fmadd(a, b, sums); }
ZB_INLINE void add_product_to(Vec4& sums, Vec a, Vec b) { sums.v[0] = fmadd(a, b, sums.v[0]); }

// A step of four whole vectors. Which lane holds which element is up to the element type, the same for its every load
// and store: right for elementwise work and for sums, and for nothing else.
struct FourVecs {};

template <class T>
ZB_INLINE Vec4 load(const T* p, FourVecs) {
  return each([&](int k) { return load(p + k * kLanes); });
}
template <class T>
ZB_INLINE void store(T* p, Vec4 a, FourVecs) {
  for (int k = 0; k < 4; ++k) store(p + k * kLanes, a.v[k]);
}
ZB_INLINE Vec4 keep_first(Vec4 a, FourVecs) { return a; }

ZB_INLINE Vec4 load(const bf16* p, FourVecs) {
  const Bits a = load_bits(p), b = load_bits(p + 2 * kLanes);
  return {widen_even(a), widen_odd(a), widen_even(b), widen_odd(b)};
}
ZB_INLINE void store(bf16* p, Vec4 a, FourVecs) {
  for (int k = 0; k < 4; k += 2) store_bits(p + k * kLanes, narrow_pair(a.v[k], a.v[k + 1]));
}
ZB_INLINE void store_inexact(bf16* p, Vec4 a, FourVecs) {
  for (int k = 0; k < 4; k += 2) store_bits(p + k * kLanes, narrow_inexact_pair(a.v[k], a.v[k + 1]));
}
ZB_INLINE void stream(bf16* p, Vec4 a) {  // p aligned to a register
  for (int k = 0; k < 4; k += 2) stream_bits(p + k * kLanes, narrow_pair(a.v[k], a.v[k + 1]));
}

// Four vectors in memory's order, in the order that load(const bf16*, FourVecs{}) gives; a single one keeps its order.
ZB_INLINE Vec4 in_pairs(Vec4 a) {
  Vec4 out;
  for (int k = 0; k < 4; k += 2) deinterleave(a.v[k], a.v[k + 1], out.v[k], out.v[k + 1]);
  return out;
}
ZB_INLINE Vec in_pairs(Vec a) { return a; }
// And back.
ZB_INLINE Vec4 out_of_pairs(Vec4 a) {
  Vec4 out;
  for (int k = 0; k < 4; k += 2) interleave(a.v[k], a.v[k + 1], out.v[k], out.v[k + 1]);
  return out;
}
ZB_INLINE Vec out_of_pairs(Vec a) { return a; }

// body(i, lanes) over [0, n): FourVecs{} as long as it fits, then as for_lanes.
template <class Body>
ZB_INLINE void for_lanes_by_4(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) body(i, FourVecs{});
  for (; i + kLanes <= n; i += kLanes) body(i, OneVec{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// Rows of a matrix, four in step: rows.load(p, lanes) reads one Vec of each row, p being in the first.
struct FourRows {
  int64_t stride;
  template <class T, class Lanes>
  ZB_INLINE Vec4 load(const T* p, Lanes lanes) const {
    return each([&](int k) { return zeroblock::load(p + k * stride, lanes); });
  }
  template <class T, class Lanes>
  ZB_INLINE void store(T* p, Vec4 a, Lanes lanes) const {
    for (int k = 0; k < 4; ++k) zeroblock::store(p + k * stride, a.v[k], lanes);
  }
};

}  // namespace
}  // namespace zeroblock
