// residual_norm_modulate: x_new = residual + act(gate) norm_b(branch), y = norm(x_new) [* weight + bias] (1 + scale) +
// shift, every part optional, each tensor and operand in its own dtype. x_new is rounded before it is normalised, for
// backward reads it so. grid: a team of warps per row (residual_norm_tile.cuh). Bytes: each tensor once; rows that
// tokens share come from cache. Reduction order: a thread's packs, lanes, warps; the mean first, then centred squares
// with the rounding of the mean taken out. Zero path: none, no flag is read.
#include "residual_norm_tile.cuh"

namespace zeroblock::cuda {
namespace {

// The 1: without it ptxas aims at more blocks than fit in registers, and spills.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, 1) residual_norm_fwd_kernel(ResidualNorm p, RowTeams teams) {
  ZB_SHARED(float, part, [4][kMaxRowWarps]);
  const RowTeam team(teams);
  const int64_t row = int64_t(blockIdx.x) * teams.per_block + team.index;
  const bool valid = row < p.B * p.T;
  const int D = valid ? static_cast<int>(p.D) : 0;
  const int64_t b = valid ? row / p.T : 0, t = valid ? row - b * p.T : 0;
  const int64_t chosen = valid ? chosen_row(p, b, t) : 0, at = row * p.D;
  Pack<Kept<T>, V> xs[kKept / V];
  each_pack<V>(team, D, [&](int i, int d) { xs[i] = load_tensor<T, V>(p.residual, p.residual_dtype, at + d); });
  if (p.branch) {
    Pack<Kept<T>, V> hs[kKept / V];
    each_pack<V>(team, D, [&](int i, int d) { hs[i] = load_tensor<T, V>(p.branch, p.branch_dtype, at + d); });
    float h_rstd = 1.0f;
    if (p.branch_rms) {
      float squares = 0;
      each_pack<V>(team, D, [&](int i, int) {
#pragma unroll
        for (int k = 0; k < V; k++) squares += hs[i][k] * hs[i][k];
      });
      h_rstd = rsqrtf(team.sum(squares, part) / p.D + p.branch_eps);
      if (valid && team.lane == 0) p.branch_rstd[row] = h_rstd;
    }
    const int64_t gate_row = row_begin(p.gate, b, t, chosen);
    each_pack<V>(team, D, [&](int i, int d) {
      float added[V], gate[V];
#pragma unroll
      for (int k = 0; k < V; k++) added[k] = hs[i][k] * h_rstd;
      times<T>(p.branch_weight, d, added);
      if (p.gate.kind != RowKind::kNone) {
        load_row<T>(p.gate, gate_row, d, gate);
#pragma unroll
        for (int k = 0; k < V; k++) added[k] *= p.tanh ? tanhf(gate[k]) : gate[k];
      }
#pragma unroll
      for (int k = 0; k < V; k++) {
        added[k] += xs[i][k];
        xs[i].v[k] = rounded_to<T>(p.x_dtype, added[k]);
      }
      store_tensor<T>(p.x_new, p.x_dtype, at + d, added);
    });
  }
  if (!p.norm) return;
  float sum = 0, moments[2] = {};
  if (!p.rms) {
    each_pack<V>(team, D, [&](int i, int) {
#pragma unroll
      for (int k = 0; k < V; k++) sum += xs[i][k];
    });
  }
  const float first = p.rms ? 0.0f : team.sum(sum, part + 1) / p.D;
  each_pack<V>(team, D, [&](int i, int) {
#pragma unroll
    for (int k = 0; k < V; k++) {
      const float centred = xs[i][k] - first;
      moments[0] += centred;
      moments[1] += centred * centred;
    }
  });
  team.sum(moments, part + 2);
  const float error = p.rms ? 0.0f : moments[0] / p.D, variance = moments[1] / p.D - error * error;
  const float mean = first + error, rstd = p.rms ? rsqrtf(variance + p.eps) : rstd_of(variance, p.eps);
  if (valid && team.lane == 0) {
    if (p.mean) p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
  const int64_t scale_row = row_begin(p.scale, b, t, chosen), shift_row = row_begin(p.shift, b, t, chosen);
  each_pack<V>(team, D, [&](int i, int d) {
    float out[V], operand[V];
#pragma unroll
    for (int k = 0; k < V; k++) out[k] = (xs[i][k] - mean) * rstd;
    times<T>(p.weight, d, out);
    plus<T>(p.bias, d, out);
    load_row<T>(p.scale, scale_row, d, operand);
#pragma unroll
    for (int k = 0; k < V; k++) out[k] *= 1.0f + operand[k];
    load_row<T>(p.shift, shift_row, d, operand);
#pragma unroll
    for (int k = 0; k < V; k++) out[k] += operand[k];
    store_tensor<T>(p.y, p.y_dtype, at + d, out);
  });
}

}  // namespace

int residual_norm_fwd(const ResidualNorm& p, void* stream) {
  if (p.B * p.T * p.D == 0) return 0;
  return with_row_shape(p, [&](auto element, auto V) {
    const RowTeams teams = row_teams(p, V);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.B * p.T, teams.per_block)));
    return launch(residual_norm_fwd_kernel<decltype(element), decltype(V)::value>, grid, teams.threads, 0, stream, p,
                  teams);
  });
}

}  // namespace zeroblock::cuda
