// Row norms backward. With g = dy (1 + scale) weight: dx = rstd (g - mean(g) - xhat mean(g xhat)), no mean(g) for rms.
// With a branch: dresidual = dx_new + dx, dbranch = gate dresidual, dgate = sum over T of dresidual branch.
// Sums over rows, per sample and column: P of dy and X of dy xhat (of dy (1 + scale) where scale is per token) give
//   dshift = P, dscale = weight X + bias P, dweight = sum over samples of (1 + scale) X, dbias likewise of P.
// grid: a block owns a sample's chunk of rows; each thread sums its columns in registers, teams are added in shared
// memory, blocks by finishing kernels, all in index order. Bytes: each tensor once, and the partial sums.
// Zero path: none, no flag is read.
#include "row_norm_tile.cuh"

namespace zeroblock::cuda {
namespace {

constexpr int kPacks = 2;  // that a thread keeps in registers: no spills (python tests/cuda/simt/static.py)

// The workspace: partial sums [B, chunks, Q, D], then totals P, X [B, 2, D].
__host__ __device__ inline int quantities(const RowNorm& p) { return p.branch ? 3 : 2; }

// The 1: without it ptxas aims at more blocks than fit in registers, and spills a few.
template <class T, int V, bool kGate>
__global__ void __launch_bounds__(32 * kMaxTeamWarpsBwd, 1) row_norm_bwd_kernel(RowNorm p, Teams teams) {
  constexpr int Q = kGate ? 3 : 2;
  ZB_SHARED(float, part, [4 * kMaxTeamWarpsBwd]);
  ZB_DYNAMIC_SHARED(float, columns);  // Q sums per column, where teams share a block
  const Team team(teams);
  const int64_t b = blockIdx.x / teams.chunks, chunk = blockIdx.x % teams.chunks, begin = chunk * teams.chunk;
  const int64_t end = begin + teams.chunk < p.T ? begin + teams.chunk : p.T;
  float* partial = p.workspace + int64_t(blockIdx.x) * Q * p.D;
  const int64_t cached = int64_t(kPacks) * team.step * V;  // columns below are summed in registers, others in `partial`
  float sums[Q][kPacks][V] = {};
  for (int64_t base = begin, pass = 0; base < end; base += teams.per_block, pass++) {
    const int64_t t = base + team.index, row = b * p.T + t;
    const bool valid = t < end;
    const int64_t D = valid ? p.D : 0;
    const T *x = static_cast<const T*>(p.x) + row * p.D, *dy = static_cast<const T*>(p.dy) + row * p.D;
    const float mean = valid && p.mean ? p.mean[row] : 0.0f, rstd = valid ? p.rstd[row] : 0.0f;
    Pack<T, V> xs[kPacks], dys[kPacks];
    auto each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        const int64_t d = int64_t(team.lane + i * team.step) * V;
        if (d < D) f(i, d, xs[i], dys[i]);
      }
      for (int64_t d = int64_t(team.lane) * V + cached; d < D; d += int64_t(team.step) * V) {
        f(-1, d, load_pack<V>(x + d), load_pack<V>(dy + d));
      }
    };
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      const int64_t d = int64_t(team.lane + i * team.step) * V;
      if (d < D) {
        xs[i] = load_pack<V>(x + d);
        dys[i] = load_pack<V>(dy + d);
      }
    }
    const int64_t scale_row = b * p.scale.stride_b + t * p.scale.stride_t;
    LongSum g_sum, gx_sum;
    each([&](int, int64_t d, const Pack<T, V>& x_pack, const Pack<T, V>& dy_pack) {
      float weight[V], scale[V];
      load_operand<T>(p.weight, d, 1.0f, weight);
      load_operand<T>(p.scale, scale_row + d, 0.0f, scale);
      float g_part = 0, gx_part = 0;
#pragma unroll
      for (int k = 0; k < V; k++) {
        const float g = rounded_product(dy_pack[k] * (1.0f + scale[k]), weight[k]);
        g_part += g;
        gx_part += g * ((x_pack[k] - mean) * rstd);
      }
      g_sum.add(g_part);
      gx_sum.add(gx_part);
    });
    float* pass_part = part + (pass & 1) * 2 * kMaxTeamWarpsBwd;
    const float g_mean = p.rms ? 0.0f : team.sum(g_sum.value(), pass_part) / p.D;
    const float gx_mean = team.sum(gx_sum.value(), pass_part + kMaxTeamWarpsBwd) / p.D;
    each([&](int i, int64_t d, const Pack<T, V>& x_pack, const Pack<T, V>& dy_pack) {
      const int64_t at = row * p.D + d;
      float weight[V], bias[V], scale[V], out[V], add[Q][V];
      load_operand<T>(p.weight, d, 1.0f, weight);
      load_operand<T>(p.scale, scale_row + d, 0.0f, scale);
#pragma unroll
      for (int k = 0; k < V; k++) {
        const float xhat = (x_pack[k] - mean) * rstd, da = dy_pack[k] * (1.0f + scale[k]);
        out[k] = rstd * (rounded_product(da, weight[k]) - g_mean - xhat * gx_mean);
        const float summed = p.scale.per_token ? da : dy_pack[k];
        add[0][k] = summed;
        add[1][k] = summed * xhat;
      }
      if (p.dscale_token.ptr) {
        float dscale[V];
        load_operand<T>(p.bias, d, 0.0f, bias);
#pragma unroll
        for (int k = 0; k < V; k++) {
          const float xhat = (x_pack[k] - mean) * rstd;
          dscale[k] = dy_pack[k] * (xhat * weight[k] + bias[k]);
        }
        store_grads<T>(p.dscale_token, at, dscale);
      }
      if constexpr (kGate) {
        const Pack<T, V> h = load_pack<V>(static_cast<const T*>(p.branch) + at);
        float gate[V], dbranch[V];
        if (p.dx_new) {
          const Pack<T, V> direct = load_pack<V>(static_cast<const T*>(p.dx_new) + at);
#pragma unroll
          for (int k = 0; k < V; k++) out[k] += direct[k];
        }
        load_operand<T>(p.gate, b * p.gate.stride_b + t * p.gate.stride_t + d, 0.0f, gate);
#pragma unroll
        for (int k = 0; k < V; k++) {
          dbranch[k] = gate[k] * out[k];
          add[2][k] = out[k] * h[k];
        }
        store_floats<V>(static_cast<T*>(p.dbranch) + at, dbranch);
        if (p.dgate_token.ptr) store_grads<T>(p.dgate_token, at, add[2]);
      }
      store_floats<V>(static_cast<T*>(p.dx) + at, out);
#pragma unroll
      for (int q = 0; q < Q; q++) {
#pragma unroll
        for (int k = 0; k < V; k++) {
          if (i < 0) {  // the thread's own columns: no other thread touches them
            float& sum = partial[q * p.D + d + k];
            sum = pass == 0 ? add[q][k] : sum + add[q][k];
          } else {
#pragma unroll
            for (int j = 0; j < kPacks; j++) {
              if (i == j) sums[q][j][k] += add[q][k];
            }
          }
        }
      }
    });
  }
  // Teams of a block one after another, so that the order of the additions is fixed.
  for (int turn = 0; turn < teams.per_block; turn++) {
    const bool first = turn == 0, last = turn == teams.per_block - 1;
    if (team.index == turn) {
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        const int64_t d = int64_t(team.lane + i * team.step) * V;
        if (d >= p.D) continue;
#pragma unroll
        for (int q = 0; q < Q; q++) {
#pragma unroll
          for (int k = 0; k < V; k++) {
            const int64_t at = q * p.D + d + k;
            const float sum = first ? sums[q][i][k] : columns[at] + sums[q][i][k];
            (last ? partial : columns)[at] = sum;
          }
        }
      }
    }
    if (!last) __syncthreads();
  }
}

constexpr int kFinishThreads = 128;

// One thread per sample and column adds the blocks' sums.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) row_norm_bwd_samples_kernel(RowNorm p, Teams teams) {
  const int64_t i = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (i >= p.B * p.D) return;
  const int64_t b = i / p.D, d = i % p.D;
  const int Q = quantities(p);
  float sums[3] = {};
  for (int64_t chunk = 0; chunk < teams.chunks; chunk++) {
    const float* partial = p.workspace + (b * teams.chunks + chunk) * Q * p.D + d;
    for (int q = 0; q < Q; q++) sums[q] += partial[q * p.D];
  }
  const float weight = operand_at<T>(p.weight, d, 1.0f), bias = operand_at<T>(p.bias, d, 0.0f);
  store_grad<T>(p.dshift, i, sums[0]);
  store_grad<T>(p.dscale, i, weight * sums[1] + bias * sums[0]);
  store_grad<T>(p.dgate, i, sums[2]);
  float* totals = p.workspace + p.B * teams.chunks * Q * p.D;
  totals[b * 2 * p.D + d] = sums[0];
  totals[(b * 2 + 1) * p.D + d] = sums[1];
}

// One thread per column adds the samples.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) row_norm_bwd_params_kernel(RowNorm p, Teams teams) {
  const int64_t d = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (d >= p.D) return;
  const float* totals = p.workspace + p.B * teams.chunks * quantities(p) * p.D + d;
  float dweight = 0, dbias = 0;
  for (int64_t b = 0; b < p.B; b++) {
    const float modulation = p.scale.per_token ? 1.0f : 1.0f + operand_at<T>(p.scale, b * p.scale.stride_b + d, 0.0f);
    dbias += modulation * totals[b * 2 * p.D];
    dweight += modulation * totals[(b * 2 + 1) * p.D];
  }
  store_grad<T>(p.dweight, d, dweight);
  store_grad<T>(p.dbias, d, dbias);
}

}  // namespace

int64_t row_norm_bwd_workspace(const RowNorm& p) {
  const Teams wide = row_norm_teams(p, kPacks, pack_size(p.dtype), kMaxTeamWarpsBwd);
  const Teams narrow = row_norm_teams(p, kPacks, 1, kMaxTeamWarpsBwd);
  const int64_t chunks = wide.chunks > narrow.chunks ? wide.chunks : narrow.chunks;
  return p.B * (chunks * quantities(p) + 2) * p.D;
}

int row_norm_bwd(const RowNorm& p, void* stream) {
  if (p.D == 0) return 0;
  const Teams teams = row_norm_teams(p, kPacks, row_norm_vector(p), kMaxTeamWarpsBwd);
  const dim3 grid(static_cast<unsigned>(p.B * teams.chunks));
  const size_t bytes = teams.per_block > 1 ? size_t(quantities(p)) * p.D * sizeof(float) : 0;
  int status = 0;
  if (p.B * p.T > 0) {
    status = with_row_norm_shape(p, teams.V, [&](auto element, auto V, auto gate) {
      return launch(row_norm_bwd_kernel<decltype(element), decltype(V)::value, decltype(gate)::value>, grid,
                    teams.threads, bytes, stream, p, teams);
    });
  }
  const bool params = p.dweight.ptr || p.dbias.ptr;
  if (status || !(params || p.dshift.ptr || p.dscale.ptr || p.dgate.ptr)) return status;
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    auto blocks = [](int64_t n) { return dim3(static_cast<unsigned>(ceil_div(n, kFinishThreads))); };
    if (p.B > 0) {
      const int first = launch(row_norm_bwd_samples_kernel<T>, blocks(p.B * p.D), kFinishThreads, 0, stream, p, teams);
      if (first || !params) return first;
    }
    return params ? launch(row_norm_bwd_params_kernel<T>, blocks(p.D), kFinishThreads, 0, stream, p, teams) : 0;
  });
}

}  // namespace zeroblock::cuda
