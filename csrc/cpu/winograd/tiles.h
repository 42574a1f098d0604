// 3x3 convolutions of stride 1 by Winograd's minimal filtering (Lavin and Gray, arXiv:1509.09308): what forward
// (fwd.h), weight gradient (wgrad.h) and the weight's transform (weight.h) share. fp32 throughout; 16-bit images and
// weights are widened as they are read, and the result is rounded once.
//
// Math: y = A^T [ (G w G^T) * (B^T d B) ] A for a tile of m x m outputs and its patch d of (m+2) x (m+2) inputs, "*"
// summed over input channels: (m+2)^2 GEMMs [tiles, C] x [C, K] in place of one with 9 C products. m = 2 saves a factor
// of 2.25 of the products, m = 4 one of 4 at up to 11 times the library's rounding error in the L2 norm and 26 times in
// the maximum norm (tests/ops/winograd_errors.py). Loop: chunks of tiles. Per chunk the patches (normalised and
// activated once, as they are read) are transformed into V [points, C / L, tiles, L], L lanes of a vector; then, per
// panel of 2 L output channels, the GEMMs of a few tiles leave their products M in the cache, and the transform back
// adds bias and residual as it stores. Reduction order: every output is one fixed chain of operations: no result
// depends on the chunks or on the number of threads. Zero path: none; the caller decides (add_bias.h).
//
// Threads share no V where each can have its own: reading a line that another core wrote costs several times as much as
// reading one's own where the cores have no common L3, as on many virtual machines.
//
// Measured and not done:
//   * Keeping U = G w G^T from forward for the data gradient (for m = 2 it is the same with points 0 and infinity
//   swapped
//     and channels transposed). U is 16 / 9 of the weight, and costs more to write and read than a transform of a panel
//     in the cache. Even within one call, transforming all panels once instead of for each chunk is between 3 % faster
//     (320 channels at 64 x 64) and 17 % slower (512 at 16 x 16).
//   * The next norm's statistics in the same pass: they are 0.2-1 % of a training step, and partial sums of every tile
//     would have to travel from op to op.
#pragma once

#include <cstdlib>

#include "../group_norm_silu.h"
#include "transforms.h"

namespace zeroblock {
namespace {

constexpr int kL = kLanes, kPanel = 2 * kLanes;  // output channels of a panel: two vectors
// Tiles of a row that are transformed together: their rows of input (100 KB with AVX-512 and m = 4) stay in L2.
constexpr int64_t kMaxStrip = 64;

ZB_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The transpose of a [rows, cols] corner of at most L x L, row r at src + r * stride, into out[0..L): column j becomes
// out[j], lanes from `rows` on are 0.
template <class T>
ZB_INLINE void load_transposed(const T* src, int64_t stride, int rows, int cols, Vec* out) {
  if (rows == kL && cols == kL) {
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) out[i] = load(src + i * stride);
  } else {
    for (int i = 0; i < kL; ++i) out[i] = i < rows ? load(src + i * stride, cols) : zero();
  }
  transpose(out);
}

// Memory that a thread keeps between calls, so that no call pays for fresh pages; more than kKept floats (48 MiB) are
// freed.
struct Scratch {
  static constexpr int64_t kKept = int64_t{3} << 22;
  float* data = nullptr;
  int64_t size = 0;
  ~Scratch() { free(data); }
  float* at_least(int64_t floats) {
    if (floats > size) {
      free(data);
      size = ceil_div(floats, 1024) * 1024;
      data = static_cast<float*>(aligned_alloc(64, static_cast<size_t>(size) * sizeof(float)));
      if (data == nullptr) size = 0;
    }
    return data;
  }
  void trim() {
    if (size > kKept) free(data), data = nullptr, size = 0;
  }
};
thread_local Scratch winograd_tiles;   // of the thread that transforms: V, and dU for the weight gradient
thread_local Scratch winograd_panels;  // of each worker: the transformed weights of a panel and M, or dM and dU

// How the tiles of the outputs [N, OH, OW] are cut. A strip is a row of up to kMaxStrip tiles; strips are numbered down
// the image first, so that those of a chunk share the rows of input between them.
template <class F>
struct Tiling {
  int64_t rows, segments, width, strips, chunk;  // width: tiles of a strip; chunk: strips of a chunk
  Tiling(const Winograd& p, int64_t budget) {
    const int64_t columns = ceil_div(p.OW, F::m);
    rows = ceil_div(p.OH, F::m);
    segments = ceil_div(columns, kMaxStrip);
    width = ceil_div(columns, segments);
    strips = p.N * segments * rows;
    const int64_t most = larger(1, smaller(strips, budget / width));
    chunk = ceil_div(strips, ceil_div(strips, most));
  }
  int64_t tiles() const { return chunk * width; }
};

// Floats between the points of V and of dM: padded, so that the points do not all fall into one set of the cache.
ZB_INLINE int64_t point_stride(int64_t blocks, int64_t tiles) { return blocks * tiles * kL + 5 * kL; }

// One operand of the transforms: an image [N, C, H, W] and how tiles are taken from it.
template <class T>
struct Source {
  const T* x;
  const float* affine;  // [N, 3, C] (mean, a, b of ChannelAffine), or null: x as it is
  bool channels_last;
  int64_t C, H, W;
  int64_t padding;
};

// Pixels [first, first + count) of row `row` of block `block` of channels of sample n, L channels each, activated, to
// out [count, L]; what is outside the image is 0, as are channels from C on.
template <class T>
ZB_LOOPS void load_row(Source<T> s, int64_t n, int64_t row, int64_t first, int64_t count, int64_t block, float* out) {
  const int64_t begin = row < 0 || row >= s.H ? count : smaller(count, larger(0, -first));
  const int64_t end = larger(begin, smaller(count, s.W - first)), c = block * kL;
  for (int64_t i = 0; i < begin; ++i) store(out + i * kL, zero());
  for (int64_t i = end; i < count; ++i) store(out + i * kL, zero());
  const int lanes = static_cast<int>(larger(0, smaller(kL, s.C - c)));  // none in the second half of a last panel
  Vec mean = zero(), a = zero(), b = zero();
  if (s.affine != nullptr) {
    const float* affine = s.affine + n * 3 * s.C + c;
    mean = load(affine, lanes), a = load(affine + s.C, lanes), b = load(affine + 2 * s.C, lanes);
  }
  const T* type = nullptr;
  const auto act = [&](auto v) {  // a = b = 0 in the lanes that do not exist: silu(0) = 0
    return s.affine == nullptr ? v : silu_for(fmadd(v - mean, a, b), type);
  };
  if (s.channels_last) {
    const T* x = s.x + ((n * s.H + row) * s.W + first) * s.C + c;
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      const FourRows from{s.C}, to{kL};
      if (lanes == kL) {
        to.store(out + i * kL, act(from.load(x + i * s.C, OneVec{})), OneVec{});
      } else {
        to.store(out + i * kL, act(from.load(x + i * s.C, lanes)), OneVec{});
      }
    }
    for (; i < end; ++i) store(out + i * kL, act(load(x + i * s.C, lanes)));
    return;
  }
  const T* x = s.x + ((n * s.C + c) * s.H + row) * s.W + first;
  for (int64_t i = begin; i < end; i += kL) {
    const int pixels = static_cast<int>(smaller(kL, end - i));
    Vec v[kL];
    load_transposed(x + i, s.H * s.W, lanes, pixels, v);
    for (int j = 0; j < kL; j += 4) {
      const Vec4 w = act(Vec4(v[j], v[j + 1], v[j + 2], v[j + 3]));
      for (int k = 0; k < 4 && j + k < pixels; ++k) store(out + (i + j + k) * kL, w.v[k]);
    }
  }
}

// Transforms block `block` of channels of the tiles of strips [begin, end): point q of tile t goes to
// out + q * point + t * step. kPatch: B^T d B of overlapping input patches; else A d A^T of the outputs' tiles.
template <class F, bool kPatch, class T>
ZB_LOOPS void transform_block(Source<T> s, Tiling<F> tiling, int64_t begin, int64_t end, int64_t block, float* out,
                              int64_t point, int64_t step) {
  constexpr int in = kPatch ? F::n : F::m, halo = in - F::m;
  const int64_t pixels = tiling.width * F::m + halo;
  // Rows live in a ring of `in`; consecutive strips of one image share the halo.
  alignas(64) float ring[in * (kMaxStrip * F::m + 2) * kL];
  const auto slot = [&](int64_t row) { return ring + row % in * pixels * kL; };
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t ty = strip % tiling.rows, column = strip / tiling.rows % tiling.segments;
    const int64_t n = strip / tiling.rows / tiling.segments, top = ty * F::m;
    const int64_t fresh = strip == begin || ty == 0 ? 0 : halo;
    for (int64_t r = fresh; r < in; ++r) {
      load_row(s, n, top + r - s.padding, column * tiling.width * F::m - s.padding, pixels, block, slot(top + r));
    }
    const float* rows[in];
    for (int r = 0; r < in; ++r) rows[r] = slot(top + r);
    float* to = out + (strip - begin) * tiling.width * step;
    for (int64_t tx = 0; tx < tiling.width; ++tx, to += step) {
      const int64_t at = tx * F::m * kL;
      both_dims<in, F::n>([](const Vec* a, Vec* b) { kPatch ? F::input(a, b) : F::spread(a, b); },
                          [&](int i, int j) { return load(rows[i] + at + j * kL); },
                          [&](int i, int j, Vec v) { store(to + (i * F::n + j) * point, v); });
    }
  }
}

}  // namespace
}  // namespace zeroblock
