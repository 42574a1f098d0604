// channel_rms_norm_silu: y = silu(x |rstd| a + b) with a = weight (1 + scale), b = bias (1 + scale) + shift, and rstd
// of each pixel over its channels: 1 / sqrt(mean(x^2) + eps), or sqrt(C) / max(norm, eps), negative where that divisor
// is eps. Backward, with dz = dy silu'(z) and g = dz a: dx = |rstd| (g - xhat m), m the mean of g xhat over the
// channels, 0 where rstd is negative, for there it is a constant; sums P of dz and X of dz xhat over the pixels of a
// sample give
//   dshift = P, dscale = weight X + bias P, dweight = sum over samples of (1 + scale) X, dbias likewise of P.
// grid: a block owns pixels of one sample and takes them tile by tile, all channels of a pixel at once, in registers.
// Threads lie `inner` along what is dense in memory, channels or pixels, and `outer` along the other. Bytes: each
// tensor once, and 16 C of partial sums per block of backward. Reduction order: a thread's packs, lanes, warps; over
// pixels a thread's, the block's, blocks, samples. Zero path: none, no flag is read.
#include "any_dtype.cuh"

namespace zeroblock::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostInner = 8;          // packs of a row of pixels: 128 bytes
constexpr int64_t kLeastPixels = 128;  // of a block of backward: its partial sums are then 3 % of its bytes at most
// Packs that a thread keeps: no spills (python -m tests.cuda.simt.static). Backward keeps as many sums besides.
template <int V>
constexpr int kForwardPacks = V > 1 ? 4 : 8;
template <int V, bool kLast>
constexpr int kBackwardPacks = V == 1  ? 8
                               : kLast ? 2
                                       : 4;

struct PixelTiles {
  int V, inner, outer;
  int64_t tiles, steps, blocks;  // of a sample; tiles of a block; blocks of a sample
  bool summed;                   // backward: whether a gradient of what pixels share is wanted
};

// Where a thread stands. Of a tile it has the packs i of one pixel (channels-last), or of V pixels one channel each.
template <class T, int V, bool kLast>
struct Place {
  static constexpr int P = kLast ? 1 : V;  // pixels of a thread
  int x, y, inner, outer, C;
  int64_t n, block, S;
  __device__ Place(const ChannelRmsNormSilu& p, const PixelTiles& t)
      : x(threadIdx.x % t.inner), y(threadIdx.x / t.inner), inner(t.inner), outer(t.outer), C(static_cast<int>(p.C)) {
    n = blockIdx.x / t.blocks, block = blockIdx.x % t.blocks, S = p.S;
  }
  __device__ __forceinline__ int channel(int i) const { return kLast ? (x + i * inner) * V : y + i * outer; }
  __device__ __forceinline__ int64_t pixel(int64_t tile) const {
    return kLast ? tile * outer + y : (tile * inner + x) * V;
  }
  // Where the packs of a pixel lie: pack i is `step(i)` beyond.
  __device__ __forceinline__ int64_t first(int64_t pixel) const { return n * S * C + pixel * (kLast ? C : 1); }
  __device__ __forceinline__ int64_t step(int i) const { return kLast ? channel(i) : channel(i) * S; }
  __device__ bool writes() const { return kLast ? x == 0 : y == 0; }
  // Sums over the channels of each pixel, to all threads of that pixel. All threads of the block call it; `part` is
  // used by every second call.
  __device__ __forceinline__ void sum(float (&v)[P], float* part) const {
    const int warp = threadIdx.x / 32;
    if constexpr (kLast) {
      v[0] = lanes_sum(v[0], inner < 32 ? inner : 32);
      if (inner <= 32) return;
      if (threadIdx.x % 32 == 0) part[warp] = v[0];
      __syncthreads();
      const float* sums = part + y * (inner / 32);
      v[0] = sums[0];
      for (int j = 1; j < inner / 32; j++) v[0] += sums[j];
    } else {
      for (int offset = inner; offset < 32; offset *= 2) {
#pragma unroll
        for (int k = 0; k < V; k++) v[k] += __shfl_xor_sync(kAllLanes, v[k], offset);
      }
      if (threadIdx.x % 32 < inner) {
#pragma unroll
        for (int k = 0; k < V; k++) part[(warp * inner + x) * V + k] = v[k];
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < V; k++) v[k] = part[x * V + k];
      for (int j = 1; j < kWarps; j++) {
#pragma unroll
        for (int k = 0; k < V; k++) v[k] += part[(j * inner + x) * V + k];
      }
    }
  }
};

// a and b of the channels of sample n, once per block.
__device__ __forceinline__ void stage_affine(const ChannelRmsNormSilu& p, int64_t n, float* a, float* b) {
  for (int c = threadIdx.x; c < p.C; c += kThreads) {
    const float gain = 1.0f + any_at(p.scale, n * p.scale.stride_b + c, 0.0f);
    a[c] = any_at(p.weight, c, 1.0f) * gain;
    b[c] = any_at(p.bias, c, 0.0f) * gain + any_at(p.shift, n * p.shift.stride_b + c, 0.0f);
  }
  __syncthreads();
}
// Those of a pack.
template <bool kLast, int V>
__device__ __forceinline__ void affine_of(const float* values, int c, float (&out)[V]) {
  if constexpr (kLast) return load_as<float>(values, c, out);
  const float v = values[c];
#pragma unroll
  for (int k = 0; k < V; k++) out[k] = v;
}

__device__ __forceinline__ float rstd_of_pixel(const ChannelRmsNormSilu& p, float squares, float root) {
  if (p.eps_inside) return 1.0f / sqrtf(squares / p.C + p.eps);
  const float norm = sqrtf(squares);
  return norm <= p.eps ? -(root / p.eps) : root / norm;  // a NaN is no less
}

template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads, kLast ? 3 : 2)
    channel_rms_norm_silu_fwd_kernel(ChannelRmsNormSilu p, PixelTiles tiles, float root) {
  constexpr int NV = kForwardPacks<V>, P = Place<T, V, kLast>::P;
  ZB_SHARED(float, part, [2][kWarps * kMostInner * (kLast ? 1 : V)]);
  ZB_DYNAMIC_SHARED(float, a);
  float* const b = a + p.C;
  const Place<T, V, kLast> at(p, tiles);
  stage_affine(p, at.n, a, b);
  for (int64_t step = 0; step < tiles.steps; step++) {
    const int64_t tile = at.block * tiles.steps + step, pixel = at.pixel(tile);
    if (tile >= tiles.tiles) break;
    const int C = pixel < p.S ? at.C : 0;
    const T* const x = static_cast<const T*>(p.x) + at.first(pixel);
    T* const y = static_cast<T*>(p.y) + at.first(pixel);
    Pack<T, V> xs[NV];
    float r[P] = {};
#pragma unroll
    for (int i = 0; i < NV; i++) {
      if (at.channel(i) >= C) continue;
      xs[i] = load_pack<V>(x + at.step(i));
      float squares = 0;
#pragma unroll
      for (int k = 0; k < V; k++) (kLast ? squares : r[kLast ? 0 : k]) += xs[i][k] * xs[i][k];
      if (kLast) r[0] += squares;
    }
    at.sum(r, part[step & 1]);
#pragma unroll
    for (int q = 0; q < P; q++) {
      r[q] = rstd_of_pixel(p, r[q], root);
      if (C && at.writes()) p.rstd[at.n * p.S + pixel + q] = r[q];
      r[q] = fabsf(r[q]);
    }
#pragma unroll
    for (int i = 0; i < NV; i++) {
      if (at.channel(i) >= C) continue;
      float gain[V], out[V];
      affine_of<kLast>(a, at.channel(i), gain);
      affine_of<kLast>(b, at.channel(i), out);
#pragma unroll
      for (int k = 0; k < V; k++) out[k] += xs[i][k] * r[kLast ? 0 : k] * gain[k];
      if (p.silu) {
#pragma unroll
        for (int k = 0; k < V; k++) out[k] = silu<T>(out[k]);
      }
      store_floats<V>(y + at.step(i), out);
    }
  }
}

template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads, 2)
    channel_rms_norm_silu_bwd_kernel(ChannelRmsNormSilu p, PixelTiles tiles) {
  constexpr int NV = kBackwardPacks<V, kLast>, P = Place<T, V, kLast>::P, W = kLast ? V : 1;  // W sums of a pack
  ZB_SHARED(float, part, [2][kWarps * kMostInner * (kLast ? 1 : V)]);
  ZB_DYNAMIC_SHARED(float, a);
  float* const b = a + p.C;
  const Place<T, V, kLast> at(p, tiles);
  stage_affine(p, at.n, a, b);
  float sums[2][NV][W] = {};
  for (int64_t step = 0; step < tiles.steps; step++) {
    const int64_t tile = at.block * tiles.steps + step, pixel = at.pixel(tile);
    if (tile >= tiles.tiles) break;
    const int C = pixel < p.S ? at.C : 0;
    const T *const x = static_cast<const T*>(p.x) + at.first(pixel), *const dy =
                                                                         static_cast<const T*>(p.dy) + at.first(pixel);
    T* const dx = static_cast<T*>(p.dx) + at.first(pixel);
    Pack<T, V> xs[NV];
    float g[NV][V], r[P], m[P] = {};
#pragma unroll
    for (int q = 0; q < P; q++) r[q] = C ? p.rstd[at.n * p.S + pixel + q] : 0.0f;
#pragma unroll
    for (int i = 0; i < NV; i++) {
      if (at.channel(i) >= C) continue;
      xs[i] = load_pack<V>(x + at.step(i));
      const Pack<T, V> dys = load_pack<V>(dy + at.step(i));
      float gain[V], offset[V];
      affine_of<kLast>(a, at.channel(i), gain);
      affine_of<kLast>(b, at.channel(i), offset);
#pragma unroll
      for (int k = 0; k < V; k++) {
        const float xhat = xs[i][k] * fabsf(r[kLast ? 0 : k]);
        const float dz = p.silu ? dys[k] * silu_derivative<T>(xhat * gain[k] + offset[k]) : dys[k];
        sums[0][i][kLast ? k : 0] += dz;
        sums[1][i][kLast ? k : 0] += dz * xhat;
        g[i][k] = rounded_product(dz, gain[k]);
        m[kLast ? 0 : k] += g[i][k] * xhat;
      }
    }
    at.sum(m, part[step & 1]);
#pragma unroll
    for (int q = 0; q < P; q++) m[q] = r[q] < 0.0f ? 0.0f : m[q] / p.C;
#pragma unroll
    for (int i = 0; i < NV; i++) {
      if (at.channel(i) >= C) continue;
#pragma unroll
      for (int k = 0; k < V; k++) {
        const int q = kLast ? 0 : k;
        g[i][k] = (g[i][k] - xs[i][k] * fabsf(r[q]) * m[q]) * fabsf(r[q]);
      }
      store_floats<V>(dx + at.step(i), g[i]);
    }
  }
  if (!tiles.summed) return;
  float* const partial = p.workspace + int64_t(blockIdx.x) * 2 * p.C;
  if constexpr (!kLast) {
#pragma unroll
    for (int q = 0; q < 2; q++) {
#pragma unroll
      for (int i = 0; i < NV; i++) {
        const float sum = lanes_sum(sums[q][i][0], at.inner);
        if (at.x == 0 && at.channel(i) < at.C) partial[q * p.C + at.channel(i)] = sum;
      }
    }
  } else {
    // Pixels of a warp side by side, then rows of threads one after another, so that the order is fixed; in the place
    // of a and b.
    const bool narrow = at.inner < 32;
    const int rows = narrow ? kWarps : at.outer, row = narrow ? threadIdx.x / 32 : at.y;
    if (narrow) {
#pragma unroll
      for (int q = 0; q < 2; q++) {
#pragma unroll
        for (int i = 0; i < NV; i++) {
#pragma unroll
          for (int k = 0; k < V; k++) {
            float& sum = sums[q][i][k];
            for (int offset = at.inner; offset < 32; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
          }
        }
      }
    }
    for (int turn = 0; turn < rows; turn++) {
      __syncthreads();
      if (row != turn || (narrow && threadIdx.x % 32 >= at.inner)) continue;
#pragma unroll
      for (int i = 0; i < NV; i++) {
        if (at.channel(i) >= at.C) continue;
#pragma unroll
        for (int q = 0; q < 2; q++) {
#pragma unroll
          for (int k = 0; k < V; k++) {
            const int64_t c = q * p.C + at.channel(i) + k;
            const float sum = turn == 0 ? sums[q][i][k] : a[c] + sums[q][i][k];
            (turn == rows - 1 ? partial : a)[c] = sum;
          }
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kSumThreads)
    channel_rms_norm_silu_bwd_params_kernel(ChannelRmsNormSilu p, PixelTiles tiles) {
  ZB_SHARED(float, part, [kSumThreads]);
  const ColumnSums columns(part, blockIdx.x, p.C);
  const int64_t c = columns.column;
  const float weight = columns.first ? any_at(p.weight, c, 1.0f) : 0.0f;
  const float bias = columns.first ? any_at(p.bias, c, 0.0f) : 0.0f;
  float dweight = 0, dbias = 0;
  for (int64_t n = 0; n < p.N; n++) {
    const float* first = p.workspace + n * tiles.blocks * 2 * p.C;
    const float dz = columns.sum(first, tiles.blocks, 2 * p.C);
    const float dz_xhat = columns.sum(first + p.C, tiles.blocks, 2 * p.C);
    if (!columns.first) continue;
    const float gain = 1.0f + any_at(p.scale, n * p.scale.stride_b + c, 0.0f);
    store_one(p.dscale, n * p.C + c, weight * dz_xhat + bias * dz);
    store_one(p.dshift, n * p.C + c, dz);
    dweight += gain * dz_xhat;
    dbias += gain * dz;
  }
  if (!columns.first) return;
  store_one(p.dweight, c, dweight);
  store_one(p.dbias, c, dbias);
}

// ---- host side ------------------------------------------------------------------------------------------------------

int vector_of(const ChannelRmsNormSilu& p) {
  const int vector = pack_size(p.dtype);
  bool whole = (p.channels_last ? p.C : p.S) % vector == 0;
  for (const void* t : {p.x, p.dy, static_cast<const void*>(p.y), static_cast<const void*>(p.dx)}) {
    whole = whole && is_aligned(t);
  }
  return whole ? vector : 1;
}

int packs_of(const ChannelRmsNormSilu& p, int V, bool backward) {
  if (!backward) return V > 1 ? kForwardPacks<8> : kForwardPacks<1>;
  if (V == 1) return kBackwardPacks<1, true>;
  return p.channels_last ? kBackwardPacks<8, true> : kBackwardPacks<8, false>;
}

PixelTiles tiles_of(const ChannelRmsNormSilu& p, int V, bool backward) {
  PixelTiles t{};
  t.V = V;
  t.summed = p.dweight.ptr || p.dbias.ptr || p.dscale.ptr || p.dshift.ptr;
  const int64_t NV = packs_of(p, V, backward), packs = ceil_div(p.channels_last ? p.C : p.S, V);
  t.inner = 1;
  if (p.channels_last) {  // two packs a thread while a warp has lanes
    while ((t.inner < 32 && 2 * t.inner < packs) || t.inner * NV < packs) t.inner *= 2;
  } else {
    // A row of pixels as long as the channels leave threads for.
    while (t.inner < kMostInner && t.inner < packs && 2 * t.inner * p.C <= kThreads * NV) t.inner *= 2;
  }
  t.outer = kThreads / t.inner;
  t.tiles = ceil_div(p.S, p.channels_last ? t.outer : t.inner * V);
  int64_t blocks = ceil_div(kElementwiseBlocks, p.N > 0 ? p.N : 1);
  const int64_t most = backward ? ceil_div(p.S, kLeastPixels) : t.tiles;
  if (blocks > most) blocks = most;
  t.steps = blocks > 0 ? ceil_div(t.tiles, blocks) : 1;
  t.blocks = ceil_div(t.tiles, t.steps);
  return t;
}

// f(element, V constant, whether channels-last)
template <class F>
int with_shape(const ChannelRmsNormSilu& p, int V, F f) {
  return with_dtype(p.dtype, [&](auto element) {
    auto with_layout = [&](auto width) {
      return p.channels_last ? f(element, width, std::true_type()) : f(element, width, std::false_type());
    };
    return V > 1 ? with_layout(std::integral_constant<int, kVector<decltype(element)>>())
                 : with_layout(std::integral_constant<int, 1>());
  });
}

}  // namespace

int channel_rms_norm_silu_fwd(const ChannelRmsNormSilu& p, void* stream) {
  if (p.N * p.C * p.S == 0) return 0;
  const PixelTiles tiles = tiles_of(p, vector_of(p), false);
  const dim3 grid(static_cast<unsigned>(p.N * tiles.blocks));
  const float root = static_cast<float>(sqrt(static_cast<double>(p.C)));
  return with_shape(p, tiles.V, [&](auto element, auto V, auto last) {
    return launch(channel_rms_norm_silu_fwd_kernel<decltype(element), decltype(V)::value, decltype(last)::value>, grid,
                  kThreads, 2 * p.C * sizeof(float), stream, p, tiles, root);
  });
}

int64_t channel_rms_norm_silu_bwd_workspace(const ChannelRmsNormSilu& p) {
  const PixelTiles tiles = tiles_of(p, vector_of(p), true);
  return tiles.summed ? p.N * tiles.blocks * 2 * p.C : 0;
}

int channel_rms_norm_silu_bwd(const ChannelRmsNormSilu& p, void* stream) {
  if (p.C == 0) return 0;
  const PixelTiles tiles = tiles_of(p, vector_of(p), true);
  if (p.N * p.S > 0) {
    const dim3 grid(static_cast<unsigned>(p.N * tiles.blocks));
    const int status = with_shape(p, tiles.V, [&](auto element, auto V, auto last) {
      return launch(channel_rms_norm_silu_bwd_kernel<decltype(element), decltype(V)::value, decltype(last)::value>,
                    grid, kThreads, 2 * p.C * sizeof(float), stream, p, tiles);
    });
    if (status) return status;
  }
  if (!tiles.summed) return 0;
  return launch(channel_rms_norm_silu_bwd_params_kernel, dim3(static_cast<unsigned>(sum_blocks(p.C))), kSumThreads, 0,
                stream, p, tiles);
}

}  // namespace zeroblock::cuda
