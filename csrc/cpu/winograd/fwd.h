// The convolution (tiles.h): y = conv(act(norm(x)), w) [+ bias] [+ residual]. The data gradient is the same function of
// dy and of the weight with its channels swapped and its taps reversed.
#pragma once

#include "weight.h"

namespace zeroblock {
namespace {

// Tiles that one GEMM keeps in registers, 2 vectors of outputs each, beside 2 vectors of weights and 1 of inputs: all
// but one of the 32 registers of AVX-512, of the 16 of AVX2.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif

// What is worked on at a time: floats and tiles of a chunk (2 MiB of V, near the processor, but each transformed weight
// should serve many tiles), and tiles whose products M stay in the cache until they are transformed back. python
// benchmarks/scaling.py shows the times over channels and resolutions (guess).
constexpr int64_t kChunkFloats = int64_t{1} << 19, kChunkTiles = 64;
constexpr int kGroupTiles = 8 * kTileRows;

// Channels summed in registers; then the sum goes to memory: one chain over all channels would lose more to rounding
// than PyTorch's convolution does (tests/ops/test_winograd.py).
constexpr int64_t kChainChannels = 64;

// m[R, 2 L] = v[R tiles, C] u[C, 2 L]; v holds `blocks` blocks of L channels, block_stride apart.

template <int R>
ZB_LOOPS void gemm_tiles(const float* v, int64_t block_stride, const float* u, int64_t blocks, float* m) {
  for (int64_t begin = 0; begin < blocks; begin += kChainChannels / kL) {
    const int64_t end = smaller(blocks, begin + kChainChannels / kL);
    Vec sum[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = zero();
    for (int64_t block = begin; block < end; ++block, v += block_stride) {
#pragma GCC unroll 2
      for (int c = 0; c < kL; ++c, u += kPanel) {
        const Vec u0 = load(u), u1 = load(u + kL);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
          const Vec a = set1(v[r * kL + c]);
          sum[r][0] = fmadd(a, u0, sum[r][0]);
          sum[r][1] = fmadd(a, u1, sum[r][1]);
        }
      }
    }
    if (begin > 0) {
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) {
        sum[r][0] = load(m + r * kPanel) + sum[r][0], sum[r][1] = load(m + r * kPanel + kL) + sum[r][1];
      }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) store(m + r * kPanel, sum[r][0]), store(m + r * kPanel + kL, sum[r][1]);
  }
}

template <int R = kTileRows>
ZB_INLINE void gemm_tiles(int rows, const float* v, int64_t block_stride, const float* u, int64_t blocks, float* m) {
  if constexpr (R > 0) {
    if (rows == R) return gemm_tiles<R>(v, block_stride, u, blocks, m);
    gemm_tiles<R - 1>(rows, v, block_stride, u, blocks, m);
  }
}

// Where the tiles [t, t + count) of one strip go: the outputs of its first tile start at (n, row, column).
struct Target {
  int64_t n, row, column;
};

// f(channel, lanes, bias, products) for each of the vectors of channels of a panel that exist; k is the first channel.
template <class Half>
ZB_INLINE void each_half(const Winograd& p, int64_t k, const float* m, Half f) {
  for (int64_t channel = k; channel < smaller(p.K, k + kPanel); channel += kL, m += kL) {
    const int lanes = static_cast<int>(smaller(kL, p.K - channel));
    f(channel, lanes, p.bias ? load(p.bias + channel, lanes) : zero(), m);
  }
}

// A^T M A of one tile, from the products of its vector of channels.
template <class F, class Write>
ZB_INLINE void transform_back(const float* m, Write write) {
  both_dims<F::n, F::m>([](const Vec* a, Vec* b) { F::output(a, b); },
                        [&](int i, int j) { return load(m + (i * F::n + j) * kGroupTiles * kPanel); }, write);
}

// The channels of one panel, from k on; m: [points, kGroupTiles, 2 L]. y[..] = A^T M A + bias + residual for `count`
// neighbouring tiles, channels_last.
template <class F, class T>
ZB_LOOPS void store_tiles_rows(const Winograd& p, Target at, int count, int64_t k, const float* m) {
  T* const y = static_cast<T*>(p.y);
  const T* const residual = static_cast<const T*>(p.residual);
  each_half(p, k, m, [&](int64_t channel, int lanes, Vec bias, const float* products) {
    for (int t = 0; t < count; ++t) {
      const int64_t column = at.column + t * F::m;
      transform_back<F>(products + t * kPanel, [&](int i, int j, Vec v) {
        if (at.row + i >= p.OH || column + j >= p.OW) return;
        const int64_t to = ((at.n * p.OH + at.row + i) * p.OW + column + j) * p.K + channel;
        v = v + bias;
        if (lanes == kL) {
          store(y + to, residual ? v + load(residual + to) : v);
        } else {
          store(y + to, residual ? v + load(residual + to, lanes) : v, lanes);
        }
      });
    }
  });
}

// The same for [N, K, OH, OW]: the outputs of a row of tiles go through a buffer and are transposed.
template <class F, class T>
ZB_LOOPS void store_tiles_planes(const Winograd& p, Target at, int count, int64_t k, const float* m) {
  T* const y = static_cast<T*>(p.y);
  const T* const residual = static_cast<const T*>(p.residual);
  alignas(64) float buffer[F::m][kGroupTiles * F::m + kL][kL];
  const int pixels = static_cast<int>(smaller(count * F::m, p.OW - at.column)), plane_rows = F::m;
  each_half(p, k, m, [&](int64_t channel, int lanes, Vec bias, const float* products) {
    for (int t = 0; t < count; ++t) {
      transform_back<F>(products + t * kPanel, [&](int i, int j, Vec v) { store(buffer[i][t * F::m + j], v + bias); });
    }
    for (int i = 0; i < plane_rows && at.row + i < p.OH; ++i) {
      const int64_t to = ((at.n * p.K + channel) * p.OH + at.row + i) * p.OW + at.column;
      for (int j = 0; j < pixels; j += kL) {
        const int columns = static_cast<int>(smaller(kL, pixels - j));
        Vec v[kL];
        for (int l = 0; l < kL; ++l) v[l] = load(buffer[i][j + l]);
        transpose(v);
        for (int l = 0; l < lanes; ++l) {
          const int64_t place = to + l * p.OH * p.OW + j;
          if (columns == kL) {
            store(y + place, residual ? v[l] + load(residual + place) : v[l]);
          } else {
            store(y + place, residual ? v[l] + load(residual + place, columns) : v[l], columns);
          }
        }
      }
    }
  });
}

// Products and outputs of tiles [begin, end) of a chunk, at most kGroupTiles, for one panel of output channels.
template <class F, class T>
ZB_INLINE void finish_tiles(const Winograd& p, const Tiling<F>& tiling, int64_t first_strip, int64_t begin, int64_t end,
                            int64_t panel, const float* v, const float* u, float* m) {
  const int64_t blocks = ceil_div(p.C, kL), tiles = tiling.tiles(), point = point_stride(blocks, tiles);
  const int64_t parts = ceil_div(end - begin, kTileRows), rows = ceil_div(end - begin, parts);
  for (int q = 0; q < F::n * F::n; ++q) {
    for (int64_t t = begin; t < end; t += rows) {
      gemm_tiles(static_cast<int>(smaller(rows, end - t)), v + q * point + t * kL, tiles * kL, u + q * panel_point(p.C),
                 blocks, m + (q * kGroupTiles + t - begin) * kPanel);
    }
  }
  for (int64_t t = begin; t < end;) {
    const int64_t strip = first_strip + t / tiling.width, tx = t % tiling.width;
    const int64_t count = smaller(end - t, tiling.width - tx);
    const Target at = {strip / tiling.rows / tiling.segments, strip % tiling.rows * F::m,
                       (strip / tiling.rows % tiling.segments * tiling.width + tx) * F::m};
    if (at.column < p.OW) {
      const auto store_tiles = p.channels_last ? store_tiles_rows<F, T> : store_tiles_planes<F, T>;
      store_tiles(p, at, static_cast<int>(count), panel * kPanel, m + (t - begin) * kPanel);
    }
    t += count;
  }
}

template <class F>
int64_t packed_panel(int64_t C) {
  return F::n * F::n * panel_point(C);
}

// The strips [first, last), a chunk after the other; V is scratch memory of the calling thread.
template <class F, class T>
void winograd_fwd_strips(const Winograd& p, const Tiling<F>& tiling, int64_t first, int64_t last, ParallelFor run) {
  constexpr int points = F::n * F::n;
  const int64_t blocks = ceil_div(p.C, kL), panels = ceil_div(p.K, kPanel), size = packed_panel<F>(p.C);
  const int64_t tiles = tiling.tiles(), point = point_stride(blocks, tiles);
  float* const v = winograd_tiles.at_least(points * point);
  const Source<T> source = {static_cast<const T*>(p.x), p.affine, p.channels_last, p.C, p.H, p.W, p.padding};
  for (int64_t begin = first; begin < last; begin += tiling.chunk) {
    const int64_t end = smaller(begin + tiling.chunk, last), count = (end - begin) * tiling.width;
    parallel(run, 0, blocks, group_norm_grain(count * 16), [&](int64_t b0, int64_t b1) {
      for (int64_t b = b0; b < b1; ++b) {
        transform_block<F, true>(source, tiling, begin, end, b, v + b * tiles * kL, point, kL);
      }
    });
    const int64_t groups = ceil_div(count, kGroupTiles);
    parallel(run, 0, panels * groups, 1, [&](int64_t item, int64_t stop) {
      float* const scratch = winograd_panels.at_least(size + points * kGroupTiles * kPanel);
      for (int64_t ready = -1; item < stop; ++item) {
        const int64_t k = item / groups, g = item % groups;
        if (p.packed == nullptr && ready != k) weight_panel<F, T>(p.weight, k, scratch);
        ready = k;
        finish_tiles<F, T>(p, tiling, begin, count * g / groups, count * (g + 1) / groups, k, v,
                           p.packed ? p.packed + k * size : scratch, scratch + size);
      }
    });
  }
  winograd_tiles.trim();
}

// Tiles of a thread from which on every thread transforms the weights for itself (measured: python
// benchmarks/scaling.py; 16 x 16 maps of 64 channels gain up to 20 %).
constexpr int64_t kOwnTiles = 64;

// Where every thread has tiles enough, it multiplies what it transformed itself, and no V travels from core to core,
// which takes up to half of a convolution's time between cores without a common L3. Else the threads share each chunk:
// by input channels for the transform, by output channels for the products.
template <class F, class T>
void winograd_fwd_of(F, T*, const Winograd& p, ParallelFor run) {
  const int64_t tile_floats = F::n * F::n * ceil_div(p.C, kL) * kL;
  Tiling<F> tiling(p, larger(kChunkTiles, kChunkFloats / tile_floats));
  const int64_t share = ceil_div(tiling.strips, p.threads);
  if (p.threads == 1 || share * tiling.width < kOwnTiles) {
    return winograd_fwd_strips<F, T>(p, tiling, 0, tiling.strips, run);
  }
  tiling.chunk = ceil_div(share, ceil_div(share, tiling.chunk));  // chunks of equal size
  parallel(run, 0, tiling.strips, share,
           [&](int64_t first, int64_t last) { winograd_fwd_strips<F, T>(p, tiling, first, last, run_alone); });
}

template <class F, class T>
void winograd_pack_of(F, T*, const Winograd& p, ParallelFor run) {
  const int64_t size = packed_panel<F>(p.C);
  parallel(run, 0, ceil_div(p.K, kPanel), 1, [&](int64_t k0, int64_t k1) {
    for (int64_t k = k0; k < k1; ++k) weight_panel<F, T>(p.weight, k, p.u + k * size);
  });
}

// f(F, T*) with the transforms of p's tile and the type of its images and weight.
template <class Body>
ZB_INLINE void with_transform(const Winograd& p, const Body& f) {
  with_type(p.dtype, [&](auto* type) { p.tile == 2 ? f(F2{}, type) : f(F4{}, type); });
}

void winograd_fwd(const Winograd& p, ParallelFor run) {
  with_transform(p, [&](auto transform, auto* type) { winograd_fwd_of(transform, type, p, run); });
}

int64_t winograd_packed_size(const Winograd& p) {
  return ceil_div(p.K, kPanel) * (p.tile == 2 ? packed_panel<F2>(p.C) : packed_panel<F4>(p.C));
}

// G w G^T of every panel to p.u, winograd_packed_size floats.
void winograd_pack(const Winograd& p, ParallelFor run) {
  with_transform(p, [&](auto transform, auto* type) { winograd_pack_of(transform, type, p, run); });
}

}  // namespace
}  // namespace zeroblock
