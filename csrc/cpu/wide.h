// Four vectors in step, for kernels with a sigmoid: its chain of some twenty dependent instructions fills a processor's
// scheduler long before its units; four chains side by side keep the units busy.
#pragma once

#include "vec.h"

namespace zeroblock {
namespace {

struct Wide {
  Vec v[4];
  Wide() = default;
  ZB_INLINE Wide(Vec a) : v{a, a, a, a} {}  // implicit: a Vec operand serves all four
  ZB_INLINE Wide(Vec a, Vec b, Vec c, Vec d) : v{a, b, c, d} {}
};

template <class F>
ZB_INLINE Wide each(const F& f) {
  return {f(0), f(1), f(2), f(3)};
}

ZB_INLINE Wide operator+(Wide a, Wide b) {
  return each([&](int k) { return a.v[k] + b.v[k]; });
}
ZB_INLINE Wide operator-(Wide a, Wide b) {
  return each([&](int k) { return a.v[k] - b.v[k]; });
}
ZB_INLINE Wide operator*(Wide a, Wide b) {
  return each([&](int k) { return a.v[k] * b.v[k]; });
}
ZB_INLINE Wide fmadd(Wide a, Wide b, Wide c) {
  return each([&](int k) { return fmadd(a.v[k], b.v[k], c.v[k]); });
}
ZB_INLINE Wide fmsub(Wide a, Wide b, Wide c) {
  return each([&](int k) { return fmsub(a.v[k], b.v[k], c.v[k]); });
}
ZB_INLINE Wide fnmadd(Wide a, Wide b, Wide c) {
  return each([&](int k) { return fnmadd(a.v[k], b.v[k], c.v[k]); });
}
ZB_INLINE Wide min_with(float bound, Wide x) {
  return each([&](int k) { return min_with(bound, x.v[k]); });
}
ZB_INLINE Wide max_with(float bound, Wide x) {
  return each([&](int k) { return max_with(bound, x.v[k]); });
}
ZB_INLINE Wide round_nearest(Wide a) {
  return each([&](int k) { return round_nearest(a.v[k]); });
}
ZB_INLINE Wide times_power_of_2(Wide a, Wide n) {
  return each([&](int k) { return times_power_of_2(a.v[k], n.v[k]); });
}
ZB_INLINE Wide reciprocal_estimate(Wide a) {
  return each([&](int k) { return reciprocal_estimate(a.v[k]); });
}
#if !defined(__AVX512F__)
ZB_INLINE Wide reciprocal(Wide a) {
  return each([&](int k) { return reciprocal(a.v[k]); });
}
#endif

// The sum of the four; a Vec is its own.
ZB_INLINE Vec total(Wide a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
ZB_INLINE Vec total(Vec a) { return a; }

ZB_INLINE Vec total_product(Wide a, Wide b) {
  return fmadd(a.v[0], b.v[0], a.v[1] * b.v[1]) + fmadd(a.v[2], b.v[2], a.v[3] * b.v[3]);
}
ZB_INLINE Vec total_product(Vec a, Vec b) { return a * b; }

// Sums kept in four accumulators; a single vector goes to the first.
ZB_INLINE void add_to(Wide& sums, Wide a) { sums = sums + a; }
ZB_INLINE void add_to(Wide& sums, Vec a) { sums.v[0] = sums.v[0] + a; }
ZB_INLINE void add_product_to(Wide& sums, Wide a, Wide b) { sums = fmadd(a, b, sums); }
ZB_INLINE void add_product_to(Wide& sums, Vec a, Vec b) { sums.v[0] = fmadd(a, b, sums.v[0]); }

// Stands for four whole vectors where All stands for one. Which lane holds which element is up to the element type:
// the same for its every load and store, so elementwise work and sums are right, and nothing else is.
struct Four {};

template <class T>
ZB_INLINE Wide load(const T* p, Four) {
  return each([&](int k) { return load(p + k * kLanes); });
}
template <class T>
ZB_INLINE void store(T* p, Wide a, Four) {
  for (int k = 0; k < 4; ++k) store(p + k * kLanes, a.v[k]);
}
ZB_INLINE Wide keep_first(Wide a, Four) { return a; }

// Two neighbours of 16 bits share a lane of 32: a shift gives the even one and a mask the odd one, fewer instructions
// than widening each half.
#if defined(__AVX512F__)
ZB_INLINE Wide load(const bf16* p, Four) {
  const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 2 * kLanes);
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(a, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(a, odd))},
          {_mm512_castsi512_ps(_mm512_slli_epi32(b, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(b, odd))}};
}
ZB_INLINE void store(bf16* p, Wide a, Four) {
  for (int k = 0; k < 4; k += 2) {
    const __m512i even = _mm512_srli_epi32(round_bf16(a.v[k]), 16);
    _mm512_storeu_si512(p + k * kLanes, _mm512_mask_blend_epi16(0xaaaaaaaau, even, round_bf16(a.v[k + 1])));
  }
}
#else
ZB_INLINE Wide load(const bf16* p, Four) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2 * kLanes));
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(a, odd))},
          {_mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(b, odd))}};
}
ZB_INLINE void store(bf16* p, Wide a, Four) {
  for (int k = 0; k < 4; k += 2) {
    const __m256i even = _mm256_srli_epi32(round_bf16(a.v[k]), 16);
    const __m256i both = _mm256_blend_epi16(even, round_bf16(a.v[k + 1]), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + k * kLanes), both);
  }
}
#endif

// body(i, lanes) over [0, n): Four{} as long as it fits, then as for_lanes.
template <class Body>
ZB_INLINE void for_wide_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) body(i, Four{});
  for (; i + kLanes <= n; i += kLanes) body(i, All{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// Rows of a matrix, four in step: rows.load(p, lanes) reads one Vec of each row, p being in the first.
struct FourRows {
  int64_t stride;
  template <class T, class Lanes>
  ZB_INLINE Wide load(const T* p, Lanes lanes) const {
    return each([&](int k) { return zeroblock::load(p + k * stride, lanes); });
  }
  template <class T, class Lanes>
  ZB_INLINE void store(T* p, Wide a, Lanes lanes) const {
    for (int k = 0; k < 4; ++k) zeroblock::store(p + k * stride, a.v[k], lanes);
  }
};
struct OneRow {
  template <class T, class Lanes>
  ZB_INLINE Vec load(const T* p, Lanes lanes) const {
    return zeroblock::load(p, lanes);
  }
  template <class T, class Lanes>
  ZB_INLINE void store(T* p, Vec a, Lanes lanes) const {
    zeroblock::store(p, a, lanes);
  }
};

// body(row, FourRows or OneRow) over [0, rows), in order.
template <class Body>
ZB_INLINE void for_row_tiles(int64_t rows, int64_t stride, const Body& body) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) body(row, FourRows{stride});
  for (; row < rows; ++row) body(row, OneRow{});
}

}  // namespace
}  // namespace zeroblock
