// The torch side of the Winograd convolutions (../cpu/winograd/tiles.h).
#include "cpu.h"

namespace {

// A contiguous or channels-last [K, C, 3, 3]; transposed: as the data gradient reads it.
WinogradWeight winograd_weight(const Tensor& w, bool transposed) {
  STD_TORCH_CHECK(w.is_cpu() && w.dim() == 4 && w.size(2) == 3 && w.size(3) == 3,
                  "zeroblock: weight must be [K, C, 3, 3]");
  const int64_t K = w.size(0), C = w.size(1);
  const bool planes = w.is_contiguous();
  if (!planes) check_dense(w, true, "weight");
  void* const data = const_cast<void*>(w.const_data_ptr());
  const int64_t k = 9 * C, c = planes ? 9 : 1, tap = planes ? 1 : C;
  if (transposed) return {data, C, K, c, k, tap, true};
  return {data, K, C, k, c, tap, false};
}

const void* image(const Tensor& t, DType dtype, bool channels_last, std::vector<int64_t> size, const char* what) {
  bool ok = dtype_of(t) == dtype && t.dim() == 4;
  for (int64_t d = 0; ok && d < 4; ++d) ok = t.size(d) == size[d];
  STD_TORCH_CHECK(ok, "zeroblock: ", what, " must be of the type of x and of the size of the convolution");
  check_dense(t, channels_last, what);
  return t.const_data_ptr();
}

Winograd winograd_params(const Tensor& x, const MaybeTensor& affine, int64_t out_channels, int64_t padding,
                         int64_t tile, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4 && padding >= 0 && padding <= 2 && (tile == 2 || tile == 4),
                  "zeroblock: winograd takes images, a padding of 0, 1 or 2 and tiles of 2 or 4");
  Winograd p{};
  p.dtype = dtype_of(x);
  p.tile = static_cast<int>(tile);
  p.channels_last = channels_last;
  p.N = x.size(0), p.C = x.size(1), p.H = x.size(2), p.W = x.size(3), p.K = out_channels, p.padding = padding;
  p.OH = p.H + 2 * padding - 2, p.OW = p.W + 2 * padding - 2;
  p.threads = torch::stable::get_num_threads();
  STD_TORCH_CHECK(p.N > 0 && p.C > 0 && p.K > 0 && p.OH > 0 && p.OW > 0, "zeroblock: an empty convolution");
  p.x = image(x, p.dtype, channels_last, {p.N, p.C, p.H, p.W}, "x");
  if (affine) {
    STD_TORCH_CHECK(
        affine->scalar_type() == ScalarType::Float && affine->is_contiguous() && affine->numel() == p.N * 3 * p.C,
        "zeroblock: affine must be [N, 3, C]");
    p.affine = static_cast<const float*>(affine->const_data_ptr());
  }
  return p;
}

// transposed: x is the gradient dy of a convolution with this weight, and the result its dx.
Tensor winograd_conv(Tensor x, MaybeTensor affine, Tensor weight, MaybeTensor packed, MaybeTensor bias,
                     MaybeTensor residual, int64_t padding, int64_t tile, bool transposed, bool channels_last) {
  std::vector<Tensor> copies;
  const WinogradWeight w = winograd_weight(weight, transposed);
  Winograd p = winograd_params(x, affine, w.K, padding, tile, channels_last);
  STD_TORCH_CHECK(w.C == p.C && dtype_of(weight) == p.dtype, "zeroblock: x and weight must agree in channels and type");
  p.weight = w;
  if (packed) {
    STD_TORCH_CHECK(packed->scalar_type() == ScalarType::Float && packed->is_contiguous() &&
                        packed->numel() == kernels().winograd_packed_size(p),
                    "zeroblock: packed has another shape than this weight and tile give");
    p.packed = static_cast<const float*>(packed->const_data_ptr());
  }
  p.bias = as_f32(bias, p.K, copies, "bias");
  const std::vector<int64_t> size = {p.N, p.K, p.OH, p.OW};
  const int64_t plane = p.OH * p.OW, stride[2][4] = {{p.K * plane, plane, p.OW, 1}, {plane * p.K, 1, p.OW * p.K, p.K}};
  Tensor y = allocate(x, 4, size.data(), stride[channels_last], dtype_id(x));
  p.y = y.mutable_data_ptr();
  if (residual) p.residual = image(*residual, p.dtype, channels_last, size, "residual");
  kernels().winograd_fwd(p, parallel_for);
  return y;
}

// What _winograd_conv takes as `packed`.
Tensor winograd_pack(Tensor weight, int64_t tile, bool transposed) {
  STD_TORCH_CHECK(tile == 2 || tile == 4, "zeroblock: winograd takes tiles of 2 or 4");
  Winograd p{};
  p.dtype = dtype_of(weight);
  p.tile = static_cast<int>(tile);
  p.weight = winograd_weight(weight, transposed);
  p.K = p.weight.K, p.C = p.weight.C;
  Tensor u = f32(weight, {kernels().winograd_packed_size(p)});
  p.u = data<float>(u);
  kernels().winograd_pack(p, parallel_for);
  return u;
}

// The weight gradient, laid out like `weight`, which is not read.
Tensor winograd_weight_grad(Tensor dy, Tensor x, MaybeTensor affine, Tensor weight, int64_t padding, int64_t tile,
                            bool channels_last) {
  STD_TORCH_CHECK(dy.dim() == 4, "zeroblock: dy must be [N, K, H, W]");
  Winograd p = winograd_params(x, affine, dy.size(1), padding, tile, channels_last);
  Tensor dweight = dense_like(weight);
  p.weight = winograd_weight(dweight, false);
  STD_TORCH_CHECK(p.weight.K == p.K && p.weight.C == p.C && dtype_of(weight) == p.dtype,
                  "zeroblock: x, dy and weight must agree in channels and type");
  p.dy = image(dy, p.dtype, channels_last, {p.N, p.K, p.OH, p.OW}, "dy");
  kernels().winograd_wgrad(p, parallel_for);
  return dweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zeroblock, m) {
  m.def(
      "_winograd_conv(Tensor x, Tensor? affine, Tensor weight, Tensor? packed, Tensor? bias, Tensor? residual, "
      "int padding, int tile, bool transposed, bool channels_last) -> Tensor");
  m.def("_winograd_pack(Tensor weight, int tile, bool transposed) -> Tensor");
  m.def(
      "_winograd_weight_grad(Tensor dy, Tensor x, Tensor? affine, Tensor weight, int padding, int tile, "
      "bool channels_last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(zeroblock, CPU, m) {
  m.impl("_winograd_conv", TORCH_BOX(&winograd_conv));
  m.impl("_winograd_pack", TORCH_BOX(&winograd_pack));
  m.impl("_winograd_weight_grad", TORCH_BOX(&winograd_weight_grad));
}
