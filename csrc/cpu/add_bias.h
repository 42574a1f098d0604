// add_bias: y = x + (bias + 0), bias along one dimension, or y = x + 0: the zero path of a residual branch, whose
// products are all +0, so that a bias of -0, and an x of -0 without a bias, come out as +0. x is [R, C, S]: NCHW has R
// = N, channels-last and token layouts have S = 1. fp32, bf16 or fp16, bias fp32, one rounding. y may be x itself.
// Without a bias elements are copied as words, -0 replaced; in place only vectors that hold a -0 are written. Where the
// calling thread flushes denormals the addition is carried out, which flushes them as eager's does.
// residual_if_zero: the test of a branch's weights (is_zero.h) and, where they are zero, add_bias, in one parallel
// region: a thread reads its share of the weights and then forms its share of y. Where they are not, y is left
// undefined. Loop: pieces of the weights and of y, shared between the threads. No reduction.
#pragma once

#include "is_zero.h"
#include "rows/rows.h"

namespace zeroblock {
namespace {

// Work is shared in pieces of kPieceBytes read or written, at most so many: the products of piece_begin must not
// overflow.
constexpr int64_t kMostPieces = 4096;

// Where piece k of `pieces` begins among n elements; between first and last in whole units.
ZB_INLINE int64_t piece_begin(int64_t n, int64_t k, int64_t pieces, int64_t unit) {
  return k == pieces ? n : n * k / pieces / unit * unit;
}

// Whether this thread's arithmetic treats denormals as zero (bit 6) or flushes them (bit 15).
ZB_INLINE bool flushes_denormals() { return (_mm_getcsr() & 0x8040u) != 0; }

// y = x + 0 for `bytes` bytes of elements of `size` bytes.
template <int size>
ZB_LOOPS void copy_plus_zero(const char* x, char* y, int64_t bytes, bool streamed) {
  constexpr int64_t step = sizeof(Bits);
  int64_t k = 0;
  bool changed;
  if (x == y) {
    for (; k + step <= bytes; k += step) {
      const Bits a = without_minus_zero<size>(load_bits(x + k), &changed);
      if (changed) store_bits(y + k, a);
    }
  } else if (streamed) {
    for (; k + step <= bytes; k += step) stream_bits(y + k, without_minus_zero<size>(load_bits(x + k), &changed));
  } else {
    for (; k + step <= bytes; k += step) store_bits(y + k, without_minus_zero<size>(load_bits(x + k), &changed));
  }
  for (; k < bytes; k += size) {
    uint32_t bits = 0;
    std::memcpy(&bits, x + k, size);
    if (bits == (size == 2 ? 0x8000u : 0x80000000u)) bits = 0;
    std::memcpy(y + k, &bits, size);
  }
}

struct AddBiasPlan {
  bool words, streamed, by_column;
  int64_t rows, width;
};

template <class T>
ZB_INLINE AddBiasPlan add_bias_plan(const T* y, const AddBias& p) {
  AddBiasPlan plan{};
  const int64_t n = p.R * p.C * p.S, total_bytes = 2 * n * static_cast<int64_t>(sizeof(T));
  plan.words = p.bias == nullptr && !flushes_denormals();
  plan.by_column = p.bias != nullptr && p.S == 1;
  plan.rows = p.bias == nullptr ? 1 : plan.by_column ? p.R : p.R * p.C;
  plan.width = p.bias == nullptr ? n : plan.by_column ? p.C : p.S;
  plan.streamed = streams(y, p.bias == nullptr ? 0 : plan.width, total_bytes);  // pieces of one long row are aligned
  return plan;
}

// Pieces k .. last of y.
template <class T>
ZB_LOOPS void add_bias_pieces(const AddBias& p, AddBiasPlan plan, int64_t k, int64_t last, int64_t pieces) {
  const T* const x = static_cast<const T*>(p.x);
  T* const y = static_cast<T*>(p.y);
  const bool streamed = plan.streamed;
  const Vec zero = set1(0.0f);
  if (p.bias == nullptr) {
    constexpr int64_t unit = 64;
    const int64_t begin = piece_begin(plan.width, k, pieces, unit), end = piece_begin(plan.width, last, pieces, unit);
    if (plan.words) {
      copy_plus_zero<sizeof(T)>(reinterpret_cast<const char*>(x + begin), reinterpret_cast<char*>(y + begin),
                                (end - begin) * static_cast<int64_t>(sizeof(T)), streamed);
    } else {
      each_column(begin, end, [&](int64_t i, auto lanes) ZB_BODY {
        store_or_stream(y + i, load(x + i, lanes) + zero, lanes, streamed);
      });
    }
    return;
  }
  const int64_t width = plan.width, end = piece_begin(plan.rows, last, pieces, 1);
  for (int64_t r = piece_begin(plan.rows, k, pieces, 1); r < end; ++r) {
    const T* const in = x + r * width;
    T* const out = y + r * width;
    if (plan.by_column) {
      each_column(0, width, [&](int64_t i, auto lanes) ZB_BODY {
        store_or_stream(out + i, load(in + i, lanes) + (load(p.bias + i, lanes) + zero), lanes, streamed);
      });
    } else {
      const Vec b = set1(p.bias[r % p.C] + 0.0f);
      each_column(0, width, [&](int64_t i, auto lanes) ZB_BODY {
        store_or_stream(out + i, load(in + i, lanes) + b, lanes, streamed);
      });
    }
  }
}

template <class T>
bool residual_if_zero_of(T*, const ZeroBytes* tests, int count, int element_size, const AddBias& p, ParallelFor run) {
  const AddBiasPlan plan = add_bias_plan(static_cast<const T*>(p.y), p);
  int64_t cost = 2 * p.R * p.C * p.S * static_cast<int64_t>(sizeof(T));
  for (int t = 0; t < count; ++t) cost += tests[t].bytes;
  const int64_t wanted = cost / kPieceBytes + 1, pieces = wanted < kMostPieces ? wanted : kMostPieces;
  const uint64_t mask = magnitude_bits(element_size);
  int found = 0;  // set by any thread that meets a non-zero; the others stop at their next chunk
  parallel(run, 0, pieces, kLeastPieces, [&](int64_t begin, int64_t end) {
    for (int t = 0; t < count; ++t) {
      const int64_t last = piece_begin(tests[t].bytes, end, pieces, 64);
      int64_t left = 0;
      for (int64_t k = piece_begin(tests[t].bytes, begin, pieces, 64); k < last; k += left) {
        left = last - k < kZeroChunkBytes ? last - k : kZeroChunkBytes;
        if (__atomic_load_n(&found, __ATOMIC_RELAXED) != 0) return;
        if (!is_zero_range(static_cast<const char*>(tests[t].data) + k, left, mask)) {
          __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
          return;
        }
      }
    }
    if (__atomic_load_n(&found, __ATOMIC_RELAXED) != 0) return;
    add_bias_pieces<T>(p, plan, begin, end, pieces);
    _mm_sfence();
  });
  return __atomic_load_n(&found, __ATOMIC_RELAXED) == 0;
}

inline bool residual_if_zero(const ZeroBytes* tests, int count, int element_size, const AddBias& p, ParallelFor run) {
  bool zero = false;
  with_type(p.dtype, [&](auto* t) { zero = residual_if_zero_of(t, tests, count, element_size, p, run); });
  return zero;
}

inline void add_bias(const AddBias& p, ParallelFor run) { residual_if_zero(nullptr, 0, 4, p, run); }

}  // namespace
}  // namespace zeroblock
