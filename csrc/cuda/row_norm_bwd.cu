// Row norms backward. With g = dy (1 + scale) weight: dx = rstd (g - mean(g) - xhat mean(g xhat)), no mean(g) for rms.
// With a branch: dresidual = dx_new + dx, dbranch = gate dresidual, dgate = sum over T of dresidual branch.
// Sums over rows, per sample and column: P of dy and X of dy xhat (of dy (1 + scale) where scale is per token) give
//   dshift = P, dscale = weight X + bias P, dweight = sum over samples of (1 + scale) X, dbias likewise of P.
// grid: a block owns a sample's chunk of rows; each thread sums its columns in registers or, for itself, in shared
// memory, teams are added there, blocks by finishing kernels, all in index order. Bytes: each tensor once,
// and the partial sums. The next rows are on their way into shared memory while one is reduced.
// Zero path: none, no flag is read.
#include "row_norm_tile.cuh"

namespace zeroblock::cuda {
namespace {

constexpr int kPacks = 1;  // of a row, whose sums a thread keeps

// The packs of the next rows that a thread owns, of every stream: each is written and read by that thread alone.
template <bool kGate>
struct Ring {
  static constexpr int kStreams = kGate ? 4 : 2;  // x, dy, branch, dx_new
  static constexpr int kAhead = kGate ? 1 : 2, kSlots = kAhead + 1;
  static constexpr size_t kBytes = 16 * kStreams * kSlots;  // of a thread
};

// Whether a thread keeps its sums in shared memory: for so many there are no registers.
__host__ __device__ constexpr bool sums_in_shared(int V, bool gate) { return gate || V == 8; }

// The workspace: partial sums [B, chunks, Q, D], then totals P, X [B, 2, D].
__host__ __device__ inline int quantities(const RowNorm& p) { return p.branch ? 3 : 2; }

// The bounds leave a thread 80 registers (python -m tests.cuda.simt.static).
template <class T, int V, bool kGate>
__global__ void __launch_bounds__(32 * kMaxTeamWarpsBwd, 1) row_norm_bwd_kernel(RowNorm p, Teams teams) {
  constexpr int Q = kGate ? 3 : 2;
  constexpr bool kAsync = sizeof(Pack<T, V>) == 16;
  using Ahead = Ring<kGate>;
  ZB_SHARED(float, part, [4 * kMaxTeamWarpsBwd]);
  ZB_DYNAMIC_SHARED(float, columns);  // Q sums per column, where teams share a block; `shared`; the ring
  constexpr int H = V < 4 ? V : 4;    // columns worked on at a time: few, for their operands are in fp32
  const Team team(teams);
  const unsigned chunks = static_cast<unsigned>(teams.chunks);
  const int64_t b = blockIdx.x / chunks, begin = blockIdx.x % chunks * teams.chunk;
  const int rows = static_cast<int>(begin + teams.chunk < p.T ? teams.chunk : p.T - begin);
  float* partial = p.workspace + int64_t(blockIdx.x) * Q * p.D;
  const int own = team.lane * V;     // this thread's first column
  const int cached = team.step * V;  // columns of a team; those of longer rows are read twice and summed in `partial`
  const int64_t first = (b * p.T + begin) * p.D;
  const void* streams[4] = {p.x, p.dy, p.branch, p.dx_new};
  constexpr bool kShared = sums_in_shared(V, kGate);
  float sums[Q][kShared ? 1 : V] = {};
  Pack<float, H>* shared =
      reinterpret_cast<Pack<float, H>*>(columns + (teams.per_block > 1 ? Q * p.D : 0)) + threadIdx.x;
  if constexpr (kShared) {
    for (int i = 0; i < Q * V / H; i++) shared[i * blockDim.x] = {};
  }
  Pack<T, V>* ring =
      reinterpret_cast<Pack<T, V>*>(shared - threadIdx.x + (kShared ? Q * V / H * blockDim.x : 0)) + threadIdx.x;
  auto fetch = [&](int i, int slot) {
    if constexpr (kAsync) {
      const bool valid = i < rows && own < p.D;
      const int64_t at = valid ? first + i * p.D + own : 0;
#pragma unroll
      for (int s = 0; s < Ahead::kStreams; s++) {
        if (streams[s] == nullptr) continue;
        copy_async_16(ring + (slot * Ahead::kStreams + s) * blockDim.x, static_cast<const T*>(streams[s]) + at, valid);
      }
      copy_async_commit();
    }
  };
  for (int i = 0; i < Ahead::kAhead; i++) fetch(i * teams.per_block + team.index, i);
  for (int pass = 0; pass * teams.per_block < rows; pass++) {
    const int i = pass * teams.per_block + team.index, slot = pass % Ahead::kSlots;
    fetch(i + Ahead::kAhead * teams.per_block, (pass + Ahead::kAhead) % Ahead::kSlots);
    if constexpr (kAsync) copy_async_wait<Ahead::kAhead>();
    const int64_t t = begin + i;
    const bool valid = i < rows;
    const float mean = valid && p.mean ? p.mean[b * p.T + t] : 0.0f, rstd = valid ? p.rstd[b * p.T + t] : 0.0f;
    // f(whether the columns are this thread's own, the first of them) for every pack of its row.
    auto each = [&](auto f) {
      if (valid && own < p.D) f(std::true_type(), own);
#pragma unroll 1
      for (int64_t d = own + cached; valid && d < p.D; d += cached) f(std::false_type(), d);
    };
    // Columns d + j .. d + j + H - 1 of stream s.
    auto read = [&](int s, auto is_own, auto d, int j) {
      if constexpr (kAsync && decltype(is_own)::value) {
        return load_pack<H>(ring[(slot * Ahead::kStreams + s) * blockDim.x].v + j);
      }
      return load_pack<H>(static_cast<const T*>(streams[s]) + first + i * p.D + d + j);
    };
    LongSum g_sum, gx_sum;
    each([&](auto is_own, auto d) {
      float g_part = 0, gx_part = 0;
#pragma unroll(kShared ? 1 : V / H)
      for (int j = 0; j < V; j += H) {
        const Pack<T, H> x = read(0, is_own, d, j), dy = read(1, is_own, d, j);
        float weight[H], scale[H];
        load_operand<T>(p.weight, d + j, 1.0f, weight);
        load_operand<T>(p.scale, b * p.scale.stride_b + t * p.scale.stride_t + d + j, 0.0f, scale);
#pragma unroll
        for (int k = 0; k < H; k++) {
          const float g = rounded_product(dy[k] * (1.0f + scale[k]), weight[k]);
          g_part += g;
          gx_part += g * ((x[k] - mean) * rstd);
        }
      }
      g_sum.add(g_part);
      gx_sum.add(gx_part);
    });
    float* pass_part = part + (pass & 1) * 2 * kMaxTeamWarpsBwd;
    const float g_mean = p.rms ? 0.0f : team.sum(g_sum.value(), pass_part) / p.D;
    const float gx_mean = team.sum(gx_sum.value(), pass_part + kMaxTeamWarpsBwd) / p.D;
    each([&](auto is_own, auto d) {
      auto add = [&](int q, int j, const float (&v)[H]) {
        if constexpr (decltype(is_own)::value && kShared) {
          Pack<float, H>& sum = shared[(q * (V / H) + j / H) * blockDim.x];
#pragma unroll
          for (int k = 0; k < H; k++) sum.v[k] += v[k];
        } else if constexpr (decltype(is_own)::value) {
#pragma unroll
          for (int k = 0; k < H; k++) sums[q][j + k] += v[k];
        } else {  // no other thread touches these columns
          for (int k = 0; k < H; k++) {
            float& sum = partial[q * p.D + d + j + k];
            sum = pass == 0 ? v[k] : sum + v[k];
          }
        }
      };
      const int64_t at = first + i * p.D + d;
      // One half of a pack after the other: with both at once the registers are too few.
#pragma unroll(kShared ? 1 : V / H)
      for (int j = 0; j < V; j += H) {
        const Pack<T, H> x = read(0, is_own, d, j), dy = read(1, is_own, d, j);
        float weight[H], scale[H], out[H], operand[H];
        load_operand<T>(p.weight, d + j, 1.0f, weight);
        load_operand<T>(p.scale, b * p.scale.stride_b + t * p.scale.stride_t + d + j, 0.0f, scale);
#pragma unroll
        for (int k = 0; k < H; k++) {
          const float xhat = (x[k] - mean) * rstd, da = dy[k] * (1.0f + scale[k]);
          operand[k] = p.scale.per_token ? da : dy[k];
          out[k] = operand[k] * xhat;
        }
        add(0, j, operand);
        add(1, j, out);
        if (p.dscale_token.ptr) {
          load_operand<T>(p.bias, d + j, 0.0f, operand);
#pragma unroll
          for (int k = 0; k < H; k++) {
            operand[k] = dy[k] * ((x[k] - mean) * rstd * weight[k] + operand[k]);
          }
          store_grads<T>(p.dscale_token, at + j, operand);
        }
#pragma unroll
        for (int k = 0; k < H; k++) {
          out[k] =
              rstd * (rounded_product(dy[k] * (1.0f + scale[k]), weight[k]) - g_mean - (x[k] - mean) * rstd * gx_mean);
        }
        if constexpr (kGate) {
          if (p.dx_new) {
            const Pack<T, H> direct = read(3, is_own, d, j);
#pragma unroll
            for (int k = 0; k < H; k++) out[k] += direct[k];
          }
          const Pack<T, H> h = read(2, is_own, d, j);
          Pack<T, H> dbranch;
          load_operand<T>(p.gate, b * p.gate.stride_b + t * p.gate.stride_t + d + j, 0.0f, operand);
#pragma unroll
          for (int k = 0; k < H; k++) {
            dbranch.v[k] = from_float<T>(operand[k] * out[k]);
            operand[k] = out[k] * h[k];
          }
          store_pack<H>(static_cast<T*>(p.dbranch) + at + j, dbranch);
          add(2, j, operand);
          if (p.dgate_token.ptr) store_grads<T>(p.dgate_token, at + j, operand);
        }
        store_floats<H>(static_cast<T*>(p.dx) + at + j, out);
      }
    });
  }
  if constexpr (kAsync) copy_async_wait<0>();
  // Teams of a block one after another, so that the order of the additions is fixed.
  for (int turn = 0; turn < teams.per_block; turn++) {
    const bool first = turn == 0, last = turn == teams.per_block - 1;
    if (team.index == turn && own < p.D) {
#pragma unroll
      for (int q = 0; q < Q; q++) {
#pragma unroll
        for (int k = 0; k < V; k++) {
          const int64_t at = q * p.D + own + k;
          const float mine = kShared ? shared[(q * (V / H) + k / H) * blockDim.x].v[k % H] : sums[q][kShared ? 0 : k];
          const float sum = first ? mine : columns[at] + mine;
          (last ? partial : columns)[at] = sum;
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
  LongSum added[3];
  for (int64_t chunk = 0; chunk < teams.chunks; chunk++) {
    const float* partial = p.workspace + (b * teams.chunks + chunk) * Q * p.D + d;
#pragma unroll
    for (int q = 0; q < 3; q++) {
      if (q < Q) added[q].add(partial[q * p.D]);
    }
  }
  const float sums[3] = {added[0].value(), added[1].value(), added[2].value()};
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

// Dynamic shared memory of a thread: its sums and its part of the ring.
size_t thread_bytes(const RowNorm& p, int V) {
  const size_t sums = sums_in_shared(V, p.branch) ? quantities(p) * V * sizeof(float) : 0;
  return sums + (V == 1 ? 0 : p.branch ? Ring<true>::kBytes : Ring<false>::kBytes);
}

// As many warps as have what they need in shared memory.
Teams teams_of(const RowNorm& p, int V) {
  const size_t bytes = 32 * thread_bytes(p, V), fit = bytes ? (shared_limit() - 1024) / bytes : kMaxTeamWarpsBwd;
  return row_norm_teams(p, kPacks, V, fit < kMaxTeamWarpsBwd ? static_cast<int>(fit) : kMaxTeamWarpsBwd);
}

}  // namespace

int64_t row_norm_bwd_workspace(const RowNorm& p) {
  const Teams wide = teams_of(p, pack_size(p.dtype));
  const Teams narrow = teams_of(p, 1);
  const int64_t chunks = wide.chunks > narrow.chunks ? wide.chunks : narrow.chunks;
  return p.B * (chunks * quantities(p) + 2) * p.D;
}

int row_norm_bwd(const RowNorm& p, void* stream) {
  if (p.D == 0) return 0;
  const Teams teams = teams_of(p, row_norm_vector(p));
  const dim3 grid(static_cast<unsigned>(p.B * teams.chunks));
  const size_t columns = teams.per_block > 1 ? size_t(quantities(p)) * p.D * sizeof(float) : 0;
  int status = 0;
  if (p.B * p.T > 0) {
    status = with_row_norm_shape(p, teams.V, [&](auto element, auto V, auto gate) {
      return launch(row_norm_bwd_kernel<decltype(element), decltype(V)::value, decltype(gate)::value>, grid,
                    teams.threads, columns + teams.threads * thread_bytes(p, teams.V), stream, p, teams);
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
