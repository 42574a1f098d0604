// Shifts, scales and gates of every form and type, one row at a time in fp32: staged in a buffer where a row is another
// than the last one, or, where each token has its own, read in place. Also the rows of activations, to and from
// buffers.
#pragma once

#include <cstdlib>

#include "../vec/math.h"
#include "rows.h"

namespace zeroblock {
namespace {

// tanh to the last bits of fp32, near 0 too, where gates begin: a polynomial below 0.625, else 1 - 2 / (exp(2 |x|) +
// 1).
ZB_INLINE Vec tanh_of(Vec x) {
  const Vec one = set1(1.0f), size = magnitude(x), square = x * x;
  Vec p = fmadd(set1(-5.70498872745e-3f), square, set1(2.06390887954e-2f));
  p = fmadd(p, square, set1(-5.37397155531e-2f));
  p = fmadd(p, square, set1(1.33314422036e-1f));
  p = fmadd(p, square, set1(-3.33332819422e-1f));
  const Vec small = fmadd(p * square, x, x);
  const Vec large = fnmadd(set1(2.0f), one / (exp_bounded(clamp_exponent(size + size)) + one), one);
  return where_negative(size - set1(0.625f), small, where_negative(x, zero() - large, large));
}

// f(i, values, lanes) for every step of a row of any type.
template <class F>
ZB_INLINE void each_value(DType dtype, const void* row, int64_t D, const F& f) {
  with_type(dtype, [&](auto* type) {
    const auto* const p = static_cast<decltype(type)>(const_cast<void*>(row));
    each_column(0, D, [&](int64_t i, auto lanes) ZB_BODY { f(i, load(p + i, lanes), lanes); });
  });
}

// Row number `row` of D elements of a type.
ZB_INLINE const void* row_at(DType dtype, const void* p, int64_t row, int64_t D) {
  return static_cast<const char*>(p) + row * D * (dtype == DType::kF32 ? 4 : 2);
}
ZB_INLINE void* row_at(DType dtype, void* p, int64_t row, int64_t D) {
  return static_cast<char*>(p) + row * D * (dtype == DType::kF32 ? 4 : 2);
}

// Writes value(i, lanes) to a row of any type. keep, unless null, is a buffer that gets what was written, rounded.
template <class Value>
ZB_INLINE void write_row(DType dtype, void* row, float* keep, int64_t D, bool streamed, const Value& value) {
  with_type(dtype, [&](auto* type) {
    auto* const p = static_cast<decltype(type)>(row);
    if (keep != nullptr) {
      each_column(0, D, [&](int64_t i, auto lanes) ZB_BODY {
        const Vec v = value(i, lanes);
        store_or_stream(p + i, v, lanes, streamed);
        store(keep + i, round_to(v, p), lanes);
      });
    } else {
      each_column(0, D,
                  [&](int64_t i, auto lanes) ZB_BODY { store_or_stream(p + i, value(i, lanes), lanes, streamed); });
    }
  });
}

ZB_INLINE bool streams_rows(DType dtype, const void* out, int64_t D, int64_t bytes) {
  return out != nullptr && (dtype == DType::kF32 ? streams(static_cast<const float*>(out), D, bytes)
                                                 : streams(static_cast<const bf16*>(out), D, bytes));
}

// One row of an operand as a loop reads it: staged in fp32, or in place, with its table.
struct StagedRow {
  const float* p;
  template <class Lanes>
  ZB_INLINE Vec at(int64_t i, Lanes lanes) const {
    return load(p + i, lanes);
  }
};
template <class M>
struct RowInPlace {
  OperandRow<M> row;
  OperandRow<float> table;
  template <class Lanes>
  ZB_INLINE Vec at(int64_t i, Lanes lanes) const {
    return row.at(i, lanes) + table.at(i, lanes);
  }
};
template <class Row>
struct OnePlus {
  Row row;
  template <class Lanes>
  ZB_INLINE Vec at(int64_t i, Lanes lanes) const {
    return set1(1.0f) + row.at(i, lanes);
  }
};

// The row of the table of rows that token t of sample b takes.
ZB_INLINE int64_t chosen(const RowOperand& a, const int32_t* index, int64_t token) {
  const int64_t k = index[token];
  return k < 0 ? 0 : k < a.count ? k : a.count - 1;
}

// -0, which leaves any number that it is added to as it is.
struct MinusZeros {
  alignas(64) float lanes[kConstant];
  constexpr MinusZeros() : lanes() {
    for (int i = 0; i < kConstant; ++i) lanes[i] = -0.0f;
  }
};
constexpr MinusZeros kMinusZeros;  // made by the compiler: nothing of one instruction set runs as the library is loaded

// Follows an operand through the tokens of a chunk.
class OperandCursor {
 public:
  explicit OperandCursor(const RowOperand& a) : a_(a) {}

  // The row where it is, of type M; `absent`, kConstant of one number, where there is no operand.
  template <class M>
  ZB_INLINE RowInPlace<M> in_place(const float* absent) const {
    if (a_.kind == RowKind::kNone) return {{reinterpret_cast<const M*>(kZeros), 0}, {absent, 0}};
    return {{static_cast<const M*>(a_.ptr) + offset_, -1}, channel_row(a_.table, kMinusZeros.lanes)};
  }

  // Goes to token t of sample b; whether its row is another than before. An absent operand has one row.
  ZB_INLINE bool move(const int32_t* index, int64_t b, int64_t t, int64_t T) {
    int64_t offset = 0;
    if (a_.kind == RowKind::kSample) offset = b * a_.stride_b;
    if (a_.kind == RowKind::kToken) offset = b * a_.stride_b + t * a_.stride_r;
    if (a_.kind == RowKind::kIndexed) offset = b * a_.stride_b + chosen(a_, index, b * T + t) * a_.stride_r;
    const bool moved = offset != offset_;
    offset_ = offset;
    return moved;
  }

  // f(i, row + table, lanes) over the row; zeros where the operand is absent.
  template <class F>
  ZB_INLINE void each(int64_t D, const F& f) const {
    if (a_.kind == RowKind::kNone) {
      each_column(0, D, [&](int64_t i, auto lanes) ZB_BODY { f(i, zero(), lanes); });
      return;
    }
    const float* const table = a_.table;
    const void* const row = row_at(a_.dtype, a_.ptr, 1, offset_);
    if (table != nullptr) {
      each_value(a_.dtype, row, D,
                 [&](int64_t i, Vec v, auto lanes) ZB_BODY { f(i, v + load(table + i, lanes), lanes); });
    } else {
      each_value(a_.dtype, row, D, f);
    }
  }

 private:
  const RowOperand& a_;
  int64_t offset_ = -1;
};

// Rows of fp32 that a thread has to itself, 64 bytes aligned.
class Buffers {
 public:
  Buffers(int64_t count, int64_t D)
      : stride_((D + 15) / 16 * 16),
        rows_(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(count * stride_) * sizeof(float)))) {}
  ~Buffers() { std::free(rows_); }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;
  ZB_INLINE float* row(int64_t k) const { return rows_ + k * stride_; }

 private:
  int64_t stride_;
  float* rows_;
};

// f(buffers, chunk, b, t_begin, t_end) as each_chunk, with `count` rows of D.
template <class F>
ZB_INLINE void each_chunk_with(ParallelFor run, int64_t B, int64_t T, int64_t D, int64_t count, const F& f) {
  const int64_t per_sample = chunks_per_sample(T), rows = T < kChunkRows ? T : kChunkRows;
  parallel(run, 0, B * per_sample, kGrainElements / (rows * D + 1) + 1, [&](int64_t begin, int64_t end) {
    const Buffers buffers(count, D);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t b = chunk / per_sample, t = (chunk - b * per_sample) * kChunkRows;
      f(buffers, chunk, b, t, t + kChunkRows < T ? t + kChunkRows : T);
    }
    _mm_sfence();
  });
}

}  // namespace
}  // namespace zeroblock
