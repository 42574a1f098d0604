// The torch side of residual_norm_modulate (../cpu/residual_norm_modulate.h).
#include "cpu.h"

namespace {

// Rows of any form, as they are; without rows there is no table.
RowOperand row_operand(const MaybeTensor& rows, const MaybeTensor& table, const Tensor& x, bool indexed,
                       std::vector<Tensor>& copies, const char* what) {
  RowOperand a{};
  if (!rows.has_value()) return a;
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2), dims = rows->dim();
  const bool fits = dims == 1 || (dims == 2 && rows->size(0) == B) ||
                    (dims == 3 && rows->size(0) == B && (indexed ? rows->size(1) > 0 : rows->size(1) == T));
  STD_TORCH_CHECK(is_here(*rows) && fits && rows->size(dims - 1) == D && (D <= 1 || rows->stride(dims - 1) == 1),
                  "zeroblock: ", what, " must be rows of x with a dense last dimension");
  a.dtype = dtype_of(*rows);
  a.ptr = rows->const_data_ptr();
  a.kind = dims == 1 ? RowKind::kOne : dims == 2 ? RowKind::kSample : indexed ? RowKind::kIndexed : RowKind::kToken;
  a.stride_b = dims > 1 ? rows->stride(0) : 0;
  a.stride_r = dims > 2 ? rows->stride(1) : 0;
  a.count = dims > 2 ? rows->size(1) : 1;
  a.table = as_f32(table, D, copies, what);
  return a;
}

struct Operands {
  MaybeTensor gate, gate_table, branch_weight, weight, bias, shift, shift_table, scale, scale_table, index;
  bool tanh, branch_rms, normed, rms;
  double branch_eps, eps;
};

ResidualNormModulate params_of(const Tensor& x, const MaybeTensor& branch, const Operands& o,
                               std::vector<Tensor>& copies) {
  check_tokens(x, "x");
  ResidualNormModulate p{};
  p.B = x.size(0);
  p.T = x.size(1);
  p.D = x.size(2);
  if (branch) {
    check_tokens(*branch, "branch");
    STD_TORCH_CHECK(branch->numel() == x.numel() && branch->size(2) == p.D, "zeroblock: branch must be like x");
    p.branch = branch->const_data_ptr();
    p.branch_dtype = dtype_of(*branch);
  }
  if (o.index) {
    STD_TORCH_CHECK(is_here(*o.index) && o.index->scalar_type() == ScalarType::Int && o.index->is_contiguous() &&
                        o.index->numel() == p.B * p.T,
                    "zeroblock: index must be dense int32 [B, T]");
    p.index = static_cast<const int32_t*>(o.index->const_data_ptr());
  }
  const bool indexed = o.index.has_value();
  if (branch) p.gate = row_operand(o.gate, o.gate_table, x, indexed, copies, "gate");
  if (branch) p.branch_weight = as_f32(o.branch_weight, p.D, copies, "branch_weight");
  if (o.normed) {
    p.shift = row_operand(o.shift, o.shift_table, x, indexed, copies, "shift");
    p.scale = row_operand(o.scale, o.scale_table, x, indexed, copies, "scale");
    p.weight = as_f32(o.weight, p.D, copies, "weight");
    p.bias = as_f32(o.bias, p.D, copies, "bias");
  }
  p.tanh = o.tanh;
  p.branch_rms = branch && o.branch_rms;
  p.norm = o.normed;
  p.rms = o.rms;
  p.branch_eps = static_cast<float>(o.branch_eps);
  p.eps = static_cast<float>(o.eps);
  return p;
}

// norm: 0 none, 1 layer, 2 rms.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_norm_modulate(
    Tensor residual, MaybeTensor branch, MaybeTensor gate, MaybeTensor gate_table, bool tanh, bool branch_rms,
    MaybeTensor branch_weight, double branch_eps, int64_t norm, MaybeTensor weight, MaybeTensor bias, MaybeTensor shift,
    MaybeTensor shift_table, MaybeTensor scale, MaybeTensor scale_table, MaybeTensor index, double eps, int64_t x_dtype,
    int64_t y_dtype) {
  std::vector<Tensor> copies;
  const Operands o = {gate,        gate_table, branch_weight, weight,     bias,      shift,     shift_table, scale,
                      scale_table, index,      tanh,          branch_rms, norm != 0, norm == 2, branch_eps,  eps};
  ResidualNormModulate p = params_of(residual, branch, o, copies);
  p.residual = residual.const_data_ptr();
  p.residual_dtype = dtype_of(residual);
  p.x_dtype = dtype_at(x_dtype);
  p.y_dtype = dtype_at(y_dtype);
  Tensor x_new = branch ? dense_like(residual, torch_dtype(p.x_dtype)) : absent();
  Tensor y = p.norm ? dense_like(residual, torch_dtype(p.y_dtype)) : absent();
  Tensor mean = p.norm && !p.rms ? f32(residual, {p.B, p.T}) : absent();
  Tensor rstd = p.norm ? f32(residual, {p.B, p.T}) : absent();
  Tensor branch_rstd = p.branch_rms ? f32(residual, {p.B, p.T}) : absent();
  if (branch) p.x_new = x_new.mutable_data_ptr();
  if (p.norm) p.y = y.mutable_data_ptr(), p.rstd = data<float>(rstd);
  if (p.norm && !p.rms) p.mean = data<float>(mean);
  if (p.branch_rms) p.branch_rstd = data<float>(branch_rstd);
  kernels().residual_norm_modulate_fwd(p, parallel_for);
  return {x_new, y, mean, rstd, branch_rstd};
}

// The gradient of rows: of their own type where each token has one, else fp32, to be narrowed.
Tensor rows_gradient(RowOperand& a, const MaybeTensor& rows, bool wanted) {
  if (!wanted || !rows) return absent();
  std::vector<int64_t> size;
  for (int64_t d = 0; d < rows->dim(); ++d) size.push_back(rows->size(d));
  Tensor grad = f32(*rows, size);
  if (a.kind == RowKind::kToken && a.dtype != DType::kF32) grad = dense_like(grad, torch_dtype(a.dtype));
  a.grad = grad.mutable_data_ptr();
  return grad;
}

Tensor channels_gradient(float*& to, const MaybeTensor& operand, bool wanted) {
  if (!wanted || !operand) return absent();
  Tensor grad = f32(*operand, {operand->size(0)});
  to = data<float>(grad);
  return grad;
}

using T = Tensor;
// needed: of residual, branch, gate, gate_table, branch_weight, weight, bias, shift, shift_table, scale, scale_table.
std::tuple<T, T, T, T, T, T, T, T, T, T, T> residual_norm_modulate_bwd(
    MaybeTensor dx_new, MaybeTensor dy, Tensor x, MaybeTensor mean, MaybeTensor rstd, MaybeTensor branch_rstd,
    MaybeTensor branch, MaybeTensor gate, MaybeTensor gate_table, bool tanh, bool branch_rms, MaybeTensor branch_weight,
    MaybeTensor weight, MaybeTensor bias, MaybeTensor shift, MaybeTensor shift_table, MaybeTensor scale,
    MaybeTensor scale_table, MaybeTensor index, int64_t residual_dtype, int64_t needed) {
  std::vector<Tensor> copies;
  const bool normed = dy.has_value();
  const Operands o = {gate,        gate_table, branch_weight, weight,     bias,   shift, shift_table, scale,
                      scale_table, index,      tanh,          branch_rms, normed, !mean, 0.0,         0.0};
  ResidualNormModulate p = params_of(x, branch, o, copies);
  p.x = x.const_data_ptr();
  p.x_dtype = dtype_of(x);
  for (const MaybeTensor* t : {&dx_new, &dy}) {
    if (*t) check_tokens(**t, "dx_new and dy");
    STD_TORCH_CHECK(!*t || (*t)->numel() == x.numel(), "zeroblock: dx_new and dy must be like x");
  }
  STD_TORCH_CHECK(!dx_new || dx_new->scalar_type() == x.scalar_type(), "zeroblock: dx_new must have the dtype of x");
  STD_TORCH_CHECK(dx_new || dy, "zeroblock: dx_new or dy must be given");
  if (dx_new) p.dx_new = dx_new->const_data_ptr();
  if (dy) p.dy = dy->const_data_ptr(), p.y_dtype = dtype_of(*dy);
  if (normed) p.rstd = const_cast<float*>(as_f32(rstd, p.B * p.T, copies, "rstd"));
  STD_TORCH_CHECK(!normed || rstd, "zeroblock: rstd must be given");
  if (normed) p.mean = const_cast<float*>(as_f32(mean, p.B * p.T, copies, "mean"));
  p.branch_rstd = const_cast<float*>(as_f32(branch_rstd, p.B * p.T, copies, "branch_rstd"));
  STD_TORCH_CHECK(!p.branch_rms || branch_rstd, "zeroblock: branch_rstd must be given");
  p.residual_dtype = dtype_at(residual_dtype);
  const auto wanted = [&](int place) { return (needed >> place & 1) != 0; };
  Tensor dresidual = wanted(0) ? dense_like(x, torch_dtype(p.residual_dtype)) : absent();
  Tensor dbranch = branch && wanted(1) ? dense_like(*branch) : absent();
  if (wanted(0)) p.dresidual = dresidual.mutable_data_ptr();
  if (branch && wanted(1)) p.dbranch = dbranch.mutable_data_ptr();
  // The table's gradient is that of the rows, summed: chosen rows have theirs in any case.
  const auto rows = [&](RowOperand& a, const MaybeTensor& v, int place) {
    const bool for_table = a.kind == RowKind::kIndexed && wanted(place + 1) && a.table != nullptr;
    return a.kind == RowKind::kNone ? absent() : rows_gradient(a, v, wanted(place) || for_table);
  };
  const auto table = [&](RowOperand& a, const MaybeTensor& v, int place) {
    return a.kind == RowKind::kNone ? absent() : channels_gradient(a.dtable, v, wanted(place));
  };
  Tensor dgate = rows(p.gate, gate, 2), dgate_table = table(p.gate, gate_table, 3);
  Tensor dshift = rows(p.shift, shift, 7), dshift_table = table(p.shift, shift_table, 8);
  Tensor dscale = rows(p.scale, scale, 9), dscale_table = table(p.scale, scale_table, 10);
  Tensor dbranch_weight = branch ? channels_gradient(p.dbranch_weight, branch_weight, wanted(4)) : absent();
  Tensor dweight = normed ? channels_gradient(p.dweight, weight, wanted(5)) : absent();
  Tensor dbias = normed ? channels_gradient(p.dbias, bias, wanted(6)) : absent();
  const Workspace workspace(kernels().residual_norm_modulate_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().residual_norm_modulate_bwd(p, parallel_for);
  return {dresidual,
          dbranch,
          as_gradient(dgate, gate),
          as_gradient(dgate_table, gate_table),
          as_gradient(dbranch_weight, branch_weight),
          as_gradient(dweight, weight),
          as_gradient(dbias, bias),
          as_gradient(dshift, shift),
          as_gradient(dshift_table, shift_table),
          as_gradient(dscale, scale),
          as_gradient(dscale_table, scale_table)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zeroblock, m) {
  m.def(
      "_residual_norm_modulate(Tensor residual, Tensor? branch, Tensor? gate, Tensor? gate_table, bool tanh, "
      "bool branch_rms, Tensor? branch_weight, float branch_eps, int norm, Tensor? weight, Tensor? bias, Tensor? "
      "shift, "
      "Tensor? shift_table, Tensor? scale, Tensor? scale_table, Tensor? index, float eps, int x_dtype, int y_dtype) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_residual_norm_modulate_bwd(Tensor? dx_new, Tensor? dy, Tensor x, Tensor? mean, Tensor? rstd, "
      "Tensor? branch_rstd, Tensor? branch, Tensor? gate, Tensor? gate_table, bool tanh, bool branch_rms, "
      "Tensor? branch_weight, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? shift_table, Tensor? scale, "
      "Tensor? scale_table, Tensor? index, int residual_dtype, int needed) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(zeroblock, CPU, m) {
  m.impl("_residual_norm_modulate", TORCH_BOX(&residual_norm_modulate));
  m.impl("_residual_norm_modulate_bwd", TORCH_BOX(&residual_norm_modulate_bwd));
}
