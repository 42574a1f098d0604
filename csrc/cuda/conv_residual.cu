// conv_residual and group_norm_silu_conv_residual forward on tensor cores: y = residual + conv(h) + bias, h = x or
// silu(norm(x)) with FiLM; 3x3 with padding 1 or 1x1, stride 1, channels-last, bf16 or fp16, fp32 accumulators.
//
// grid: a block owns 8 x 16 pixels of one image and BN output channels; blocks of the same pixels are neighbours, so
// the input comes from L2 for all but the first. Steps run over (32 input channels, tap); cp.async keeps kStages - 1 of
// them in flight. The input tile with its halo arrives once per 32 channels, is normalised and activated in place
// (padding stays zero: it is applied after the activation), and all nine taps read it from there: an element is
// activated 180 / 128 times per BN output channels instead of 9. Epilogue: fp32 sums pass through shared memory to
// 16-byte accesses; y = sum + bias + residual, rounded once. For the next norm the tile leaves, of each channel of the
// rounded y, the mean, the mean's rounding error and the centred squares, combined by conv_moments: without the error
// rstd would lose bits where |mean| >> std. Reduction order: 32-channel blocks, taps, tensor-core order; statistics by
// pixel, then tiles: deterministic. Zero path: the flag skips all steps; the epilogue writes residual + bias, with its
// statistics.
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
constexpr int kBlockC = 32;           // input channels of a step
constexpr int kChunks = kBlockC / 8;  // of 16 bytes
constexpr int kStages = 4;            // two blocks fit a multiprocessor (python tests/cuda/simt/static.py)
constexpr int kThreads = 256, kWarps = kThreads / 32;

// The epilogue's staged sums: a row of tile pixels for each warp, the warp's half of BN channels each, padded.
template <int BN>
constexpr int kStagedRow = BN / 2 + 8;
template <int BN>
constexpr int kStagedFloats = kWarps * kTileW * kStagedRow<BN>;

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
  const Layout& layout;
  float *gain, *offset;  // h = silu(x * gain + offset)
  T *input, *weight;
  int64_t n;
  int top, left, first_k, pad;  // of the tile of pixels; of the output channels

  __device__ Conv(const ConvResidual& p, const Layout& layout, float* shared) : p(p), layout(layout) {
    gain = shared;
    offset = shared + layout.blocks_c * kBlockC;
    input = reinterpret_cast<T*>(shared + layout.tables);
    weight = input + layout.halo_buffers * layout.halo * kBlockC;
    const int64_t tile = blockIdx.x / layout.tiles_k;
    first_k = static_cast<int>(blockIdx.x % layout.tiles_k) * BN;
    n = tile / (layout.tiles_h * layout.tiles_w);
    const int in_image = static_cast<int>(tile % (layout.tiles_h * layout.tiles_w));
    top = in_image / layout.tiles_w * kTileH;
    left = in_image % layout.tiles_w * kTileW;
    pad = p.kernel / 2;
  }
  __device__ T* input_tile(int block) const { return input + block % layout.halo_buffers * layout.halo * kBlockC; }
  __device__ T* weight_tile(int step) const { return weight + step % kStages * BN * kBlockC; }

  // f(pixel, chunk, row, column, channel, inside) for every chunk of the input tile that is this thread's; row and
  // column are those of the image.
  template <class F>
  __device__ void each_input_chunk(int block, F f) const {
    for (int i = threadIdx.x; i < layout.halo * kChunks; i += kThreads) {
      const int pixel = i / kChunks, chunk = i % kChunks, channel = block * kBlockC + chunk * 8;
      const int row = top + pixel / layout.halo_w - pad, column = left + pixel % layout.halo_w - pad;
      const bool inside = row >= 0 && row < p.H && column >= 0 && column < p.W && channel < p.C;
      f(pixel, chunk, row, column, channel, inside);
    }
  }

  // Starts the copies of a step: its tile of the weight, and the input tile of a new block of channels. Always one
  // group.
  __device__ void prefetch(int step) const {
    if (step < layout.blocks_c * layout.taps) {
      const int block = step / layout.taps, tap = step % layout.taps;
      if (tap == 0) {
        T* tile = input_tile(block);
        const T* image = static_cast<const T*>(p.x) + n * p.H * p.W * p.C;
        each_input_chunk(block, [&](int pixel, int chunk, int row, int column, int channel, bool inside) {
          const T* source = inside ? image + (int64_t(row) * p.W + column) * p.C + channel : image;
          copy_async_16(tile + swizzled(pixel, chunk), source, inside);
        });
      }
      T* tile = weight_tile(step);
      for (int i = threadIdx.x; i < BN * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks, k = first_k + row, channel = block * kBlockC + chunk * 8;
        const bool inside = k < p.K && channel < p.C;
        const T* all = static_cast<const T*>(p.weight);
        const T* source = inside ? all + (int64_t(k) * layout.taps + tap) * p.C + channel : all;
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
      const float channel_gain = operand_at<T>(p.norm_weight, c, 1.0f) * modulation * p.rstd[group];
      gain[c] = channel_gain;
      offset[c] = operand_at<T>(p.norm_bias, c, 0.0f) * modulation +
                  operand_at<T>(p.shift, n * p.shift.stride_b + c, 0.0f) - p.mean[group] * channel_gain;
    }
  }

  __device__ void activate(int block) const {
    T* tile = input_tile(block);
    each_input_chunk(block, [&](int pixel, int chunk, int, int, int channel, bool inside) {
      if (!inside) return;  // zero, as copied
      T* at = tile + swizzled(pixel, chunk);
      const Pack<T, 8> pack = load_pack<8>(at);
      float out[8];
#pragma unroll
      for (int k = 0; k < 8; k++) out[k] = silu<T>(pack[k] * gain[channel + k] + offset[channel + k]);
      store_floats<8>(at, out);
    });
  }
};

template <class T, int BN, bool kNorm>
__global__ void __launch_bounds__(kThreads, 2) conv_residual_kernel(ConvResidual p, Layout layout) {
  constexpr int kWarpN = BN / 2, kColumns = kWarpN / 8;  // eight warps: 4 pairs of tile rows x 2 halves of BN
  ZB_DYNAMIC_SHARED(float, shared);
  const Conv<T, BN, kNorm> conv(p, layout, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp % 4 * 2, warp_column = warp / 4 * kWarpN;
  float sums[2][kColumns][4] = {};
  if (!branch_is_zero(p.zero)) {
    const int steps = layout.blocks_c * layout.taps;
    for (int s = 0; s < kStages - 1; s++) conv.prefetch(s);
    if (kNorm) conv.load_tables();  // visible after the first barrier below
    for (int s = 0; s < steps; s++) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // step s has arrived for all, and all have finished step s - 1, whose buffers are refilled
      conv.prefetch(s + kStages - 1);
      const int block = s / layout.taps, tap = s % layout.taps;
      if (kNorm && tap == 0) {
        conv.activate(block);
        __syncthreads();
      }
      const T *input = conv.input_tile(block), *weight = conv.weight_tile(s);
      const int shift = tap / p.kernel * layout.halo_w + tap % p.kernel;
#pragma unroll
      for (int k = 0; k < kBlockC / 16; k++) {
        unsigned a[2][4], b[kColumns][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int row = (warp_row + i) * layout.halo_w + lane % 16 + shift;
          ldmatrix_x4(a[i], input + swizzled(row, 2 * k + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < kColumns; j += 2) {
          unsigned pair[4];
          const int row = warp_column + j * 8 + lane / 16 * 8 + lane % 8;
          ldmatrix_x4(pair, weight + swizzled(row, 2 * k + lane / 8 % 2));
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

  constexpr int kRow = kStagedRow<BN>, kAcross = kWarpN / 8, kDown = 32 / kAcross;
  float* stage = shared + warp * kTileW * kRow;
  T* rounded = reinterpret_cast<T*>(shared + kStagedFloats<BN>);  // [kPixels, BN], for the statistics
  const int k = conv.first_k + warp_column + lane % kAcross * 8;
  float bias[8];  // one by one: it may start anywhere, as the slice of a flat buffer of parameters does
#pragma unroll
  for (int e = 0; e < 8; e++) bias[e] = k < p.K ? operand_at<T>(p.bias, k + e, 0.0f) : 0.0f;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = conv.top + warp_row + i;
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Pack<float, 2> two{{sums[i][j][2 * half], sums[i][j][2 * half + 1]}};
        store_pack<2>(stage + (lane / 4 + 8 * half) * kRow + j * 8 + lane % 4 * 2, two);
      }
    }
    __syncwarp();
    for (int pixel = lane / kAcross; pixel < kTileW; pixel += kDown) {
      const int column = conv.left + pixel;
      if (row >= p.H || column >= p.W || k >= p.K) continue;
      const float* sum = stage + pixel * kRow + lane % kAcross * 8;
      const Pack<float, 4> low = load_pack<4>(sum), high = load_pack<4>(sum + 4);
      const int64_t at = ((conv.n * p.H + row) * p.W + column) * p.K + k;
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
        store_floats<8>(rounded + ((warp_row + i) * kTileW + pixel) * BN + warp_column + lane % kAcross * 8, out);
      }
    }
    __syncwarp();
  }
  if (!p.partial) return;

  // A thread owns a channel of part of the pixels; parts are added in order.
  constexpr int kParts = kThreads / BN;
  ZB_SHARED(float, parts, [3 * kThreads]);
  const int channel = threadIdx.x % BN, part = threadIdx.x / BN;
  const int height = p.H - conv.top < kTileH ? static_cast<int>(p.H) - conv.top : kTileH;
  const int width = p.W - conv.left < kTileW ? static_cast<int>(p.W) - conv.left : kTileW;
  const bool valid = conv.first_k + channel < p.K;
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
    float* out = p.partial + (int64_t(blockIdx.x / layout.tiles_k) * p.K + conv.first_k + channel) * kConvMoments;
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
    p.rstd[i] = rstd_of(squares / count - error * error, p.eps);
  }
}

// ---- host side ------------------------------------------------------------------------------------------------------

// Output channels of a block. Tiles of 128 read and activate the input half as often as tiles of 64, but may compute up
// to 127 channels that do not exist: a fifth of the work at most above 512 (guess).
constexpr int kWide = 128, kNarrow = 64, kAlwaysWide = 512;
bool takes_wide_tiles(const ConvResidual& p) { return p.K % kWide == 0 || p.K > kAlwaysWide; }

template <int BN>
Layout layout_of(const ConvResidual& p) {
  Layout layout{};
  const int pad = p.kernel / 2;
  layout.halo_w = kTileW + 2 * pad;
  layout.halo = (kTileH + 2 * pad) * layout.halo_w;
  layout.taps = p.kernel * p.kernel;
  layout.halo_buffers = layout.taps >= kStages ? 2 : kStages;  // a new input tile every `taps` steps
  layout.blocks_c = static_cast<int>(ceil_div(p.C, kBlockC));
  layout.tables = p.mean ? 2 * layout.blocks_c * kBlockC : 0;
  layout.tiles_h = static_cast<int>(ceil_div(p.H, kTileH));
  layout.tiles_w = static_cast<int>(ceil_div(p.W, kTileW));
  layout.tiles_k = static_cast<int>(ceil_div(p.K, BN));
  const size_t steps =
      layout.tables * sizeof(float) + (layout.halo_buffers * layout.halo + kStages * BN) * size_t(kBlockC) * 2;
  const size_t epilogue = kStagedFloats<BN> * sizeof(float) + (p.partial ? size_t(kPixels) * BN * 2 : 0);
  layout.bytes = steps > epilogue ? steps : epilogue;
  return layout;
}

template <class T, int BN>
int launch_conv(const ConvResidual& p, void* stream) {
  const Layout layout = layout_of<BN>(p);
  const dim3 grid(static_cast<unsigned>(p.N * layout.tiles_h * layout.tiles_w * layout.tiles_k));
  return p.mean ? launch(conv_residual_kernel<T, BN, true>, grid, kThreads, layout.bytes, stream, p, layout)
                : launch(conv_residual_kernel<T, BN, false>, grid, kThreads, layout.bytes, stream, p, layout);
}

}  // namespace

int64_t conv_residual_tiles(const ConvResidual& p) { return ceil_div(p.H, kTileH) * ceil_div(p.W, kTileW); }

int conv_residual_fwd(const ConvResidual& p, void* stream) {
  if (p.N * p.H * p.W * p.K == 0) return 0;
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      return takes_wide_tiles(p) ? launch_conv<T, kWide>(p, stream) : launch_conv<T, kNarrow>(p, stream);
    }
    return 1;  // cudaErrorInvalidValue: tensor cores take no fp32, and the binding has refused it
  });
}

int conv_moments(const ConvMoments& p, void* stream) {
  if (p.N * p.H * p.W * p.K == 0) return 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.N * p.G, kMomentsThreads / 32)));
  return launch(conv_moments_kernel, grid, kMomentsThreads, 0, stream, p);
}

}  // namespace zeroblock::cuda
