// Calls of channel_rms_norm_silu and residual_norm_modulate, in every form of their operands.
#pragma once

#include "calls.h"

namespace {

struct ChannelOptions {
  bool weight = true, bias = true, film = true, inside = false;
};

inline void drive_channel_norm(DType dtype, bool channels_last, ChannelOptions o, int64_t N, int64_t C, int64_t S) {
  Call call(channels_last ? "channel_rms_norm_silu channels-last" : "channel_rms_norm_silu", dtype);
  cuda::ChannelRmsNormSilu p{};
  p.dtype = dtype;
  p.channels_last = channels_last;
  p.silu = true;
  p.eps_inside = o.inside;
  p.N = N, p.C = C, p.S = S, p.eps = 1e-6f;
  p.x = call.input(N * C * S);
  if (o.weight) p.weight = call.operand(C);
  if (o.bias) p.bias = call.operand(C);
  if (o.film) p.scale = call.operand(N * C, false, C), p.shift = call.operand(N * C, false, C);
  p.rstd = call.statistics(N * S);
  p.y = call.output(N * C * S);
  call.launched(channel_rms_norm_silu_fwd(p, nullptr));
  p.dy = call.input(N * C * S);
  p.dx = call.output(N * C * S);
  p.y = nullptr;
  if (o.weight) p.dweight = call.grad(C);
  if (o.bias) p.dbias = call.grad(C);
  if (o.film) p.dscale = call.grad(N * C), p.dshift = call.grad(N * C);
  p.workspace = call.scratch(channel_rms_norm_silu_bwd_workspace(p));
  call.launched(channel_rms_norm_silu_bwd(p, nullptr));
}

struct NormOptions {
  RowKind gate = RowKind::kSample, shift = RowKind::kSample, scale = RowKind::kSample;
  bool tables = true, affine = false, branch_norm = false, tanh = false, rms = false;
  bool branch = true, norm = true;
  bool wide = false;        // operands in fp32
  bool mixed = false;       // x_new in fp32, too
  int64_t K = 1, tail = 0;  // rows of which an index chooses; columns of a larger tensor behind each row
  size_t shared = 163 * 1024;
};

// Operands and their gradients, which backward writes.
class NormOperands {
 public:
  NormOperands(Call& call, DType dtype, const NormOptions& o, int64_t B, int64_t T, int64_t D)
      : call_(call), dtype_(o.wide ? DType::kF32 : dtype), o_(o), B_(B), T_(T), D_(D) {}
  Operand vector() const { return {input(D_), dtype_, false, 0, 0}; }
  Grad grad(int64_t n) const { return {output(n), dtype_}; }
  cuda::RowOperand rows(RowKind kind) const {
    cuda::RowOperand a{};
    a.kind = kind;
    if (kind == RowKind::kNone) return a;
    const int64_t step = D_ + o_.tail, of_sample = kind == RowKind::kToken ? T_ : kind == RowKind::kIndexed ? o_.K : 1;
    const bool one = kind == RowKind::kOne;
    a.rows = {input(count(kind) * step - o_.tail), dtype_, of_sample > 1, one ? 0 : of_sample * step, step};
    if (o_.tables) a.table = vector();
    return a;
  }
  void grads(cuda::RowOperand& a) const {
    if (a.kind == RowKind::kNone) return;
    a.drows = grad(count(a.kind) * D_);
    if (o_.tables) a.dtable = grad(D_);
  }

 private:
  int64_t count(RowKind kind) const {
    return kind == RowKind::kOne ? 1 : kind == RowKind::kSample ? B_ : kind == RowKind::kToken ? B_ * T_ : B_ * o_.K;
  }
  void* input(int64_t n) const { return o_.wide ? call_.numbers(n) : call_.input(n); }
  void* output(int64_t n) const { return o_.wide ? call_.statistics(n) : call_.output(n); }
  Call& call_;
  DType dtype_;
  const NormOptions& o_;
  int64_t B_, T_, D_;
};

inline void drive_residual_norm(DType dtype, NormOptions o, int64_t B, int64_t T, int64_t D) {
  simt::machine().shared_limit = o.shared;
  Call call("residual_norm_modulate", dtype);
  const NormOperands operands(call, dtype, o, B, T, D);
  const int64_t n = B * T * D;
  cuda::ResidualNorm p{};
  p.B = B, p.T = T, p.D = D, p.K = o.K;
  p.residual_dtype = p.branch_dtype = p.x_dtype = p.y_dtype = dtype;
  if (o.mixed) p.x_dtype = DType::kF32;
  p.tanh = o.tanh, p.branch_rms = o.branch_norm && o.branch, p.norm = o.norm, p.rms = o.rms;
  p.branch_eps = p.eps = 1e-6f;
  p.residual = call.input(n);
  // One row has no token; the first half of the others has one index out of range on either side.
  std::vector<int32_t> index(B * T);
  std::vector<int64_t> order(B * T);
  std::vector<int32_t> bounds(B * (o.K + 1));
  if (o.K > 1) {
    auto row = [&](int64_t t) { return t * 7 % o.K == 1 ? 0 : t * 7 % o.K; };
    for (int64_t b = 0; b < B; b++) {
      int64_t at = 0;
      for (int64_t k = 0; k < o.K; k++) {
        bounds[b * (o.K + 1) + k] = at;
        for (int64_t t = 0; t < T; t++) {
          if (row(t) == k) order[b * T + at++] = t;
        }
      }
      bounds[b * (o.K + 1) + o.K] = at;
      for (int64_t t = 0; t < T; t++) index[b * T + t] = row(t) == 0 ? -3 : row(t) == o.K - 1 ? o.K + 5 : row(t);
    }
    p.index = index.data();
  }
  if (o.branch) {
    p.branch = call.input(n);
    p.gate = operands.rows(o.gate);
    if (o.affine) p.branch_weight = operands.vector();
    p.x_new = o.mixed ? call.statistics(n) : call.output(n);
    if (p.branch_rms) p.branch_rstd = call.statistics(B * T);
  }
  if (o.norm) {
    p.shift = operands.rows(o.shift), p.scale = operands.rows(o.scale);
    if (o.affine) p.weight = operands.vector(), p.bias = operands.vector();
    p.mean = o.rms ? nullptr : call.statistics(B * T);
    p.rstd = call.statistics(B * T);
    p.y = call.output(n);
  }
  call.launched(residual_norm_fwd(p, nullptr));
  p.x = o.branch ? p.x_new : p.residual;
  p.residual = p.x_new = p.y = nullptr;
  if (o.K > 1) p.order = order.data(), p.bounds = bounds.data();
  if (o.norm) p.dy = call.input(n);
  if (o.branch) {
    p.dx_new = o.mixed ? call.numbers(n) : call.input(n);
    p.dbranch = call.output(n);
    operands.grads(p.gate);
    if (o.affine) p.dbranch_weight = operands.grad(D);
  }
  p.dresidual = call.output(n);
  if (o.norm) {
    operands.grads(p.shift), operands.grads(p.scale);
    if (o.affine) p.dweight = operands.grad(D), p.dbias = operands.grad(D);
  }
  p.workspace = call.scratch(residual_norm_bwd_workspace(p));
  call.launched(residual_norm_bwd(p, nullptr));
  simt::machine().shared_limit = 163 * 1024;
}

}  // namespace
