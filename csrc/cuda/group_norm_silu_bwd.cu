// group_norm_silu backward. With xhat = (x - mean) rstd, z = xhat gain + offset and dz = dy act'(z), sums over the
// positions give per (n, c) A = sum dz and B = sum dz xhat, and everything follows from them:
//   dx = rstd (gain dz - m1 - xhat m2), m1 and m2 the group's means of gain A and gain B;
//   dshift = A, dscale = weight B + bias A; dweight = sum over n of (1 + scale) B, dbias likewise of A.
// grid and modes as in group_norm_tile.cuh, between two passes one thread per sum, then one per channel for the
// parameters. Bytes: x, dy and dx once each on chip (in one block or a cluster), else x and dy twice. Reduction order:
// threads, chunks and samples in index order. Zero path: dx and every parameter gradient are written as zeros.
#include "group_norm_tile.cuh"

namespace zeroblock::cuda {
namespace {

// The workspace: totals A, B [N, 2, C], then partial sums [N, chunks, 2, C].
__host__ __device__ inline int64_t partial_start(const GroupNormSilu& p) { return p.N * 2 * p.C; }

// The 1: without it ptxas aims at more blocks than fit in registers, and spills a few.
template <class T, int V, bool kLast, Mode kMode>
__global__ void __launch_bounds__(kGroupNormThreads, 1) group_norm_silu_bwd_kernel(GroupNormSilu p, Tiling t) {
  if (kMode == Mode::kCluster && !kKnowsClusters) return;
  ZB_DYNAMIC_SHARED(float, shared);
  GroupNormShared s(shared, t);
  const Slab<T, V, kLast> slab(p, t);
  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  T* dx = static_cast<T*>(p.dx);
  if (branch_is_zero(p.zero)) {
    if (kMode == Mode::kStats) return;
    const float zeros[V] = {};
    slab.each(t, [&](int r, int c) { store_floats<V>(dx + slab.offset(r, c), zeros); });
    return;
  }
  const int cpg = static_cast<int>(p.C / p.G), lane = threadIdx.x % 32;
  T* x_tile = reinterpret_cast<T*>(s.tiles);
  T* dy_tile = x_tile + int64_t(t.channels) * t.chunk;
  s.load_affine<T>(p, t, slab.n, slab.first_channel);
  each_group(t, cpg, [&](int group, int first) {
    const int64_t at = slab.n * p.G + slab.slab * t.groups + group;
#pragma unroll 1
    for (int j = lane; j < cpg; j += 32) {
      s.center[first + j] = p.mean[at];
      s.inverse[first + j] = p.rstd[at];
    }
  });
  struct Point {
    float xhat, dz;
  };
  auto point = [&](float x_value, float dy_value, int channel) {
    const float xhat = (x_value - s.center[channel]) * s.inverse[channel];
    const float z = xhat * s.gain[channel] + s.offset[channel];
    return Point{xhat, p.silu ? dy_value * silu_derivative<T>(z) : dy_value};
  };
  if (kMode != Mode::kApply) {
    channel_sums<2>(slab, t, s.part, s.sums, [&](int r, int c, float (&acc)[2][V]) {
      const Pack<T, V> xs = load_pack<V>(x + slab.offset(r, c)), dys = load_pack<V>(dy + slab.offset(r, c));
      if (kKeepsTile<kMode>) {
        store_pack<V>(x_tile + slab.in_tile(r, c), xs);
        store_pack<V>(dy_tile + slab.in_tile(r, c), dys);
      }
#pragma unroll
      for (int k = 0; k < V; k++) {
        const Point at = point(xs[k], dys[k], slab.channel(r, c, k));
        acc[0][k] += at.dz;
        acc[1][k] += at.dz * at.xhat;
      }
    });
  } else {
    const float* total = p.workspace + slab.n * 2 * p.C + slab.first_channel;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * t.channels; i += kGroupNormThreads) {
      s.sums[i] = total[i / t.channels * p.C + i % t.channels];
    }
    __syncthreads();
  }
  float* totals = kMode == Mode::kCluster ? s.part : s.sums;
  if (kMode == Mode::kCluster) {
    cluster_arrive();
    cluster_wait();  // every block of the cluster has its sums
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * t.channels; i += kGroupNormThreads) {
      float sum = 0;
#pragma unroll 1
      for (int j = 0; j < t.chunks; j++) sum += *cluster_peer(s.sums + i, j);
      totals[i] = sum;
    }
    cluster_arrive();
    __syncthreads();
  }
  if (kMode == Mode::kStats || (kKeepsTile<kMode> && slab.chunk_index == 0)) {
    float* out = p.workspace + slab.first_channel;
    out +=
        kMode == Mode::kStats ? partial_start(p) + (slab.n * t.chunks + slab.chunk_index) * 2 * p.C : p.C * 2 * slab.n;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * t.channels; i += kGroupNormThreads) {
      out[i / t.channels * p.C + i % t.channels] = totals[i];
    }
  }
  if (kMode == Mode::kStats) return;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * t.channels; i += kGroupNormThreads) totals[i] *= s.gain[i % t.channels];
  __syncthreads();
  const float count = static_cast<float>(cpg) * p.S;
  each_group(t, cpg, [&](int, int first) {
#pragma unroll
    for (int q = 0; q < 2; q++) {
      float* sums = totals + q * t.channels + first;
      const float mean = group_sum(sums, cpg) / count;
      __syncwarp();
#pragma unroll 1
      for (int j = lane; j < cpg; j += 32) sums[j] = mean;
    }
  });
  const float *m1 = totals, *m2 = totals + t.channels;
  slab.each(t, [&](int r, int c) {
    Pack<T, V> xs, dys;
    if (kKeepsTile<kMode>) {
      xs = load_pack<V>(x_tile + slab.in_tile(r, c));
      dys = load_pack<V>(dy_tile + slab.in_tile(r, c));
    } else {
      xs = load_pack<V>(x + slab.offset(r, c));
      dys = load_pack<V>(dy + slab.offset(r, c));
    }
    float out[V];
#pragma unroll
    for (int k = 0; k < V; k++) {
      const int channel = slab.channel(r, c, k);
      const Point at = point(xs[k], dys[k], channel);
      const float g = rounded_product(s.gain[channel], at.dz);
      out[k] = s.inverse[channel] * (g - m1[channel] - at.xhat * m2[channel]);
    }
    store_floats<V>(dx + slab.offset(r, c), out);
  });
  if (kMode == Mode::kCluster) cluster_wait();  // shared memory stays until every block has read it
}

constexpr int kFinishThreads = 128;

// Between the two passes: one thread per sample, quantity and channel adds the chunks, so that not every block does.
__global__ void __launch_bounds__(kFinishThreads) group_norm_silu_bwd_totals_kernel(GroupNormSilu p, int64_t chunks) {
  const int64_t i = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x, width = 2 * p.C;
  if (i >= p.N * width || branch_is_zero(p.zero)) return;
  const float* partial = p.workspace + partial_start(p) + i / width * chunks * width + i % width;
  float sum = 0;
#pragma unroll 4
  for (int64_t j = 0; j < chunks; j++) sum += partial[j * width];
  p.workspace[i] = sum;
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads) group_norm_silu_bwd_params_kernel(GroupNormSilu p) {
  const int64_t c = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (c >= p.C) return;
  const bool zero = p.S == 0 || branch_is_zero(p.zero);
  const float weight = operand_at<T>(p.weight, c, 1.0f), bias = operand_at<T>(p.bias, c, 0.0f);
  float dweight = 0, dbias = 0;
#pragma unroll 1
  for (int64_t n = 0; n < p.N; n++) {
    const float a = zero ? 0.0f : p.workspace[n * 2 * p.C + c];
    const float b = zero ? 0.0f : p.workspace[(n * 2 + 1) * p.C + c];
    const float modulation = 1.0f + operand_at<T>(p.scale, n * p.scale.stride_b + c, 0.0f);
    dweight += modulation * b;
    dbias += modulation * a;
    store_grad<T>(p.dscale, n * p.C + c, weight * b + bias * a);
    store_grad<T>(p.dshift, n * p.C + c, a);
  }
  store_grad<T>(p.dweight, c, dweight);
  store_grad<T>(p.dbias, c, dbias);
}

}  // namespace

int64_t group_norm_silu_bwd_workspace(const GroupNormSilu& p) {
  return partial_start(p) + p.N * group_norm_chunks(p) * 2 * p.C;
}

int group_norm_silu_bwd(const GroupNormSilu& p, void* stream) {
  if (p.N * p.C * p.S) {  // else the parameters still get their zeros
    auto pick = [](auto element, auto V, auto last, auto mode) {
      return &group_norm_silu_bwd_kernel<decltype(element), V, last, mode>;
    };
    auto add_chunks = [&](const Tiling& t) {
      const dim3 blocks(static_cast<unsigned>(ceil_div(p.N * 2 * p.C, kFinishThreads)));
      return launch(group_norm_silu_bwd_totals_kernel, blocks, kFinishThreads, 0, stream, p, t.chunks);
    };
    if (const int status = launch_group_norm(p, 2, stream, pick, add_chunks)) return status;
  }
  const bool wanted = p.dweight.ptr || p.dbias.ptr || p.dscale.ptr || p.dshift.ptr;
  if (!wanted || p.C == 0) return 0;
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.C, kFinishThreads)));
  return with_dtype(p.dtype, [&](auto element) {
    return launch(group_norm_silu_bwd_params_kernel<decltype(element)>, blocks, kFinishThreads, 0, stream, p);
  });
}

}  // namespace zeroblock::cuda
