// The torch side of group_norm_silu (../cpu/group_norm_silu.h).
#include "cpu.h"

namespace {

// The gradients that backward of a norm writes, in fp32 where they are not dx.
struct NormGradients {
  Tensor dx, dweight, dbias, dscale, dshift;
  NormGradients(GroupNormSilu& p, const Tensor& dy, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                const MaybeTensor& scale, const MaybeTensor& shift)
      : dx(dense_like(x)),
        dweight(weight ? f32(x, {p.C}) : absent()),
        dbias(bias ? f32(x, {p.C}) : absent()),
        dscale(scale ? f32(x, {p.N, p.C}) : absent()),
        dshift(shift ? f32(x, {p.N, p.C}) : absent()) {
    check_like(dy, x, "dy");
    check_dense(dy, p.channels_last, "dy");
    p.dy = dy.const_data_ptr();
    p.dx = dx.mutable_data_ptr();
    if (weight) p.dweight = data<float>(dweight);
    if (bias) p.dbias = data<float>(dbias);
    if (scale) p.dscale = data<float>(dscale);
    if (shift) p.dshift = data<float>(dshift);
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results(const MaybeTensor& weight, const MaybeTensor& bias,
                                                             const MaybeTensor& scale, const MaybeTensor& shift) const {
    return {dx, as_gradient(dweight, weight), as_gradient(dbias, bias), as_gradient(dscale, scale),
            as_gradient(dshift, shift)};
  }
};

// One number per pixel of x [N, C, *S], [N, *S].
Tensor pixel_statistics(const Tensor& x) {
  std::vector<int64_t> size = {x.size(0)};
  for (int64_t d = 2; d < x.dim(); ++d) size.push_back(x.size(d));
  return f32(x, size);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor scale,
                                                   MaybeTensor shift, int64_t groups, double eps, bool silu,
                                                   bool channels_last, bool per_frame) {
  std::vector<Tensor> copies;
  GroupNormSilu p = group_norm_params(x, weight, bias, scale, shift, groups, silu, channels_last, copies, per_frame);
  Tensor y = dense_like(x), mean = f32(x, {p.N, p.G}), rstd = f32(x, {p.N, p.G});
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
                                                                       int64_t groups, bool silu, bool channels_last,
                                                                       bool per_frame) {
  std::vector<Tensor> copies;
  GroupNormSilu p = group_norm_params(x, weight, bias, scale, shift, groups, silu, channels_last, copies, per_frame);
  p.mean = const_cast<float*>(as_f32(mean, p.N * p.G, copies, "mean"));
  p.rstd = const_cast<float*>(as_f32(rstd, p.N * p.G, copies, "rstd"));
  const NormGradients grads(p, dy, x, weight, bias, scale, shift);
  const Workspace workspace(kernels().group_norm_silu_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().group_norm_silu_bwd(p, parallel_for);
  return grads.results(weight, bias, scale, shift);
}

std::tuple<Tensor, Tensor> channel_rms_norm_silu(Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor scale,
                                                 MaybeTensor shift, double eps, bool eps_inside, bool silu,
                                                 bool channels_last) {
  std::vector<Tensor> copies;
  ChannelRmsNormSilu p{group_norm_params(x, weight, bias, scale, shift, 1, silu, channels_last, copies), eps_inside};
  Tensor y = dense_like(x), rstd = pixel_statistics(x);
  const Workspace workspace(kernels().channel_rms_norm_silu_fwd_workspace(p));
  p.eps = static_cast<float>(eps);
  p.y = y.mutable_data_ptr();
  p.rstd = data<float>(rstd);
  p.workspace = workspace.data.get();
  kernels().channel_rms_norm_silu_fwd(p, parallel_for);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_rms_norm_silu_bwd(Tensor dy, Tensor x, Tensor rstd,
                                                                             MaybeTensor weight, MaybeTensor bias,
                                                                             MaybeTensor scale, MaybeTensor shift,
                                                                             bool silu, bool channels_last) {
  std::vector<Tensor> copies;
  ChannelRmsNormSilu p{group_norm_params(x, weight, bias, scale, shift, 1, silu, channels_last, copies), false};
  p.rstd = const_cast<float*>(as_f32(rstd, p.N * p.S, copies, "rstd"));
  const NormGradients grads(p, dy, x, weight, bias, scale, shift);
  const Workspace workspace(kernels().channel_rms_norm_silu_bwd_workspace(p));
  p.workspace = workspace.data.get();
  kernels().channel_rms_norm_silu_bwd(p, parallel_for);
  return grads.results(weight, bias, scale, shift);
}

// Statistics alone: mean and rstd, [N, G] each.
std::tuple<Tensor, Tensor> group_norm_statistics(Tensor x, int64_t groups, double eps, bool channels_last) {
  std::vector<Tensor> copies;
  GroupNormSilu p = group_norm_params(x, {}, {}, {}, {}, groups, false, channels_last, copies);
  Tensor mean = f32(x, {p.N, p.G}), rstd = f32(x, {p.N, p.G});
  const Workspace workspace(kernels().group_norm_silu_fwd_workspace(p));
  p.eps = static_cast<float>(eps);
  p.mean = data<float>(mean);
  p.rstd = data<float>(rstd);
  p.workspace = workspace.data.get();
  kernels().group_norm_statistics(p, parallel_for);
  return {mean, rstd};
}

// The norm with these statistics as a map of every channel: [N, 3, C], mean, a and b of z = (x - mean) * a + b.
Tensor group_norm_affine(Tensor x, Tensor mean, Tensor rstd, MaybeTensor weight, MaybeTensor bias, MaybeTensor scale,
                         MaybeTensor shift, int64_t groups, bool channels_last) {
  std::vector<Tensor> copies;
  GroupNormSilu p = group_norm_params(x, weight, bias, scale, shift, groups, true, channels_last, copies);
  p.mean = const_cast<float*>(as_f32(mean, p.N * p.G, copies, "mean"));
  p.rstd = const_cast<float*>(as_f32(rstd, p.N * p.G, copies, "rstd"));
  Tensor affine = f32(x, {p.N, 3, p.C});
  kernels().group_norm_affine(p, data<float>(affine));
  return affine;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zeroblock, m) {
  m.def(
      "_group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps, "
      "bool silu, bool channels_last, bool per_frame=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_group_norm_silu_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
      "Tensor? scale, Tensor? shift, int groups, bool silu, bool channels_last, bool per_frame=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_channel_rms_norm_silu(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, "
      "bool eps_inside, bool silu, bool channels_last) -> (Tensor, Tensor)");
  m.def(
      "_channel_rms_norm_silu_bwd(Tensor dy, Tensor x, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? scale, "
      "Tensor? shift, bool silu, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_group_norm_statistics(Tensor x, int groups, float eps, bool channels_last) -> (Tensor, Tensor)");
  m.def(
      "_group_norm_affine(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? scale, "
      "Tensor? shift, int groups, bool channels_last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(zeroblock, CPU, m) {
  m.impl("_group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("_group_norm_silu_bwd", TORCH_BOX(&group_norm_silu_bwd));
  m.impl("_channel_rms_norm_silu", TORCH_BOX(&channel_rms_norm_silu));
  m.impl("_channel_rms_norm_silu_bwd", TORCH_BOX(&channel_rms_norm_silu_bwd));
  m.impl("_group_norm_statistics", TORCH_BOX(&group_norm_statistics));
  m.impl("_group_norm_affine", TORCH_BOX(&group_norm_affine));
}
