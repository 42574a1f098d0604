// The torch side of the CUDA convolution and of zero_flag (../cuda/cuda_kernels.h).
#include "cuda.h"

#ifndef ZB_CUDA_ARCHS
#define ZB_CUDA_ARCHS "emulated"
#endif

namespace {

// ---- zero_flag ------------------------------------------------------------------------------------------------------

// words: int64 zeros that launches on the current stream share (kernels/_counters.py).
Tensor zero_flag(std::vector<Tensor> tensors, bool any_of, Tensor words) {
  STD_TORCH_CHECK(!tensors.empty(), "zero_flag: tensors must not be empty");
  STD_TORCH_CHECK(!any_of || tensors.size() <= cuda::kZeroFlagTogether, "zero_flag: any_of takes ",
                  cuda::kZeroFlagTogether, " tensors at most, got ", tensors.size());
  STD_TORCH_CHECK(is_here(words) && words.scalar_type() == ScalarType::Long && words.numel() >= cuda::kZeroFlagTensors,
                  "zero_flag: words must be ", cuda::kZeroFlagTensors, " int64 on the ", device_name());
  const Here here(tensors[0]);
  const int64_t count = any_of ? 1 : static_cast<int64_t>(tensors.size());
  Tensor flags = torch::stable::new_empty(tensors[0], {count}, ScalarType::Int);
  for (size_t first = 0; first < tensors.size(); first += cuda::kZeroFlagTensors) {
    cuda::ZeroFlag p{};
    for (size_t i = first; i < tensors.size() && p.count < cuda::kZeroFlagTensors; ++i) {
      const Tensor& t = tensors[i];
      const int size = zero_test_size(t);
      STD_TORCH_CHECK(t.is_contiguous(), "zero_flag: tensors must be dense");
      p.data[p.count] = t.const_data_ptr();
      p.bytes[p.count] = t.numel() * size;
      p.element_size[p.count++] = size;
    }
    p.any_of = any_of;
    p.flags = static_cast<int32_t*>(flags.mutable_data_ptr()) + first;
    p.words = static_cast<unsigned long long*>(words.mutable_data_ptr());
    check_launch("zero_flag", cuda::zero_flag(p, here.stream));
  }
  return flags;
}

// ---- conv_residual, group_norm_silu_conv_residual -------------------------------------------------------------------

void check_image(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(is_here(t) && t.dim() == 4 && t.is_contiguous(), "conv_residual: ", what, " must be dense, 4-D");
}

// x [N, H, W, C], weight [K, k, k, C], residual [N, H, W, K]: channels-last tensors seen in memory order.
// (y, partial statistics of y when asked for); with mean and rstd h = silu(norm(x)), else h = x.
std::tuple<Tensor, Tensor> conv_residual(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor residual,
                                         MaybeTensor mean, MaybeTensor rstd, MaybeTensor norm_weight,
                                         MaybeTensor norm_bias, MaybeTensor scale, MaybeTensor shift, bool partial,
                                         MaybeTensor zero) {
  const Here here(x);
  std::vector<Tensor> copies;
  check_image(x, "x");
  check_image(weight, "weight");
  cuda::ConvResidual p{};
  p.dtype = dtype_of(x);
  p.N = x.size(0);
  p.H = x.size(1);
  p.W = x.size(2);
  p.C = x.size(3);
  p.K = weight.size(0);
  p.kernel = static_cast<int>(weight.size(1));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && p.dtype != DType::kF32 && weight.size(3) == p.C &&
                      weight.size(2) == p.kernel && (p.kernel == 1 || p.kernel == 3) && p.C % 8 == 0 && p.K % 8 == 0 &&
                      p.C > 0,
                  "conv_residual: the CUDA kernel takes bfloat16 or float16, 3x3 or 1x1, channels divisible by 8");
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = as_operand(bias, x, {p.K}, copies, "bias");
  if (residual) {
    check_image(*residual, "residual");
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type() && residual->numel() == p.N * p.H * p.W * p.K,
                    "conv_residual: residual must match the output");
    p.residual = residual->const_data_ptr();
  }
  if (mean) {
    p.G = mean->size(1);
    STD_TORCH_CHECK(rstd.has_value() && p.G > 0 && p.C % p.G == 0, "conv_residual: mean and rstd must be [N, G]");
    p.mean = as_f32(mean, p.N * p.G, copies, "mean");
    p.rstd = as_f32(rstd, p.N * p.G, copies, "rstd");
    p.norm_weight = as_operand(norm_weight, x, {p.C}, copies, "norm_weight");
    p.norm_bias = as_operand(norm_bias, x, {p.C}, copies, "norm_bias");
    p.scale = as_operand(scale, x, {p.N, p.C}, copies, "scale");
    p.shift = as_operand(shift, x, {p.N, p.C}, copies, "shift");
  }
  p.zero = zero_of(zero);
  Tensor y = torch::stable::new_empty(x, {p.N, p.H, p.W, p.K}), statistics = absent();
  p.y = y.mutable_data_ptr();
  if (partial) {
    statistics = f32(x, {p.N, cuda::conv_residual_tiles(p), p.K, cuda::kConvMoments});
    p.partial = data<float>(statistics);
  }
  for (const void* t : {p.x, p.weight, p.residual}) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t) % 16 == 0,
                    "conv_residual: x, weight and residual must start at 16 bytes");
  }
  check_launch(mean ? "group_norm_silu_conv_residual" : "conv_residual", cuda::conv_residual_fwd(p, here.stream));
  return {y, statistics};
}

// mean and rstd [N, groups] of y [N, H, W, K] from the partial statistics of its convolution.
std::tuple<Tensor, Tensor> conv_moments(Tensor partial, Tensor y, int64_t groups, double eps) {
  const Here here(y);
  check_image(y, "y");
  cuda::ConvMoments p{};
  p.N = y.size(0);
  p.H = y.size(1);
  p.W = y.size(2);
  p.K = y.size(3);
  p.G = groups;
  p.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(groups > 0 && p.K % groups == 0 && is_here(partial) && partial.is_contiguous() &&
                      partial.scalar_type() == ScalarType::Float && partial.dim() == 4 && partial.size(0) == p.N &&
                      partial.size(2) == p.K && partial.size(3) == cuda::kConvMoments,
                  "conv_moments: partial must be what conv_residual returned for y");
  p.partial = data<float>(partial);
  Tensor mean = f32(y, {p.N, p.G}), rstd = f32(y, {p.N, p.G});
  p.mean = data<float>(mean);
  p.rstd = data<float>(rstd);
  check_launch("conv_moments", cuda::conv_moments(p, here.stream));
  return {mean, rstd};
}

std::string archs() { return ZB_CUDA_ARCHS; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ZB_NAMESPACE, m) {
  m.def("_zero_flag_cuda(Tensor[] tensors, bool any_of, Tensor(a!) words) -> Tensor");
  m.def(
      "_conv_residual_cuda(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? rstd, "
      "Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? shift, bool partial, Tensor? zero) "
      "-> (Tensor, Tensor)");
  m.def("_conv_moments_cuda(Tensor partial, Tensor y, int groups, float eps) -> (Tensor, Tensor)");
  m.def("_cuda_archs() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ZB_NAMESPACE, ZB_KEY, m) {
  m.impl("_zero_flag_cuda", TORCH_BOX(&zero_flag));
  m.impl("_conv_residual_cuda", TORCH_BOX(&conv_residual));
  m.impl("_conv_moments_cuda", TORCH_BOX(&conv_moments));
}

STABLE_TORCH_LIBRARY_IMPL(ZB_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("_cuda_archs", TORCH_BOX(&archs)); }
