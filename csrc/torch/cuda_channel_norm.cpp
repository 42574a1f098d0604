// The torch side of channel_rms_norm_silu (../cuda/channel_rms_norm_silu.cu).
#include "cuda.h"

namespace {

cuda::ChannelRmsNormSilu channel_params(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                        const MaybeTensor& scale, const MaybeTensor& shift, bool silu,
                                        bool channels_last, std::vector<Tensor>& copies) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(1) <= cuda::kMostNormedChannels, "zeroblock: x must be [N, C, *] of at most ",
                  cuda::kMostNormedChannels, " channels");
  check_dense(x, channels_last, "x");
  cuda::ChannelRmsNormSilu p{};
  p.dtype = dtype_of(x);
  p.channels_last = channels_last;
  p.silu = silu;
  p.N = x.size(0);
  p.C = x.size(1);
  p.S = 1;
  for (int64_t d = 2; d < x.dim(); ++d) p.S *= x.size(d);
  p.x = x.const_data_ptr();
  p.weight = as_operand(weight, x, {p.C}, copies, "weight");
  p.bias = as_operand(bias, x, {p.C}, copies, "bias");
  p.scale = as_operand(scale, x, {p.N, p.C}, copies, "scale");
  p.shift = as_operand(shift, x, {p.N, p.C}, copies, "shift");
  return p;
}

// (y, rstd)
std::tuple<Tensor, Tensor> channel_rms_norm_silu(Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor scale,
                                                 MaybeTensor shift, double eps, bool eps_inside, bool silu,
                                                 bool channels_last) {
  const Here here(x);
  std::vector<Tensor> copies;
  auto p = channel_params(x, weight, bias, scale, shift, silu, channels_last, copies);
  p.eps = static_cast<float>(eps);
  p.eps_inside = eps_inside;
  std::vector<int64_t> pixels = {p.N};
  for (int64_t d = 2; d < x.dim(); ++d) pixels.push_back(x.size(d));
  Tensor y = dense_like(x), rstd = f32(x, pixels);
  p.y = y.mutable_data_ptr();
  p.rstd = data<float>(rstd);
  check_launch("channel_rms_norm_silu", cuda::channel_rms_norm_silu_fwd(p, here.stream));
  return {y, rstd};
}

// (dx, dweight, dbias, dscale, dshift)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_rms_norm_silu_bwd(Tensor dy, Tensor x, Tensor rstd,
                                                                             MaybeTensor weight, MaybeTensor bias,
                                                                             MaybeTensor scale, MaybeTensor shift,
                                                                             bool silu, bool channels_last) {
  const Here here(x);
  std::vector<Tensor> copies;
  auto p = channel_params(x, weight, bias, scale, shift, silu, channels_last, copies);
  check_like(dy, x, "dy");
  check_dense(dy, channels_last, "dy");
  p.dy = dy.const_data_ptr();
  p.rstd = const_cast<float*>(as_f32(rstd, p.N * p.S, copies, "rstd"));
  Tensor dx = dense_like(x);
  p.dx = dx.mutable_data_ptr();
  Tensor dweight = grad_of(p.weight, x, {p.C}, p.dweight), dbias = grad_of(p.bias, x, {p.C}, p.dbias);
  Tensor dscale = grad_of(p.scale, x, {p.N, p.C}, p.dscale), dshift = grad_of(p.shift, x, {p.N, p.C}, p.dshift);
  Tensor scratch = workspace(x, cuda::channel_rms_norm_silu_bwd_workspace(p));
  p.workspace = data<float>(scratch);
  check_launch("channel_rms_norm_silu_bwd", cuda::channel_rms_norm_silu_bwd(p, here.stream));
  return {dx, dweight, dbias, dscale, dshift};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ZB_NAMESPACE, m) {
  m.def(
      "_channel_rms_norm_silu_cuda(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, "
      "bool eps_inside, bool silu, bool channels_last) -> (Tensor, Tensor)");
  m.def(
      "_channel_rms_norm_silu_bwd_cuda(Tensor dy, Tensor x, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? scale, "
      "Tensor? shift, bool silu, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ZB_NAMESPACE, ZB_KEY, m) {
  m.impl("_channel_rms_norm_silu_cuda", TORCH_BOX(&channel_rms_norm_silu));
  m.impl("_channel_rms_norm_silu_bwd_cuda", TORCH_BOX(&channel_rms_norm_silu_bwd));
}
