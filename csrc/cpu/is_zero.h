// is_zero: does a buffer hold nothing but +0 and -0? The sign bit is dropped, so NaN and denormals count as non-zero.
// Dense weights differ from zero in their first bytes, so those are looked at before any thread is involved.
#pragma once

#include "vec.h"

namespace zeroblock {
namespace {

// Below this size one thread reads it from its cache faster than others wake up.
constexpr int64_t kZeroParallelBytes = int64_t{1} << 20;
// Bytes read between two looks at the result, and by one piece of parallel work.
constexpr int64_t kZeroBlockBytes = 4096;
constexpr int64_t kZeroChunkBytes = int64_t{256} << 10;

// All bits but the sign, for every element in 8 bytes.
ZB_INLINE uint64_t magnitude_bits(int element_size) {
  if (element_size == 2) return 0x7fff7fff7fff7fffull;
  return element_size == 4 ? 0x7fffffff7fffffffull : 0x7fffffffffffffffull;
}

#if defined(__AVX512F__)
using ZeroVec = __m512i;
ZB_INLINE ZeroVec zero_load(const char* p) { return _mm512_loadu_si512(p); }
ZB_INLINE ZeroVec zero_or(ZeroVec a, ZeroVec b) { return _mm512_or_si512(a, b); }
ZB_INLINE bool zero_test(ZeroVec a, uint64_t mask) {
  return _mm512_test_epi64_mask(a, _mm512_set1_epi64(static_cast<int64_t>(mask))) == 0;
}
#else
using ZeroVec = __m256i;
ZB_INLINE ZeroVec zero_load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ZB_INLINE ZeroVec zero_or(ZeroVec a, ZeroVec b) { return _mm256_or_si256(a, b); }
ZB_INLINE bool zero_test(ZeroVec a, uint64_t mask) {
  return _mm256_testz_si256(a, _mm256_set1_epi64x(static_cast<int64_t>(mask)));
}
#endif

// One thread: blocks of four interleaved chains, then single vectors, then 8 bytes at a time with the last ones padded.
inline bool is_zero_range(const char* p, int64_t bytes, uint64_t mask) {
  constexpr int64_t step = sizeof(ZeroVec);
  int64_t k = 0;
  for (; k + kZeroBlockBytes <= bytes; k += kZeroBlockBytes) {
    ZeroVec a = zero_load(p + k), b = zero_load(p + k + step);
    ZeroVec c = zero_load(p + k + 2 * step), d = zero_load(p + k + 3 * step);
    for (int64_t j = 4 * step; j < kZeroBlockBytes; j += 4 * step) {
      a = zero_or(a, zero_load(p + k + j));
      b = zero_or(b, zero_load(p + k + j + step));
      c = zero_or(c, zero_load(p + k + j + 2 * step));
      d = zero_or(d, zero_load(p + k + j + 3 * step));
    }
    if (!zero_test(zero_or(zero_or(a, b), zero_or(c, d)), mask)) return false;
  }
  for (; k + step <= bytes; k += step) {
    if (!zero_test(zero_load(p + k), mask)) return false;
  }
  for (; k < bytes; k += 8) {
    uint64_t bits = 0;
    std::memcpy(&bits, p + k, static_cast<size_t>(bytes - k < 8 ? bytes - k : 8));
    if ((bits & mask) != 0) return false;
  }
  return true;
}

inline bool is_zero(const void* data, int64_t bytes, int element_size, ParallelFor run) {
  const char* p = static_cast<const char*>(data);
  const uint64_t mask = magnitude_bits(element_size);
  constexpr int64_t look = 4 * static_cast<int64_t>(sizeof(ZeroVec));
  if (bytes >= look && !is_zero_range(p, look, mask)) return false;
  if (bytes <= kZeroParallelBytes) return is_zero_range(p, bytes, mask);

  int found = 0;  // set once, by any thread that meets a non-zero; the others stop at their next chunk
  const int64_t chunks = (bytes + kZeroChunkBytes - 1) / kZeroChunkBytes;
  parallel(run, 0, chunks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end && __atomic_load_n(&found, __ATOMIC_RELAXED) == 0; ++c) {
      const int64_t k = c * kZeroChunkBytes;
      const int64_t left = bytes - k;
      if (!is_zero_range(p + k, left < kZeroChunkBytes ? left : kZeroChunkBytes, mask)) {
        __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
      }
    }
  });
  return __atomic_load_n(&found, __ATOMIC_RELAXED) == 0;
}

}  // namespace
}  // namespace zeroblock
