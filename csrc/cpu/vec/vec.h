// A thin vector of fp32 lanes, 16 with AVX-512 and 8 with AVX2, and loops over them whose tail is a step like the
// others.
#pragma once

#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#else
#error "csrc/cpu kernels need AVX2 or AVX-512; setup.py compiles them with the flags of each"
#endif

namespace zeroblock {
namespace {

ZB_INLINE Vec& operator+=(Vec& a, Vec b) { return a = a + b; }

// The value that storing to T and loading again would give (used where a rounded value feeds further arithmetic).
ZB_INLINE Vec round_to(Vec a, const float*) { return a; }

// What a generic body handles in one step, passed as its `lanes`: one whole vector, or an int, the elements of a tail.
// vec4.h and rows/steps.h add FourVecs and TwoVecs.
struct OneVec {};
template <class T>
ZB_INLINE Vec load(const T* p, OneVec) {
  return load(p);
}
template <class T>
ZB_INLINE void store(T* p, Vec a, OneVec) {
  store(p, a);
}
ZB_INLINE Vec keep_first(Vec a, OneVec) { return a; }

// Stores a value that carries an error of more than half an ulp of fp32; a NaN as round_inexact_bf16 wants it.
template <class T, class V, class Lanes>
ZB_INLINE void store_inexact(T* p, V a, Lanes lanes) {
  store(p, a, lanes);
}
#if defined(__AVX512F__)
ZB_INLINE void store_inexact(bf16* p, Vec a, OneVec) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_inexact_bf16(a));
}
ZB_INLINE void store_inexact(bf16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, tail_mask(n), narrow_inexact_bf16(a));
}
#endif

// body(i, lanes) for i = 0, kLanes, ... below n; lanes is OneVec{}, or the number of elements left in the tail.
template <class Body>
ZB_INLINE void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, OneVec{});
  if (i < n) body(i, static_cast<int>(n - i));
}

}  // namespace
}  // namespace zeroblock
