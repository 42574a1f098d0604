// Small operands and gradients between 16 bits and the fp32 that kernels read and write. On the calling thread: the
// largest are [B, D].
#pragma once

#include "vec.h"

namespace zeroblock {
namespace {

// to: dense [rows, columns]; from: rows `stride` apart.
inline void widen(DType dtype, const void* from, int64_t rows, int64_t columns, int64_t stride, float* to) {
  with_type(dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(const_cast<void*>(from));
    for (int64_t r = 0; r < rows; ++r, p += stride, to += columns) {
      for_lanes(columns, [&](int64_t i, auto lanes) { store(to + i, load(p + i, lanes), lanes); });
    }
  });
}

inline void narrow(DType dtype, const float* from, int64_t n, void* to) {
  with_type(dtype, [&](auto* type) {
    auto* const p = static_cast<decltype(type)>(to);
    for_lanes(n, [&](int64_t i, auto lanes) { store(p + i, load(from + i, lanes), lanes); });
  });
}

}  // namespace
}  // namespace zeroblock
