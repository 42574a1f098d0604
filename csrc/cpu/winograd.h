// 3x3 convolutions of stride 1 by Winograd's minimal filtering (Lavin and Gray, arXiv:1509.09308): the shared part.
// Arithmetic is fp32 throughout; 16-bit images and weights are widened as they are read, and rounded once at the end.
//
//   y = A^T [ (G w G^T) * (B^T d B) ] A for a tile of m x m outputs and its patch d of (m+2) x (m+2) inputs, "*" summed
//   over input channels: (m+2)^2 GEMMs [tiles, C] x [C, K] in the place of one with 9 C products. m = 2 saves a factor
//   of 2.25 of the products, m = 4 one of 4 at about ten times the rounding error. Work is cut into chunks of tiles.
//   Per chunk the patches (activated once, as they are read) are transformed into V [points, C / L, tiles, L], L lanes
//   of a vector; then, per panel of 2 L output channels, the GEMMs of a few tiles leave their products M in the cache,
//   and the transform back adds bias and residual as it stores. Every output is one fixed chain of operations, so no
//   result depends on the chunks or on the number of threads.
//   Threads share no V where each can have its own: a line that another core has written costs several times as much as
//   one's own where the cores have no common L3, as the processors of a virtual machine often have not.
//
//   Two things were weighed and left. The data gradient transforms the weight again, though for m = 2 its U is that of
//   the forward with points 0 and infinity swapped and channels transposed: the transform reads 9 floats of weight for
//   16 of U, so that U kept from the forward on (16/9 of the weights' memory) is written and read back for more than
//   transforming anew from a panel in the cache; even within one call, all panels transformed once instead of for each
//   chunk measured between 3 % faster (320 channels at 64 x 64) and 17 % slower (512 at 16 x 16). And the statistics of
//   a norm that follows stay a pass of their own: 4 bytes read for each of the 8 that the convolution moves, measured
//   0.2-1 % of a step, against partial sums of every tile, merged in a fixed order, that travel from op to op.
#pragma once

#include <cstdlib>

#include "group_norm_silu.h"

namespace zeroblock {
namespace {

constexpr int kL = kLanes, kPanel = 2 * kLanes;  // output channels of a panel: two vectors
constexpr int64_t kMaxStrip = 64;                // tiles of a row that are worked on together

ZB_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The transforms of one dimension. m outputs, n = m + 2 points; V is a Vec.
//   input:  out[n] = B^T in[n]      output:   out[m] = A^T in[n]     weight:   out[n] = G in[3]
//   and, for the weight gradient, the transposes of the last two:
//   spread: out[n] = A in[m]        unweight: out[3] = G^T in[n]
struct F2 {  // points 0, 1, -1, infinity
  static constexpr int m = 2, n = 4;
  ZB_INLINE static void input(const Vec* d, Vec* o) {
    o[0] = d[0] - d[2], o[1] = d[1] + d[2], o[2] = d[2] - d[1], o[3] = d[1] - d[3];
  }
  ZB_INLINE static void output(const Vec* p, Vec* o) { o[0] = p[0] + (p[1] + p[2]), o[1] = (p[1] - p[2]) - p[3]; }
  ZB_INLINE static void weight(const Vec* g, Vec* o) {
    const Vec half = set1(0.5f), even = g[0] + g[2];
    o[0] = g[0], o[1] = half * (even + g[1]), o[2] = half * (even - g[1]), o[3] = g[2];
  }
  ZB_INLINE static void spread(const Vec* y, Vec* o) {
    o[0] = y[0], o[1] = y[0] + y[1], o[2] = y[0] - y[1], o[3] = zero() - y[1];
  }
  ZB_INLINE static void unweight(const Vec* u, Vec* o) {
    const Vec half = set1(0.5f), even = half * (u[1] + u[2]);
    o[0] = u[0] + even, o[1] = half * (u[1] - u[2]), o[2] = even + u[3];
  }
};

struct F4 {  // points 0, 1, -1, 2, -2, infinity
  static constexpr int m = 4, n = 6;
  ZB_INLINE static void input(const Vec* d, Vec* o) {
    const Vec two = set1(2.0f), four = set1(4.0f), five = set1(5.0f);
    const Vec a = fnmadd(four, d[2], d[4]), b = fnmadd(four, d[1], d[3]), c = d[4] - d[2], e = two * (d[3] - d[1]);
    o[0] = fmadd(four, d[0], fnmadd(five, d[2], d[4]));
    o[1] = a + b, o[2] = a - b, o[3] = c + e, o[4] = c - e;
    o[5] = fmadd(four, d[1], fnmadd(five, d[3], d[5]));
  }
  ZB_INLINE static void output(const Vec* p, Vec* o) {
    const Vec s1 = p[1] + p[2], d1 = p[1] - p[2], s2 = p[3] + p[4], d2 = p[3] - p[4];
    o[0] = p[0] + (s1 + s2), o[1] = fmadd(set1(2.0f), d2, d1);
    o[2] = fmadd(set1(4.0f), s2, s1), o[3] = fmadd(set1(8.0f), d2, d1) + p[5];
  }
  ZB_INLINE static void weight(const Vec* g, Vec* o) {
    const Vec sixth = set1(1.0f / 6), even = g[0] + g[2];
    const Vec far = fmadd(set1(0.25f), g[0], g[2]), odd = set1(0.5f) * g[1];
    o[0] = set1(0.25f) * g[0];
    o[1] = zero() - sixth * (even + g[1]), o[2] = sixth * (g[1] - even);
    o[3] = sixth * (far + odd), o[4] = sixth * (far - odd), o[5] = g[2];
  }
  ZB_INLINE static void spread(const Vec* y, Vec* o) {
    const Vec even = y[0] + y[2], odd = y[1] + y[3], two = set1(2.0f), four = set1(4.0f);
    const Vec far_even = fmadd(four, y[2], y[0]), far_odd = two * fmadd(four, y[3], y[1]);
    o[0] = y[0], o[1] = even + odd, o[2] = even - odd, o[3] = far_even + far_odd, o[4] = far_even - far_odd;
    o[5] = y[3];
  }
  ZB_INLINE static void unweight(const Vec* u, Vec* o) {
    const Vec sixth = set1(1.0f / 6), s1 = u[1] + u[2], d1 = u[1] - u[2], s2 = u[3] + u[4], d2 = u[3] - u[4];
    o[0] = fmadd(sixth, fmadd(set1(0.25f), s2, zero() - s1), set1(0.25f) * u[0]);
    o[1] = sixth * fmadd(set1(0.5f), d2, zero() - d1);
    o[2] = fmadd(sixth, s2 - s1, u[5]);
  }
};

// f in both dimensions: first down each of the `in` columns, then along the `out` rows that this leaves. read(row,
// column) gives the input, write(row, column, v) takes the output.
template <int in, int out, class OneDim, class Read, class Write>
ZB_INLINE void both_dims(const OneDim& f, const Read& read, const Write& write) {
  Vec half[out][in];
#pragma GCC unroll 6
  for (int j = 0; j < in; ++j) {
    Vec column[in], result[out];
#pragma GCC unroll 6
    for (int i = 0; i < in; ++i) column[i] = read(i, j);
    f(column, result);
#pragma GCC unroll 6
    for (int i = 0; i < out; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < out; ++i) {
    Vec result[out];
    f(half[i], result);
#pragma GCC unroll 6
    for (int j = 0; j < out; ++j) write(i, j, result[j]);
  }
}

// v[i] lane j <-> v[j] lane i.
ZB_INLINE void transpose(Vec* v) {
#if defined(__AVX512F__)
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i].v = _mm512_shuffle_ps(t[i], t[i + 2], 0x44), v[i + 1].v = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    v[i + 2].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44), v[i + 3].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(v[i].v, v[i + 4].v, 0x88), b = _mm512_shuffle_f32x4(v[i].v, v[i + 4].v, 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(v[i + 8].v, v[i + 12].v, 0x88);
    const __m512 d = _mm512_shuffle_f32x4(v[i + 8].v, v[i + 12].v, 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, c, 0x88), t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88), t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i].v = t[i];
#else
  __m256 t[8], s[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v), t[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), s[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), s[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i].v = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20), v[i + 4].v = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
  }
#endif
}

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

// Memory that a thread keeps between calls, so that no call pays for fresh pages; more than kKept floats are freed.
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

// Floats between the points of V, of dM: padded, so that the streams of the points do not meet in one set of the cache.
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
  const int lanes = static_cast<int>(smaller(kL, s.C - c));
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
        to.store(out + i * kL, act(from.load(x + i * s.C, All{})), All{});
      } else {
        to.store(out + i * kL, act(from.load(x + i * s.C, lanes)), All{});
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
      const Wide w = act(Wide(v[j], v[j + 1], v[j + 2], v[j + 3]));
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
