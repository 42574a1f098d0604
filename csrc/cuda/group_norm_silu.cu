// group_norm_silu forward: y = act((x - mean) * rstd * gain + offset), gain = weight (1 + scale), offset = bias (1 +
// scale) + shift, statistics over one group of one sample.
// x [N, C, S] or [N, S, C], dense. grid: one block per (sample, slab of groups, chunk of positions); see
// group_norm_tile.cuh. Bytes: x once and y once on chip (in one block or a cluster), else x twice and y once.
// Reduction order: per thread along its packs, then threads, channels, chunks, each in index order; the mean first,
// then centred squares with the rounding of the mean taken out. Zero path: mean and rstd are written as zeros, y is
// not: a backward that cannot read the flag then multiplies its zero gradients with finite numbers.
#include "group_norm_tile.cuh"

namespace zeroblock::cuda {
namespace {

// Mean and sum of centred squares of one group's elements, of which sums holds the sum and then the corrections.
struct Moments {
  float mean, m2;
};

template <class T, int V, bool kLast, Mode kMode>
__global__ void __launch_bounds__(kGroupNormThreads, 2) group_norm_silu_fwd_kernel(GroupNormSilu p, Tiling t) {
  if (kMode == Mode::kCluster && !kKnowsClusters) return;
  ZB_DYNAMIC_SHARED(float, shared);
  GroupNormShared s(shared, t);
  const Slab<T, V, kLast> slab(p, t);
  if (branch_is_zero(p.zero)) {
    if (kMode == Mode::kStats || slab.chunk_index > 0) return;
    const int64_t first = slab.n * p.G + slab.slab * t.groups;
#pragma unroll 1
    for (int g = threadIdx.x; g < t.groups; g += kGroupNormThreads) p.mean[first + g] = p.rstd[first + g] = 0;
    return;
  }
  const T* x = static_cast<const T*>(p.x);
  T* tile = reinterpret_cast<T*>(s.tiles);
  const int cpg = static_cast<int>(p.C / p.G), lane = threadIdx.x % 32;
  auto load = [&](int r, int c) {
    return kKeepsTile<kMode> ? load_pack<V>(tile + slab.in_tile(r, c)) : load_pack<V>(x + slab.offset(r, c));
  };
  auto finish = [&](int group, int first, Moments m, float count) {
    const float rstd = rstd_of(m.m2 / count, p.eps);
#pragma unroll 1
    for (int j = lane; j < cpg; j += 32) {
      s.center[first + j] = m.mean;
      s.gain[first + j] *= rstd;
    }
    const int64_t at = slab.n * p.G + slab.slab * t.groups + group;
    if (lane == 0 && slab.chunk_index == 0) {
      p.mean[at] = m.mean;
      p.rstd[at] = rstd;
    }
  };
  if (kMode != Mode::kStats) s.load_affine<T>(p, t, slab.n, slab.first_channel);
  const float total = static_cast<float>(cpg) * p.S;
  // The moments of the chunks, of which partial(group, its first channel, i) has the i-th, in their order.
  auto combine = [&](auto partial) {
    each_group(t, cpg, [&](int group, int first) {
      auto size = [&](int64_t i) {
        const int64_t rest = p.S - i * t.chunk;
        return static_cast<float>(cpg) * (rest < t.chunk ? rest : t.chunk);
      };
      const float origin = partial(group, first, 0).mean;
      float sum = 0, m2 = 0;
#pragma unroll 1
      for (int64_t i = lane; i < t.chunks; i += 32) sum += size(i) * (partial(group, first, i).mean - origin);
      const float mean = origin + warp_sum(sum) / total;
#pragma unroll 1
      for (int64_t i = lane; i < t.chunks; i += 32) {
        const Moments chunk = partial(group, first, i);
        const float d = chunk.mean - mean;
        m2 += chunk.m2 + size(i) * d * d;
      }
      finish(group, first, {mean, warp_sum(m2)}, total);
    });
  };
  auto in_workspace = [&](int group, int64_t chunk) {
    return p.workspace + ((slab.n * p.G + slab.slab * t.groups + group) * t.chunks + chunk) * 2;
  };
  if (kMode != Mode::kApply) {
    channel_sums<1>(slab, t, s.part, s.sums, [&](int r, int c, float (&acc)[1][V]) {
      const Pack<T, V> pack = load_pack<V>(x + slab.offset(r, c));
      if (kKeepsTile<kMode>) store_pack<V>(tile + slab.in_tile(r, c), pack);
#pragma unroll
      for (int k = 0; k < V; k++) acc[0][k] += pack[k];
    });
    const float count = static_cast<float>(cpg) * (kLast ? slab.rows : slab.columns * V);
    each_group(t, cpg, [&](int, int first) {
      const float mean = group_sum(s.sums + first, cpg) / count;
#pragma unroll 1
      for (int j = lane; j < cpg; j += 32) s.center[first + j] = mean;
    });
    channel_sums<2>(slab, t, s.part, s.sums, [&](int r, int c, float (&acc)[2][V]) {
      const Pack<T, V> pack = load(r, c);
#pragma unroll
      for (int k = 0; k < V; k++) {
        const float d = pack[k] - s.center[slab.channel(r, c, k)];
        acc[0][k] += d;
        acc[1][k] += d * d;
      }
    });
    each_group(t, cpg, [&](int group, int first) {
      const float error = group_sum(s.sums + first, cpg) / count;
      const float squares = group_sum(s.sums + t.channels + first, cpg);
      const Moments m{s.center[first] + error, squares - count * error * error};
      __syncwarp();  // center is rewritten by finish, sums below
      if (kMode == Mode::kOnChip) {
        finish(group, first, m, count);
      } else if (lane == 0) {
        float* mean = kMode == Mode::kCluster ? s.sums + first : in_workspace(group, slab.chunk_index);
        mean[0] = m.mean;
        mean[kMode == Mode::kCluster ? t.channels : 1] = m.m2;
      }
    });
  }
  if (kMode == Mode::kStats) return;
  if (kMode == Mode::kApply) {
    __syncthreads();  // finish multiplies what load_affine wrote
    combine([&](int group, int, int64_t i) {
      const float* partial = in_workspace(group, i);
      return Moments{partial[0], partial[1]};
    });
  }
  if (kMode == Mode::kCluster) {
    cluster_arrive();
    cluster_wait();  // every block of the cluster has its moments in sums
    combine([&](int, int first, int64_t i) {
      const float* mean = cluster_peer(s.sums + first, static_cast<unsigned>(i));
      return Moments{mean[0], mean[t.channels]};
    });
    cluster_arrive();
  }
  T* y = static_cast<T*>(p.y);
  slab.each(t, [&](int r, int c) {
    const Pack<T, V> pack = load(r, c);
    float out[V];
#pragma unroll
    for (int k = 0; k < V; k++) {
      const int channel = slab.channel(r, c, k);
      const float z = (pack[k] - s.center[channel]) * s.gain[channel] + s.offset[channel];
      out[k] = p.silu ? silu<T>(z) : z;
    }
    store_floats<V>(y + slab.offset(r, c), out);
  });
  if (kMode == Mode::kCluster) cluster_wait();  // shared memory stays until every block has read it
}

}  // namespace

int64_t group_norm_silu_fwd_workspace(const GroupNormSilu& p) { return p.N * p.G * group_norm_chunks(p) * 2; }

int group_norm_silu_fwd(const GroupNormSilu& p, void* stream) {
  if (p.N * p.C * p.S == 0) return 0;
  auto pick = [](auto element, auto V, auto last, auto mode) {
    return &group_norm_silu_fwd_kernel<decltype(element), V, last, mode>;
  };
  return launch_group_norm(p, 1, stream, pick, [](const Tiling&) { return 0; });
}

}  // namespace zeroblock::cuda
