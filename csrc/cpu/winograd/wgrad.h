// The weight gradient (tiles.h): dw = G^T [ sum over tiles of (B^T d B) (A dy A^T) ] G, with d a patch of act(norm(x))
// and dy a tile of the output's gradient: (m+2)^2 GEMMs [C, tiles] x [tiles, K]. Reduction order: chunks of tiles are
// added to dU [panels, points, C, 2 L] one after the other; an element of dU is the sum over the tiles in order, kChain
// of them at a time.
#pragma once

#include "fwd.h"

namespace zeroblock {
namespace {

// Tiles summed in registers; then the sum goes to memory: one chain over all tiles would lose more to rounding than
// PyTorch's gradient does (tests/ops/test_winograd.py).
constexpr int64_t kChain = 32;
constexpr int kChannelRows = kL / 2;  // input channels that one GEMM keeps in registers, two vectors of outputs each

// du[rows, 2 L] (+)= sum over t of v[t, rows] dm[t, 2 L]; v is L apart from tile to tile.
template <bool kAdd>
ZB_LOOPS void gemm_channels(const float* v, const float* dm, int64_t tiles, float* du) {
  bool add = kAdd;
  for (int64_t first = 0; first < tiles; first += kChain, add = true) {
    Vec sum[kChannelRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kChannelRows; ++r) sum[r][0] = sum[r][1] = zero();
    const int64_t last = smaller(tiles, first + kChain);
    for (int64_t t = first; t < last; ++t, v += kL, dm += kPanel) {
      const Vec d0 = load(dm), d1 = load(dm + kL);
#pragma GCC unroll 8
      for (int r = 0; r < kChannelRows; ++r) {
        const Vec a = set1(v[r]);
        sum[r][0] = fmadd(a, d0, sum[r][0]);
        sum[r][1] = fmadd(a, d1, sum[r][1]);
      }
    }
    if (add) {
#pragma GCC unroll 8
      for (int r = 0; r < kChannelRows; ++r) {
        sum[r][0] = load(du + r * kPanel) + sum[r][0], sum[r][1] = load(du + r * kPanel + kL) + sum[r][1];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kChannelRows; ++r) store(du + r * kPanel, sum[r][0]), store(du + r * kPanel + kL, sum[r][1]);
  }
}

// Floats and tiles of a chunk of V and dM together: twice fwd.h's floats for two operands.
constexpr int64_t kGradChunkFloats = int64_t{1} << 20, kGradChunkTiles = 64;

// The output channels of the panels [first, last). V is scratch memory of the calling thread; dM of a panel belongs to
// the thread that multiplies it, and is still in its cache then.
template <class F, class T>
void winograd_wgrad_panels(const Winograd& p, const Tiling<F>& tiling, int64_t first, int64_t last, ParallelFor run) {
  constexpr int points = F::n * F::n;
  const int64_t blocks = ceil_div(p.C, kL), size = packed_panel<F>(p.C);
  const int64_t tiles = tiling.tiles(), point = point_stride(blocks, tiles), dpoint = point_stride(2, tiles);
  const bool single = tiling.chunk == tiling.strips;  // dU of a panel is complete at once and need not be kept
  float* const v = winograd_tiles.at_least(points * point + (single ? 0 : (last - first) * size));
  float* const du = v + points * point;
  const Source<T> source = {static_cast<const T*>(p.x), p.affine, p.channels_last, p.C, p.H, p.W, p.padding};
  const Source<T> gradient = {static_cast<const T*>(p.dy), nullptr, p.channels_last, p.K, p.OH, p.OW, 0};
  for (int64_t begin = 0; begin < tiling.strips; begin += tiling.chunk) {
    const int64_t end = smaller(begin + tiling.chunk, tiling.strips), count = (end - begin) * tiling.width;
    parallel(run, 0, blocks, group_norm_grain(count * 16), [&](int64_t b0, int64_t b1) {
      for (int64_t b = b0; b < b1; ++b) {
        transform_block<F, true>(source, tiling, begin, end, b, v + b * tiles * kL, point, kL);
      }
    });
    parallel(run, first, last, 1, [&](int64_t k, int64_t stop) {
      float* const dm = winograd_panels.at_least(points * dpoint + (single ? size : 0));
      for (; k < stop; ++k) {
        for (int half = 0; half < 2; ++half) {
          transform_block<F, false>(gradient, tiling, begin, end, 2 * k + half, dm + half * kL, dpoint, kPanel);
        }
        float* const panel = single ? dm + points * dpoint : du + (k - first) * size;
        for (int q = 0; q < points; ++q) {
          for (int64_t c = 0; c < blocks * kL; c += kChannelRows) {
            const float* const from = v + q * point + c / kL * tiles * kL + c % kL;
            float* const to = panel + q * panel_point(p.C) + c * kPanel;
            const float* const with = dm + q * dpoint;
            begin == 0 ? gemm_channels<false>(from, with, count, to) : gemm_channels<true>(from, with, count, to);
          }
        }
        if (end == tiling.strips) weight_grad_panel<F, T>(p.weight, k, panel);
      }
    });
  }
  winograd_tiles.trim();
}

// Floats that the threads' copies of V may take together (measured: python benchmarks/run.py --group dense --threads 2;
// 64 channels: 1.50 -> 0.75 ms on two processors without a common L3).
constexpr int64_t kOwnFloats = int64_t{1} << 22;

// Every thread transforms all inputs for itself where it has a panel to multiply and the copies are small: reading
// another's V takes up to half of the time between cores without a common L3, and as long as the transform elsewhere.
template <class F, class T>
void winograd_wgrad_of(F, T*, const Winograd& p, ParallelFor run) {
  const int64_t blocks = ceil_div(p.C, kL), panels = ceil_div(p.K, kPanel);
  const int64_t tile_floats = F::n * F::n * (blocks * kL + panels * kPanel);
  // All tiles at once where their V and dM are small against the dU that chunks would need.
  const Tiling<F> chunked(p, larger(kGradChunkTiles, kGradChunkFloats / tile_floats));
  const Tiling<F> whole(p, panels * packed_panel<F>(p.C) / 2 / tile_floats);
  const Tiling<F>& tiling = whole.chunk == whole.strips ? whole : chunked;
  const int64_t copies = p.threads * F::n * F::n * point_stride(blocks, tiling.tiles());
  if (p.threads == 1 || panels < p.threads || copies > kOwnFloats) {
    return winograd_wgrad_panels<F, T>(p, tiling, 0, panels, run);
  }
  parallel(run, 0, panels, ceil_div(panels, p.threads),
           [&](int64_t first, int64_t last) { winograd_wgrad_panels<F, T>(p, tiling, first, last, run_alone); });
}

void winograd_wgrad(const Winograd& p, ParallelFor run) {
  with_transform(p, [&](auto transform, auto* type) { winograd_wgrad_of(transform, type, p, run); });
}

}  // namespace
}  // namespace zeroblock
