// The torch side of the zero path: the test of a branch's weights, and the residual that is left where they are zero
// (../cpu/is_zero.h, add_bias.h).
#include "cpu.h"

namespace {

bool is_zero_bytes(const ZeroBytes& t, int element_size) {
  return kernels().is_zero(t.data, t.bytes, element_size, parallel_for);
}

// True when every element of a dense float32, float64, bfloat16 or float16 tensor is +0 or -0, by its bits.
bool is_zero(Tensor t) {
  const int size = zero_test_size(t);
  return is_zero_bytes({t.const_data_ptr(), t.numel() * size}, size);
}

// Whether the elements fill their memory, in any order of the dimensions.
bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const int64_t n = t.numel(), dims = t.dim();
  int64_t next = 1;  // the stride of the next dimension outwards
  for (int64_t found = 0; next < n; next *= found) {
    found = 0;
    for (int64_t d = 0; d < dims && found == 0; ++d) {
      if (t.size(d) > 1 && t.stride(d) == next) found = t.size(d);
    }
    if (found == 0) return false;
  }
  return true;
}

// x + bias without y; bias runs along the innermost dimension in memory (last) or along dimension 1 of a contiguous x.
AddBias add_bias_params(const Tensor& x, const MaybeTensor& bias, bool last, std::vector<Tensor>& copies) {
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
  STD_TORCH_CHECK(x.is_cpu() && is_dense(x) && p.R * p.C * p.S == x.numel(), "zeroblock: bias does not fit x");
  if (bias && !(bias->is_contiguous() && is_zero(*bias))) p.bias = as_f32(bias, p.C, copies, "bias");
  p.x = x.const_data_ptr();
  return p;
}

Tensor add_bias(Tensor x, MaybeTensor bias, bool last) {
  std::vector<Tensor> copies;
  AddBias p = add_bias_params(x, bias, last, copies);
  Tensor y = dense_like(x);
  p.y = y.mutable_data_ptr();
  kernels().add_bias(p, parallel_for);
  return y;
}

void add_bias_(Tensor x, MaybeTensor bias, bool last) {
  std::vector<Tensor> copies;
  AddBias p = add_bias_params(x, bias, last, copies);
  p.y = x.mutable_data_ptr();
  kernels().add_bias(p, parallel_for);
}

// x + bias where weight (and `also`) hold nothing but zeros, else undefined. With parts > 1 the tensors are cut into as
// many equal parts along dimension 0, and only those whose bit is set in `which` are tested.
Tensor residual_if_zero(Tensor weight, MaybeTensor also, int64_t parts, int64_t which, Tensor x, MaybeTensor bias,
                        bool last) {
  constexpr int kMost = 16;
  ZeroBytes tests[kMost];
  int count = 0;
  const int size = zero_test_size(weight);
  const auto add = [&](const Tensor& t) {
    STD_TORCH_CHECK(zero_test_size(t) == size && is_dense(t) && (parts == 1 || t.is_contiguous()) && t.dim() > 0 &&
                        parts > 0 && t.size(0) % parts == 0,
                    "zeroblock: residual_if_zero takes dense weights of one dtype, cut along dimension 0");
    const int64_t bytes = t.numel() / parts * size;
    for (int64_t k = 0; k < parts; ++k) {
      if ((which >> k & 1) == 0) continue;
      STD_TORCH_CHECK(count < kMost, "zeroblock: residual_if_zero has too many parts");
      tests[count++] = {static_cast<const char*>(t.const_data_ptr()) + k * bytes, bytes};
    }
  };
  add(weight);
  if (also) add(*also);
  // Weights that are not zero differ from it in their first bytes: no memory is allocated for them.
  constexpr int64_t kFirstBytes = 256;
  for (int t = 0; t < count; ++t) {
    if (!is_zero_bytes({tests[t].data, tests[t].bytes < kFirstBytes ? tests[t].bytes : kFirstBytes}, size))
      return absent();
  }
  std::vector<Tensor> copies;
  AddBias p = add_bias_params(x, bias, last, copies);
  Tensor y = dense_like(x);
  p.y = y.mutable_data_ptr();
  return kernels().residual_if_zero(tests, count, size, p, parallel_for) ? y : absent();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zeroblock, m) {
  m.def("_add_bias(Tensor x, Tensor? bias, bool last) -> Tensor");
  m.def("_add_bias_(Tensor(a!) x, Tensor? bias, bool last) -> ()");
  m.def("_is_zero(Tensor t) -> bool");
  m.def(
      "_residual_if_zero(Tensor weight, Tensor? also, int parts, int which, Tensor x, Tensor? bias, bool last) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(zeroblock, CPU, m) {
  m.impl("_add_bias", TORCH_BOX(&add_bias));
  m.impl("_add_bias_", TORCH_BOX(&add_bias_));
  m.impl("_is_zero", TORCH_BOX(&is_zero));
  m.impl("_residual_if_zero", TORCH_BOX(&residual_if_zero));
}
