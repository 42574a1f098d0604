// The torch side of the activations (../cpu/activation.h), and the name of the instruction set in use.
#include "cpu.h"

namespace {

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
  Tensor y = dense_like(x);
  p.y = y.mutable_data_ptr();
  kernels().activation_fwd(p, parallel_for);
  return y;
}

// Returns act(x) too: both come from one read of x.
std::tuple<Tensor, Tensor> activation_bwd(Tensor dy, Tensor x, int64_t act, bool need_y) {
  Activation p = activation_params(x, act);
  check_like(dy, x, "dy");
  STD_TORCH_CHECK(dy.is_contiguous(), "zeroblock: dy must be dense");
  Tensor dx = dense_like(x), y = need_y ? dense_like(x) : absent();
  p.dy = dy.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.y = need_y ? y.mutable_data_ptr() : nullptr;
  kernels().activation_bwd(p, parallel_for);
  return {dx, y};
}

std::string isa() { return cpu_kernels() ? cpu_kernels()->isa : ""; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zeroblock, m) {
  m.def("_activation(Tensor x, int act) -> Tensor");
  m.def("_activation_bwd(Tensor dy, Tensor x, int act, bool need_y) -> (Tensor, Tensor)");
  m.def("_cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(zeroblock, CPU, m) {
  m.impl("_activation", TORCH_BOX(&activation));
  m.impl("_activation_bwd", TORCH_BOX(&activation_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(zeroblock, CompositeExplicitAutograd, m) { m.impl("_cpu_isa", TORCH_BOX(&isa)); }
