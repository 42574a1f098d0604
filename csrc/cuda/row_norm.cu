// Row norms forward: y = (xhat weight + bias) (1 + scale) + shift, xhat = (x - mean) rstd, or x rstd for rms; with a
// branch x is x_new = residual + gate * branch, rounded to the dtype of x before its statistics are taken.
// x [B, T, D] dense. grid: one block per few rows, a team of warps per row (row_norm_tile.cuh). Bytes: each tensor
// once. Reduction order: a thread's packs, lanes, warps; the mean first, then centred squares with the rounding of the
// mean taken out. Zero path: none, no flag is read.
#include "row_norm_tile.cuh"

namespace zeroblock::cuda {
namespace {

constexpr int kPacks = 4;  // that a thread keeps in registers: no spills (python tests/cuda/simt/static.py)

// The 1: without it ptxas aims at more blocks than fit in registers, and spills a few.
template <class T, int V, bool kGate>
__global__ void __launch_bounds__(32 * kMaxTeamWarps, 1) row_norm_fwd_kernel(RowNorm p, Teams teams) {
  ZB_SHARED(float, part, [3 * kMaxTeamWarps]);
  const Team team(teams);
  const int64_t row = int64_t(blockIdx.x) * teams.per_block + team.index;
  const bool valid = row < p.B * p.T;
  const int64_t D = valid ? p.D : 0, b = valid ? row / p.T : 0, t = row - b * p.T;
  const T* source = static_cast<const T*>(p.x) + row * p.D;
  Pack<T, V> cache[kPacks];
  // f(column, pack) for every pack of this thread's row.
  auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      const int64_t d = int64_t(team.lane + i * team.step) * V;
      if (d < D) f(d, cache[i]);
    }
    for (int64_t d = int64_t(team.lane + kPacks * team.step) * V; d < D; d += int64_t(team.step) * V) {
      f(d, load_pack<V>(source + d));
    }
  };
  if constexpr (kGate) {
    const T* branch = static_cast<const T*>(p.branch) + row * p.D;
    T* x_new = static_cast<T*>(p.x_new) + row * p.D;
    auto add = [&](int64_t d) {
      Pack<T, V> x = load_pack<V>(source + d);
      const Pack<T, V> h = load_pack<V>(branch + d);
      float gate[V];
      load_operand<T>(p.gate, b * p.gate.stride_b + t * p.gate.stride_t + d, 0.0f, gate);
#pragma unroll
      for (int k = 0; k < V; k++) x.v[k] = from_float<T>(x[k] + gate[k] * h[k]);
      store_pack<V>(x_new + d, x);
      return x;
    };
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      const int64_t d = int64_t(team.lane + i * team.step) * V;
      if (d < D) cache[i] = add(d);
    }
    for (int64_t d = int64_t(team.lane + kPacks * team.step) * V; d < D; d += int64_t(team.step) * V) add(d);
    source = x_new;
  } else {
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      const int64_t d = int64_t(team.lane + i * team.step) * V;
      if (d < D) cache[i] = load_pack<V>(source + d);
    }
  }
  LongSum sum, errors, squares;
  if (!p.rms) {
    each([&](int64_t, const Pack<T, V>& x) {
      float s = 0;
#pragma unroll
      for (int k = 0; k < V; k++) s += x[k];
      sum.add(s);
    });
  }
  const float first = p.rms ? 0.0f : team.sum(sum.value(), part) / p.D;
  each([&](int64_t, const Pack<T, V>& x) {
    float e = 0, q = 0;
#pragma unroll
    for (int k = 0; k < V; k++) {
      const float d = x[k] - first;
      e += d;
      q += d * d;
    }
    errors.add(e);
    squares.add(q);
  });
  const float error = p.rms ? 0.0f : team.sum(errors.value(), part + kMaxTeamWarps) / p.D;
  const float variance = team.sum(squares.value(), part + 2 * kMaxTeamWarps) / p.D - error * error;
  const float mean = first + error, rstd = p.rms ? rsqrtf(variance + p.eps) : rstd_of(variance, p.eps);
  if (valid && team.lane == 0) {
    if (p.mean) p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
  T* y = static_cast<T*>(p.y) + row * p.D;
  each([&](int64_t d, const Pack<T, V>& x) {
    float out[V], operand[V];
#pragma unroll
    for (int k = 0; k < V; k++) out[k] = (x[k] - mean) * rstd;
    if (p.weight.ptr) {
      load_operand<T>(p.weight, d, 1.0f, operand);
#pragma unroll
      for (int k = 0; k < V; k++) out[k] *= operand[k];
    }
    if (p.bias.ptr) {
      load_operand<T>(p.bias, d, 0.0f, operand);
#pragma unroll
      for (int k = 0; k < V; k++) out[k] += operand[k];
    }
    load_operand<T>(p.scale, b * p.scale.stride_b + t * p.scale.stride_t + d, 0.0f, operand);
#pragma unroll
    for (int k = 0; k < V; k++) out[k] *= 1.0f + operand[k];
    load_operand<T>(p.shift, b * p.shift.stride_b + t * p.shift.stride_t + d, 0.0f, operand);
#pragma unroll
    for (int k = 0; k < V; k++) out[k] += operand[k];
    store_floats<V>(y + d, out);
  });
}

}  // namespace

int row_norm_fwd(const RowNorm& p, void* stream) {
  if (p.B * p.T * p.D == 0) return 0;
  const Teams teams = row_norm_teams(p, kPacks, row_norm_vector(p), kMaxTeamWarps);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.B * p.T, teams.per_block)));
  return with_row_norm_shape(p, teams.V, [&](auto element, auto V, auto gate) {
    return launch(row_norm_fwd_kernel<decltype(element), decltype(V)::value, decltype(gate)::value>, grid,
                  teams.threads, 0, stream, p, teams);
  });
}

}  // namespace zeroblock::cuda
