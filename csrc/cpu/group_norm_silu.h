// group_norm_silu: GroupNorm, modulation and SiLU in one kernel. What both directions share, and forward.
//
// Math: z = (x - mean) * a + b with a = rstd * weight * (1 + scale), b = bias * (1 + scale) + shift; y = z *
// sigmoid(z). x * a + (b - mean * a) would save an operation but cancels where |mean| >> std. Loop, [N, C, S]: a group
// of a sample is contiguous; one work item takes its statistics and applies them while it is cached. [N, S, C]: chunks
// of whole rows leave per-channel statistics, one item per sample merges them over chunks and groups, and a second walk
// over the chunks applies them, row by row: prefetchers follow the one order best. Reduction order: statistics take one
// pass, sums of x - centre and of its square, where centre is the mean of what came before: the previous block (its own
// first elements for the first block) or, per channel, the first rows of a chunk. What the centre misses is corrected
// for, and blocks are merged in order by Chan's formula. It is not E[x^2] - E[x]^2 again: with d the distance of the
// centre from the mean of a block of m elements, the correction is m d^2, and the elements that the centre is the mean
// of make the group's own sum of squares at least a part of that: half where they are a block, a quarter for
// kFirstElements, a sixteenth for kFirstRows. The sum so loses at most four bits, and in all but contrived images none
// (tests/ops/test_unusual_input.py). Zero path: none; the caller decides (add_bias.h).
#pragma once

#include "parallel.h"
#include "vec/slope.h"

namespace zeroblock {
namespace {

constexpr int64_t kGroupNormBlock = 2048;  // elements summed in fp32 before fp64 takes over
constexpr int64_t kFirstElements = 512;    // elements whose mean is the centre of the first block

ZB_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ZB_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// Work items, each of `elements`, for parallel().
ZB_INLINE int64_t group_norm_grain(int64_t elements) { return larger(1, kGroupNormGrain / larger(1, elements)); }

// With one position per channel both layouts are the same memory, and rows of C fill the vectors better.
ZB_INLINE bool group_norm_by_rows(const GroupNormSilu& p) { return p.channels_last || (p.S == 1 && p.frames == 1); }

// From a channel of [N, C, S] to the next, and where group g of sample n begins.
ZB_INLINE int64_t channel_stride(const GroupNormSilu& p) { return p.frames * p.S; }
ZB_INLINE int64_t start_of_group(const GroupNormSilu& p, int64_t n, int64_t g) {
  const int64_t video = n / p.frames, frame = n - video * p.frames;
  return (video * p.C + g * (p.C / p.G)) * channel_stride(p) + frame * p.S;
}

// Elements of a chunk of rows, 64 KB of fp32, but at least kMinRows of them: the statistics of 12 rows took a quarter
// of their chunk's time (measured: python benchmarks/run.py --group memory_bound --filter group_norm_silu).
constexpr int64_t kGroupNormChunk = 16384, kMinRows = 32;
constexpr int64_t kMaxRows = 128;  // rows summed in fp32 before compensated sums take over
constexpr int64_t kFirstRows = 8;  // rows whose mean is the centre of the chunk's

// The cut of [S, C] into chunks of rows.
struct RowChunks {
  int64_t rows, count;
  explicit RowChunks(const GroupNormSilu& p)
      : rows(smaller(kMaxRows, larger(kMinRows, kGroupNormChunk / larger(1, p.C) / 8 * 8))),
        count((p.S + rows - 1) / rows) {}
  int64_t rows_of(int64_t k, int64_t S) const { return smaller(rows, S - k * rows); }
};

// a - b as a * 1 - b: the units that multiply are free here, those that add are busy with the sums and with widening 16
// bits (measured: python benchmarks/run.py --group memory_bound --filter group_norm_silu).
template <class V, class W>
ZB_INLINE V product_unit_minus(V a, W b) {
  return fmsub(a, V(set1(1.0f)), V(b));
}

// Two sums over a block: add(sums, i, lanes) adds what is at i.
struct BlockSums {
  Vec4 first = zero(), second = zero();
};
struct TwoSums {
  double first = 0, second = 0;
};
template <class Add>
ZB_INLINE TwoSums sum_block(int64_t n, const Add& add) {
  BlockSums sums;
  for_lanes_by_4(n, [&](int64_t i, auto lanes) { add(sums, i, lanes); });
  return {sum(total(sums.first)), sum(total(sums.second))};
}

struct Kahan {
  Vec total = zero(), lost = zero();
  ZB_INLINE void add(Vec a) {
    const Vec y = a - lost;
    const Vec t = total + y;
    lost = (t - total) - y;
    total = t;
  }
};

// A variance beyond fp32 is NaN: 0 would hide it.
ZB_INLINE float rstd_of(double sum_of_squares, double count, float eps) {
  const double variance = sum_of_squares / count;
  return static_cast<float>(1.0 / __builtin_sqrt(variance + 0 * variance + static_cast<double>(eps)));
}

struct MeanRstd {
  float mean, rstd;
};

// Of the group of [N, C, S] that begins at x: one run of elements or, of a frame, a run for each channel.
template <class T>
ZB_LOOPS MeanRstd group_statistics(const GroupNormSilu& p, const T* x) {
  const int64_t D = p.C / p.G, runs = p.frames == 1 ? 1 : D, n = D / runs * p.S, stride = channel_stride(p);
  const int64_t first = smaller(kFirstElements, n);
  const TwoSums s =
      sum_block(first, [&](BlockSums& sums, int64_t i, auto lanes) { add_to(sums.first, load(x + i, lanes)); });
  double mean = 0, squares = 0;
  float centre = static_cast<float>(s.first / static_cast<double>(first));
  int64_t before = 0;
  for (int64_t run = 0; run < runs; ++run, x += stride) {
    for (int64_t begin = 0; begin < n; begin += kGroupNormBlock) {
      const T* block = x + begin;
      const int64_t size = smaller(kGroupNormBlock, n - begin);
      const double count = static_cast<double>(size);
      const TwoSums d = sum_block(size, [&](BlockSums& sums, int64_t i, auto lanes) {
        const auto d = keep_first(product_unit_minus(load(block + i, lanes), set1(centre)), lanes);
        add_to(sums.first, d);
        add_product_to(sums.second, d, d);
      });
      const double missed = d.first / count;
      const double delta = centre + missed - mean, part = count / static_cast<double>(before + size);
      mean += delta * part;
      squares += d.second - d.first * missed + delta * delta * part * static_cast<double>(before);
      centre = static_cast<float>(centre + missed);
      before += size;
    }
  }
  return {static_cast<float>(mean), rstd_of(squares, static_cast<double>(runs * n), p.eps)};
}

// weight * (1 + scale) and bias * (1 + scale) + shift of channel c of sample n.
ZB_INLINE float modulation(const GroupNormSilu& p, int64_t n, int64_t c) {
  return p.scale ? 1.0f + p.scale[n * p.C + c] : 1.0f;
}
ZB_INLINE float channel_gain(const GroupNormSilu& p, int64_t n, int64_t c) {
  return (p.weight ? p.weight[c] : 1.0f) * modulation(p, n, c);
}
ZB_INLINE float channel_offset(const GroupNormSilu& p, int64_t n, int64_t c) {
  return (p.bias ? p.bias[c] : 0.0f) * modulation(p, n, c) + (p.shift ? p.shift[n * p.C + c] : 0.0f);
}

// What came through a sigmoid is inexact.
template <bool kSilu, class T, class V, class Lanes>
ZB_INLINE void store_result(T* p, V a, Lanes lanes) {
  if constexpr (kSilu) {
    store_inexact(p, a, lanes);
  } else {
    store(p, a, lanes);
  }
}
template <bool kSilu, class T, class V, class Lanes>
ZB_INLINE void store_activated(T* y, V z, Lanes lanes) {
  if constexpr (kSilu) z = silu_for(z, y);
  store_result<kSilu>(y, z, lanes);
}

template <bool kSilu, class T>
ZB_LOOPS void apply_channel(const T* x, T* y, int64_t n, float mean, float a, float b) {
  const Vec vmean = with_plain_nan(set1(mean)), va = with_plain_nan(set1(a)), vb = with_plain_nan(set1(b));
  for_lanes_by_4(n, [&](int64_t i, auto lanes) {
    store_activated<kSilu>(y + i, fmadd(load(x + i, lanes) - vmean, va, vb), lanes);
  });
}

template <bool kSilu, class T>
void group_norm_silu_fwd_nchw(const GroupNormSilu& p, ParallelFor run, T*) {
  const int64_t D = p.C / p.G, stride = channel_stride(p);
  parallel(run, 0, p.N * p.G, group_norm_grain(D * p.S), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / p.G, first_channel = item % p.G * D, start = start_of_group(p, n, item % p.G);
      const T* x = static_cast<const T*>(p.x) + start;
      T* y = static_cast<T*>(p.y) + start;
      const MeanRstd s = group_statistics(p, x);
      p.mean[item] = s.mean;
      p.rstd[item] = s.rstd;
      for (int64_t d = 0; d < D; ++d) {
        const int64_t c = first_channel + d;
        const float a = s.rstd * channel_gain(p, n, c), b = channel_offset(p, n, c);
        apply_channel<kSilu>(x + d * stride, y + d * stride, p.S, s.mean, a, b);
      }
    }
  });
}

ZB_INLINE void fill(float* p, int64_t n, float value) {
  for_lanes(n, [&](int64_t i, auto lanes) { store(p + i, with_plain_nan(set1(value)), lanes); });
}

// Rows of per-channel vectors into the order in which rows of T are loaded (vec4.h; only bf16 has its own), and back.
template <class T>
ZB_INLINE void to_element_order(float*, int64_t, int64_t, T*) {}
template <class T>
ZB_INLINE void to_memory_order(float*, int64_t, int64_t, T*) {}
ZB_INLINE void to_element_order(float* p, int64_t rows, int64_t C, bf16*) {
  for (int64_t row = 0; row < rows; ++row, p += C) {
    for_lanes_by_4(C, [&](int64_t c, auto lanes) { store(p + c, in_pairs(load(p + c, lanes)), lanes); });
  }
}
ZB_INLINE void to_memory_order(float* p, int64_t rows, int64_t C, bf16*) {
  for (int64_t row = 0; row < rows; ++row, p += C) {
    for_lanes_by_4(C, [&](int64_t c, auto lanes) { store(p + c, out_of_pairs(load(p + c, lanes)), lanes); });
  }
}

// What a chunk of rows says of each channel, [C] each: the mean of its first rows, and the sums of the differences from
// that, which is what the centre misses, and of their squares.
struct ChunkStatistics {
  float *centre, *missed, *squares;
  ChunkStatistics(float* base, int64_t item, int64_t C)
      : centre(base + item * 3 * C), missed(centre + C), squares(missed + C) {}
};

template <class T>
ZB_LOOPS void channel_statistics(const T* x, int64_t rows, int64_t C, ChunkStatistics chunk) {
  const int64_t first = smaller(kFirstRows, rows);
  const Vec inverse = set1(1.0f / static_cast<float>(first));
  for_lanes_by_4(C, [&](int64_t c, auto lanes) {
    auto sum = load(x + c, lanes);
    for (int64_t row = 1; row < first; ++row) sum = sum + load(x + row * C + c, lanes);
    store(chunk.centre + c, sum * inverse, lanes);
  });
  fill(chunk.missed, 2 * C, 0.0f);
  // So many rows at a time: the sums lie in the cache, and loading and storing them costs as much as two rows.
  for (int64_t row = 0; row < rows; row += kFirstRows) {
    const int64_t end = smaller(row + kFirstRows, rows);
    for_lanes_by_4(C, [&](int64_t c, auto lanes) {
      const auto centre = load(chunk.centre + c, lanes);
      decltype(load(x + c, lanes)) missed = zero(), squares = zero();
      for (int64_t i = row * C + c; i < end * C; i += C) {
        const auto d = product_unit_minus(load(x + i, lanes), centre);
        missed = missed + d;
        squares = fmadd(d, d, squares);
      }
      store(chunk.missed + c, load(chunk.missed + c, lanes) + missed, lanes);
      store(chunk.squares + c, load(chunk.squares + c, lanes) + squares, lanes);
    });
  }
  to_memory_order(chunk.centre, 3, C, const_cast<T*>(x));
}

// Sum in fp64 over the D channels of a group.
ZB_INLINE double group_total(const float* values, int64_t D) {
  double total = 0;
  for (int64_t d = 0; d < D; ++d) total += static_cast<double>(values[d]);
  return total;
}

// The per-channel vectors of one sample, [C] each: z = (x - mean) * a + b.
struct ChannelAffine {
  float *mean, *a, *b;
  ChannelAffine(float* base, int64_t n, int64_t C) : mean(base + n * 3 * C), a(mean + C), b(a + C) {}
};

// On entry affine.a holds rstd.
ZB_INLINE void fold_modulation(const GroupNormSilu& p, int64_t n, const ChannelAffine& affine) {
  for_lanes(p.C, [&](int64_t c, auto lanes) {
    const Vec factor = p.scale ? set1(1.0f) + load(p.scale + n * p.C + c, lanes) : set1(1.0f);
    const Vec gain = p.weight ? load(p.weight + c, lanes) * factor : factor;
    const Vec offset = p.bias ? load(p.bias + c, lanes) * factor : zero();
    const Vec shifted = p.shift ? offset + load(p.shift + n * p.C + c, lanes) : offset;
    store(affine.a + c, with_plain_nan(load(affine.a + c, lanes) * gain), lanes);
    store(affine.b + c, with_plain_nan(shifted), lanes);
  });
}

// Merges the chunks' statistics of sample n into its groups' and leaves its affine. With e = centre - mean, a chunk's
// sum of squares around the mean is squares + 2 * e * missed + rows * e^2.
ZB_LOOPS inline void merge_statistics(const GroupNormSilu& p, int64_t n, RowChunks chunks, float* base,
                                      ChannelAffine affine) {
  const int64_t C = p.C, D = C / p.G;
  const double rows = static_cast<double>(p.S), count = rows * static_cast<double>(D);
  const auto chunk = [&](int64_t k) { return ChunkStatistics(base, n * chunks.count + k, C); };
  const auto rows_of = [&](int64_t k) { return set1(static_cast<float>(chunks.rows_of(k, p.S))); };
  // A channel's sum is rows * pivot + rest: near the pivot nothing is lost to rounding.
  const float* pivot = chunk(0).centre;
  float* rest = affine.a;
  for_lanes(C, [&](int64_t c, auto lanes) {
    const Vec centre0 = load(pivot + c, lanes);
    Kahan total;
    for (int64_t k = 0; k < chunks.count; ++k) {
      total.add(fmadd(load(chunk(k).centre + c, lanes) - centre0, rows_of(k), load(chunk(k).missed + c, lanes)));
    }
    store(rest + c, total.total, lanes);
  });
  for (int64_t g = 0; g < p.G; ++g) {
    const double total = rows * group_total(pivot + g * D, D) + group_total(rest + g * D, D);
    p.mean[n * p.G + g] = static_cast<float>(total / count);
    fill(affine.mean + g * D, D, p.mean[n * p.G + g]);
  }
  for_lanes(C, [&](int64_t c, auto lanes) {
    const Vec mean = load(affine.mean + c, lanes);
    Kahan total;
    for (int64_t k = 0; k < chunks.count; ++k) {
      const Vec e = load(chunk(k).centre + c, lanes) - mean, missed = load(chunk(k).missed + c, lanes);
      total.add(fmadd(e, fmadd(e, rows_of(k), missed + missed), load(chunk(k).squares + c, lanes)));
    }
    store(affine.a + c, total.total, lanes);
  });
  for (int64_t g = 0; g < p.G; ++g) {
    p.rstd[n * p.G + g] = rstd_of(group_total(affine.a + g * D, D), count, p.eps);
    fill(affine.a + g * D, D, p.rstd[n * p.G + g]);
  }
  fold_modulation(p, n, affine);
}

template <bool kSilu, class T>
ZB_LOOPS void apply_rows(const T* x, T* y, int64_t rows, int64_t C, ChannelAffine affine) {
  for (int64_t i = 0; i < rows * C; i += C) {
    for_lanes_by_4(C, [&](int64_t c, auto lanes) {
      const auto mean = load(affine.mean + c, lanes), a = load(affine.a + c, lanes), b = load(affine.b + c, lanes);
      store_activated<kSilu>(y + i + c, fmadd(load(x + i + c, lanes) - mean, a, b), lanes);
    });
  }
}

// Workspace: the statistics of every chunk, [N, chunks, 3, C]; the affine, [N, 3, C]. Returns the affine.
template <class T>
float* row_statistics(const GroupNormSilu& p, ParallelFor run, T* type) {
  const int64_t C = p.C;
  const RowChunks chunks(p);
  const int64_t items = p.N * chunks.count;
  float* statistics = p.workspace;
  float* affines = statistics + items * 3 * C;
  parallel(run, 0, items, group_norm_grain(chunks.rows * C), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / chunks.count, k = item % chunks.count;
      const T* x = static_cast<const T*>(p.x) + (n * p.S + k * chunks.rows) * C;
      channel_statistics(x, chunks.rows_of(k, p.S), C, ChunkStatistics(statistics, item, C));
    }
  });
  parallel(run, 0, p.N, group_norm_grain(chunks.count * C), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const ChannelAffine affine(affines, n, C);
      merge_statistics(p, n, chunks, statistics, affine);
      to_element_order(affine.mean, 3, C, type);
    }
  });
  return affines;
}

template <bool kSilu, class T>
void group_norm_silu_fwd_rows(const GroupNormSilu& p, ParallelFor run, T* type) {
  const int64_t C = p.C;
  const RowChunks chunks(p);
  float* const affines = row_statistics(p, run, type);
  parallel(run, 0, p.N * chunks.count, group_norm_grain(chunks.rows * C), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / chunks.count, k = item % chunks.count;
      const int64_t start = (n * p.S + k * chunks.rows) * C;
      apply_rows<kSilu>(static_cast<const T*>(p.x) + start, static_cast<T*>(p.y) + start, chunks.rows_of(k, p.S), C,
                        ChannelAffine(affines, n, C));
    }
  });
}

inline void group_norm_silu_fwd(const GroupNormSilu& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* type) {
    if (group_norm_by_rows(p)) {
      p.silu ? group_norm_silu_fwd_rows<true>(p, run, type) : group_norm_silu_fwd_rows<false>(p, run, type);
    } else {
      p.silu ? group_norm_silu_fwd_nchw<true>(p, run, type) : group_norm_silu_fwd_nchw<false>(p, run, type);
    }
  });
}

// mean and rstd alone; the workspace is that of fwd.
inline void group_norm_statistics(const GroupNormSilu& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* type) {
    if (group_norm_by_rows(p)) {
      row_statistics(p, run, type);
      return;
    }
    parallel(run, 0, p.N * p.G, group_norm_grain(p.C / p.G * p.S), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const auto* const x = static_cast<decltype(type)>(const_cast<void*>(p.x));
        const MeanRstd s = group_statistics(p, x + start_of_group(p, item / p.G, item % p.G));
        p.mean[item] = s.mean;
        p.rstd[item] = s.rstd;
      }
    });
  });
}

// affine [N, 3, C] of z = (x - mean) * a + b from mean and rstd, for winograd/.
inline void group_norm_affine(const GroupNormSilu& p, float* affine) {
  const int64_t D = p.C / p.G;
  for (int64_t n = 0; n < p.N; ++n) {
    const ChannelAffine to(affine, n, p.C);
    for (int64_t c = 0; c < p.C; ++c) {
      const int64_t g = n * p.G + c / D;
      to.mean[c] = p.mean[g], to.a[c] = p.rstd[g] * channel_gain(p, n, c), to.b[c] = channel_offset(p, n, c);
    }
  }
}

inline int64_t group_norm_silu_fwd_workspace(const GroupNormSilu& p) {
  return group_norm_by_rows(p) ? p.N * p.C * (3 * RowChunks(p).count + 3) : 0;
}

}  // namespace
}  // namespace zeroblock
