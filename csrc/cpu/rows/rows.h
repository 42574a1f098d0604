// What the kernels on rows [B, T, D] share: loops over columns, operands that may be absent, chunks of tokens, streamed
// stores, and the second stage of every reduction over tokens.
#pragma once

#include "../parallel.h"
#include "../vec/vec4.h"

namespace zeroblock {
namespace {

// Tokens of one sample that a thread takes at a time. Sums over T are taken per chunk, then over the chunks in order:
// the result depends on the shape alone. At most 4 * kCascade: see Partials.
constexpr int64_t kChunkRows = 64;
// A call that touches more bytes than this writes past the caches: its output would be evicted before it is read, and
// an ordinary store reads the line first. 383 -> 223 us for gate_residual of fp32 [1, 1024, 1152], whose 14 MB no
// longer stay in an L3 of 32 MB that virtual machines share (measured: python benchmarks/run.py --filter
// gate_residual-1x1024).
constexpr int64_t kStreamBytes = int64_t{12} << 20;
// Rows that backward walks in step: they share the loads of operands and the sums over tokens (measured: python
// benchmarks/run.py --group memory_bound --filter training).
constexpr int kRowsInStep = 4;
// Addends of one fp32 sum: a longer sum loses a bit with every fourfold of its length, so it is cut and the parts
// added.
constexpr int64_t kCascade = 16;
// The same of a chain of sum_columns, where such a cut costs a sum over lanes.
constexpr int64_t kColumnChain = 32;

template <bool B>
struct Bool {
  static constexpr bool value = B;
};

template <class F>
ZB_INLINE void with_bool(bool b, const F& f) {
  if (b) {
    f(Bool<true>{});
  } else {
    f(Bool<false>{});
  }
}

// Stores past the caches when streamed; the tail of a row is stored the ordinary way.
template <class T>
ZB_INLINE void store_or_stream(T* p, Vec a, OneVec, bool streamed) {
  if (streamed) {
    stream(p, a);
  } else {
    store(p, a);
  }
}
template <class T>
ZB_INLINE void store_or_stream(T* p, Vec a, int lanes, bool) {
  store(p, a, lanes);
}

// Whether the lanes of a step are those of a tail.
constexpr bool is_tail(const int*) { return true; }
constexpr bool is_tail(const void*) { return false; }

// f(i, lanes) for the columns begin .. end.
template <class F>
ZB_INLINE void each_column(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, OneVec{});
  if (i < end) f(i, static_cast<int>(end - i));
}

// The sum over D columns of what acc = f(acc, i, lanes) adds; four chains hide the latency of the addition. They are
// cut after kColumnChain addends: sums of 16-bit numbers of one size are exact, however long.
template <class F>
ZB_INLINE double sum_columns(int64_t D, const F& f) {
  constexpr int64_t step = 4 * kLanes;
  const int64_t whole = D / step * step;
  double total = 0;
  int64_t i = 0;
  while (true) {
    Vec a = zero(), b = zero(), c = zero(), d = zero();
    const int64_t end = whole - i > kColumnChain * step ? i + kColumnChain * step : whole;
    for (; i < end; i += step) {
      a = f(a, i, OneVec{});
      b = f(b, i + kLanes, OneVec{});
      c = f(c, i + 2 * kLanes, OneVec{});
      d = f(d, i + 3 * kLanes, OneVec{});
    }
    if (end == whole) each_column(whole, D, [&](int64_t j, auto lanes) ZB_BODY { a = f(a, j, lanes); });
    total += static_cast<double>(sum((a + b) + (c + d)));
    if (end == whole) return total;
  }
}

// One row of an operand. When the operand is absent, mask is 0 and one constant vector stands for every column.
template <class M>
struct OperandRow {
  const M* p;
  int64_t mask;
  template <class Lanes>
  ZB_INLINE auto at(int64_t i, Lanes lanes) const {
    return load(p + (i & mask), lanes);
  }
};

// The same for a tile of rows: one row for all of them, or (kToken) one for each.
template <bool kToken, class M>
struct OperandTile {
  const M* p;
  int64_t stride_t;
};

template <class M>
struct Operand {
  const M* p;
  int64_t stride_b, stride_t, mask;
  ZB_INLINE OperandRow<M> row(int64_t b, int64_t t) const { return {p + b * stride_b + t * stride_t, mask}; }
  template <bool kToken>
  ZB_INLINE OperandTile<kToken, M> tile(int64_t b, int64_t t) const {
    return {p + b * stride_b + t * stride_t, stride_t};
  }
};

constexpr int kConstant = 4 * kLanes;  // as long as the longest step (vec4.h)
alignas(64) const float kZeros[kConstant] = {};
struct ConstantRow {
  alignas(64) float lanes[kConstant];
  explicit ConstantRow(float value) {
    for (int i = 0; i < kConstant; i += kLanes) store(lanes + i, set1(value));
  }
};

// M is float, or the activation type for a per-token operand; `absent` holds kConstant of it.
template <class M>
ZB_INLINE Operand<M> operand(const Rows& rows, const M* absent) {
  if (rows.ptr == nullptr) return {absent, 0, 0, 0};
  return {static_cast<const M*>(rows.ptr), rows.stride_b, rows.per_token ? rows.stride_t : 0, -1};
}

ZB_INLINE OperandRow<float> channel_row(const float* p, const float* absent) {
  return p == nullptr ? OperandRow<float>{absent, 0} : OperandRow<float>{p, -1};
}

ZB_INLINE bool is_per_token(const Rows& rows) { return rows.ptr != nullptr && rows.per_token; }

// Rows for each token that are fp32 beside activations of 16 bits: the loops that read operands as they read the
// activations do not take them.
template <class T>
ZB_INLINE bool is_wide(T*, const Rows& rows) {
  return is_per_token(rows) && rows.fp32 && sizeof(T) != sizeof(float);
}

// f(M*) with the element type of an operand of activations of type T.
template <class T, class F>
ZB_INLINE void with_operand_type(T*, const Rows& rows, const F& f) {
  if (is_per_token(rows) && !rows.fp32) {
    f(static_cast<T*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

ZB_INLINE int64_t chunks_per_sample(int64_t T) { return (T + kChunkRows - 1) / kChunkRows; }

// f(chunk, b, t_begin, t_end) for every chunk of tokens of every sample, in parallel.
template <class F>
ZB_INLINE void each_chunk(ParallelFor run, int64_t B, int64_t T, int64_t D, const F& f) {
  const int64_t per_sample = chunks_per_sample(T);
  const int64_t rows = T < kChunkRows ? T : kChunkRows;
  parallel(run, 0, B * per_sample, kGrainElements / (rows * D + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t b = chunk / per_sample;
      const int64_t t = (chunk - b * per_sample) * kChunkRows;
      f(chunk, b, t, t + kChunkRows < T ? t + kChunkRows : T);
    }
    _mm_sfence();  // streamed stores become visible before the other threads go on
  });
}

// R rows in step, `stride` elements apart, and a vector for each of them.
template <int R>
struct RowTile {
  static constexpr int rows = R;
  int64_t stride;
  template <class T>
  ZB_INLINE T* row(T* first, int r) const {
    return first + r * stride;
  }
};
template <int R>
struct PerRow {
  Vec v[R];
  ZB_INLINE Vec& operator[](int r) { return v[r]; }
};
template <int R, class F>
ZB_INLINE PerRow<R> per_row(RowTile<R>, const F& f) {
  PerRow<R> out;
  for (int r = 0; r < R; ++r) out[r] = f(r);
  return out;
}

// body(row, tile) over [0, rows), in order.
template <class Body>
ZB_INLINE void for_row_tiles(int64_t rows, int64_t stride, const Body& body) {
  int64_t row = 0;
  for (; row + kRowsInStep <= rows; row += kRowsInStep) body(row, RowTile<kRowsInStep>{stride});
  for (; row < rows; ++row) body(row, RowTile<1>{stride});
}

// Prefetches column i of a tile: the hardware follows one forward walk per array, but loses it when a row is walked
// twice (measured: python benchmarks/run.py --group memory_bound --filter training).
template <int R, class T>
ZB_INLINE void prefetch(RowTile<R> tile, const T* first, int64_t i) {
  for (int r = 0; r < R; ++r) _mm_prefetch(reinterpret_cast<const char*>(tile.row(first, r) + i), _MM_HINT_T0);
}

// Streaming needs every row of the output to start on the boundary of a whole vector register.
template <class T>
ZB_INLINE bool streams(const T* out, int64_t D, int64_t total_bytes) {
  constexpr uint64_t vector_bytes = kLanes * sizeof(float);
  return total_bytes > kStreamBytes &&
         (reinterpret_cast<uint64_t>(out) | (static_cast<uint64_t>(D) * sizeof(T))) % vector_bytes == 0;
}

// Sum of `count` rows of partial sums, `stride` floats apart, at one column step.
template <class Lanes>
ZB_INLINE Vec sum_partials(const float* p, int64_t count, int64_t stride, Lanes lanes) {
  Vec total = zero();
  for (int64_t k = 0; k < count; k += kCascade) {
    Vec a = zero();
    for (int64_t j = k; j < count && j < k + kCascade; ++j) a += load(p + j * stride, lanes);
    total += a;
  }
  return total;
}

// The workspace of a reduction over tokens: for every chunk `summed` rows of D sums and `staged` rows of operands as
// the rows of the chunk read them. Tiles add up four rows before they touch the sums, so that a chunk is no more than
// kCascade addends.
struct Partials {
  float* workspace;
  int64_t summed, staged_rows, T, D;
  static_assert(kChunkRows <= 4 * kCascade, "the sums of a chunk would be too long");

  ZB_INLINE int64_t chunk_size() const { return (summed + staged_rows) * D; }
  ZB_INLINE int64_t size(int64_t B) const { return B * chunks_per_sample(T) * chunk_size(); }
  ZB_INLINE float* sums(int64_t chunk, int64_t slot) const { return workspace + chunk * chunk_size() + slot * D; }
  ZB_INLINE float* staged(int64_t chunk, int64_t slot) const { return sums(chunk, summed + slot); }
  ZB_INLINE void clear(int64_t chunk) const {
    if (summed > 0) std::memset(sums(chunk, 0), 0, static_cast<size_t>(summed * D) * sizeof(float));
  }

  // Over the chunks of sample b.
  template <class Lanes>
  ZB_INLINE Vec sample_sum(int64_t b, int64_t slot, int64_t i, Lanes lanes) const {
    const int64_t chunks = chunks_per_sample(T);
    return sum_partials(sums(b * chunks, slot) + i, chunks, chunk_size(), lanes);
  }
  // Over the samples, once the totals of each have been written over those of its first chunk.
  template <class Lanes>
  ZB_INLINE Vec batch_sum(int64_t B, int64_t slot, int64_t i, Lanes lanes) const {
    const int64_t chunks = chunks_per_sample(T);
    return sum_partials(sums(0, slot) + i, chunks > 0 ? B : 0, chunks * chunk_size(), lanes);
  }
};

// f(b, begin, end) over blocks of columns of every sample, in parallel; `depth` rows are read for each.
template <class F>
ZB_INLINE void each_column_block(ParallelFor run, int64_t B, int64_t D, int64_t depth, const F& f) {
  constexpr int64_t block = 128;  // columns: 8 cache lines of a row of sums
  const int64_t blocks = (D + block - 1) / block;
  parallel(run, 0, B * blocks, kGrainElements / (block * (depth + 1)) + 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t b = k / blocks;
      const int64_t begin = (k - b * blocks) * block;
      f(b, begin, begin + block < D ? begin + block : D);
    }
  });
}

// Adds to a row of accumulators; null: the sum is not wanted.
template <class Lanes>
ZB_INLINE void accumulate(float* acc, int64_t i, Vec a, Lanes lanes) {
  if (acc != nullptr) store(acc + i, load(acc + i, lanes) + a, lanes);
}

}  // namespace
}  // namespace zeroblock
