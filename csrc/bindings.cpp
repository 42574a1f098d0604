// The torch side of the native kernels (stable ABI: built once, runs on torch >= 2.13).
//
// Each private op checks what memory safety needs, allocates its results, fills the parameter block of zeroblock.h and
// calls the kernel. Shapes, layouts and dtypes are settled by the Python caller (zeroblock/_cpu.py); a check that fails
// here is a bug there. An absent result is undefined, None in Python.
#include "binding_cpu.h"

namespace {

// ---- group_norm_silu ------------------------------------------------------------------------------------------------

GroupNormSilu group_norm_params(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                const MaybeTensor& scale, const MaybeTensor& shift, int64_t groups, bool silu,
                                bool channels_last, std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(x.dim() >= 2 && groups > 0 && x.size(1) > 0 && x.size(1) % groups == 0,
                  "zeroblock: x must be [N, C, *] with C divisible by the groups");
  check_dense(x, channels_last, "x");
  GroupNormSilu p{};
  p.dtype = dtype_of(x);
  p.channels_last = channels_last;
  p.silu = silu;
  p.N = x.size(0);
  p.C = x.size(1);
  p.G = groups;
  p.S = 1;
  for (int64_t d = 2; d < x.dim(); ++d) p.S *= x.size(d);
  p.x = x.const_data_ptr();
  p.weight = as_f32(weight, p.C, keep, "weight");
  p.bias = as_f32(bias, p.C, keep, "bias");
  p.scale = as_f32(scale, p.N * p.C, keep, "scale");
  p.shift = as_f32(shift, p.N * p.C, keep, "shift");
  return p;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor scale,
                                                   MaybeTensor shift, int64_t groups, double eps, bool silu,
                                                   bool channels_last) {
  std::vector<Tensor> keep;
  GroupNormSilu p = group_norm_params(x, weight, bias, scale, shift, groups, silu, channels_last, keep);
  Tensor y = torch::stable::empty_like(x), mean = f32(x, {p.N, p.G}), rstd = f32(x, {p.N, p.G});
  const Workspace workspace(kernels().group_norm_silu_fwd_workspace(p));
  p.eps = static_cast<float>(eps);
  p.y = y.mutable_data_ptr();
  p.mean = data<float>(mean);
  p.rstd = data<float>(rstd);
  p.workspace = workspace.data.get();
  kernels().group_norm_silu_fwd(p, parallel_for);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd,
                                                                       MaybeTensor weight, MaybeTensor bias,
                                                                       MaybeTensor scale, MaybeTensor shift,
                                                                       int64_t groups, bool silu, bool channels_last) {
  std::vector<Tensor> keep;
  GroupNormSilu p = group_norm_params(x, weight, bias, scale, shift, groups, silu, channels_last, keep);
  check_like(dy, x, "dy");
  check_dense(dy, channels_last, "dy");
  p.mean = const_cast<float*>(as_f32(mean, p.N * p.G, keep, "mean"));
  p.rstd = const_cast<float*>(as_f32(rstd, p.N * p.G, keep, "rstd"));
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = weight ? f32(x, {p.C}) : absent(), dbias = bias ? f32(x, {p.C}) : absent();
  Tensor dscale = scale ? f32(x, {p.N, p.C}) : absent(), dshift = shift ? f32(x, {p.N, p.C}) : absent();
  p.dy = dy.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  if (weight) p.dweight = data<float>(dweight);
  if (bias) p.dbias = data<float>(dbias);
  if (scale) p.dscale = data<float>(dscale);
  if (shift) p.dshift = data<float>(dshift);
  const Workspace workspace(kernels().group_norm_silu_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().group_norm_silu_bwd(p, parallel_for);
  return {dx, dweight, dbias, dscale, dshift};
}

// ---- layer_norm_modulate, rms_norm_modulate -------------------------------------------------------------------------

void check_tokens(const Tensor& x, const char* what) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_cpu() && x.is_contiguous(), "zeroblock: ", what, " must be dense [B, T, D]");
}

LayerNormModulate layer_norm_params(const Tensor& x, const MaybeTensor& shift, const MaybeTensor& scale,
                                    const MaybeTensor& weight, const MaybeTensor& bias, bool rms,
                                    std::vector<Tensor>& keep) {
  check_tokens(x, "x");
  LayerNormModulate p{};
  p.dtype = dtype_of(x);
  p.rms = rms;
  p.B = x.size(0);
  p.T = x.size(1);
  p.D = x.size(2);
  p.x = x.const_data_ptr();
  p.weight = as_f32(weight, p.D, keep, "weight");
  p.bias = as_f32(bias, p.D, keep, "bias");
  p.shift = as_rows(shift, x, keep, "shift");
  p.scale = as_rows(scale, x, keep, "scale");
  return p;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate(Tensor x, MaybeTensor shift, MaybeTensor scale,
                                                       MaybeTensor weight, MaybeTensor bias, double eps, bool rms) {
  std::vector<Tensor> keep;
  LayerNormModulate p = layer_norm_params(x, shift, scale, weight, bias, rms, keep);
  Tensor y = torch::stable::empty_like(x), mean = rms ? absent() : f32(x, {p.B, p.T}), rstd = f32(x, {p.B, p.T});
  p.eps = static_cast<float>(eps);
  p.y = y.mutable_data_ptr();
  p.mean = rms ? nullptr : data<float>(mean);
  p.rstd = data<float>(rstd);
  kernels().layer_norm_modulate_fwd(p, parallel_for);
  return {y, mean, rstd};
}

// A per-token dshift equals dy and is not returned.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_modulate_bwd(Tensor dy, Tensor x, MaybeTensor mean,
                                                                           Tensor rstd, MaybeTensor shift,
                                                                           MaybeTensor scale, MaybeTensor weight,
                                                                           MaybeTensor bias, bool rms) {
  std::vector<Tensor> keep;
  LayerNormModulate p = layer_norm_params(x, shift, scale, weight, bias, rms, keep);
  check_like(dy, x, "dy");
  check_tokens(dy, "dy");
  p.mean = const_cast<float*>(as_f32(mean, p.B * p.T, keep, "mean"));
  p.rstd = const_cast<float*>(as_f32(rstd, p.B * p.T, keep, "rstd"));
  p.dy = dy.const_data_ptr();
  Tensor dx = torch::stable::empty_like(x);
  p.dx = dx.mutable_data_ptr();
  Tensor dshift = shift && !p.shift.per_token ? f32(x, {p.B, p.D}) : absent();
  Tensor dscale = !scale ? absent() : p.scale.per_token ? torch::stable::empty_like(x) : f32(x, {p.B, p.D});
  Tensor dweight = weight ? f32(x, {p.D}) : absent(), dbias = bias ? f32(x, {p.D}) : absent();
  if (shift && !p.shift.per_token) p.dshift = data<float>(dshift);
  if (scale) p.dscale = dscale.mutable_data_ptr();
  if (weight) p.dweight = data<float>(dweight);
  if (bias) p.dbias = data<float>(dbias);
  const Workspace workspace(kernels().layer_norm_modulate_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().layer_norm_modulate_bwd(p, parallel_for);
  return {dx, dshift, dscale, dweight, dbias};
}

// ---- gate_residual --------------------------------------------------------------------------------------------------

GateResidual gate_params(const Tensor& branch, const Tensor& gate, std::vector<Tensor>& keep) {
  check_tokens(branch, "branch");
  GateResidual p{};
  p.dtype = dtype_of(branch);
  p.B = branch.size(0);
  p.T = branch.size(1);
  p.D = branch.size(2);
  p.branch = branch.const_data_ptr();
  if (gate.dim() == 1 && gate.numel() == 1) {
    p.scalar_gate = as_f32(gate, 1, keep, "gate");
  } else {
    p.gate = as_rows(gate, branch, keep, "gate");
  }
  return p;
}

Tensor gate_residual(Tensor residual, Tensor gate, Tensor branch) {
  std::vector<Tensor> keep;
  GateResidual p = gate_params(branch, gate, keep);
  check_like(residual, branch, "residual");
  check_tokens(residual, "residual");
  Tensor y = torch::stable::empty_like(branch);
  p.residual = residual.const_data_ptr();
  p.y = y.mutable_data_ptr();
  kernels().gate_residual_fwd(p, parallel_for);
  return y;
}

Tensor gate_gradient(const Tensor& branch, bool scalar, bool per_token) {
  if (scalar) return f32(branch, {1});
  return per_token ? torch::stable::empty_like(branch) : f32(branch, {branch.size(0), branch.size(2)});
}

std::tuple<Tensor, Tensor> gate_residual_bwd(Tensor dy, Tensor gate, Tensor branch, bool need_dgate,
                                             bool need_dbranch) {
  std::vector<Tensor> keep;
  GateResidual p = gate_params(branch, gate, keep);
  check_like(dy, branch, "dy");
  check_tokens(dy, "dy");
  p.dy = dy.const_data_ptr();
  Tensor dgate = need_dgate ? gate_gradient(branch, p.scalar_gate, p.gate.per_token) : absent();
  Tensor dbranch = need_dbranch ? torch::stable::empty_like(branch) : absent();
  if (need_dgate) p.dgate = dgate.mutable_data_ptr();
  if (need_dbranch) p.dbranch = dbranch.mutable_data_ptr();
  const Workspace workspace(kernels().gate_residual_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().gate_residual_bwd(p, parallel_for);
  return {dgate, dbranch};
}

// ---- gate_residual_layer_norm_modulate ------------------------------------------------------------------------------

GateResidualLayerNormModulate gate_norm_params(const Tensor& branch, const Tensor& gate, const Tensor& shift,
                                               const Tensor& scale, std::vector<Tensor>& keep) {
  check_tokens(branch, "branch");
  GateResidualLayerNormModulate p{};
  p.dtype = dtype_of(branch);
  p.B = branch.size(0);
  p.T = branch.size(1);
  p.D = branch.size(2);
  p.branch = branch.const_data_ptr();
  p.gate = as_rows(gate, branch, keep, "gate");
  p.shift = as_rows(shift, branch, keep, "shift");
  p.scale = as_rows(scale, branch, keep, "scale");
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_layer_norm_modulate(Tensor residual, Tensor gate,
                                                                             Tensor branch, Tensor shift, Tensor scale,
                                                                             double eps) {
  std::vector<Tensor> keep;
  GateResidualLayerNormModulate p = gate_norm_params(branch, gate, shift, scale, keep);
  check_like(residual, branch, "residual");
  check_tokens(residual, "residual");
  Tensor x_new = torch::stable::empty_like(branch), y = torch::stable::empty_like(branch);
  Tensor mean = f32(branch, {p.B, p.T}), rstd = f32(branch, {p.B, p.T});
  p.eps = static_cast<float>(eps);
  p.residual = residual.const_data_ptr();
  p.x_new = x_new.mutable_data_ptr();
  p.y = y.mutable_data_ptr();
  p.mean = data<float>(mean);
  p.rstd = data<float>(rstd);
  kernels().gate_residual_layer_norm_modulate_fwd(p, parallel_for);
  return {x_new, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_layer_norm_modulate_bwd(MaybeTensor dx_new, Tensor dy,
                                                                                         Tensor x_new, Tensor mean,
                                                                                         Tensor rstd, Tensor gate,
                                                                                         Tensor branch, Tensor shift,
                                                                                         Tensor scale) {
  std::vector<Tensor> keep;
  GateResidualLayerNormModulate p = gate_norm_params(branch, gate, shift, scale, keep);
  for (const Tensor* t : {&dy, &x_new}) check_like(*t, branch, "dy and x_new"), check_tokens(*t, "dy and x_new");
  if (dx_new) check_like(*dx_new, branch, "dx_new"), check_tokens(*dx_new, "dx_new");
  p.dx_new = dx_new ? dx_new->const_data_ptr() : nullptr;
  p.dy = dy.const_data_ptr();
  p.x_new = x_new.mutable_data_ptr();
  p.mean = const_cast<float*>(as_f32(mean, p.B * p.T, keep, "mean"));
  p.rstd = const_cast<float*>(as_f32(rstd, p.B * p.T, keep, "rstd"));
  Tensor dresidual = torch::stable::empty_like(branch), dbranch = torch::stable::empty_like(branch);
  Tensor dgate = gate_gradient(branch, false, p.gate.per_token);
  Tensor dshift = p.shift.per_token ? absent() : f32(branch, {p.B, p.D});
  Tensor dscale = gate_gradient(branch, false, p.scale.per_token);
  p.dresidual = dresidual.mutable_data_ptr();
  p.dbranch = dbranch.mutable_data_ptr();
  p.dgate = dgate.mutable_data_ptr();
  if (!p.shift.per_token) p.dshift = data<float>(dshift);
  p.dscale = dscale.mutable_data_ptr();
  const Workspace workspace(kernels().gate_residual_layer_norm_modulate_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().gate_residual_layer_norm_modulate_bwd(p, parallel_for);
  return {dresidual, dgate, dbranch, dshift, dscale};
}

// ---- activation, is_zero --------------------------------------------------------------------------------------------

Activation activation_params(const Tensor& x, int64_t act) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && act >= 0 && act <= 2,
                  "zeroblock: activation needs a dense tensor");
  Activation p{};
  p.dtype = dtype_of(x);
  p.act = static_cast<Act>(act);
  p.n = x.numel();
  p.x = x.const_data_ptr();
  return p;
}

Tensor activation(Tensor x, int64_t act) {
  Activation p = activation_params(x, act);
  Tensor y = torch::stable::empty_like(x);
  p.y = y.mutable_data_ptr();
  kernels().activation_fwd(p, parallel_for);
  return y;
}

// Returns act(x) too: both come from one read of x.
std::tuple<Tensor, Tensor> activation_bwd(Tensor dy, Tensor x, int64_t act, bool need_y) {
  Activation p = activation_params(x, act);
  check_like(dy, x, "dy");
  STD_TORCH_CHECK(dy.is_contiguous(), "zeroblock: dy must be dense");
  Tensor dx = torch::stable::empty_like(x), y = need_y ? torch::stable::empty_like(x) : absent();
  p.dy = dy.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.y = need_y ? y.mutable_data_ptr() : nullptr;
  kernels().activation_bwd(p, parallel_for);
  return {dx, y};
}

// x + bias; bias runs along the innermost dimension in memory (last) or along dimension 1 of a contiguous x.
Tensor add_bias(Tensor x, MaybeTensor bias, bool last) {
  std::vector<Tensor> keep;
  AddBias p{};
  p.dtype = dtype_of(x);
  p.C = bias ? bias->numel() : 1;
  p.S = 1;
  if (!bias) {
    p.S = x.numel();
  } else if (!last) {
    for (int64_t d = 2; d < x.dim(); ++d) p.S *= x.size(d);
  }
  p.R = p.C * p.S > 0 ? x.numel() / (p.C * p.S) : 0;
  STD_TORCH_CHECK(x.is_cpu() && p.R * p.C * p.S == x.numel(), "zeroblock: bias does not fit x");
  p.bias = as_f32(bias, p.C, keep, "bias");
  Tensor y = torch::stable::empty_like(x);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  kernels().add_bias(p, parallel_for);
  return y;
}

// True when every element of a dense float32, float64, bfloat16 or float16 tensor is +0 or -0, judged by its bits.
bool is_zero(Tensor t) {
  STD_TORCH_CHECK(t.is_cpu(), "zeroblock: is_zero reads CPU memory");
  const ScalarType type = t.scalar_type();
  const int size = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  STD_TORCH_CHECK(size != 2 || type == ScalarType::BFloat16 || type == ScalarType::Half, "zeroblock: is_zero dtype");
  return kernels().is_zero(t.const_data_ptr(), t.numel() * size, size, parallel_for);
}

std::string isa() { return cpu_kernels() ? cpu_kernels()->isa : ""; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zeroblock, m) {
  m.def(
      "_group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps, "
      "bool silu, bool channels_last) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_group_norm_silu_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
      "Tensor? scale, Tensor? shift, int groups, bool silu, bool channels_last) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps, "
      "bool rms) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_layer_norm_modulate_bwd(Tensor dy, Tensor x, Tensor? mean, Tensor rstd, Tensor? shift, Tensor? scale, "
      "Tensor? weight, Tensor? bias, bool rms) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_gate_residual(Tensor residual, Tensor gate, Tensor branch) -> Tensor");
  m.def(
      "_gate_residual_bwd(Tensor dy, Tensor gate, Tensor branch, bool need_dgate, bool need_dbranch) "
      "-> (Tensor, Tensor)");
  m.def(
      "_gate_residual_layer_norm_modulate(Tensor residual, Tensor gate, Tensor branch, Tensor shift, Tensor scale, "
      "float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_gate_residual_layer_norm_modulate_bwd(Tensor? dx_new, Tensor dy, Tensor x_new, Tensor mean, Tensor rstd, "
      "Tensor gate, Tensor branch, Tensor shift, Tensor scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_activation(Tensor x, int act) -> Tensor");
  m.def("_activation_bwd(Tensor dy, Tensor x, int act, bool need_y) -> (Tensor, Tensor)");
  m.def("_add_bias(Tensor x, Tensor? bias, bool last) -> Tensor");
  m.def("_is_zero(Tensor t) -> bool");
  m.def("_cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(zeroblock, CPU, m) {
  m.impl("_group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("_group_norm_silu_bwd", TORCH_BOX(&group_norm_silu_bwd));
  m.impl("_layer_norm_modulate", TORCH_BOX(&layer_norm_modulate));
  m.impl("_layer_norm_modulate_bwd", TORCH_BOX(&layer_norm_modulate_bwd));
  m.impl("_gate_residual", TORCH_BOX(&gate_residual));
  m.impl("_gate_residual_bwd", TORCH_BOX(&gate_residual_bwd));
  m.impl("_gate_residual_layer_norm_modulate", TORCH_BOX(&gate_residual_layer_norm_modulate));
  m.impl("_gate_residual_layer_norm_modulate_bwd", TORCH_BOX(&gate_residual_layer_norm_modulate_bwd));
  m.impl("_activation", TORCH_BOX(&activation));
  m.impl("_activation_bwd", TORCH_BOX(&activation_bwd));
  m.impl("_add_bias", TORCH_BOX(&add_bias));
  m.impl("_is_zero", TORCH_BOX(&is_zero));
}

STABLE_TORCH_LIBRARY_IMPL(zeroblock, CompositeExplicitAutograd, m) { m.impl("_cpu_isa", TORCH_BOX(&isa)); }

#include "binding_winograd.h"
