// GroupNorm, modulation and SiLU in one kernel: backward. Included at the end of group_norm_silu.h.
//
// z and its sigmoid are recomputed from x, mean and rstd. With dz = dy * act'(z), xhat = (x - mean) * rstd and
// gain = weight * (1 + scale):
//   dx = rstd * (gain * dz - m1 - xhat * m2), m1 and m2 the means over the group of gain * dz and gain * dz * xhat;
//   per sample and channel: dshift = sum dz, dscale = sum dz * (xhat * weight + bias);
//   per channel: dweight = sum over n of (1 + scale) * sum dz * xhat, dbias = sum over n of (1 + scale) * sum dz.
// Two passes over x: the sums, then dx. In fp32 the first leaves dz in dx, which is cheaper than a second sigmoid; a dz
// rounded to 16 bits would cost accuracy, and the 16-bit sigmoid is short, so there the second pass starts over.
#pragma once

namespace zeroblock {
namespace {

// dy * act'(z). With e = exp(-z) and s = 1 / (1 + e), 1 - s is e * s: nothing cancels where s is near 1.
template <bool kSilu, class V, class T>
ZB_INLINE V group_norm_dz(V z, V dy, const T* type) {
  if constexpr (!kSilu) return dy;
  const V e = exp_negated_for(z, type), s = reciprocal_for(set1(1.0f) + e, type);
  return (dy * s) * fmadd(z, e * s, set1(1.0f));
}

template <class T>
constexpr bool kKeepsDz = sizeof(T) == sizeof(float);

// Sums of dz and of dz * (x - mean) over one channel, [n] contiguous; dz, where not null, receives dz.
template <bool kSilu, class T>
ZB_LOOPS TwoSums channel_gradient_sums(const T* x, const T* dy, T* dz, int64_t n, float mean, float a, float b) {
  const Vec vmean = set1(mean), va = set1(a), vb = set1(b);
  TwoSums total;
  for (int64_t begin = 0; begin < n; begin += kGroupNormBlock) {
    const TwoSums s = sum_block(smaller(kGroupNormBlock, n - begin), [&](BlockSums& sums, int64_t i, auto lanes) {
      const auto centred = load(x + begin + i, lanes) - vmean;
      const auto d = group_norm_dz<kSilu>(fmadd(centred, va, vb), load(dy + begin + i, lanes), x);
      add_to(sums.first, d);
      add_product_to(sums.second, d, centred);
      if (kKeepsDz<T> && dz) store(dz + begin + i, d, lanes);
    });
    total.first += s.first;
    total.second += s.second;
  }
  return total;
}

// dx = dz * a - shared - (x - mean) * slope over one channel.
template <bool kSilu, class T>
ZB_LOOPS void channel_gradient(const T* x, const T* dy, T* dx, int64_t n, float mean, float a, float b, float shared,
                               float slope) {
  const Vec vmean = set1(mean), va = set1(a), vb = set1(b), vshared = set1(shared), vslope = set1(slope);
  for_wide_lanes(n, [&](int64_t i, auto lanes) {
    const auto centred = load(x + i, lanes) - vmean;
    const auto dz =
        kKeepsDz<T> ? load(dx + i, lanes) : group_norm_dz<kSilu>(fmadd(centred, va, vb), load(dy + i, lanes), x);
    store(dx + i, fnmadd(centred, vslope, fmsub(dz, va, vshared)), lanes);
  });
}

// Sums over s of dz and of dz * xhat for every sample and channel, [N, C] each, at the start of the workspace.
struct ChannelSums {
  float *dz, *dz_xhat;
  explicit ChannelSums(const GroupNormSilu& p) : dz(p.workspace), dz_xhat(p.workspace + p.N * p.C) {}
};

template <bool kSilu, class T>
void group_norm_silu_bwd_nchw(const GroupNormSilu& p, ParallelFor run, T*) {
  const int64_t D = p.C / p.G, size = D * p.S;
  const ChannelSums sums(p);
  parallel(run, 0, p.N * p.G, group_norm_grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / p.G, first_channel = item % p.G * D;
      const float mean = p.mean[item], rstd = p.rstd[item];
      const T* x = static_cast<const T*>(p.x) + item * size;
      const T* dy = static_cast<const T*>(p.dy) + item * size;
      T* dx = p.dx ? static_cast<T*>(p.dx) + item * size : nullptr;
      double m1 = 0, m2 = 0;
      for (int64_t d = 0; d < D; ++d) {
        const int64_t c = first_channel + d;
        const float gain = channel_gain(p, n, c);
        const TwoSums s = channel_gradient_sums<kSilu>(x + d * p.S, dy + d * p.S, dx ? dx + d * p.S : nullptr, p.S,
                                                       mean, rstd * gain, channel_offset(p, n, c));
        sums.dz[n * p.C + c] = static_cast<float>(s.first);
        sums.dz_xhat[n * p.C + c] = static_cast<float>(s.second * rstd);
        m1 += gain * s.first;
        m2 += gain * s.second * rstd;
      }
      if (!dx) continue;
      const float shared = static_cast<float>(m1 / static_cast<double>(size) * rstd);
      const float slope = static_cast<float>(m2 / static_cast<double>(size) * rstd * rstd);
      for (int64_t d = 0; d < D; ++d) {
        const int64_t c = first_channel + d, at = d * p.S;
        const float a = rstd * channel_gain(p, n, c), b = channel_offset(p, n, c);
        channel_gradient<kSilu>(x + at, dy + at, dx + at, p.S, mean, a, b, shared, slope);
      }
    }
  });
}

// As channel_gradient has them: the per-channel vectors of one sample, [C] each.
struct ChannelGradient {
  float *shared, *slope;
  ChannelGradient(float* base, int64_t n, int64_t C) : shared(base + n * 2 * C), slope(shared + C) {}
};

ZB_INLINE void recompute_affine(const GroupNormSilu& p, int64_t n, const ChannelAffine& affine) {
  const int64_t D = p.C / p.G;
  for (int64_t g = 0; g < p.G; ++g) {
    fill(affine.mean + g * D, D, p.mean[n * p.G + g]);
    fill(affine.a + g * D, D, p.rstd[n * p.G + g]);
  }
  fold_modulation(p, n, affine);
}

// Adds the chunks' sums of sample n, and derives what dx takes from its group.
ZB_LOOPS inline void merge_gradient_sums(const GroupNormSilu& p, int64_t n, int64_t chunks, const float* dz,
                                         const float* dz_x, ChannelSums sums, ChannelAffine affine,
                                         ChannelGradient gradient) {
  const int64_t C = p.C, D = C / p.G;
  const double count = static_cast<double>(D * p.S);
  for_lanes(C, [&](int64_t c, auto lanes) {
    Kahan total, total_x;
    for (int64_t k = 0; k < chunks; ++k) {
      total.add(load(dz + k * C + c, lanes));
      total_x.add(load(dz_x + k * C + c, lanes));
    }
    // a = rstd * gain
    const Vec a = load(affine.a + c, lanes);
    store(sums.dz + n * C + c, total.total, lanes);
    store(sums.dz_xhat + n * C + c, total_x.total, lanes);
    store(gradient.shared + c, total.total * a, lanes);
    store(gradient.slope + c, total_x.total * a, lanes);
  });
  for (int64_t g = 0; g < p.G; ++g) {
    const double rstd = p.rstd[n * p.G + g];
    float *shared = gradient.shared + g * D, *slope = gradient.slope + g * D, *dz_xhat = sums.dz_xhat + n * C + g * D;
    fill(shared, D, static_cast<float>(group_total(shared, D) / count));
    fill(slope, D, static_cast<float>(group_total(slope, D) / count * rstd * rstd));
    for_lanes(D, [&](int64_t d, auto lanes) {
      store(dz_xhat + d, load(dz_xhat + d, lanes) * set1(p.rstd[n * p.G + g]), lanes);
    });
  }
}

template <bool kSilu, class T>
ZB_LOOPS void rows_gradient_sums(const T* x, const T* dy, T* dz, int64_t rows, int64_t C, ChannelAffine affine,
                                 float* sum_dz, float* sum_dz_x) {
  fill(sum_dz, C, 0.0f);
  fill(sum_dz_x, C, 0.0f);
  for_row_tiles(rows, C, [&](int64_t row, auto tile) {
    for_lanes(C, [&](int64_t c, auto lanes) {
      const Vec mean = load(affine.mean + c, lanes), a = load(affine.a + c, lanes), b = load(affine.b + c, lanes);
      const int64_t i = row * C + c;
      const auto centred = tile.load(x + i, lanes) - mean;
      const auto d = group_norm_dz<kSilu>(fmadd(centred, a, b), tile.load(dy + i, lanes), x);
      store(sum_dz + c, load(sum_dz + c, lanes) + total(d), lanes);
      store(sum_dz_x + c, load(sum_dz_x + c, lanes) + total_product(d, centred), lanes);
      if (kKeepsDz<T> && dz) tile.store(dz + i, d, lanes);
    });
  });
}

template <bool kSilu, class T>
ZB_LOOPS void rows_gradient(const T* x, const T* dy, T* dx, int64_t rows, int64_t C, ChannelAffine affine,
                            ChannelGradient gradient) {
  for_row_tiles(rows, C, [&](int64_t row, auto tile) {
    for_lanes(C, [&](int64_t c, auto lanes) {
      const Vec mean = load(affine.mean + c, lanes), a = load(affine.a + c, lanes), b = load(affine.b + c, lanes);
      const Vec shared = load(gradient.shared + c, lanes), slope = load(gradient.slope + c, lanes);
      const int64_t i = row * C + c;
      const auto centred = tile.load(x + i, lanes) - mean;
      const auto dz = kKeepsDz<T> ? tile.load(dx + i, lanes)
                                  : group_norm_dz<kSilu>(fmadd(centred, a, b), tile.load(dy + i, lanes), x);
      tile.store(dx + i, fnmadd(centred, slope, fmsub(dz, a, shared)), lanes);
    });
  });
}

// Workspace after the channel sums: sum dz and sum dz * (x - mean) of every chunk, [N, chunks, C] each; the affine,
// [N, 3, C]; the gradient's vectors, [N, 2, C].
template <bool kSilu, class T>
void group_norm_silu_bwd_rows(const GroupNormSilu& p, ParallelFor run, T*) {
  const int64_t C = p.C;
  const RowChunks chunks(p);
  const int64_t items = p.N * chunks.count, grain = group_norm_grain(chunks.rows * C);
  const ChannelSums sums(p);
  float* partial_dz = p.workspace + 2 * p.N * C;
  float* partial_dz_x = partial_dz + items * C;
  float* affines = partial_dz_x + items * C;
  float* gradients = affines + 3 * p.N * C;
  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  T* dx = static_cast<T*>(p.dx);

  parallel(run, 0, p.N, group_norm_grain(C), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) recompute_affine(p, n, ChannelAffine(affines, n, C));
  });
  parallel(run, 0, items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / chunks.count, k = item % chunks.count, start = (n * p.S + k * chunks.rows) * C;
      rows_gradient_sums<kSilu>(x + start, dy + start, dx ? dx + start : nullptr, chunks.rows_of(k, p.S), C,
                                ChannelAffine(affines, n, C), partial_dz + item * C, partial_dz_x + item * C);
    }
  });
  parallel(run, 0, p.N, group_norm_grain(chunks.count * C), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t first = n * chunks.count * C;
      merge_gradient_sums(p, n, chunks.count, partial_dz + first, partial_dz_x + first, sums,
                          ChannelAffine(affines, n, C), ChannelGradient(gradients, n, C));
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
  group_norm_vector_gradients(p);
}

int64_t group_norm_silu_bwd_workspace(const GroupNormSilu& p) {
  return p.N * p.C * (group_norm_by_rows(p) ? 2 * RowChunks(p).count + 7 : 2);
}

}  // namespace
}  // namespace zeroblock
