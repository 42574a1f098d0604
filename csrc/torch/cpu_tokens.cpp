// The torch side of the ops on tokens [B, T, D]: layer_norm_modulate, gate_residual and both in one (../cpu).
#include "cpu.h"

namespace {

// ---- layer_norm_modulate, rms_norm_modulate -------------------------------------------------------------------------

LayerNormModulate layer_norm_params(const Tensor& x, const MaybeTensor& shift, const MaybeTensor& scale,
                                    const MaybeTensor& weight, const MaybeTensor& bias, bool rms,
                                    std::vector<Tensor>& copies) {
  LayerNormModulate p = token_params<LayerNormModulate>(x, "x");
  p.rms = rms;
  p.x = x.const_data_ptr();
  p.weight = as_f32(weight, p.D, copies, "weight");
  p.bias = as_f32(bias, p.D, copies, "bias");
  p.shift = as_rows(shift, x, copies, "shift");
  p.scale = as_rows(scale, x, copies, "scale");
  return p;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate(Tensor x, MaybeTensor shift, MaybeTensor scale,
                                                       MaybeTensor weight, MaybeTensor bias, double eps, bool rms) {
  std::vector<Tensor> copies;
  LayerNormModulate p = layer_norm_params(x, shift, scale, weight, bias, rms, copies);
  Tensor y = dense_like(x), mean = rms ? absent() : f32(x, {p.B, p.T}), rstd = f32(x, {p.B, p.T});
  p.eps = static_cast<float>(eps);
  p.y = y.mutable_data_ptr();
  p.mean = rms ? nullptr : data<float>(mean);
  p.rstd = data<float>(rstd);
  kernels().layer_norm_modulate_fwd(p, parallel_for);
  return {y, mean, rstd};
}

// The gradient of an operand in the type in which the kernel reads it.
Tensor rows_gradient(const Rows& rows, const Tensor& x) {
  if (!rows.per_token) return f32(x, {x.size(0), x.size(2)});
  return dense_like(x, rows.fp32 ? aoti_torch_dtype_float32() : dtype_id(x));
}

// A per-token dshift equals dy and is not returned.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_modulate_bwd(Tensor dy, Tensor x, MaybeTensor mean,
                                                                           Tensor rstd, MaybeTensor shift,
                                                                           MaybeTensor scale, MaybeTensor weight,
                                                                           MaybeTensor bias, bool rms) {
  std::vector<Tensor> copies;
  LayerNormModulate p = layer_norm_params(x, shift, scale, weight, bias, rms, copies);
  check_like(dy, x, "dy");
  check_tokens(dy, "dy");
  p.mean = const_cast<float*>(as_f32(mean, p.B * p.T, copies, "mean"));
  p.rstd = const_cast<float*>(as_f32(rstd, p.B * p.T, copies, "rstd"));
  p.dy = dy.const_data_ptr();
  Tensor dx = dense_like(x);
  p.dx = dx.mutable_data_ptr();
  Tensor dshift = shift && !p.shift.per_token ? f32(x, {p.B, p.D}) : absent();
  Tensor dscale = scale ? rows_gradient(p.scale, x) : absent();
  Tensor dweight = weight ? f32(x, {p.D}) : absent(), dbias = bias ? f32(x, {p.D}) : absent();
  if (shift && !p.shift.per_token) p.dshift = data<float>(dshift);
  if (scale) p.dscale = dscale.mutable_data_ptr();
  if (weight) p.dweight = data<float>(dweight);
  if (bias) p.dbias = data<float>(dbias);
  const Workspace workspace(kernels().layer_norm_modulate_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().layer_norm_modulate_bwd(p, parallel_for);
  return {dx, as_gradient(dshift, shift), as_gradient(dscale, scale), as_gradient(dweight, weight),
          as_gradient(dbias, bias)};
}

// One norm, two modulations: all operands [B, D] or none.
LayerNormModulateTwo two_params(const Tensor& x, const MaybeTensor& shift, const MaybeTensor& scale,
                                const MaybeTensor& shift2, const MaybeTensor& scale2, bool rms,
                                std::vector<Tensor>& copies) {
  LayerNormModulateTwo p{};
  static_cast<LayerNormModulate&>(p) = layer_norm_params(x, shift, scale, {}, {}, rms, copies);
  p.shift2 = as_rows(shift2, x, copies, "shift2");
  p.scale2 = as_rows(scale2, x, copies, "scale2");
  STD_TORCH_CHECK(!p.shift.per_token && !p.scale.per_token && !p.shift2.per_token && !p.scale2.per_token,
                  "zeroblock: two modulations take one row for each sample");
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_modulate_two(Tensor x, MaybeTensor shift, MaybeTensor scale,
                                                                   MaybeTensor shift2, MaybeTensor scale2, double eps,
                                                                   bool rms) {
  std::vector<Tensor> copies;
  LayerNormModulateTwo p = two_params(x, shift, scale, shift2, scale2, rms, copies);
  Tensor y = dense_like(x), y2 = dense_like(x);
  Tensor mean = rms ? absent() : f32(x, {p.B, p.T}), rstd = f32(x, {p.B, p.T});
  p.eps = static_cast<float>(eps);
  p.y = y.mutable_data_ptr();
  p.y2 = y2.mutable_data_ptr();
  p.mean = rms ? nullptr : data<float>(mean);
  p.rstd = data<float>(rstd);
  kernels().layer_norm_modulate_two_fwd(p, parallel_for);
  return {y, y2, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_modulate_two_bwd(Tensor dy, Tensor dy2, Tensor x,
                                                                               MaybeTensor mean, Tensor rstd,
                                                                               MaybeTensor shift, MaybeTensor scale,
                                                                               MaybeTensor shift2, MaybeTensor scale2,
                                                                               bool rms) {
  std::vector<Tensor> copies;
  LayerNormModulateTwo p = two_params(x, shift, scale, shift2, scale2, rms, copies);
  for (const Tensor* t : {&dy, &dy2}) check_like(*t, x, "dy and dy2"), check_tokens(*t, "dy and dy2");
  p.mean = const_cast<float*>(as_f32(mean, p.B * p.T, copies, "mean"));
  STD_TORCH_CHECK(rms || mean, "zeroblock: mean must be given");
  p.rstd = const_cast<float*>(as_f32(rstd, p.B * p.T, copies, "rstd"));
  p.dy = dy.const_data_ptr();
  p.dy2 = dy2.const_data_ptr();
  Tensor dx = dense_like(x);
  p.dx = dx.mutable_data_ptr();
  const auto gradient = [&](const MaybeTensor& operand) { return operand ? f32(x, {p.B, p.D}) : absent(); };
  Tensor dshift = gradient(shift), dscale = gradient(scale), dshift2 = gradient(shift2), dscale2 = gradient(scale2);
  if (shift) p.dshift = data<float>(dshift);
  if (scale) p.dscale = dscale.mutable_data_ptr();
  if (shift2) p.dshift2 = data<float>(dshift2);
  if (scale2) p.dscale2 = data<float>(dscale2);
  const Workspace workspace(kernels().layer_norm_modulate_two_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().layer_norm_modulate_two_bwd(p, parallel_for);
  return {dx, as_gradient(dshift, shift), as_gradient(dscale, scale), as_gradient(dshift2, shift2),
          as_gradient(dscale2, scale2)};
}

// ---- gate_residual --------------------------------------------------------------------------------------------------

Rows gate_rows(const Tensor& gate, const Tensor& branch, std::vector<Tensor>& copies) {
  STD_TORCH_CHECK(gate.dim() < 3 || gate.scalar_type() == branch.scalar_type(),
                  "zeroblock: a gate per token must have the dtype of branch");
  return as_rows(gate, branch, copies, "gate");
}

GateResidual gate_params(const Tensor& branch, const Tensor& gate, std::vector<Tensor>& copies) {
  GateResidual p = token_params<GateResidual>(branch, "branch");
  p.branch = branch.const_data_ptr();
  if (gate.dim() == 1 && gate.numel() == 1) {
    p.scalar_gate = as_f32(gate, 1, copies, "gate");
  } else {
    p.gate = gate_rows(gate, branch, copies);
  }
  return p;
}

Tensor gate_residual(Tensor residual, Tensor gate, Tensor branch) {
  std::vector<Tensor> copies;
  GateResidual p = gate_params(branch, gate, copies);
  check_like(residual, branch, "residual");
  check_tokens(residual, "residual");
  Tensor y = dense_like(branch);
  p.residual = residual.const_data_ptr();
  p.y = y.mutable_data_ptr();
  kernels().gate_residual_fwd(p, parallel_for);
  return y;
}

// The gradient of a [D] or [1] gate stays fp32: the caller sums it further.
Tensor as_gate_gradient(const Tensor& dgate, const Tensor& gate) {
  return gate.dim() > 1 ? as_gradient(dgate, gate) : dgate;
}

std::tuple<Tensor, Tensor> gate_residual_bwd(Tensor dy, Tensor gate, Tensor branch, bool need_dgate,
                                             bool need_dbranch) {
  std::vector<Tensor> copies;
  GateResidual p = gate_params(branch, gate, copies);
  check_like(dy, branch, "dy");
  check_tokens(dy, "dy");
  p.dy = dy.const_data_ptr();
  Tensor dgate = !need_dgate ? absent() : p.scalar_gate ? f32(branch, {1}) : rows_gradient(p.gate, branch);
  Tensor dbranch = need_dbranch ? dense_like(branch) : absent();
  if (need_dgate) p.dgate = dgate.mutable_data_ptr();
  if (need_dbranch) p.dbranch = dbranch.mutable_data_ptr();
  const Workspace workspace(kernels().gate_residual_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().gate_residual_bwd(p, parallel_for);
  return {need_dgate ? as_gate_gradient(dgate, gate) : dgate, dbranch};
}

// ---- gate_residual_layer_norm_modulate ------------------------------------------------------------------------------

GateResidualLayerNormModulate gate_norm_params(const Tensor& branch, const Tensor& gate, const Tensor& shift,
                                               const Tensor& scale, std::vector<Tensor>& copies) {
  GateResidualLayerNormModulate p = token_params<GateResidualLayerNormModulate>(branch, "branch");
  p.branch = branch.const_data_ptr();
  p.gate = gate_rows(gate, branch, copies);
  p.shift = as_rows(shift, branch, copies, "shift");
  p.scale = as_rows(scale, branch, copies, "scale");
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_layer_norm_modulate(Tensor residual, Tensor gate,
                                                                             Tensor branch, Tensor shift, Tensor scale,
                                                                             double eps) {
  std::vector<Tensor> copies;
  GateResidualLayerNormModulate p = gate_norm_params(branch, gate, shift, scale, copies);
  check_like(residual, branch, "residual");
  check_tokens(residual, "residual");
  Tensor x_new = dense_like(branch), y = dense_like(branch);
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
  std::vector<Tensor> copies;
  GateResidualLayerNormModulate p = gate_norm_params(branch, gate, shift, scale, copies);
  for (const Tensor* t : {&dy, &x_new}) check_like(*t, branch, "dy and x_new"), check_tokens(*t, "dy and x_new");
  if (dx_new) check_like(*dx_new, branch, "dx_new"), check_tokens(*dx_new, "dx_new");
  p.dx_new = dx_new ? dx_new->const_data_ptr() : nullptr;
  p.dy = dy.const_data_ptr();
  p.x_new = x_new.mutable_data_ptr();
  p.mean = const_cast<float*>(as_f32(mean, p.B * p.T, copies, "mean"));
  p.rstd = const_cast<float*>(as_f32(rstd, p.B * p.T, copies, "rstd"));
  Tensor dresidual = dense_like(branch), dbranch = dense_like(branch);
  Tensor dgate = rows_gradient(p.gate, branch);
  Tensor dshift = p.shift.per_token ? absent() : f32(branch, {p.B, p.D});
  Tensor dscale = rows_gradient(p.scale, branch);
  p.dresidual = dresidual.mutable_data_ptr();
  p.dbranch = dbranch.mutable_data_ptr();
  p.dgate = dgate.mutable_data_ptr();
  if (!p.shift.per_token) p.dshift = data<float>(dshift);
  p.dscale = dscale.mutable_data_ptr();
  const Workspace workspace(kernels().gate_residual_layer_norm_modulate_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().gate_residual_layer_norm_modulate_bwd(p, parallel_for);
  return {dresidual, as_gate_gradient(dgate, gate), dbranch, p.shift.per_token ? dshift : as_gradient(dshift, shift),
          as_gradient(dscale, scale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zeroblock, m) {
  m.def(
      "_layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps, "
      "bool rms) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_layer_norm_modulate_bwd(Tensor dy, Tensor x, Tensor? mean, Tensor rstd, Tensor? shift, Tensor? scale, "
      "Tensor? weight, Tensor? bias, bool rms) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_layer_norm_modulate_two(Tensor x, Tensor? shift, Tensor? scale, Tensor? shift2, Tensor? scale2, float eps, "
      "bool rms) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_layer_norm_modulate_two_bwd(Tensor dy, Tensor dy2, Tensor x, Tensor? mean, Tensor rstd, Tensor? shift, "
      "Tensor? scale, Tensor? shift2, Tensor? scale2, bool rms) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
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
}

STABLE_TORCH_LIBRARY_IMPL(zeroblock, CPU, m) {
  m.impl("_layer_norm_modulate", TORCH_BOX(&layer_norm_modulate));
  m.impl("_layer_norm_modulate_bwd", TORCH_BOX(&layer_norm_modulate_bwd));
  m.impl("_layer_norm_modulate_two", TORCH_BOX(&layer_norm_modulate_two));
  m.impl("_layer_norm_modulate_two_bwd", TORCH_BOX(&layer_norm_modulate_two_bwd));
  m.impl("_gate_residual", TORCH_BOX(&gate_residual));
  m.impl("_gate_residual_bwd", TORCH_BOX(&gate_residual_bwd));
  m.impl("_gate_residual_layer_norm_modulate", TORCH_BOX(&gate_residual_layer_norm_modulate));
  m.impl("_gate_residual_layer_norm_modulate_bwd", TORCH_BOX(&gate_residual_layer_norm_modulate_bwd));
}
