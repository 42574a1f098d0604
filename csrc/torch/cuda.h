// What the CUDA bindings share: device and stream, launch errors, operands in their own dtype.
// Nothing waits for the device; a launch that fails becomes a Python exception with the op's name.
//
// Under ZB_SIMT (tests/cuda/simt) the same files bind the emulated kernels to CPU tensors, in another namespace.
#pragma once

#ifdef ZB_SIMT
#define ZB_KEY CPU
#else
#define ZB_KEY CUDA
#endif
#ifndef ZB_NAMESPACE
#define ZB_NAMESPACE zeroblock
#endif

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../cuda/cuda_kernels.h"
#include "args.h"

namespace {

using cuda::Grad;
using cuda::Operand;

// The device of x and its current stream, for the duration of a call.
#ifdef ZB_SIMT
inline bool is_here(const Tensor& t) { return t.is_cpu(); }
inline const char* device_name() { return "CPU"; }
struct Here {
  explicit Here(const Tensor&) {}
  void* stream = nullptr;
};
#else
inline bool is_here(const Tensor& t) { return t.is_cuda(); }
inline const char* device_name() { return "GPU"; }

// torch::stable's Stream::nativeHandle() came with torch 2.13; this entry point is older than 2.10. It is in
// libtorch_cuda.so, which a CPU build of torch lacks: looked up by name, so that one binary loads beside either.
inline void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(function != nullptr, "zeroblock: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

struct Here {
  explicit Here(const Tensor& x) : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {}
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
};
#endif

inline void check_launch(const char* op, int status) {
  STD_TORCH_CHECK(status == 0, op, ": the CUDA kernel was not launched: ", cuda::error_string(status));
}

inline Tensor workspace(const Tensor& like, int64_t floats) { return f32(like, {floats}); }

inline Tensor to_f32(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float)); }

// A small operand in its own dtype when that is fp32 or x's and its last dimension is contiguous, else an fp32 copy.
// [D], [B, D] or [B, T, D]; the first broadcasts over samples.
inline Operand as_operand(const MaybeTensor& t, const Tensor& x, std::vector<int64_t> size, std::vector<Tensor>& copies,
                          const char* what) {
  if (!t.has_value()) return {nullptr, DType::kF32, false, 0, 0};
  const int64_t dims = t->dim(), D = size.back();
  bool fits = is_here(*t) && dims >= 1 && dims <= static_cast<int64_t>(size.size());
  for (int64_t d = 1; fits && d <= dims; ++d) {
    const int64_t full = dims == 2 && d == 2 ? size[0] : size[size.size() - d];
    fits = t->size(dims - d) == full;
  }
  STD_TORCH_CHECK(fits, "zeroblock: ", what, " does not fit x");
  Tensor v = *t;
  const bool as_it_is = v.scalar_type() == ScalarType::Float || v.scalar_type() == x.scalar_type();
  if (!as_it_is) v = torch::stable::to(v, ScalarType::Float);
  if (D > 1 && v.stride(dims - 1) != 1) v = torch::stable::contiguous(v);
  copies.push_back(v);
  return {v.const_data_ptr(), dtype_of(v), dims == 3, dims >= 2 ? v.stride(0) : 0, dims == 3 ? v.stride(1) : 0};
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
#define ZB_CASE(name, type, scalar_type) \
  case DType::name:                      \
    return ScalarType::scalar_type;
    ZB_DTYPES(ZB_CASE)
#undef ZB_CASE
  }
  return ScalarType::Undefined;
}

// A gradient in the dtype in which the kernel reads its operand; undefined, and not computed, without an operand.
inline Tensor grad_of(const Operand& o, const Tensor& x, std::vector<int64_t> size, Grad& grad) {
  if (o.ptr == nullptr) return absent();
  Tensor t = torch::stable::new_empty(x, size, scalar_type_of(o.dtype));
  grad = {t.mutable_data_ptr(), o.dtype};
  return t;
}

inline const uint8_t* zero_of(const MaybeTensor& zero) {
  if (!zero.has_value()) return nullptr;
  STD_TORCH_CHECK(is_here(*zero) && zero->numel() >= 1 && zero->scalar_type() == ScalarType::Bool,
                  "zeroblock: zero must be a bool tensor on the ", device_name());
  return static_cast<const uint8_t*>(zero->const_data_ptr());
}

}  // namespace
