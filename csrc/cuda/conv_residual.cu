// conv_residual and group_norm_silu_conv_residual forward on tensor cores: y = residual + conv(h) + bias, h = x or
// silu(norm(x)) with FiLM; 3x3 with padding 1 or 1x1, stride 1, channels-last, bf16 or fp16, fp32 accumulators.
//
// grid: a block owns 8 x 16 pixels of one image and BN output channels; blocks of the same pixels are neighbours, so
// the input comes from L2 for all but the first. Steps run over (32 input channels, tap); cp.async keeps kStages - 1 of
// them in flight. The input tile with its halo arrives once per 32 channels, is normalised and activated in place
// (padding stays zero: it is applied after the activation), and all nine taps read it from there: an element is
// activated 180 / 128 times per BN output channels instead of 9. Epilogue: fp32 sums pass through shared memory to
// 16-byte accesses; y = sum + bias + residual, rounded once. Per-channel mean, the rounding of that mean, and centred
// squares of the tile's y (after rounding) for the next norm, combined by conv_moments: means far above the deviation,
// cut to fp32, would cost rstd its last bits. Reduction order: 32-channel blocks, taps,
// tensor-core order; statistics by pixel, then tiles: deterministic. Zero path: the flag skips all steps; the epilogue
// writes residual + bias, with its statistics.
//
// Bank conflicts. A row of the tiles is 32 channels, 64 bytes, 16 banks; chunk c (16 bytes) of row r lies at chunk
// c ^ (r / 2 % 4). ldmatrix reads one chunk of 8 consecutive rows r..r+7: bank group 16 (r % 2) + 4 (c ^ (r / 2 % 4)),
// and (r % 2, r / 2 % 4) takes 8 different values over any 8 consecutive rows, so every phase touches all 32 banks
// once, also from the odd starts that taps make; the 16 pixels of a fragment lie in one tile row, hence are
// consecutive. cp.async and the activation move whole rows, 8 threads per 128 bytes: one wavefront. Staged sums have
// rows of BN / 2 + 8 floats: float2 writes of a half-warp (g = 0..3, t = 0..3) go to banks 8 g + 2 t, all different;
// float4 reads are of consecutive addresses.
#include <type_traits>

#include "common.cuh"

namespace zeroblock::cuda {
namespace {

constexpr int kTileH = 8, kTileW = 16, kPixels = kTileH * kTileW;
constexpr int kBlockC = 32;  // input channels of a step
constexpr int kChunks = kBlockC / 8;
constexpr int kStages = 4;
constexpr int kThreads = 256;

struct Layout {
  int halo_w, halo, halo_buffers;  // pixels of the input tile, tiles in flight
  int taps, blocks_c, tables;      // floats of the norm's tables
  int tiles_h, tiles_w, tiles_k;
  size_t bytes;
};

// The element offset of a chunk of a row of a tile.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kBlockC + (chunk ^ (row / 2 % 4)) * 8; }

template <class T, int BN, bool kNorm>
struct Conv {
  const ConvResidual& p;
  const Layout& l;
  float *gain, *offset;  // h = silu(x * gain + offset)
  T *input, *filter;
  int64_t n;
  int y0, x0, k0, pad;

  __device__ Conv(const ConvResidual& params, const Layout& layout, float* shared) : p(params), l(layout) {
    gain = shared;
    offset = shared + l.blocks_c * kBlockC;
    input = reinterpret_cast<T*>(shared + l.tables);
    filter = input + l.halo_buffers * l.halo * kBlockC;
    const int64_t tile = blockIdx.x / l.tiles_k;
    k0 = static_cast<int>(blockIdx.x % l.tiles_k) * BN;
    n = tile / (l.tiles_h * l.tiles_w);
    const int in_image = static_cast<int>(tile % (l.tiles_h * l.tiles_w));
    y0 = in_image / l.tiles_w * kTileH;
    x0 = in_image % l.tiles_w * kTileW;
    pad = p.kernel / 2;
  }
  __device__ T* input_tile(int block) const { return input + block % l.halo_buffers * l.halo * kBlockC; }
  __device__ T* filter_tile(int step) const { return filter + step % kStages * BN * kBlockC; }

  // f(row, chunk, image row, image column, channel, inside) for every chunk of the input tile that is this thread's.
  template <class F>
  __device__ void each_input_chunk(int block, F f) const {
    for (int i = threadIdx.x; i < l.halo * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks, channel = block * kBlockC + chunk * 8;
      const int y = y0 + row / l.halo_w - pad, x = x0 + row % l.halo_w - pad;
      f(row, chunk, y, x, channel, y >= 0 && y < p.H && x >= 0 && x < p.W && channel < p.C);
    }
  }

  // Starts the copies of a step: its filter tile, and the input tile of a new block of channels. Always one group.
  __device__ void prefetch(int step) const {
    if (step < l.blocks_c * l.taps) {
      const int block = step / l.taps, tap = step % l.taps;
      if (tap == 0) {
        T* tile = input_tile(block);
        const T* image = static_cast<const T*>(p.x) + n * p.H * p.W * p.C;
        each_input_chunk(block, [&](int row, int chunk, int y, int x, int channel, bool inside) {
          const T* source = inside ? image + (int64_t(y) * p.W + x) * p.C + channel : image;
          copy_async_16(tile + swizzled(row, chunk), source, inside);
        });
      }
      T* tile = filter_tile(step);
      for (int i = threadIdx.x; i < BN * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks, k = k0 + row, channel = block * kBlockC + chunk * 8;
        const bool inside = k < p.K && channel < p.C;
        const T* all = static_cast<const T*>(p.filter);
        const T* source = inside ? all + (int64_t(k) * l.taps + tap) * p.C + channel : all;
        copy_async_16(tile + swizzled(row, chunk), source, inside);
      }
    }
    copy_async_commit();
  }

  __device__ void load_tables() const {
    const int64_t channels_per_group = p.C / p.G;
    for (int c = threadIdx.x; c < p.C; c += kThreads) {
      const int64_t group = n * p.G + c / channels_per_group;
      const float modulation = 1.0f + operand_at<T>(p.scale, n * p.scale.stride_b + c, 0.0f);
      const float weight = operand_at<T>(p.weight, c, 1.0f) * modulation * p.rstd[group];
      gain[c] = weight;
      offset[c] = operand_at<T>(p.bias, c, 0.0f) * modulation + operand_at<T>(p.shift, n * p.shift.stride_b + c, 0.0f) -
                  p.mean[group] * weight;
    }
  }

  __device__ void activate(int block) const {
    T* tile = input_tile(block);
    each_input_chunk(block, [&](int row, int chunk, int, int, int channel, bool inside) {
      if (!inside) return;  // zero, as copied
      T* at = tile + swizzled(row, chunk);
      const Pack<T, 8> pack = load_pack<8>(at);
      float out[8];
#pragma unroll
      for (int k = 0; k < 8; k++) out[k] = silu<T>(pack[k] * gain[channel + k] + offset[channel + k]);
      store_floats<8>(at, out);
    });
  }
};

template <class T, int BN, bool kNorm>
__global__ void __launch_bounds__(kThreads, 2) conv_residual_kernel(ConvResidual p, Layout l) {
  constexpr int kWarpN = BN / 2, kColumns = kWarpN / 8;  // eight warps: 4 pairs of tile rows x 2 halves of BN
  ZB_DYNAMIC_SHARED(float, shared);
  const Conv<T, BN, kNorm> conv(p, l, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp % 4 * 2, warp_column = warp / 4 * kWarpN;
  float sums[2][kColumns][4] = {};
  if (!branch_is_zero(p.zero)) {
    const int steps = l.blocks_c * l.taps;
    for (int s = 0; s < kStages - 1; s++) conv.prefetch(s);
    if (kNorm) conv.load_tables();  // visible after the first barrier below
    for (int s = 0; s < steps; s++) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // step s has arrived for all, and all have finished step s - 1, whose buffers are refilled
      conv.prefetch(s + kStages - 1);
      const int block = s / l.taps, tap = s % l.taps;
      if (kNorm && tap == 0) {
        conv.activate(block);
        __syncthreads();
      }
      const T *input = conv.input_tile(block), *filter = conv.filter_tile(s);
      const int shift = tap / p.kernel * l.halo_w + tap % p.kernel;
#pragma unroll
      for (int k = 0; k < kBlockC / 16; k++) {
        unsigned a[2][4], b[kColumns][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int row = (warp_row + i) * l.halo_w + lane % 16 + shift;
          ldmatrix_x4(a[i], input + swizzled(row, 2 * k + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < kColumns; j += 2) {
          unsigned pair[4];
          const int row = warp_column + j * 8 + lane / 16 * 8 + lane % 8;
          ldmatrix_x4(pair, filter + swizzled(row, 2 * k + lane / 8 % 2));
          b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
          for (int j = 0; j < kColumns; j++) mma_m16n8k16(sums[i][j], a[i], b[j], T());
        }
      }
    }
    copy_async_wait<0>();
    __syncthreads();  // the epilogue takes the same memory
  }

  constexpr int kRow = kWarpN + 8, kAcross = kWarpN / 8, kDown = 32 / kAcross;
  float* stage = shared + warp * 16 * kRow;
  T* rounded = reinterpret_cast<T*>(shared + 8 * 16 * kRow);  // [kPixels, BN], for the statistics
  const int k = conv.k0 + warp_column + lane % kAcross * 8;
  float bias[8];
  if (k < p.K) load_operand<T>(p.conv_bias, k, 0.0f, bias);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int y = conv.y0 + warp_row + i;
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Pack<float, 2> two{{sums[i][j][2 * half], sums[i][j][2 * half + 1]}};
        store_pack<2>(stage + (lane / 4 + 8 * half) * kRow + j * 8 + lane % 4 * 2, two);
      }
    }
    __syncwarp();
    for (int column = lane / kAcross; column < 16; column += kDown) {
      const int x = conv.x0 + column;
      if (y >= p.H || x >= p.W || k >= p.K) continue;
      const float* sum = stage + column * kRow + lane % kAcross * 8;
      const Pack<float, 4> low = load_pack<4>(sum), high = load_pack<4>(sum + 4);
      const int64_t at = ((conv.n * p.H + y) * p.W + x) * p.K + k;
      float out[8];
#pragma unroll
      for (int e = 0; e < 8; e++) out[e] = (e < 4 ? low[e] : high[e - 4]) + bias[e];
      if (p.residual) {
        const Pack<T, 8> residual = load_pack<8>(static_cast<const T*>(p.residual) + at);
#pragma unroll
        for (int e = 0; e < 8; e++) out[e] += residual[e];
      }
      store_floats<8>(static_cast<T*>(p.y) + at, out);
      if (p.partial) {
        store_floats<8>(rounded + ((warp_row + i) * kTileW + column) * BN + warp_column + lane % kAcross * 8, out);
      }
    }
    __syncwarp();
  }
  if (!p.partial) return;

  // A thread owns a channel of part of the pixels; parts are added in order.
  constexpr int kParts = kThreads / BN;
  ZB_SHARED(float, parts, [3 * kThreads]);
  const int channel = threadIdx.x % BN, part = threadIdx.x / BN;
  const int height = p.H - conv.y0 < kTileH ? static_cast<int>(p.H) - conv.y0 : kTileH;
  const int width = p.W - conv.x0 < kTileW ? static_cast<int>(p.W) - conv.x0 : kTileW;
  const bool valid = conv.k0 + channel < p.K;
  auto each_pixel = [&](auto f) {
    for (int pixel = part; valid && pixel < kPixels; pixel += kParts) {
      if (pixel / kTileW < height && pixel % kTileW < width) f(to_float(rounded[pixel * BN + channel]));
    }
  };
  auto total = [&](const float* buffer) {
    float sum = 0;
    for (int i = 0; i < kParts; i++) sum += buffer[i * BN + channel];
    return sum;
  };
  __syncthreads();
  float sum = 0, error = 0, squares = 0;
  each_pixel([&](float v) { sum += v; });
  parts[threadIdx.x] = sum;
  __syncthreads();
  const int pixels = height * width;
  const float mean = total(parts) / pixels;
  each_pixel([&](float v) {
    error += v - mean;
    squares += (v - mean) * (v - mean);
  });
  parts[kThreads + threadIdx.x] = error;
  parts[2 * kThreads + threadIdx.x] = squares;
  __syncthreads();
  if (valid && part == 0) {
    error = total(parts + kThreads) / pixels;
    float* out = p.partial + (int64_t(blockIdx.x / l.tiles_k) * p.K + conv.k0 + channel) * kConvMoments;
    out[0] = mean;
    out[1] = error;
    out[2] = total(parts + 2 * kThreads) - pixels * error * error;
  }
}

constexpr int kMomentsThreads = 128;

// A warp combines one group's partial statistics: over tiles and channels, the mean first.
__global__ void __launch_bounds__(kMomentsThreads) conv_moments_kernel(ConvMoments p) {
  const int64_t i = int64_t(blockIdx.x) * (kMomentsThreads / 32) + threadIdx.x / 32;
  if (i >= p.N * p.G) return;
  const int64_t n = i / p.G, channels = p.K / p.G, first = i % p.G * channels;
  const int64_t across = ceil_div(p.W, kTileW), tiles = ceil_div(p.H, kTileH) * across;
  const float count = static_cast<float>(p.H) * p.W * channels;
  // f(mean - origin, squares, pixels) summed over this group's entries.
  auto total = [&](float origin, auto f) {
    float sum = 0;
    for (int64_t e = threadIdx.x % 32; e < tiles * channels; e += 32) {
      const int64_t tile = e / channels, height = p.H - tile / across * kTileH, width = p.W - tile % across * kTileW;
      const float pixels = static_cast<float>((height < kTileH ? height : kTileH) * (width < kTileW ? width : kTileW));
      const float* entry = p.partial + ((n * tiles + tile) * p.K + first + e % channels) * kConvMoments;
      sum += f((entry[0] - origin) + entry[1], entry[2], pixels);
    }
    return warp_sum(sum);
  };
  const float origin = p.partial[(n * tiles * p.K + first) * kConvMoments];
  const float mean = origin + total(origin, [](float d, float, float pixels) { return pixels * d; }) / count;
  const float error = total(mean, [](float d, float, float pixels) { return pixels * d; }) / count;
  const float squares = total(mean, [](float d, float s, float pixels) { return s + pixels * d * d; });
  if (threadIdx.x % 32 == 0) {
    p.mean[i] = mean;
    p.rstd[i] = rsqrtf(squares / count - error * error + p.eps);
  }
}

// ---- host side ------------------------------------------------------------------------------------------------------

// Wide tiles where they waste no columns: they read the input and activate it half as often.
int block_n(const ConvResidual& p) { return p.K % 128 == 0 || p.K > 512 ? 128 : 64; }

Layout layout_of(const ConvResidual& p, int BN) {
  Layout l{};
  const int pad = p.kernel / 2;
  l.halo_w = kTileW + 2 * pad;
  l.halo = (kTileH + 2 * pad) * l.halo_w;
  l.taps = p.kernel * p.kernel;
  l.halo_buffers = l.taps >= kStages ? 2 : kStages;  // a new input tile every `taps` steps
  l.blocks_c = static_cast<int>(ceil_div(p.C, kBlockC));
  l.tables = p.mean ? 2 * l.blocks_c * kBlockC : 0;
  l.tiles_h = static_cast<int>(ceil_div(p.H, kTileH));
  l.tiles_w = static_cast<int>(ceil_div(p.W, kTileW));
  l.tiles_k = static_cast<int>(ceil_div(p.K, BN));
  const size_t steps = l.tables * sizeof(float) + (l.halo_buffers * l.halo + kStages * BN) * size_t(kBlockC) * 2;
  const size_t epilogue = 8 * 16 * (BN / 2 + 8) * sizeof(float) + (p.partial ? size_t(kPixels) * BN * 2 : 0);
  l.bytes = steps > epilogue ? steps : epilogue;
  return l;
}

template <class T, int BN>
int launch_conv(const ConvResidual& p, void* stream) {
  const Layout l = layout_of(p, BN);
  const dim3 grid(static_cast<unsigned>(p.N * l.tiles_h * l.tiles_w * l.tiles_k));
  return p.mean ? launch(conv_residual_kernel<T, BN, true>, grid, kThreads, l.bytes, stream, p, l)
                : launch(conv_residual_kernel<T, BN, false>, grid, kThreads, l.bytes, stream, p, l);
}

}  // namespace

int64_t conv_residual_tiles(const ConvResidual& p) { return ceil_div(p.H, kTileH) * ceil_div(p.W, kTileW); }

int conv_residual_fwd(const ConvResidual& p, void* stream) {
  if (p.N * p.H * p.W * p.K == 0) return 0;
  const bool wide = block_n(p) == 128;
  if (p.dtype == DType::kBF16) return wide ? launch_conv<bf16, 128>(p, stream) : launch_conv<bf16, 64>(p, stream);
  return wide ? launch_conv<fp16, 128>(p, stream) : launch_conv<fp16, 64>(p, stream);
}

int conv_moments(const ConvMoments& p, void* stream) {
  if (p.N * p.H * p.W * p.K == 0) return 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.N * p.G, kMomentsThreads / 32)));
  return launch(conv_moments_kernel, grid, kMomentsThreads, 0, stream, p);
}

}  // namespace zeroblock::cuda
