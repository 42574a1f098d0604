// The torch side of residual_norm_modulate (../cuda/residual_norm_tile.cuh).
#include "cuda.h"

namespace {

// [D] in its own dtype.
Operand vector_operand(const MaybeTensor& t, int64_t D, std::vector<Tensor>& copies, const char* what) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(is_here(*t) && t->dim() == 1 && t->size(0) == D, "zeroblock: ", what, " must be [D]");
  copies.push_back(D > 1 && t->stride(0) != 1 ? torch::stable::contiguous(*t) : *t);
  return {copies.back().const_data_ptr(), dtype_of(*t), false, 0, 0};
}

// Rows of any form as they are; without rows there is no table.
cuda::RowOperand row_operand(const MaybeTensor& rows, const MaybeTensor& table, const cuda::ResidualNorm& p,
                             std::vector<Tensor>& copies, const char* what) {
  cuda::RowOperand o{};
  if (!rows.has_value()) return o;
  const bool indexed = p.index != nullptr;
  const int64_t dims = rows->dim();
  const bool fits = dims == 1 || (dims == 2 && rows->size(0) == p.B && !indexed) ||
                    (dims == 3 && rows->size(0) == p.B && (indexed ? rows->size(1) >= p.K : rows->size(1) == p.T));
  STD_TORCH_CHECK(is_here(*rows) && fits && rows->size(dims - 1) == p.D && (p.D <= 1 || rows->stride(dims - 1) == 1),
                  "zeroblock: ", what, " must be rows of x with a dense last dimension");
  o.kind = dims == 1 ? RowKind::kOne : dims == 2 ? RowKind::kSample : indexed ? RowKind::kIndexed : RowKind::kToken;
  o.rows = {rows->const_data_ptr(), dtype_of(*rows), dims == 3, dims > 1 ? rows->stride(0) : 0,
            dims > 2 ? rows->stride(1) : 0};
  o.table = vector_operand(table, p.D, copies, what);
  return o;
}

struct Operands {
  MaybeTensor gate, gate_table, branch_weight, weight, bias, shift, shift_table, scale, scale_table, index;
  bool tanh, branch_rms, norm, rms;
};

// The index chooses of as many rows as the shortest operand has.
int64_t rows_of_a_sample(const Operands& o) {
  int64_t K = 0;
  for (const MaybeTensor* rows : {&o.gate, &o.shift, &o.scale}) {
    if (*rows && (*rows)->dim() == 3 && (K == 0 || (*rows)->size(1) < K)) K = (*rows)->size(1);
  }
  STD_TORCH_CHECK(K > 0, "zeroblock: an index needs rows to choose from");
  return K;
}

cuda::ResidualNorm params_of(const Tensor& x, const MaybeTensor& branch, const Operands& o,
                             std::vector<Tensor>& copies) {
  check_tokens(x, "x");
  cuda::ResidualNorm p{};
  p.B = x.size(0), p.T = x.size(1), p.D = x.size(2);
  STD_TORCH_CHECK(p.D <= cuda::kMostRow, "zeroblock: rows must have at most ", cuda::kMostRow, " columns");
  p.K = 1;
  if (o.index) {
    STD_TORCH_CHECK(is_here(*o.index) && o.index->scalar_type() == ScalarType::Int && o.index->is_contiguous() &&
                        o.index->numel() == p.B * p.T,
                    "zeroblock: index must be dense int32 [B, T]");
    p.index = static_cast<const int32_t*>(o.index->const_data_ptr());
    p.K = rows_of_a_sample(o);
  }
  if (branch) {
    check_tokens(*branch, "branch");
    STD_TORCH_CHECK(branch->numel() == x.numel() && branch->size(2) == p.D, "zeroblock: branch must be like x");
    p.branch = branch->const_data_ptr();
    p.branch_dtype = dtype_of(*branch);
    p.gate = row_operand(o.gate, o.gate_table, p, copies, "gate");
    p.branch_weight = vector_operand(o.branch_weight, p.D, copies, "branch_weight");
  }
  if (o.norm) {
    p.shift = row_operand(o.shift, o.shift_table, p, copies, "shift");
    p.scale = row_operand(o.scale, o.scale_table, p, copies, "scale");
    p.weight = vector_operand(o.weight, p.D, copies, "weight");
    p.bias = vector_operand(o.bias, p.D, copies, "bias");
  }
  p.tanh = o.tanh;
  p.branch_rms = branch && o.branch_rms;
  p.norm = o.norm;
  p.rms = o.rms;
  return p;
}

// norm: 0 none, 1 layer, 2 rms. (x_new, y, mean, rstd, branch_rstd)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_norm(
    Tensor residual, MaybeTensor branch, MaybeTensor gate, MaybeTensor gate_table, bool tanh, bool branch_rms,
    MaybeTensor branch_weight, double branch_eps, int64_t norm, MaybeTensor weight, MaybeTensor bias, MaybeTensor shift,
    MaybeTensor shift_table, MaybeTensor scale, MaybeTensor scale_table, MaybeTensor index, double eps, int64_t x_dtype,
    int64_t y_dtype) {
  const Here here(residual);
  const Operands o = {gate,  gate_table,  branch_weight, weight, bias,       shift,     shift_table,
                      scale, scale_table, index,         tanh,   branch_rms, norm != 0, norm == 2};
  std::vector<Tensor> copies;
  auto p = params_of(residual, branch, o, copies);
  p.residual = residual.const_data_ptr();
  p.residual_dtype = dtype_of(residual);
  p.x_dtype = dtype_at(x_dtype);
  p.y_dtype = dtype_at(y_dtype);
  p.branch_eps = static_cast<float>(branch_eps);
  p.eps = static_cast<float>(eps);
  auto statistic = [&](bool wanted, float*& to) {
    if (!wanted) return absent();
    Tensor t = f32(residual, {p.B, p.T});
    to = data<float>(t);
    return t;
  };
  Tensor x_new = branch ? dense_like(residual, torch_dtype(p.x_dtype)) : absent();
  Tensor y = p.norm ? dense_like(residual, torch_dtype(p.y_dtype)) : absent();
  Tensor mean = statistic(p.norm && !p.rms, p.mean), rstd = statistic(p.norm, p.rstd);
  Tensor branch_rstd = statistic(p.branch_rms, p.branch_rstd);
  if (branch) p.x_new = x_new.mutable_data_ptr();
  if (p.norm) p.y = y.mutable_data_ptr();
  check_launch("residual_norm_modulate", cuda::residual_norm_fwd(p, here.stream));
  return {x_new, y, mean, rstd, branch_rstd};
}

// Dense, in the dtype and size of its operand.
Tensor gradient(const MaybeTensor& operand, bool wanted, Grad& to) {
  if (!wanted || !operand) return absent();
  std::vector<int64_t> size, stride(operand->dim());
  for (int64_t d = 0; d < operand->dim(); ++d) size.push_back(operand->size(d));
  int64_t next = 1;
  for (int64_t d = operand->dim() - 1; d >= 0; --d) stride[d] = next, next *= size[d] > 0 ? size[d] : 1;
  Tensor t = allocate(*operand, operand->dim(), size.data(), stride.data(), dtype_id(*operand));
  to = {t.mutable_data_ptr(), dtype_of(*operand)};
  return t;
}

using T = Tensor;
// With an index also `order`, int64 [B, T], and `bounds`, int32 [B, K + 1] (../cuda/cuda_kernels.h). needed: bits, of
// the gradients of residual, branch, gate, gate_table, branch_weight, weight, bias, shift, shift_table, scale,
// scale_table.
std::tuple<T, T, T, T, T, T, T, T, T, T, T> residual_norm_bwd(
    MaybeTensor dx_new, MaybeTensor dy, Tensor x, MaybeTensor mean, MaybeTensor rstd, MaybeTensor branch_rstd,
    MaybeTensor branch, MaybeTensor gate, MaybeTensor gate_table, bool tanh, bool branch_rms, MaybeTensor branch_weight,
    MaybeTensor weight, MaybeTensor bias, MaybeTensor shift, MaybeTensor shift_table, MaybeTensor scale,
    MaybeTensor scale_table, MaybeTensor index, MaybeTensor order, MaybeTensor bounds, int64_t residual_dtype,
    int64_t needed) {
  const Here here(x);
  const Operands o = {gate,  gate_table,  branch_weight, weight, bias,       shift,          shift_table,
                      scale, scale_table, index,         tanh,   branch_rms, dy.has_value(), !mean.has_value()};
  std::vector<Tensor> copies;
  auto p = params_of(x, branch, o, copies);
  STD_TORCH_CHECK(dx_new || dy, "zeroblock: dx_new or dy must be given");
  for (const MaybeTensor* t : {&dx_new, &dy}) {
    if (*t) check_tokens(**t, "dx_new and dy");
    STD_TORCH_CHECK(!*t || (*t)->numel() == x.numel(), "zeroblock: dx_new and dy must be like x");
  }
  STD_TORCH_CHECK(!dx_new || dx_new->scalar_type() == x.scalar_type(), "zeroblock: dx_new must have the dtype of x");
  STD_TORCH_CHECK((!dy || rstd) && (!p.branch_rms || branch_rstd), "zeroblock: a norm needs its rstd");
  p.x = x.const_data_ptr();
  p.x_dtype = dtype_of(x);
  p.residual_dtype = dtype_at(residual_dtype);
  if (dx_new) p.dx_new = dx_new->const_data_ptr();
  if (dy) p.dy = dy->const_data_ptr(), p.y_dtype = dtype_of(*dy);
  p.mean = const_cast<float*>(as_f32(mean, p.B * p.T, copies, "mean"));
  p.rstd = const_cast<float*>(as_f32(rstd, p.B * p.T, copies, "rstd"));
  p.branch_rstd = const_cast<float*>(as_f32(branch_rstd, p.B * p.T, copies, "branch_rstd"));
  if (index) {
    STD_TORCH_CHECK(order && order->scalar_type() == ScalarType::Long && order->is_contiguous() && is_here(*order) &&
                        order->numel() == p.B * p.T,
                    "zeroblock: order must be dense int64 [B, T]");
    STD_TORCH_CHECK(bounds && bounds->scalar_type() == ScalarType::Int && bounds->is_contiguous() && is_here(*bounds) &&
                        bounds->numel() == p.B * (p.K + 1),
                    "zeroblock: bounds must be dense int32 [B, K + 1]");
    p.order = static_cast<const int64_t*>(order->const_data_ptr());
    p.bounds = static_cast<const int32_t*>(bounds->const_data_ptr());
  }
  const auto wanted = [&](int place) { return (needed >> place & 1) != 0; };
  Tensor dresidual = wanted(0) ? dense_like(x, torch_dtype(p.residual_dtype)) : absent();
  Tensor dbranch = branch && wanted(1) ? dense_like(*branch) : absent();
  if (wanted(0)) p.dresidual = dresidual.mutable_data_ptr();
  if (branch && wanted(1)) p.dbranch = dbranch.mutable_data_ptr();
  const bool gated = branch && gate, shifted = p.norm && shift, scaled = p.norm && scale;
  Tensor dgate = gradient(gate, wanted(2) && gated, p.gate.drows);
  Tensor dgate_table = gradient(gate_table, wanted(3) && gated, p.gate.dtable);
  Tensor dbranch_weight = gradient(branch_weight, wanted(4) && branch, p.dbranch_weight);
  Tensor dweight = gradient(weight, wanted(5) && p.norm, p.dweight);
  Tensor dbias = gradient(bias, wanted(6) && p.norm, p.dbias);
  Tensor dshift = gradient(shift, wanted(7) && shifted, p.shift.drows);
  Tensor dshift_table = gradient(shift_table, wanted(8) && shifted, p.shift.dtable);
  Tensor dscale = gradient(scale, wanted(9) && scaled, p.scale.drows);
  Tensor dscale_table = gradient(scale_table, wanted(10) && scaled, p.scale.dtable);
  Tensor scratch = workspace(x, cuda::residual_norm_bwd_workspace(p));
  p.workspace = data<float>(scratch);
  check_launch("residual_norm_modulate_bwd", cuda::residual_norm_bwd(p, here.stream));
  return {dresidual, dbranch, dgate,        dgate_table, dbranch_weight, dweight,
          dbias,     dshift,  dshift_table, dscale,      dscale_table};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ZB_NAMESPACE, m) {
  m.def(
      "_residual_norm_cuda(Tensor residual, Tensor? branch, Tensor? gate, Tensor? gate_table, bool tanh, "
      "bool branch_rms, Tensor? branch_weight, float branch_eps, int norm, Tensor? weight, Tensor? bias, "
      "Tensor? shift, Tensor? shift_table, Tensor? scale, Tensor? scale_table, Tensor? index, float eps, int x_dtype, "
      "int y_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_residual_norm_bwd_cuda(Tensor? dx_new, Tensor? dy, Tensor x, Tensor? mean, Tensor? rstd, Tensor? branch_rstd, "
      "Tensor? branch, Tensor? gate, Tensor? gate_table, bool tanh, bool branch_rms, Tensor? branch_weight, "
      "Tensor? weight, Tensor? bias, Tensor? shift, Tensor? shift_table, Tensor? scale, Tensor? scale_table, "
      "Tensor? index, Tensor? order, Tensor? bounds, int residual_dtype, int needed) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ZB_NAMESPACE, ZB_KEY, m) {
  m.impl("_residual_norm_cuda", TORCH_BOX(&residual_norm));
  m.impl("_residual_norm_bwd_cuda", TORCH_BOX(&residual_norm_bwd));
}
