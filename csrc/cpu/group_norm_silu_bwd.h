// group_norm_silu, backward.
//
// Math: z and its sigmoid are recomputed from x, mean and rstd. With dz = dy * act'(z), xhat = (x - mean) * rstd and
// gain = weight * (1 + scale):
//   dx = rstd * (gain * dz - m1 - xhat * m2), m1 and m2 the means over the group of gain * dz and gain * dz * xhat;
//   per sample and channel: dshift = sum dz, dscale = sum dz * (xhat * weight + bias);
//   per channel: dweight = sum over n of (1 + scale) * sum dz * xhat, dbias = sum over n of (1 + scale) * sum dz.
// Loop: as in group_norm_silu.h, two passes over x: the sums, then dx. The first leaves in dx what saves the second a
// sigmoid: dz in fp32; the slope act'(z) in 16 bits (vec/slope.h), since dz rounded to 16 bits would cost accuracy.
// Reduction order: blocks of elements or of rows, then chunks, then samples, in order. Zero path: as forward.
#pragma once

#include "group_norm_silu.h"

namespace zeroblock {
namespace {

// SiLU's derivative. With e = exp(-z) and s = 1 / (1 + e), 1 - s is e * s: nothing cancels where s is near 1.
template <class V, class T>
ZB_INLINE V silu_slope(V z, const T* type) {
  const V e = exp_negated_for(z, type), s = reciprocal_for(set1(1.0f) + e, type);
  return s * fmadd(z, e * s, set1(1.0f));
}

// dz of the first pass, which leaves in dx, where that is not null, what kept_dz makes it of again.
template <bool kSilu, class V, class T, class Lanes>
ZB_INLINE V first_dz(V z, const T* dy, T* dx, Lanes lanes) {
  if constexpr (!kSilu) return load(dy, lanes);
  const V slope = silu_slope(z, dy), dz = load(dy, lanes) * slope;
  if (dx == nullptr) return dz;
  if constexpr (sizeof(T) == sizeof(float)) {
    store(dx, dz, lanes);
  } else {
    store_slope(dx, slope, lanes);
  }
  return dz;
}
template <bool kSilu, class T, class Lanes>
ZB_INLINE auto kept_dz(const T* dy, const T* dx, Lanes lanes) {
  if constexpr (!kSilu) {
    return load(dy, lanes);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    return load(dx, lanes);
  } else {
    return load(dy, lanes) * load_slope(dx, lanes);
  }
}

// Sums of dz and of dz * (x - mean) over one channel, [n] contiguous.
template <bool kSilu, class T>
ZB_LOOPS TwoSums channel_gradient_sums(const T* x, const T* dy, T* dx, int64_t n, float mean, float a, float b) {
  const Vec vmean = set1(mean), va = set1(a), vb = set1(b);
  TwoSums total;
  for (int64_t begin = 0; begin < n; begin += kGroupNormBlock) {
    const TwoSums s = sum_block(smaller(kGroupNormBlock, n - begin), [&](BlockSums& sums, int64_t i, auto lanes) {
      const auto centred = load(x + begin + i, lanes) - vmean;
      const auto dz = first_dz<kSilu>(fmadd(centred, va, vb), dy + begin + i, dx ? dx + begin + i : nullptr, lanes);
      // One register each: the sigmoid's constants and four chains need the others.
      sums.first.v[0] += zeroblock::total(dz);
      sums.second.v[0] += total_product(dz, centred);
    });
    total.first += s.first;
    total.second += s.second;
  }
  return total;
}

// dx = dz * a - m1_rstd - (x - mean) * m2_rstd2 over one channel.
template <bool kSilu, class T>
ZB_LOOPS void channel_gradient(const T* x, const T* dy, T* dx, int64_t n, float mean, float a, float m1_rstd,
                               float m2_rstd2) {
  const Vec vmean = with_plain_nan(set1(mean)), va = with_plain_nan(set1(a));
  const Vec vm1_rstd = with_plain_nan(set1(m1_rstd)), vm2_rstd2 = with_plain_nan(set1(m2_rstd2));
  for_lanes_by_4(n, [&](int64_t i, auto lanes) {
    const auto centred = load(x + i, lanes) - vmean, dz = kept_dz<kSilu>(dy + i, dx + i, lanes);
    store_result<kSilu>(dx + i, fnmadd(centred, vm2_rstd2, fmsub(dz, va, vm1_rstd)), lanes);
  });
}

// dx of groups of one or two elements, of which little or nothing is left: it must not be the rounding of a factor. dx
// is not read.
template <bool kSilu, class T>
ZB_LOOPS void tiny_group_gradient(const GroupNormSilu& p, T* type) {
  const int64_t D = p.C / p.G, size = D * p.S;
  const auto first_lane = [](Vec a) { return sum(keep_first(a, 1)); };
  for (int64_t item = 0; item < p.N * p.G; ++item) {
    const int64_t n = item / p.G;
    const float mean = p.mean[item], rstd = p.rstd[item];
    int64_t at[2];
    float xhat[2];
    double g[2], sum_g = 0, sum_g_xhat = 0;
    for (int64_t k = 0; k < size; ++k) {
      const int64_t c = item % p.G * D + k / p.S, s = k % p.S;
      at[k] = p.channels_last ? (n * p.S + s) * p.C + c
                              : start_of_group(p, n, item % p.G) + k / p.S * channel_stride(p) + s;
      const float centred = first_lane(load(static_cast<const T*>(p.x) + at[k], 1)) - mean;
      const float gain = channel_gain(p, n, c), z = centred * (rstd * gain) + channel_offset(p, n, c);
      const float slope = kSilu ? first_lane(silu_slope(set1(z), type)) : 1.0f;
      g[k] = static_cast<double>(first_lane(load(static_cast<const T*>(p.dy) + at[k], 1)) * slope * gain);
      xhat[k] = centred * rstd;
      sum_g += g[k];
      sum_g_xhat += g[k] * xhat[k];
    }
    const double count = static_cast<double>(size);
    for (int64_t k = 0; k < size; ++k) {
      const double dx = rstd * (g[k] - sum_g / count - xhat[k] * (sum_g_xhat / count));
      store(static_cast<T*>(p.dx) + at[k], with_plain_nan(set1(static_cast<float>(dx))), 1);
    }
  }
}

// Sums over s of dz and of dz * xhat for every sample and channel, [N, C] each, at the start of the workspace.
struct ChannelSums {
  float *dz, *dz_xhat;
  explicit ChannelSums(const GroupNormSilu& p) : dz(p.workspace), dz_xhat(p.workspace + p.N * p.C) {}
};

template <bool kSilu, class T>
void group_norm_silu_bwd_nchw(const GroupNormSilu& p, ParallelFor run, T*) {
  const int64_t D = p.C / p.G, size = D * p.S, stride = channel_stride(p);
  const ChannelSums sums(p);
  parallel(run, 0, p.N * p.G, group_norm_grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / p.G, first_channel = item % p.G * D, start = start_of_group(p, n, item % p.G);
      const float mean = p.mean[item], rstd = p.rstd[item];
      const T* x = static_cast<const T*>(p.x) + start;
      const T* dy = static_cast<const T*>(p.dy) + start;
      T* dx = p.dx ? static_cast<T*>(p.dx) + start : nullptr;
      double m1 = 0, m2 = 0;
      for (int64_t d = 0; d < D; ++d) {
        const int64_t c = first_channel + d;
        const float gain = channel_gain(p, n, c);
        const TwoSums s = channel_gradient_sums<kSilu>(x + d * stride, dy + d * stride, dx ? dx + d * stride : nullptr,
                                                       p.S, mean, rstd * gain, channel_offset(p, n, c));
        sums.dz[n * p.C + c] = static_cast<float>(s.first);
        sums.dz_xhat[n * p.C + c] = static_cast<float>(s.second * rstd);
        m1 += gain * s.first;
        m2 += gain * s.second * rstd;
      }
      if (!dx) continue;
      const float m1_rstd = static_cast<float>(m1 / static_cast<double>(size) * rstd);
      const float m2_rstd2 = static_cast<float>(m2 / static_cast<double>(size) * rstd * rstd);
      for (int64_t d = 0; d < D; ++d) {
        const int64_t c = first_channel + d, at = d * stride;
        channel_gradient<kSilu>(x + at, dy + at, dx + at, p.S, mean, rstd * channel_gain(p, n, c), m1_rstd, m2_rstd2);
      }
    }
  });
}

// As channel_gradient has them: the per-channel vectors of one sample, [C] each.
struct ChannelGradient {
  float *m1_rstd, *m2_rstd2;
  ChannelGradient(float* base, int64_t n, int64_t C) : m1_rstd(base + n * 2 * C), m2_rstd2(m1_rstd + C) {}
};

// Rows added to one fp32 sum before it is added to the chunk's: 128 lose dshift more than its error budget
// (tests/ops/test_parity.py -k group_norm_silu).
constexpr int64_t kRunningRows = 32;

// Of a chunk of rows, [C] each: the sums of dz and of dz * (x - mean), and those of the rows since the last addition.
struct ChunkGradientSums {
  float *dz, *dz_x, *running_dz, *running_dz_x;
  ChunkGradientSums(float* base, int64_t item, int64_t C)
      : dz(base + item * 4 * C), dz_x(dz + C), running_dz(dz_x + C), running_dz_x(running_dz + C) {}
};

ZB_INLINE void recompute_affine(const GroupNormSilu& p, int64_t n, const ChannelAffine& affine) {
  const int64_t D = p.C / p.G;
  for (int64_t g = 0; g < p.G; ++g) {
    fill(affine.mean + g * D, D, p.mean[n * p.G + g]);
    fill(affine.a + g * D, D, p.rstd[n * p.G + g]);
  }
  fold_modulation(p, n, affine);
}

// Adds the chunks' sums of sample n, and derives what dx takes from its group. Those, the affine and the gradient are
// in the order of the elements, the channel sums in memory's.
template <class T>
ZB_LOOPS void merge_gradient_sums(const GroupNormSilu& p, int64_t n, int64_t chunks, float* partial, ChannelSums sums,
                                  ChannelAffine affine, ChannelGradient gradient, T* type) {
  const int64_t C = p.C, D = C / p.G;
  const double count = static_cast<double>(D * p.S);
  for_lanes(C, [&](int64_t c, auto lanes) {
    Kahan total, total_x;
    for (int64_t k = 0; k < chunks; ++k) {
      const ChunkGradientSums chunk(partial, n * chunks + k, C);
      total.add(load(chunk.dz + c, lanes));
      total_x.add(load(chunk.dz_x + c, lanes));
    }
    // a = rstd * gain
    const Vec a = load(affine.a + c, lanes);
    store(sums.dz + n * C + c, total.total, lanes);
    store(sums.dz_xhat + n * C + c, total_x.total, lanes);
    store(gradient.m1_rstd + c, total.total * a, lanes);
    store(gradient.m2_rstd2 + c, total_x.total * a, lanes);
  });
  to_memory_order(sums.dz + n * C, 1, C, type);
  to_memory_order(sums.dz_xhat + n * C, 1, C, type);
  to_memory_order(gradient.m1_rstd, 2, C, type);
  for (int64_t g = 0; g < p.G; ++g) {
    const double rstd = p.rstd[n * p.G + g];
    float *m1_rstd = gradient.m1_rstd + g * D, *m2_rstd2 = gradient.m2_rstd2 + g * D,
          *dz_xhat = sums.dz_xhat + n * C + g * D;
    fill(m1_rstd, D, static_cast<float>(group_total(m1_rstd, D) / count));
    fill(m2_rstd2, D, static_cast<float>(group_total(m2_rstd2, D) / count * rstd * rstd));
    for_lanes(D, [&](int64_t d, auto lanes) {
      store(dz_xhat + d, load(dz_xhat + d, lanes) * set1(p.rstd[n * p.G + g]), lanes);
    });
  }
  to_element_order(gradient.m1_rstd, 2, C, type);
}

// Row by row: four rows at a time would move the sums less often, but take 10 % longer, for prefetchers follow the one
// order better (measured: python benchmarks/run.py --group memory_bound --filter group_norm_silu).
template <bool kSilu, class T>
ZB_LOOPS void rows_gradient_sums(const T* x, const T* dy, T* dx, int64_t rows, int64_t C, ChannelAffine affine,
                                 ChunkGradientSums sums) {
  fill(sums.dz, 2 * C, 0.0f);
  for (int64_t begin = 0; begin < rows; begin += kRunningRows) {
    fill(sums.running_dz, 2 * C, 0.0f);
    for (int64_t row = begin * C; row < smaller(begin + kRunningRows, rows) * C; row += C) {
      for_lanes_by_4(C, [&](int64_t c, auto lanes) {
        const auto mean = load(affine.mean + c, lanes), a = load(affine.a + c, lanes), b = load(affine.b + c, lanes);
        const int64_t i = row + c;
        const auto centred = load(x + i, lanes) - mean;
        const auto dz = first_dz<kSilu>(fmadd(centred, a, b), dy + i, dx ? dx + i : nullptr, lanes);
        store(sums.running_dz + c, load(sums.running_dz + c, lanes) + dz, lanes);
        store(sums.running_dz_x + c, fmadd(dz, centred, load(sums.running_dz_x + c, lanes)), lanes);
      });
    }
    for_lanes(2 * C, [&](int64_t i, auto lanes) {
      store(sums.dz + i, load(sums.dz + i, lanes) + load(sums.running_dz + i, lanes), lanes);
    });
  }
}

template <bool kSilu, class T>
ZB_LOOPS void rows_gradient(const T* x, const T* dy, T* dx, int64_t rows, int64_t C, ChannelAffine affine,
                            ChannelGradient gradient) {
  for (int64_t row = 0; row < rows * C; row += C) {
    for_lanes_by_4(C, [&](int64_t c, auto lanes) {
      const auto mean = load(affine.mean + c, lanes), a = load(affine.a + c, lanes);
      const auto m1_rstd = load(gradient.m1_rstd + c, lanes), m2_rstd2 = load(gradient.m2_rstd2 + c, lanes);
      const int64_t i = row + c;
      const auto centred = load(x + i, lanes) - mean, dz = kept_dz<kSilu>(dy + i, dx + i, lanes);
      store_result<kSilu>(dx + i, fnmadd(centred, m2_rstd2, fmsub(dz, a, m1_rstd)), lanes);
    });
  }
}

// Workspace after the channel sums: the sums of every chunk, [N, chunks, 4, C]; the affine, [N, 3, C]; the gradient's
// vectors, [N, 2, C].
template <bool kSilu, class T>
void group_norm_silu_bwd_rows(const GroupNormSilu& p, ParallelFor run, T* type) {
  const int64_t C = p.C;
  const RowChunks chunks(p);
  const int64_t items = p.N * chunks.count, grain = group_norm_grain(chunks.rows * C);
  const ChannelSums sums(p);
  float* partial = p.workspace + 2 * p.N * C;
  float* affines = partial + items * 4 * C;
  float* gradients = affines + 3 * p.N * C;
  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  T* dx = static_cast<T*>(p.dx);

  parallel(run, 0, p.N, group_norm_grain(C), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const ChannelAffine affine(affines, n, C);
      recompute_affine(p, n, affine);
      to_element_order(affine.mean, 3, C, type);
    }
  });
  parallel(run, 0, items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / chunks.count, k = item % chunks.count, start = (n * p.S + k * chunks.rows) * C;
      rows_gradient_sums<kSilu>(x + start, dy + start, dx ? dx + start : nullptr, chunks.rows_of(k, p.S), C,
                                ChannelAffine(affines, n, C), ChunkGradientSums(partial, item, C));
    }
  });
  parallel(run, 0, p.N, group_norm_grain(chunks.count * C), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      merge_gradient_sums(p, n, chunks.count, partial, sums, ChannelAffine(affines, n, C),
                          ChannelGradient(gradients, n, C), type);
    }
  });
  if (!dx) return;
  parallel(run, 0, items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / chunks.count, k = item % chunks.count, start = (n * p.S + k * chunks.rows) * C;
      rows_gradient<kSilu>(x + start, dy + start, dx + start, chunks.rows_of(k, p.S), C, ChannelAffine(affines, n, C),
                           ChannelGradient(gradients, n, C));
    }
  });
}

// The gradients of the vectors, from the channel sums.
ZB_LOOPS inline void group_norm_vector_gradients(const GroupNormSilu& p) {
  const ChannelSums sums(p);
  const int64_t C = p.C;
  for (int64_t n = 0; n < p.N; ++n) {
    const float *dz = sums.dz + n * C, *dz_xhat = sums.dz_xhat + n * C;
    if (p.dshift) for_lanes(C, [&](int64_t c, auto lanes) { store(p.dshift + n * C + c, load(dz + c, lanes), lanes); });
    if (p.dscale) {
      for_lanes(C, [&](int64_t c, auto lanes) {
        const Vec product = load(dz_xhat + c, lanes) * (p.weight ? load(p.weight + c, lanes) : set1(1.0f));
        const Vec bias = p.bias ? load(p.bias + c, lanes) : zero();
        store(p.dscale + n * C + c, fmadd(load(dz + c, lanes), bias, product), lanes);
      });
    }
  }
  const auto over_samples = [&](const float* values, float* out) {
    if (!out) return;
    for_lanes(C, [&](int64_t c, auto lanes) {
      Kahan total;
      for (int64_t n = 0; n < p.N; ++n) {
        const Vec factor = p.scale ? set1(1.0f) + load(p.scale + n * C + c, lanes) : set1(1.0f);
        total.add(load(values + n * C + c, lanes) * factor);
      }
      store(out + c, total.total, lanes);
    });
  };
  over_samples(sums.dz_xhat, p.dweight);
  over_samples(sums.dz, p.dbias);
}

void group_norm_silu_bwd(const GroupNormSilu& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* type) {
    if (group_norm_by_rows(p)) {
      p.silu ? group_norm_silu_bwd_rows<true>(p, run, type) : group_norm_silu_bwd_rows<false>(p, run, type);
    } else {
      p.silu ? group_norm_silu_bwd_nchw<true>(p, run, type) : group_norm_silu_bwd_nchw<false>(p, run, type);
    }
  });
  if (p.dx && p.C / p.G * p.S <= 2) {
    with_type(p.dtype,
              [&](auto* type) { p.silu ? tiny_group_gradient<true>(p, type) : tiny_group_gradient<false>(p, type); });
  }
  group_norm_vector_gradients(p);
}

int64_t group_norm_silu_bwd_workspace(const GroupNormSilu& p) {
  return p.N * p.C * (group_norm_by_rows(p) ? 4 * RowChunks(p).count + 7 : 2);
}

}  // namespace
}  // namespace zeroblock
