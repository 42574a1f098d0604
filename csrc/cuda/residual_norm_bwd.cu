// residual_norm_modulate backward. With u = dy, or da = dy (1 + scale) where the scale is per token, g = da weight and
// d = dx_new + rstd (g - mean(g) - xhat mean(g xhat)), without mean(g) for rms: dresidual = d. With hhat the normalised
// branch and v = d act(gate) branch_weight: dbranch = rstd_b (v - hhat mean(v hhat)), or v without a norm. Operands per
// token get theirs at once: dshift = dy, dscale = dy a with a the affine norm, dgate = act'(gate) d branch_weight hhat;
// all else comes from sums over the tokens of a group, a sample or those of a sample that take one indexed row:
//   dy -> dshift, dscale's bias term, dbias; u xhat -> dscale, dweight; u -> dbias beside a scale per token;
//   dy a, dgate -> the tables of a scale and gate per token; d (or d act(gate) where per token) hhat -> dgate,
//   dbranch_weight
// grid: a team of warps takes `rows` tokens of one sample; its sums are in shared memory, each column by one thread.
// Bytes: each tensor once, and 8 D per block and sum. Reduction order: a team's rows, teams, blocks, groups; no
// atomics. Indexed: tokens in the order of a stable sort of the index. Where the row changes from k, team c writes its
// sums into slot c + k: in sorted order neither goes back, so that no slot is written twice. Zero path: none, no flag
// is read.
#include "residual_norm_tile.cuh"

namespace zeroblock::cuda {
namespace {

enum Sum { kDy, kUXhat, kU, kDScale, kBranch, kDGate, kSums };
enum Shared { kOfGate, kOfBranchWeight, kOfWeight, kOfBias, kOfShift, kOfScale, kShared };

// Rows of a block: enough that its sums are 3 % of its bytes where tokens are many (python -m tests.cuda.simt.traffic).
constexpr int64_t kLeastRows = 16, kMostRows = 256;
// Blocks, three on each SM of an H100: of 27,280 tokens partial sums are then 3 % of the bytes (8 D a block and sum,
// beside 12 D a token in bf16). (guess)
constexpr int64_t kBlocks = 396;

struct Work {
  RowTeams teams;
  int64_t rows, chunks, slots;   // tokens of a team; blocks of a sample, and places for their sums
  int64_t groups;                // samples, or indexed rows of all samples
  bool in_shared;                // whether the sums are in shared memory; else where they end up
  int sum[kSums], sums;          // their places in a slot, -1 where they are not wanted; how many
  int addend[kShared], addends;  // likewise what a group adds to gradients that all share
  float* total;                  // [addends, groups, D], behind the slots [B, slots, sums, D]
};

// The sums of one team: each column belongs to one thread.
template <int V>
struct TeamSums {
  const Work& w;
  const RowTeam& team;
  int D;
  float *slots, *now;  // of the sample; the sums while they are made
  __device__ float* slot(int64_t number) const { return slots + number * w.sums * D; }
  __device__ void clear() const {
    const float zeros[V] = {};
    for (int q = 0; q < w.sums; q++) each_pack<V>(team, D, [&](int, int d) { store_as<float>(now, q * D + d, zeros); });
  }
  __device__ void begin(int64_t number) {
    if (!w.in_shared) now = slot(number);
    clear();
  }
  __device__ void end(int64_t number) const {
    if (!w.in_shared) return;
    for (int q = 0; q < w.sums; q++) {
      each_pack<V>(team, D, [&](int, int d) {
        float v[V];
        load_as<float>(now, q * D + d, v);
        store_as<float>(slot(number), q * D + d, v);
      });
    }
  }
  __device__ __forceinline__ void add(Sum which, int d, const float (&v)[V]) const {
    if (w.sum[which] < 0) return;
    float sum[V];
    load_as<float>(now, w.sum[which] * D + d, sum);
#pragma unroll
    for (int k = 0; k < V; k++) sum[k] += v[k];
    store_as<float>(now, w.sum[which] * D + d, sum);
  }
};

// Loads of a row leave together, dx_new's and the branch's with those of x and dy: 49 KB are then in flight on an SM of
// whose two blocks of 192 threads (D = 3072 in 16 bits) an H200 needs 17 and a B200 25. For that a thread takes up to
// 128 registers; with 84 or fewer the row in it spills 8 bytes and more, with 112 a third block fits, but has 37 KB in
// flight with its loads in two turns, and 16 rows a block leave few tokens no third block.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, 1) residual_norm_bwd_kernel(ResidualNorm p, Work w) {
  ZB_SHARED(float, part, [2][3][kMaxRowWarps]);  // of even and of odd rows
  ZB_DYNAMIC_SHARED(float, columns);
  const RowTeam team(w.teams);
  const int64_t b = blockIdx.x / w.chunks, chunk = blockIdx.x % w.chunks;
  const int64_t number = chunk * w.teams.per_block + team.index, begin = number * w.rows;
  TeamSums<V> sums{w, team, static_cast<int>(p.D), p.workspace + b * w.slots * w.sums * p.D,
                   columns + int64_t(team.index) * w.sums * p.D};
  constexpr bool kAllAtOnce = V == 8;  // of 16 bits: for four tensors in fp32 the registers are too few
  int64_t current = -1;                // the indexed row whose tokens are being summed
  if (p.index == nullptr) sums.begin(number);
  for (int64_t step = 0; step < w.rows; step++) {
    const bool valid = begin + step < p.T;
    const int D = valid ? sums.D : 0;
    const int64_t t = !valid ? 0 : p.index ? p.order[b * p.T + begin + step] : begin + step;
    const int64_t chosen = valid ? chosen_row(p, b, t) : 0, row = b * p.T + t, at = row * p.D;
    if (p.index && valid && chosen != current) {
      if (current >= 0) sums.end(number + current);
      sums.begin(number + chosen);
      current = chosen;
    }
    Pack<Kept<T>, V> xs[kKept / V], directs[kKept / V] = {}, branches[kKept / V] = {};
    float ds[kKept / V][V];  // dy, then g, d, v
    // dx_new and the branch, where nothing has read them with x and dy.
    auto read_direct = [&](int i, int d) {
      if (kAllAtOnce && p.norm) return directs[i];
      return load_tensor<T, V>(p.dx_new, p.x_dtype, at + d);
    };
    auto read_branch = [&](int i, int d) {
      if (kAllAtOnce && p.norm) return branches[i];
      return load_tensor<T, V>(p.branch, p.branch_dtype, at + d);
    };
    if (p.norm) {
      const float mean = valid && p.mean ? p.mean[row] : 0.0f, rstd = valid ? p.rstd[row] : 0.0f;
      const int64_t scale_row = row_begin(p.scale, b, t, chosen);
      float g_sums[2] = {};
      auto load = [&](int i, int d) {
        xs[i] = load_tensor<T, V>(p.x, p.x_dtype, at + d);
        if (kAllAtOnce && p.dx_new) directs[i] = load_tensor<T, V>(p.dx_new, p.x_dtype, at + d);
        if (kAllAtOnce && p.branch) branches[i] = load_tensor<T, V>(p.branch, p.branch_dtype, at + d);
        const Pack<Kept<T>, V> dy = load_tensor<T, V>(p.dy, p.y_dtype, at + d);
#pragma unroll
        for (int k = 0; k < V; k++) ds[i][k] = dy[k];
      };
      // All packs at once, for below stores stand between them; of single numbers there are too many.
      if (V > 1) each_pack<V>(team, D, load);
      each_pack<V>(team, D, [&](int i, int d) {
        if (V == 1) load(i, d);
        float dy[V], u[V], out[V];
#pragma unroll
        for (int k = 0; k < V; k++) dy[k] = u[k] = ds[i][k];
        if (p.shift.kind == RowKind::kToken && p.shift.drows.ptr) store_any<T>(p.shift.drows, at + d, dy);
        sums.add(kDy, d, dy);
        load_row<T>(p.scale, scale_row, d, out);
#pragma unroll
        for (int k = 0; k < V; k++) ds[i][k] = rounded_product(dy[k], 1.0f + out[k]);
        if (p.scale.kind == RowKind::kToken) {
          if (p.scale.drows.ptr || p.scale.dtable.ptr) {
#pragma unroll
            for (int k = 0; k < V; k++) out[k] = (xs[i][k] - mean) * rstd;
            times<T>(p.weight, d, out);
            plus<T>(p.bias, d, out);
#pragma unroll
            for (int k = 0; k < V; k++) out[k] *= dy[k];
            if (p.scale.drows.ptr) store_any<T>(p.scale.drows, at + d, out);
            sums.add(kDScale, d, out);
          }
#pragma unroll
          for (int k = 0; k < V; k++) u[k] = ds[i][k];
        }
        sums.add(kU, d, u);
#pragma unroll
        for (int k = 0; k < V; k++) u[k] *= (xs[i][k] - mean) * rstd;
        sums.add(kUXhat, d, u);
        times<T>(p.weight, d, ds[i]);
#pragma unroll
        for (int k = 0; k < V; k++) {
          g_sums[0] += ds[i][k];
          g_sums[1] += ds[i][k] * ((xs[i][k] - mean) * rstd);
        }
      });
      team.sum(g_sums, part[step & 1]);
      const float g_mean = p.rms ? 0.0f : g_sums[0] / p.D, gx_mean = g_sums[1] / p.D;
      each_pack<V>(team, D, [&](int i, int) {
#pragma unroll
        for (int k = 0; k < V; k++) ds[i][k] = rstd * (ds[i][k] - g_mean - (xs[i][k] - mean) * rstd * gx_mean);
      });
    } else {
      each_pack<V>(team, D, [&](int i, int) {
#pragma unroll
        for (int k = 0; k < V; k++) ds[i][k] = 0.0f;
      });
    }
    each_pack<V>(team, D, [&](int i, int d) {
      if (p.dx_new) {
        const Pack<Kept<T>, V> direct = read_direct(i, d);
#pragma unroll
        for (int k = 0; k < V; k++) ds[i][k] += direct[k];
      }
      if (p.dresidual) store_tensor<T>(p.dresidual, p.residual_dtype, at + d, ds[i]);
    });
    if (p.branch == nullptr) continue;
    // From here on xs has the branch.
    const float h_rstd = valid && p.branch_rms ? p.branch_rstd[row] : 1.0f;
    const int64_t gate_row = row_begin(p.gate, b, t, chosen);
    const bool gate_of_token = p.gate.kind == RowKind::kToken;
    float projection = 0;
    each_pack<V>(team, D, [&](int i, int d) {
      xs[i] = read_branch(i, d);
      float hhat[V], gate[V], out[V];
#pragma unroll
      for (int k = 0; k < V; k++) {
        hhat[k] = xs[i][k] * h_rstd;
        out[k] = ds[i][k] * hhat[k];
      }
      if (!gate_of_token) sums.add(kBranch, d, out);
      if (p.gate.kind != RowKind::kNone) {
        load_row<T>(p.gate, gate_row, d, gate);
#pragma unroll
        for (int k = 0; k < V; k++) {
          gate[k] = p.tanh ? tanhf(gate[k]) : gate[k];
          ds[i][k] *= gate[k];
        }
        if (gate_of_token && (p.gate.drows.ptr || p.gate.dtable.ptr)) {
          times<T>(p.branch_weight, d, out);
          if (p.tanh) {
#pragma unroll
            for (int k = 0; k < V; k++) out[k] *= 1.0f - gate[k] * gate[k];
          }
          if (p.gate.drows.ptr) store_any<T>(p.gate.drows, at + d, out);
          sums.add(kDGate, d, out);
        }
        if (gate_of_token) {
#pragma unroll
          for (int k = 0; k < V; k++) out[k] = ds[i][k] * hhat[k];
          sums.add(kBranch, d, out);
        }
      }
      times<T>(p.branch_weight, d, ds[i]);
      if (!p.branch_rms) {
        if (p.dbranch) store_tensor<T>(p.dbranch, p.branch_dtype, at + d, ds[i]);
        return;
      }
#pragma unroll
      for (int k = 0; k < V; k++) projection += ds[i][k] * hhat[k];
    });
    if (!p.branch_rms) continue;
    const float mean = team.sum(projection, part[step & 1] + 2) / p.D;
    each_pack<V>(team, D, [&](int i, int d) {
#pragma unroll
      for (int k = 0; k < V; k++) ds[i][k] = h_rstd * (ds[i][k] - xs[i][k] * h_rstd * mean);
      if (p.dbranch) store_tensor<T>(p.dbranch, p.branch_dtype, at + d, ds[i]);
    });
  }
  if (p.index) {
    if (current >= 0) sums.end(number + current);
  } else if (w.in_shared) {  // teams in order
    __syncthreads();
    const int64_t size = w.sums * p.D;
    for (int64_t i = threadIdx.x; i < size; i += w.teams.threads) {
      float sum = columns[i];
      for (int j = 1; j < w.teams.per_block; j++) sum += columns[j * size + i];
      sums.slot(chunk)[i] = sum;
    }
  }
}

// The value of an operand in a group's row, at column d.
__device__ __forceinline__ float row_at(const RowOperand& o, int64_t b, int64_t k, int64_t d) {
  if (o.kind == RowKind::kNone) return 0.0f;
  return any_at(o.rows, row_begin(o, b, 0, k) + d, 0.0f) + any_at(o.table, d, 0.0f);
}

// Adds the slots of a group: the gradients of its rows, and what it adds to those that all groups share.
__global__ void __launch_bounds__(kSumThreads) residual_norm_bwd_groups_kernel(ResidualNorm p, Work w) {
  ZB_SHARED(float, part, [kSumThreads]);
  const int64_t blocks = (p.D + kSumColumns - 1) / kSumColumns, group = blockIdx.x / blocks;
  const ColumnSums columns(part, blockIdx.x % blocks, p.D);
  const int64_t b = group / p.K, k = group % p.K, d = columns.column;
  int64_t first = 0, count = w.slots;
  if (p.index) {
    const int64_t begin = p.bounds[b * (p.K + 1) + k], end = p.bounds[b * (p.K + 1) + k + 1];
    first = begin / w.rows + k;
    count = end > begin ? (end - 1) / w.rows - begin / w.rows + 1 : 0;
  }
  const float* slots = p.workspace + (b * w.slots + first) * w.sums * p.D;
  float sum[kSums] = {};
#pragma unroll
  for (int q = 0; q < kSums; q++) {
    if (w.sum[q] >= 0) sum[q] = columns.sum(slots + w.sum[q] * p.D, count, w.sums * p.D);
  }
  if (!columns.first) return;
  auto shared = [&](Shared which, float v) {
    if (w.addend[which] >= 0) w.total[(w.addend[which] * w.groups + group) * p.D + d] = v;
  };
  // Of rows per sample or indexed.
  auto rows = [&](const RowOperand& o, Shared which, float v) {
    if (o.kind == RowKind::kSample || o.kind == RowKind::kIndexed) store_one(o.drows, group * p.D + d, v);
    shared(which, v);
  };
  rows(p.shift, kOfShift, sum[kDy]);
  if (p.scale.kind == RowKind::kToken) {
    shared(kOfScale, sum[kDScale]);
    shared(kOfWeight, sum[kUXhat]);
    shared(kOfBias, sum[kU]);
  } else {
    const float gain = 1.0f + row_at(p.scale, b, k, d);
    rows(p.scale, kOfScale, any_at(p.weight, d, 1.0f) * sum[kUXhat] + any_at(p.bias, d, 0.0f) * sum[kDy]);
    shared(kOfWeight, gain * sum[kUXhat]);
    shared(kOfBias, gain * sum[kDy]);
  }
  if (p.gate.kind == RowKind::kToken || p.gate.kind == RowKind::kNone) {
    shared(kOfGate, sum[kDGate]);
    shared(kOfBranchWeight, sum[kBranch]);
  } else {
    const float gate = row_at(p.gate, b, k, d), z = p.tanh ? tanhf(gate) : gate;
    const float slope = p.tanh ? 1.0f - z * z : 1.0f;
    rows(p.gate, kOfGate, any_at(p.branch_weight, d, 1.0f) * slope * sum[kBranch]);
    shared(kOfBranchWeight, z * sum[kBranch]);
  }
}

// Adds the groups: the gradients of tables, affine parts and rows of all tokens.
__global__ void __launch_bounds__(kSumThreads) residual_norm_bwd_shared_kernel(ResidualNorm p, Work w) {
  ZB_SHARED(float, part, [kSumThreads]);
  const ColumnSums columns(part, blockIdx.x, p.D);
  auto total = [&](Shared which, auto store) {
    if (w.addend[which] < 0) return;
    const float v = columns.sum(w.total + w.addend[which] * w.groups * p.D, w.groups, p.D);
    if (columns.first) store(v);
  };
  auto one = [&](const Grad& g) { return [&](float v) { store_one(g, columns.column, v); }; };
  auto operand = [&](const RowOperand& o) {
    return [&](float v) {
      if (o.kind == RowKind::kOne) store_one(o.drows, columns.column, v);
      store_one(o.dtable, columns.column, v);
    };
  };
  total(kOfGate, operand(p.gate));
  total(kOfBranchWeight, one(p.dbranch_weight));
  total(kOfWeight, one(p.dweight));
  total(kOfBias, one(p.dbias));
  total(kOfShift, operand(p.shift));
  total(kOfScale, operand(p.scale));
}

// ---- host side ------------------------------------------------------------------------------------------------------

size_t shared_bytes(const ResidualNorm& p, const Work& w) {
  return size_t(w.teams.per_block) * w.sums * p.D * sizeof(float);
}

Work work_of(const ResidualNorm& p, int V) {
  Work w{};
  w.teams = row_teams(p, V);
  const int64_t wanted = p.B * p.T / kBlocks, most = wanted < kMostRows ? wanted : kMostRows;
  int64_t rows = most > kLeastRows ? most : kLeastRows;
  if (rows > p.T) rows = p.T > 0 ? p.T : 1;
  w.rows = p.index ? rows : ceil_div(rows, w.teams.per_block);
  w.chunks = ceil_div(p.T, w.rows * w.teams.per_block);
  w.groups = p.B * p.K;

  const bool by_token = p.scale.kind == RowKind::kToken, gate_by_token = p.gate.kind == RowKind::kToken;
  auto shared = [](const RowOperand& o) { return o.dtable.ptr || (o.kind == RowKind::kOne && o.drows.ptr); };
  auto summed = [](const RowOperand& o) { return o.dtable.ptr || (o.kind != RowKind::kToken && o.drows.ptr); };
  const bool dscale = summed(p.scale) && !by_token, dbias = p.dbias.ptr, dweight = p.dweight.ptr;
  const bool sums[kSums] = {summed(p.shift) || (!by_token && (dbias || (dscale && p.bias.ptr))),
                            dweight || dscale,
                            dbias && by_token,
                            by_token && p.scale.dtable.ptr,
                            p.dbranch_weight.ptr || (!gate_by_token && summed(p.gate)),
                            gate_by_token && p.gate.dtable.ptr};
  const bool addends[kShared] = {shared(p.gate), p.dbranch_weight.ptr != nullptr, dweight, dbias, shared(p.shift),
                                 shared(p.scale)};
  for (int q = 0; q < kSums; q++) w.sum[q] = sums[q] ? w.sums++ : -1;
  for (int q = 0; q < kShared; q++) w.addend[q] = addends[q] ? w.addends++ : -1;
  w.in_shared = shared_bytes(p, w) <= shared_limit();
  w.slots = p.index || !w.in_shared ? w.chunks * w.teams.per_block + p.K - 1 : w.chunks;
  w.total = p.workspace ? p.workspace + p.B * w.slots * w.sums * p.D : nullptr;
  return w;
}

}  // namespace

int64_t residual_norm_bwd_workspace(const ResidualNorm& p) {
  int64_t floats = 0;
  with_row_shape(p, [&](auto, auto V) {
    const Work w = work_of(p, V);
    floats = (p.B * w.slots * w.sums + w.addends * w.groups) * p.D;
    return 0;
  });
  return floats;
}

int residual_norm_bwd(const ResidualNorm& p, void* stream) {
  if (p.D == 0) return 0;
  return with_row_shape(p, [&](auto element, auto V) {
    const Work w = work_of(p, V);
    if (p.B * p.T > 0) {
      const int status = launch(residual_norm_bwd_kernel<decltype(element), decltype(V)::value>,
                                dim3(static_cast<unsigned>(p.B * w.chunks)), w.teams.threads,
                                w.in_shared ? shared_bytes(p, w) : 0, stream, p, w);
      if (status) return status;
    }
    const unsigned blocks = static_cast<unsigned>(sum_blocks(p.D));
    if (w.sums && w.groups > 0) {
      const dim3 grid(static_cast<unsigned>(w.groups) * blocks);
      const int status = launch(residual_norm_bwd_groups_kernel, grid, kSumThreads, 0, stream, p, w);
      if (status) return status;
    }
    return w.addends ? launch(residual_norm_bwd_shared_kernel, dim3(blocks), kSumThreads, 0, stream, p, w) : 0;
  });
}

}  // namespace zeroblock::cuda
