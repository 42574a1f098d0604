// add_bias: y = x + (bias + 0), bias along one dimension, or y = x + 0: what is left of a zero branch. Its products are
// +0, so that a bias of -0 and an x of -0 without a bias come out as +0. x is [R, C, S]: NCHW has R = N, channels-last
// and token layouts have S = 1. fp32, bf16 or fp16, bias fp32, one rounding. One piece of work is a run of rows.
#pragma once

#include "rows.h"

namespace zeroblock {
namespace {

template <class T>
void add_bias_of(T*, const AddBias& p, ParallelFor run) {
  const T* const x = static_cast<const T*>(p.x);
  T* const y = static_cast<T*>(p.y);
  const bool by_column = p.S == 1;
  const int64_t rows = by_column ? p.R : p.R * p.C, width = by_column ? p.C : p.S;
  const Vec zero = set1(0.0f);
  const bool streamed = streams(y, width, 2 * rows * width * static_cast<int64_t>(sizeof(T)));
  parallel(run, 0, rows, kGrainElements / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* const in = x + r * width;
      T* const out = y + r * width;
      if (by_column && p.bias != nullptr) {
        each_column(0, width, [&](int64_t i, auto lanes) ZB_BODY {
          put(out + i, load(in + i, lanes) + (load(p.bias + i, lanes) + zero), lanes, streamed);
        });
      } else {
        const Vec b = set1(p.bias != nullptr ? p.bias[r % p.C] + 0.0f : 0.0f);
        each_column(0, width,
                    [&](int64_t i, auto lanes) ZB_BODY { put(out + i, load(in + i, lanes) + b, lanes, streamed); });
      }
    }
    _mm_sfence();
  });
}

inline void add_bias(const AddBias& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* t) { add_bias_of(t, p, run); });
}

}  // namespace
}  // namespace zeroblock
