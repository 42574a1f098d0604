// One step of a row: a vector, or for bf16 two of them. Two neighbours of 16 bits are widened and rounded at a time,
// which leaves elements in the order of their pairs; operands of fp32 are brought into that order ("staged"), and sums
// back out of it.
#pragma once

#include "rows.h"

namespace zeroblock {
namespace {

constexpr int64_t kStagedRow = 2048;  // elements: two rows and four operands of fp32 are 48 KB, what L1 has

// A step of two whole vectors; of bf16, one load of 2 kLanes elements in the order of their pairs.
struct TwoVecs {};

// Whether an operand is fp32, and not in the 16 bits of the activation.
constexpr bool is_float(const float*) { return true; }
constexpr bool is_float(const void*) { return false; }

struct Vec2 {
  Vec v[2];
};
ZB_INLINE Vec2 interleave(Vec2 a) {
  Vec2 out;
  interleave(a.v[0], a.v[1], out.v[0], out.v[1]);
  return out;
}
// NaNs as narrow_plain_pair wants them: those of bf16 and of arithmetic are, an fp32 operand's after with_plain_nan.
ZB_INLINE Bits narrow_plain_pair(Vec2 a) { return narrow_plain_pair(a.v[0], a.v[1]); }

// What load_step gives: a Vec, a Vec2, or the bits of a pair, which part() widens as it is used.
template <class Lanes>
constexpr int kParts = 1;
template <>
constexpr int kParts<TwoVecs> = 2;
template <class T, class Lanes>
ZB_INLINE Vec load_step(const T* p, Lanes lanes) {
  return load(p, lanes);
}
ZB_INLINE Bits load_step(const bf16* p, TwoVecs) { return load_bits(p); }
ZB_INLINE Vec2 load_step(const float* p, TwoVecs) { return {{load(p), load(p + kLanes)}}; }  // of a staged row
ZB_INLINE Vec part(Vec a, int) { return a; }
ZB_INLINE Vec part(Vec2 a, int k) { return a.v[k]; }
ZB_INLINE Vec part(Bits a, int k) { return k == 0 ? widen_even(a) : widen_odd(a); }

// Stores a step where load_step() will find it again.
template <class T, class Lanes>
ZB_INLINE void keep_step(T* p, Vec a, Lanes lanes) {
  store(p, a, lanes);
}
ZB_INLINE void keep_step(bf16* p, Bits a, TwoVecs) { store_bits(p, a); }
template <class Lanes>
ZB_INLINE void keep_step(float* p, Vec2 a, Lanes lanes) {
  store(p, a.v[0], lanes);
}
ZB_INLINE void keep_step(float* p, Vec2 a, TwoVecs) {
  store(p, a.v[0]);
  store(p + kLanes, a.v[1]);
}

template <class T, class Lanes>
ZB_INLINE void store_step(T* p, Vec2 a, Lanes lanes, bool streamed) {
  store_or_stream(p, a.v[0], lanes, streamed);
}
ZB_INLINE void store_step(bf16* p, Vec2 a, TwoVecs, bool streamed) {
  if (streamed) {
    stream_bits(p, narrow_plain_pair(a));
  } else {
    store_bits(p, narrow_plain_pair(a));
  }
}
// fp32 beside rows of bf16, in memory's order.
ZB_INLINE void store_step(float* p, Vec2 a, TwoVecs, bool) { keep_step(p, interleave(a), TwoVecs{}); }
// The first one, returning what was stored.
template <class T, class Lanes>
ZB_INLINE Vec store_step_rounded(T* p, Vec2 a, Lanes lanes, bool streamed) {
  store_or_stream(p, a.v[0], lanes, streamed);
  return round_to(a.v[0], p);
}
ZB_INLINE Bits store_step_rounded(bf16* p, Vec2 a, TwoVecs, bool streamed) {
  const Bits bits = narrow_plain_pair(a);
  if (streamed) {
    stream_bits(p, bits);
  } else {
    store_bits(p, bits);
  }
  return bits;
}

// f(i, lanes) over [0, D) for rows of T; bf16 in pairs up to the tail.
template <class T, class F>
ZB_INLINE void each_step(const T*, int64_t D, const F& f) {
  each_column(0, D, f);
}
template <class F>
ZB_INLINE void each_step(const bf16*, int64_t D, const F& f) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= D; i += 2 * kLanes) f(i, TwoVecs{});
  for (; i < D; i += kLanes) f(i, static_cast<int>(D - i < kLanes ? D - i : kLanes));
}
// The same a second time: from the end, for long rows of fp32 have pushed their beginning out of L1.
template <class T, class F>
ZB_INLINE void each_step_again(const T*, int64_t D, const F& f) {
  int64_t i = D / kLanes * kLanes;
  if (i < D) f(i, static_cast<int>(D - i));
  while (i > 0) f(i -= kLanes, OneVec{});
}
template <class F>
ZB_INLINE void each_step_again(const bf16* type, int64_t D, const F& f) {
  each_step(type, D, f);
}

// A step of a row of fp32 in the order of those of a row of T, ready for narrow_plain_pair.
ZB_INLINE Vec2 in_step(OperandRow<float> row, int64_t i, TwoVecs) {
  Vec2 out;
  if (row.mask == 0) return {{with_plain_nan(load(row.p)), with_plain_nan(load(row.p))}};
  deinterleave(with_plain_nan(load(row.p + i)), with_plain_nan(load(row.p + i + kLanes)), out.v[0], out.v[1]);
  return out;
}
template <class Lanes>
ZB_INLINE Vec in_step(OperandRow<float> row, int64_t i, Lanes lanes) {
  return row.at(i, lanes);
}

// What row r of a tile has at a step: of an operand with a row for each token, or of one row for all of them, staged.
template <bool kToken, class M, class Lanes>
ZB_INLINE auto either_step(const OperandTile<kToken, M>& a, OperandRow<float> staged, int r, int64_t i, Lanes lanes) {
  if constexpr (kToken && is_float(static_cast<M*>(nullptr))) {
    return in_step(OperandRow<float>{a.p + r * a.stride_t, -1}, i, lanes);
  } else if constexpr (kToken) {
    return load_step(a.p + r * a.stride_t + i, lanes);
  } else {
    return load_step(staged.p + (i & staged.mask), lanes);
  }
}

// Adds a step to a row of accumulators in the order of the steps, and brings such a row back into memory's.
template <class Lanes>
ZB_INLINE void accumulate_step(float* acc, int64_t i, Vec2 a, Lanes lanes) {
  accumulate(acc, i, a.v[0], lanes);
}
ZB_INLINE void accumulate_step(float* acc, int64_t i, Vec2 a, TwoVecs) {
  accumulate(acc, i, a.v[0], OneVec{});
  accumulate(acc, i + kLanes, a.v[1], OneVec{});
}
template <class T>
ZB_INLINE void unstage(T* type, float* row, int64_t D) {
  each_step(type, D, [&](int64_t i, auto lanes) ZB_BODY {
    if constexpr (kParts<decltype(lanes)> == 2) keep_step(row + i, interleave(load_step(row + i, lanes)), lanes);
  });
}

// A row of fp32 in the order of the steps of rows of T.
template <class T>
ZB_INLINE void stage(T* type, float* to, OperandRow<float> row, int64_t D) {
  each_step(type, D, [&](int64_t i, auto lanes) ZB_BODY { keep_step(to + i, in_step(row, i, lanes), lanes); });
}

// Whether rows of T are walked in pairs.
template <class T>
constexpr bool kInPairs = false;
template <>
constexpr bool kInPairs<bf16> = true;

}  // namespace
}  // namespace zeroblock
