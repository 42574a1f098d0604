// The torch side of the CUDA kernels of norms and gates (../cuda/cuda_kernels.h).
#include "cuda.h"

namespace {

// ---- group_norm_silu ------------------------------------------------------------------------------------------------

cuda::GroupNormSilu group_norm_params(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                      const MaybeTensor& scale, const MaybeTensor& shift, int64_t groups, bool silu,
                                      bool channels_last, const MaybeTensor& zero, std::vector<Tensor>& copies) {
  cuda::GroupNormSilu p = image_params<cuda::GroupNormSilu>(x, groups, silu, channels_last);
  p.weight = as_operand(weight, x, {p.C}, copies, "weight");
  p.bias = as_operand(bias, x, {p.C}, copies, "bias");
  p.scale = as_operand(scale, x, {p.N, p.C}, copies, "scale");
  p.shift = as_operand(shift, x, {p.N, p.C}, copies, "shift");
  p.zero = zero_of(zero);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor scale,
                                                   MaybeTensor shift, int64_t groups, double eps, bool silu,
                                                   bool channels_last, MaybeTensor zero) {
  const Here here(x);
  std::vector<Tensor> copies;
  auto p = group_norm_params(x, weight, bias, scale, shift, groups, silu, channels_last, zero, copies);
  Tensor y = dense_like(x), mean = f32(x, {p.N, p.G}), rstd = f32(x, {p.N, p.G});
  Tensor scratch = workspace(x, cuda::group_norm_silu_fwd_workspace(p));
  p.eps = static_cast<float>(eps);
  p.y = y.mutable_data_ptr();
  p.mean = data<float>(mean);
  p.rstd = data<float>(rstd);
  p.workspace = data<float>(scratch);
  check_launch("group_norm_silu", cuda::group_norm_silu_fwd(p, here.stream));
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd,
                                                                       MaybeTensor weight, MaybeTensor bias,
                                                                       MaybeTensor scale, MaybeTensor shift,
                                                                       int64_t groups, bool silu, bool channels_last,
                                                                       MaybeTensor zero) {
  const Here here(x);
  std::vector<Tensor> copies;
  auto p = group_norm_params(x, weight, bias, scale, shift, groups, silu, channels_last, zero, copies);
  check_like(dy, x, "dy");
  check_dense(dy, channels_last, "dy");
  p.mean = const_cast<float*>(as_f32(mean, p.N * p.G, copies, "mean"));
  p.rstd = const_cast<float*>(as_f32(rstd, p.N * p.G, copies, "rstd"));
  Tensor dx = dense_like(x);
  Tensor dweight = grad_of(p.weight, x, {p.C}, p.dweight), dbias = grad_of(p.bias, x, {p.C}, p.dbias);
  Tensor dscale = grad_of(p.scale, x, {p.N, p.C}, p.dscale), dshift = grad_of(p.shift, x, {p.N, p.C}, p.dshift);
  Tensor scratch = workspace(x, cuda::group_norm_silu_bwd_workspace(p));
  p.dy = dy.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.workspace = data<float>(scratch);
  check_launch("group_norm_silu_bwd", cuda::group_norm_silu_bwd(p, here.stream));
  return {dx, dweight, dbias, dscale, dshift};
}

// ---- row norms ------------------------------------------------------------------------------------------------------

cuda::RowNorm row_norm_params(const Tensor& x, const MaybeTensor& branch, const MaybeTensor& gate,
                              const MaybeTensor& shift, const MaybeTensor& scale, const MaybeTensor& weight,
                              const MaybeTensor& bias, bool rms, std::vector<Tensor>& copies) {
  auto p = token_params<cuda::RowNorm>(x, "x");
  p.rms = rms;
  p.x = x.const_data_ptr();
  const std::vector<int64_t> size = {p.B, p.T, p.D};
  p.weight = as_operand(weight, x, {p.D}, copies, "weight");
  p.bias = as_operand(bias, x, {p.D}, copies, "bias");
  p.shift = as_operand(shift, x, size, copies, "shift");
  p.scale = as_operand(scale, x, size, copies, "scale");
  STD_TORCH_CHECK(branch.has_value() == gate.has_value(), "zeroblock: gate and branch must come together");
  if (branch) {
    check_like(*branch, x, "branch");
    check_tokens(*branch, "branch");
    p.branch = branch->const_data_ptr();
    p.gate = as_operand(gate, x, size, copies, "gate");
  }
  return p;
}

// (x_new, y, mean, rstd); x_new only with a branch, mean not for rms.
std::tuple<Tensor, Tensor, Tensor, Tensor> row_norm(Tensor x, MaybeTensor branch, MaybeTensor gate, MaybeTensor shift,
                                                    MaybeTensor scale, MaybeTensor weight, MaybeTensor bias, double eps,
                                                    bool rms) {
  const Here here(x);
  std::vector<Tensor> copies;
  auto p = row_norm_params(x, branch, gate, shift, scale, weight, bias, rms, copies);
  Tensor x_new = branch ? dense_like(x) : absent(), y = dense_like(x);
  Tensor mean = rms ? absent() : f32(x, {p.B, p.T}), rstd = f32(x, {p.B, p.T});
  p.eps = static_cast<float>(eps);
  p.x_new = branch ? x_new.mutable_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.mean = rms ? nullptr : data<float>(mean);
  p.rstd = data<float>(rstd);
  check_launch(branch ? "gate_residual_layer_norm_modulate"
               : rms  ? "rms_norm_modulate"
                      : "layer_norm_modulate",
               cuda::row_norm_fwd(p, here.stream));
  return {x_new, y, mean, rstd};
}

// (dx, dbranch, dgate, dshift, dscale, dweight, dbias). A per-token dshift is dy and is not returned, nor is a
// per-sample dshift beside a per-token scale; dgate is [B, D] also for a [D] gate.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_norm_bwd(
    MaybeTensor dx_new, Tensor dy, Tensor x, MaybeTensor mean, Tensor rstd, MaybeTensor branch, MaybeTensor gate,
    MaybeTensor shift, MaybeTensor scale, MaybeTensor weight, MaybeTensor bias, bool rms) {
  const Here here(x);
  std::vector<Tensor> copies;
  auto p = row_norm_params(x, branch, gate, shift, scale, weight, bias, rms, copies);
  check_like(dy, x, "dy");
  check_tokens(dy, "dy");
  if (dx_new) check_like(*dx_new, x, "dx_new"), check_tokens(*dx_new, "dx_new");
  p.dx_new = dx_new ? dx_new->const_data_ptr() : nullptr;
  p.mean = const_cast<float*>(as_f32(mean, p.B * p.T, copies, "mean"));
  p.rstd = const_cast<float*>(as_f32(rstd, p.B * p.T, copies, "rstd"));
  p.dy = dy.const_data_ptr();
  auto like_x = [&](void*& target) {
    Tensor t = dense_like(x);
    target = t.mutable_data_ptr();
    return t;
  };
  const std::vector<int64_t> rows = {p.B, p.T, p.D}, samples = {p.B, p.D};
  Tensor dx = like_x(p.dx), dbranch = branch ? like_x(p.dbranch) : absent(), dshift = absent();
  Tensor dgate = p.gate.per_token ? grad_of(p.gate, x, rows, p.dgate_token) : grad_of(p.gate, x, samples, p.dgate);
  Tensor dscale =
      p.scale.per_token ? grad_of(p.scale, x, rows, p.dscale_token) : grad_of(p.scale, x, samples, p.dscale);
  if (!p.shift.per_token && !p.scale.per_token) dshift = grad_of(p.shift, x, samples, p.dshift);
  Tensor dweight = grad_of(p.weight, x, {p.D}, p.dweight), dbias = grad_of(p.bias, x, {p.D}, p.dbias);
  Tensor scratch = workspace(x, cuda::row_norm_bwd_workspace(p));
  p.workspace = data<float>(scratch);
  check_launch(branch ? "gate_residual_layer_norm_modulate_bwd"
               : rms  ? "rms_norm_modulate_bwd"
                      : "layer_norm_modulate_bwd",
               cuda::row_norm_bwd(p, here.stream));
  return {dx, dbranch, dgate, dshift, dscale, dweight, dbias};
}

// ---- gate_residual --------------------------------------------------------------------------------------------------

cuda::GateResidual gate_params(const Tensor& branch, const Tensor& gate, std::vector<Tensor>& copies) {
  auto p = token_params<cuda::GateResidual>(branch, "branch");
  p.branch = branch.const_data_ptr();
  const bool scalar = gate.dim() == 1 && gate.numel() == 1;
  p.gate = scalar ? as_operand(gate, branch, {1}, copies, "gate")
                  : as_operand(gate, branch, {p.B, p.T, p.D}, copies, "gate");
  p.scalar_gate = scalar ? p.gate.ptr : nullptr;
  return p;
}

Tensor gate_residual(Tensor residual, Tensor gate, Tensor branch) {
  const Here here(branch);
  std::vector<Tensor> copies;
  auto p = gate_params(branch, gate, copies);
  check_like(residual, branch, "residual");
  check_tokens(residual, "residual");
  Tensor y = dense_like(branch);
  p.residual = residual.const_data_ptr();
  p.y = y.mutable_data_ptr();
  check_launch("gate_residual", cuda::gate_residual_fwd(p, here.stream));
  return y;
}

std::tuple<Tensor, Tensor> gate_residual_bwd(Tensor dy, Tensor gate, Tensor branch, bool need_dgate,
                                             bool need_dbranch) {
  const Here here(branch);
  std::vector<Tensor> copies;
  auto p = gate_params(branch, gate, copies);
  check_like(dy, branch, "dy");
  check_tokens(dy, "dy");
  p.dy = dy.const_data_ptr();
  Tensor dgate = absent(), dbranch = need_dbranch ? dense_like(branch) : absent();
  if (need_dbranch) p.dbranch = dbranch.mutable_data_ptr();
  if (need_dgate && p.gate.per_token) {
    dgate = dense_like(branch);
    p.dgate_token = dgate.mutable_data_ptr();
  } else if (need_dgate) {
    dgate = grad_of(p.gate, branch, p.scalar_gate ? std::vector<int64_t>{1} : std::vector<int64_t>{p.B, p.D}, p.dgate);
  }
  Tensor scratch = workspace(branch, need_dgate ? cuda::gate_residual_bwd_workspace(p) : 0);
  p.workspace = data<float>(scratch);
  check_launch("gate_residual_bwd", cuda::gate_residual_bwd(p, here.stream));
  return {dgate, dbranch};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ZB_NAMESPACE, m) {
  m.def(
      "_group_norm_silu_cuda(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, "
      "float eps, bool silu, bool channels_last, Tensor? zero) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_group_norm_silu_bwd_cuda(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
      "Tensor? scale, Tensor? shift, int groups, bool silu, bool channels_last, Tensor? zero) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_row_norm_cuda(Tensor x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, "
      "Tensor? bias, float eps, bool rms) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_row_norm_bwd_cuda(Tensor? dx_new, Tensor dy, Tensor x, Tensor? mean, Tensor rstd, Tensor? branch, "
      "Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, bool rms) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_gate_residual_cuda(Tensor residual, Tensor gate, Tensor branch) -> Tensor");
  m.def(
      "_gate_residual_bwd_cuda(Tensor dy, Tensor gate, Tensor branch, bool need_dgate, bool need_dbranch) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ZB_NAMESPACE, ZB_KEY, m) {
  m.impl("_group_norm_silu_cuda", TORCH_BOX(&group_norm_silu));
  m.impl("_group_norm_silu_bwd_cuda", TORCH_BOX(&group_norm_silu_bwd));
  m.impl("_row_norm_cuda", TORCH_BOX(&row_norm));
  m.impl("_row_norm_bwd_cuda", TORCH_BOX(&row_norm_bwd));
  m.impl("_gate_residual_cuda", TORCH_BOX(&gate_residual));
  m.impl("_gate_residual_bwd_cuda", TORCH_BOX(&gate_residual_bwd));
}
