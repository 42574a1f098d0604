// How group_norm_silu cuts its work, shared by forward and backward.
//
// A block owns a slab of whole groups of one sample and a chunk of the positions: a tile of rows x columns, the rows
// `row_stride` elements apart. Channels-first: rows are channels, columns positions, one group. Channels-last: rows are
// positions, columns the slab's channels. Threads form ty rows of tx; a thread keeps its columns (channels-last) or its
// row (channels-first), so that sums per channel need no atomics and have a fixed order.
// Modes: kOnChip, the chunk is everything and the tile stays in shared memory: x is read once; kCluster, the chunks of
// a slab are the tiles of one cluster's blocks, which read one another's partial sums (sm_90 and later): x is read
// once; kStats, partial sums of a chunk; kApply, the partial sums combined in the order of the chunks and the result
// written.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace zeroblock::cuda {

constexpr int kGroupNormThreads = 512;
constexpr int kGroupNormWarps = kGroupNormThreads / 32;
enum class Mode { kOnChip, kStats, kApply, kCluster };
template <Mode kMode>
constexpr bool kKeepsTile = kMode == Mode::kOnChip || kMode == Mode::kCluster;

struct Tiling {
  int groups, channels;  // of a slab
  int64_t slabs, chunk, chunks;
  int tx, ty;
  int part;      // floats of scratch for channel_sums
  size_t bytes;  // of shared memory
};

template <class T, int V, bool kLast>
struct Slab {
  int64_t base, row_stride;
  int n, slab, chunk_index;  // a grid has less than 2^31 blocks
  int first_channel, rows, columns, x0, y0;
  bool active;

  __device__ Slab(const GroupNormSilu& p, const Tiling& t) {
    const unsigned block = blockIdx.x, chunks = static_cast<unsigned>(t.chunks), slabs = static_cast<unsigned>(t.slabs);
    chunk_index = block % chunks;
    slab = block / chunks % slabs;
    n = block / chunks / slabs;
    first_channel = slab * t.channels;
    const int64_t begin = chunk_index * t.chunk, rest = p.S - begin;
    const int positions = static_cast<int>(rest < t.chunk ? rest : t.chunk);
    rows = kLast ? positions : t.channels;
    columns = (kLast ? t.channels : positions) / V;
    row_stride = kLast ? p.C : p.S;
    base = kLast ? (n * p.S + begin) * p.C + first_channel : (n * p.C + first_channel) * p.S + begin;
    x0 = threadIdx.x % t.tx;
    y0 = threadIdx.x / t.tx;
    active = y0 < t.ty;
  }
  __device__ int64_t offset(int row, int column) const { return base + row * row_stride + int64_t(column) * V; }
  __device__ int in_tile(int row, int column) const { return (row * columns + column) * V; }
  // The slab's channel of element k of a pack.
  __device__ int channel(int row, int column, int k) const { return kLast ? column * V + k : row; }

  // f(row, column) for every pack of this thread.
  template <class F>
  __device__ void each(const Tiling& t, F f) const {
    if (!active) return;
    if (kLast) {
#pragma unroll 1
      for (int c = x0; c < columns; c += t.tx) {
#pragma unroll 2
        for (int r = y0; r < rows; r += t.ty) f(r, c);
      }
    } else {
#pragma unroll 1
      for (int r = y0; r < rows; r += t.ty) {
#pragma unroll 2
        for (int c = x0; c < columns; c += t.tx) f(r, c);
      }
    }
  }
};

// sums[q * channels + c] = sum over the tile's part of channel c of quantity q; body(row, column, acc) adds a pack's
// values to acc[q][k]. Ends with a barrier.
template <int Q, class T, int V, bool kLast, class Body>
__device__ void channel_sums(const Slab<T, V, kLast>& slab, const Tiling& t, float* part, float* sums, Body body) {
  if (kLast) {
#pragma unroll 1
    for (int c = slab.x0; slab.active && c < slab.columns; c += t.tx) {
      float acc[Q][V] = {};
#pragma unroll 2
      for (int r = slab.y0; r < slab.rows; r += t.ty) body(r, c, acc);
#pragma unroll
      for (int q = 0; q < Q; q++) {
#pragma unroll
        for (int k = 0; k < V; k++) part[(q * t.ty + slab.y0) * t.channels + c * V + k] = acc[q][k];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < Q * t.channels; i += kGroupNormThreads) {
      const int q = i / t.channels, c = i % t.channels;
      float sum = 0;
#pragma unroll 1
      for (int j = 0; j < t.ty; j++) sum += part[(q * t.ty + j) * t.channels + c];
      sums[i] = sum;
    }
  } else {
    const int warp = threadIdx.x / 32, passes = (slab.rows + t.ty - 1) / t.ty;
#pragma unroll 1
    for (int pass = 0; pass < passes; pass++) {
      const int r = slab.y0 + pass * t.ty;
      float acc[Q][V] = {};
#pragma unroll 2
      for (int c = slab.x0; r < slab.rows && c < slab.columns; c += t.tx) body(r, c, acc);
      float* pass_part = part + (pass & 1) * Q * kGroupNormWarps;  // two buffers: one barrier a pass
#pragma unroll
      for (int q = 0; q < Q; q++) {
        float sum = acc[q][0];
#pragma unroll
        for (int k = 1; k < V; k++) sum += acc[q][k];
        sum = lanes_sum(sum, t.tx < 32 ? t.tx : 32);
        if (t.tx <= 32 && slab.x0 == 0 && r < slab.rows) sums[q * t.channels + r] = sum;
        if (t.tx > 32 && threadIdx.x % 32 == 0) pass_part[q * kGroupNormWarps + warp] = sum;
      }
      if (t.tx > 32) {
        __syncthreads();
        if (slab.x0 < Q && r < slab.rows) {
          float sum = 0;
#pragma unroll 1
          for (int j = 0; j < t.tx / 32; j++) sum += pass_part[slab.x0 * kGroupNormWarps + warp + j];
          sums[slab.x0 * t.channels + r] = sum;
        }
      }
    }
  }
  __syncthreads();
}

// f(group of the slab, first channel) by one warp per group; f's sums over lanes use warp_sum. Ends with a barrier.
template <class F>
__device__ void each_group(const Tiling& t, int channels_per_group, F f) {
#pragma unroll 1
  for (int group = threadIdx.x / 32; group < t.groups; group += kGroupNormWarps) f(group, group * channels_per_group);
  __syncthreads();
}

// The sum of `values` over one group's channels, by a warp.
__device__ __forceinline__ float group_sum(const float* values, int count) {
  float sum = 0;
#pragma unroll 1
  for (int j = threadIdx.x % 32; j < count; j += 32) sum += values[j];
  return warp_sum(sum);
}

// The shared memory of a block: arrays per channel of the slab, scratch, tiles.
struct GroupNormShared {
  float *center, *inverse, *gain, *offset, *sums, *part, *tiles;  // sums: two per channel

  __device__ GroupNormShared(float* shared, const Tiling& t) {
    center = shared;
    inverse = center + t.channels;
    gain = inverse + t.channels;
    offset = gain + t.channels;
    sums = offset + t.channels;
    part = sums + 2 * t.channels;
    tiles = part + t.part;
  }

  // z = xhat * gain + offset; no barrier.
  template <class T>
  __device__ void load_affine(const GroupNormSilu& p, const Tiling& t, int64_t n, int first_channel) {
#pragma unroll 1
    for (int c = threadIdx.x; c < t.channels; c += kGroupNormThreads) {
      const int64_t at = first_channel + c;
      const float modulation = 1.0f + operand_at<T>(p.scale, n * p.scale.stride_b + at, 0.0f);
      gain[c] = operand_at<T>(p.weight, at, 1.0f) * modulation;
      offset[c] =
          operand_at<T>(p.bias, at, 0.0f) * modulation + operand_at<T>(p.shift, n * p.shift.stride_b + at, 0.0f);
    }
  }
};

// ---- host side ------------------------------------------------------------------------------------------------------

// The smallest number of groups that divides G, keeps the slab a whole number of packs and makes it `bytes` wide.
inline int groups_per_slab(const GroupNormSilu& p, int V, int element, int bytes) {
  const int64_t cpg = p.C / p.G;
  for (int64_t groups = 1; groups < p.G; groups++) {
    if (p.G % groups == 0 && groups * cpg % V == 0 && groups * cpg * element >= bytes) return static_cast<int>(groups);
  }
  return static_cast<int>(p.G);
}

// A slab's channels, of each of which eight floats lie in shared memory: 96 of the 99 KB that every GPU has for a
// block. Wider groups are refused (cuda.py).
constexpr int64_t kMostSlabChannels = 3072;
constexpr int kSlabBytes = 256;  // of a position that a slab of two passes has, or more

// The elements of a pack: 16 bytes where every row starts at a multiple of them and a slab of whole packs is not too
// wide, else one.
inline bool has_whole_packs(const GroupNormSilu& p) {
  const int V = pack_size(p.dtype);
  if (!p.channels_last) return p.S % V == 0;
  return p.C % V == 0 && groups_per_slab(p, V, element_size(p.dtype), kSlabBytes) * (p.C / p.G) <= kMostSlabChannels;
}
inline int group_norm_vector(const GroupNormSilu& p) {
  const bool aligned = is_aligned(p.x) && is_aligned(p.y) && is_aligned(p.dy) && is_aligned(p.dx);
  return aligned && has_whole_packs(p) ? pack_size(p.dtype) : 1;
}

inline Tiling group_norm_tiling(const GroupNormSilu& p, int V, int64_t chunk, int slab_bytes) {
  Tiling t{};
  t.groups = p.channels_last ? groups_per_slab(p, V, element_size(p.dtype), slab_bytes) : 1;
  t.channels = static_cast<int>(t.groups * (p.C / p.G));
  t.slabs = p.G / t.groups;
  t.chunk = ceil_div(chunk, V) * V;
  if (p.channels_last || t.chunk > p.S) t.chunk = chunk;
  t.chunks = ceil_div(p.S, t.chunk);
  const int64_t columns = (p.channels_last ? t.channels : t.chunk) / V;
  t.tx = 1;
  if (p.channels_last) {
    t.tx = static_cast<int>(columns < kGroupNormThreads ? columns : kGroupNormThreads);
  } else {
    while (t.tx < columns && t.tx < kGroupNormThreads) t.tx *= 2;
  }
  t.ty = kGroupNormThreads / t.tx;
  t.part = p.channels_last ? 2 * t.ty * t.channels : 4 * kGroupNormWarps;
  if (t.part < 2 * t.channels) t.part = 2 * t.channels;
  t.part += (4 - (6 * t.channels + t.part) % 4) % 4;  // the tiles start at 16 bytes
  t.bytes = (6 * size_t(t.channels) + t.part) * sizeof(float);
  return t;
}

// The tiles of `tensors` tensors in the shared memory of `blocks` blocks. Without chunks where they do not fit, or
// where few large blocks would leave most of a GPU idle.
inline Tiling on_chip_tiling(const GroupNormSilu& p, int tensors, int V, int blocks) {
  Tiling t = group_norm_tiling(p, V, ceil_div(p.S, blocks), 32);
  const size_t tiles = size_t(t.channels) * t.chunk * element_size(p.dtype) * tensors;
  const bool enough =
      p.N * t.slabs * t.chunks >= (blocks == 1 ? kOnChipBlocks : kClusterBlocks) || tiles <= kSmallSlabBytes;
  t.bytes += tiles;
  if (V == 1 || !enough || t.bytes > shared_limit()) t.chunks = 0;
  return t;
}

// Chunks for two passes: about kElementwiseBlocks blocks, each with 4096 elements or more, 8 for a thread.
inline Tiling two_pass_tiling(const GroupNormSilu& p, int V) {
  const Tiling whole = group_norm_tiling(p, V, p.S, kSlabBytes);
  const int64_t least = ceil_div(4096, whole.channels), most = int64_t(1) << 24;
  const int64_t chunk = ceil_div(p.S, ceil_div(kElementwiseBlocks, p.N * whole.slabs));
  return group_norm_tiling(p, V, ceil_div(chunk < least ? least : chunk > most ? most : chunk, V) * V, kSlabBytes);
}

// At least as many chunks as either width of packs makes: what the workspace is sized for.
inline int64_t group_norm_chunks(const GroupNormSilu& p) {
  if (p.N * p.C * p.S == 0) return 0;
  const int64_t narrow = two_pass_tiling(p, 1).chunks;
  const int64_t wide = has_whole_packs(p) ? two_pass_tiling(p, pack_size(p.dtype)).chunks : 1;
  return wide > narrow ? wide : narrow;
}

template <Mode kMode>
using ModeConstant = std::integral_constant<Mode, kMode>;

// Launches the kernels that pick(element, pack size, channels-last, mode) names: one where a group is held on chip, by
// a block or by a cluster of as few as hold it, else two, and what between(tiling) launches between them.
template <class Pick, class Between>
int launch_group_norm(const GroupNormSilu& p, int tensors, void* stream, Pick pick, Between between) {
  using std::integral_constant;
  auto run = [&](auto element, auto V, auto last) {
    auto start = [&](const Tiling& t, auto mode) {
      const unsigned cluster = mode == Mode::kCluster ? static_cast<unsigned>(t.chunks) : 1;
      const dim3 grid(static_cast<unsigned>(p.N * t.slabs * t.chunks));
      return launch_clusters(cluster, pick(element, V, last, mode), grid, kGroupNormThreads, t.bytes, stream, p, t);
    };
    if constexpr (V > 1) {
      const Tiling one = on_chip_tiling(p, tensors, V, 1);
      if (one.chunks) return start(one, ModeConstant<Mode::kOnChip>());
      const unsigned limit = cluster_limit(pick(element, V, last, ModeConstant<Mode::kCluster>()));
      for (unsigned blocks = 2; blocks <= limit; blocks *= 2) {
        const Tiling t = on_chip_tiling(p, tensors, V, blocks);
        if (!t.chunks) continue;
        if (start(t, ModeConstant<Mode::kCluster>()) == 0) return 0;
        break;  // this GPU has no room for the cluster
      }
    }
    const Tiling t = two_pass_tiling(p, V);
    if (const int status = start(t, ModeConstant<Mode::kStats>())) return status;
    if (const int status = between(t)) return status;
    return start(t, ModeConstant<Mode::kApply>());
  };
  const bool packs = group_norm_vector(p) > 1;
  return with_dtype(p.dtype, [&](auto element) {
    const integral_constant<int, kVector<decltype(element)>> V;
    const integral_constant<int, 1> one;
    if (p.channels_last) return packs ? run(element, V, std::true_type()) : run(element, one, std::true_type());
    return packs ? run(element, V, std::false_type()) : run(element, one, std::false_type());
  });
}

}  // namespace zeroblock::cuda
