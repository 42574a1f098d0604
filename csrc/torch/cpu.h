// What the CPU bindings alone need: the kernel table, the thread pool, operands in the CPU kernels' form, scratch
// memory.
#pragma once

#include <memory>

#include "args.h"

namespace {

inline bool is_here(const Tensor& t) { return t.is_cpu(); }
inline const char* device_name() { return "CPU"; }

inline const CpuKernels& kernels() {
  const CpuKernels* table = cpu_kernels();
  STD_TORCH_CHECK(table != nullptr, "zeroblock: this processor has neither AVX2+FMA+F16C nor AVX-512");
  return *table;
}

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* ctx) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(ctx, b, e); });
}

inline bool is_half(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
}

inline Tensor to_f32(const Tensor& t) {
  const int64_t dims = t.dim(), columns = dims > 0 ? t.size(dims - 1) : 1, rows = dims == 2 ? t.size(0) : 1;
  if (!is_half(t) || dims < 1 || dims > 2 || (columns > 1 && t.stride(dims - 1) != 1)) {
    return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
  }
  Tensor wide = dims == 2 ? f32(t, {rows, columns}) : f32(t, {columns});
  kernels().widen(dtype_of(t), t.const_data_ptr(), rows, columns, dims == 2 ? t.stride(0) : 0, data<float>(wide));
  return wide;
}

// A [B, D] operand (or one broadcast row, [D]) becomes fp32 rows; a [B, T, D] operand keeps its strides and its dtype,
// that of x or fp32.
inline Rows as_rows(const MaybeTensor& t, const Tensor& x, std::vector<Tensor>& copies, const char* what) {
  if (!t.has_value()) return {nullptr, false, 0, 0, true};
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  if (t->dim() == 3) {
    const bool fp32 = t->scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(t->is_cpu() && t->size(0) == B && t->size(1) == T && t->size(2) == D &&
                        (D <= 1 || t->stride(2) == 1) && (fp32 || t->scalar_type() == x.scalar_type()),
                    "zeroblock: ", what,
                    " per token must be [B, T, D] in the dtype of x or fp32, last dimension contiguous");
    return {t->const_data_ptr(), true, t->stride(0), t->stride(1), fp32};
  }
  if (t->dim() == 2 && t->scalar_type() == ScalarType::Float && t->is_cpu() && t->size(0) == B && t->size(1) == D &&
      (D <= 1 || t->stride(1) == 1)) {
    return {t->const_data_ptr(), false, t->stride(0), 0, true};
  }
  const bool one_row = t->dim() == 1;
  return {as_f32(t, one_row ? D : B * D, copies, what), false, one_row ? 0 : D, 0, true};
}

// A finished fp32 gradient in the dtype of its operand.
inline Tensor as_gradient(const Tensor& grad, const Tensor& operand) {
  if (grad.scalar_type() == operand.scalar_type()) return grad;
  if (!is_half(operand)) return torch::stable::to(grad, operand.scalar_type());
  Tensor narrowed = dense_like(grad, dtype_id(operand));
  kernels().narrow(dtype_of(operand), data<float>(grad), grad.numel(), narrowed.mutable_data_ptr());
  return narrowed;
}
inline Tensor as_gradient(const Tensor& grad, const MaybeTensor& operand) {
  return operand && grad.defined() ? as_gradient(grad, *operand) : grad;
}

// The parameters of group_norm_silu that forward, backward and statistics share.
inline GroupNormSilu group_norm_params(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                       const MaybeTensor& scale, const MaybeTensor& shift, int64_t groups, bool silu,
                                       bool channels_last, std::vector<Tensor>& copies, bool per_frame = false) {
  GroupNormSilu p = image_params<GroupNormSilu>(x, groups, silu, channels_last);
  if (per_frame) {
    STD_TORCH_CHECK(x.dim() == 5 && !channels_last, "zeroblock: the frames of a contiguous [N, C, T, H, W]");
    p.frames = x.size(2) > 0 ? x.size(2) : 1;
    p.N *= x.size(2);
    p.S = x.size(3) * x.size(4);
  }
  p.weight = as_f32(weight, p.C, copies, "weight");
  p.bias = as_f32(bias, p.C, copies, "bias");
  p.scale = as_f32(scale, p.N * p.C, copies, "scale");
  p.shift = as_f32(shift, p.N * p.C, copies, "shift");
  return p;
}

// Scratch memory of one call, not initialised.
struct Workspace {
  explicit Workspace(int64_t floats) : data(floats > 0 ? new float[floats] : nullptr) {}
  std::unique_ptr<float[]> data;
};

}  // namespace
