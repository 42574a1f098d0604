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
ZB_INLINE Wide operator/(Wide a, Wide b) {
  return each([&](int k) { return a.v[k] / b.v[k]; });
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
#if defined(__AVX512F__)
ZB_INLINE Wide bound_magnitude(float bound, Wide x) {
  return each([&](int k) { return bound_magnitude(bound, x.v[k]); });
}
ZB_INLINE Wide power_of_2_in_32nds(Wide u) {
  return each([&](int k) { return power_of_2_in_32nds(u.v[k]); });
}
#else
ZB_INLINE Wide times_power_of_2_floor(Wide a, Wide t) {
  return each([&](int k) { return times_power_of_2_floor(a.v[k], t.v[k]); });
}
ZB_INLINE Wide above_floor(Wide t) {
  return each([&](int k) { return above_floor(t.v[k]); });
}
ZB_INLINE Wide bound_negated_exponent(Wide x) {
  return each([&](int k) { return bound_negated_exponent(x.v[k]); });
}
ZB_INLINE Wide reciprocal(Wide a) {
  return each([&](int k) { return reciprocal(a.v[k]); });
}
#endif

ZB_INLINE Wide round_to(Wide a, const bf16* type) {
  return each([&](int k) { return round_to(a.v[k], type); });
}

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
ZB_INLINE __m512i narrow_pair(Vec even, Vec odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(round_bf16(even), 16), round_bf16(odd));
}
ZB_INLINE void store(bf16* p, Wide a, Four) {
  for (int k = 0; k < 4; k += 2) _mm512_storeu_si512(p + k * kLanes, narrow_pair(a.v[k], a.v[k + 1]));
}
ZB_INLINE void store_inexact(bf16* p, Wide a, Four) {
  const __m512i upper_halves =
      _mm512_setr_epi32(0x210001, 0x230003, 0x250005, 0x270007, 0x290009, 0x2b000b, 0x2d000d, 0x2f000f, 0x310011,
                        0x330013, 0x350015, 0x370017, 0x390019, 0x3b001b, 0x3d001d, 0x3f001f);
  for (int k = 0; k < 4; k += 2) {
    const __m512i even = round_inexact_bf16(a.v[k]), odd = round_inexact_bf16(a.v[k + 1]);
    _mm512_storeu_si512(p + k * kLanes, _mm512_permutex2var_epi16(even, upper_halves, odd));
  }
}
ZB_INLINE void stream(bf16* p, Wide a) {  // p aligned to 64 bytes
  for (int k = 0; k < 4; k += 2) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p + k * kLanes), narrow_pair(a.v[k], a.v[k + 1]));
  }
}
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
ZB_INLINE __m256i narrow_pair(Vec even, Vec odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(even), 16), round_bf16(odd), 0xaa);
}
ZB_INLINE void store(bf16* p, Wide a, Four) {
  for (int k = 0; k < 4; k += 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + k * kLanes), narrow_pair(a.v[k], a.v[k + 1]));
  }
}
ZB_INLINE void stream(bf16* p, Wide a) {  // p aligned to 32 bytes
  for (int k = 0; k < 4; k += 2) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + k * kLanes), narrow_pair(a.v[k], a.v[k + 1]));
  }
}
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
#endif

// What load(const bf16*, Four{}) would give of four vectors that are in memory's order; a single one keeps it.
ZB_INLINE Wide in_pairs(Wide a) {
  Wide out;
  for (int k = 0; k < 4; k += 2) deinterleave(a.v[k], a.v[k + 1], out.v[k], out.v[k + 1]);
  return out;
}
ZB_INLINE Vec in_pairs(Vec a) { return a; }
// And back.
ZB_INLINE Wide out_of_pairs(Wide a) {
  Wide out;
  for (int k = 0; k < 4; k += 2) interleave(a.v[k], a.v[k + 1], out.v[k], out.v[k + 1]);
  return out;
}
ZB_INLINE Vec out_of_pairs(Vec a) { return a; }

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

}  // namespace
}  // namespace zeroblock
