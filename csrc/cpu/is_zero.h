// is_zero: does a buffer hold nothing but +0 and -0? The sign bit is masked, so NaN and denormals count as non-zero.
// Weights that are not zero differ from it in their first bytes, so those are read before any thread is woken.
// Loop: chunks of kZeroChunkBytes shared between the threads; all stop at the first one that is not zero. The order of
// the reads cannot change the answer.
#pragma once

#include "parallel.h"
#include "vec/vec.h"

namespace zeroblock {
namespace {

// Bytes read between two tests of the result, a page; and by one piece of parallel work, a part of an L2.
constexpr int64_t kZeroBlockBytes = 4096;
constexpr int64_t kZeroChunkBytes = int64_t{256} << 10;

// All bits but the sign, for every element in 8 bytes.
ZB_INLINE uint64_t magnitude_bits(int element_size) {
  if (element_size == 2) return 0x7fff7fff7fff7fffull;
  return element_size == 4 ? 0x7fffffff7fffffffull : 0x7fffffffffffffffull;
}

// One thread: blocks of four interleaved chains, then single vectors, then 8 bytes at a time with the last ones padded.
inline bool is_zero_range(const char* p, int64_t bytes, uint64_t mask) {
  constexpr int64_t step = sizeof(Bits);
  int64_t k = 0;
  for (; k + kZeroBlockBytes <= bytes; k += kZeroBlockBytes) {
    Bits a = load_bits(p + k), b = load_bits(p + k + step);
    Bits c = load_bits(p + k + 2 * step), d = load_bits(p + k + 3 * step);
    for (int64_t j = 4 * step; j < kZeroBlockBytes; j += 4 * step) {
      a = either_bit(a, load_bits(p + k + j));
      b = either_bit(b, load_bits(p + k + j + step));
      c = either_bit(c, load_bits(p + k + j + 2 * step));
      d = either_bit(d, load_bits(p + k + j + 3 * step));
    }
    if (!has_no_bit(either_bit(either_bit(a, b), either_bit(c, d)), mask)) return false;
  }
  for (; k + step <= bytes; k += step) {
    if (!has_no_bit(load_bits(p + k), mask)) return false;
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
  constexpr int64_t look = 4 * static_cast<int64_t>(sizeof(Bits));
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
