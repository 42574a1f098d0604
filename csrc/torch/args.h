// How tensors become the raw arguments of zeroblock.h, on any device: cpu.h and cuda.h include it and say what a tensor
// of their device is. csrc/torch is the only folder that may include torch headers
// (test_only_the_bindings_include_torch).
//
// Built once against the stable ABI, the bindings run on torch >= 2.10. Each private op checks what memory safety
// needs, allocates its results, fills a parameter block and calls the kernel. Shapes, layouts and dtypes are settled by
// the Python caller (zeroblock/backends/cpu.py, cuda.py); a check that fails here is a bug there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../zeroblock.h"

// torch >= 2.13 has this one, which repeats the message of the error; the headers of 2.10 to 2.12 name the place alone.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using namespace zeroblock;

// Defined by cpu.h and by cuda.h, each for its device.
bool is_here(const Tensor& t);
const char* device_name();
Tensor to_f32(const Tensor& t);  // a dense fp32 copy

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
#define ZB_CASE(name, type, scalar_type) \
  case ScalarType::scalar_type:          \
    return DType::name;
    ZB_DTYPES(ZB_CASE)
#undef ZB_CASE
    default:
      STD_TORCH_CHECK(false, "zeroblock: the kernels take float32, bfloat16 and float16");
  }
}

// Bytes of one element of a tensor whose bits are tested for zero.
inline int zero_test_size(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(is_here(t) && (type == ScalarType::Double || type == ScalarType::Float ||
                                 type == ScalarType::BFloat16 || type == ScalarType::Half),
                  "zeroblock: the zero test takes float64, float32, bfloat16 and float16 on the ", device_name());
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// [N, C, *S] read as [N, C, S] or, with channels_last, as [N, S, C].
inline void check_dense(const Tensor& t, bool channels_last, const char* what) {
  bool ok = is_here(t);
  if (!channels_last) {
    ok = ok && t.is_contiguous();
  } else {
    int64_t expected = t.size(1);
    ok = ok && t.stride(1) == 1;
    for (int64_t d = t.dim() - 1; ok && d != 1; d = d == 2 ? 0 : d - 1) {
      ok = t.size(d) == 1 || t.stride(d) == expected;
      expected *= t.size(d);
      if (d == 0) break;
    }
  }
  STD_TORCH_CHECK(ok, "zeroblock: ", what, " must be dense in the layout of x");
}

// The parameters of a group norm (of either backend) that x decides.
template <class P>
P image_params(const Tensor& x, int64_t groups, bool silu, bool channels_last) {
  STD_TORCH_CHECK(x.dim() >= 2 && groups > 0 && x.size(1) > 0 && x.size(1) % groups == 0,
                  "zeroblock: x must be [N, C, *] with C divisible by the groups");
  check_dense(x, channels_last, "x");
  P p{};
  p.dtype = dtype_of(x);
  p.channels_last = channels_last;
  p.silu = silu;
  p.N = x.size(0);
  p.C = x.size(1);
  p.G = groups;
  p.S = 1;
  for (int64_t d = 2; d < x.dim(); ++d) p.S *= x.size(d);
  p.x = x.const_data_ptr();
  return p;
}

// What the parameters of every op on tokens [B, T, D] begin with.
inline void check_tokens(const Tensor& x, const char* what) {
  STD_TORCH_CHECK(x.dim() == 3 && is_here(x) && x.is_contiguous(), "zeroblock: ", what, " must be dense [B, T, D]");
}
template <class P>
P token_params(const Tensor& x, const char* what) {
  check_tokens(x, what);
  P p{};
  p.dtype = dtype_of(x);
  p.B = x.size(0);
  p.T = x.size(1);
  p.D = x.size(2);
  return p;
}

inline void check_like(const Tensor& t, const Tensor& x, const char* what) {
  STD_TORCH_CHECK(is_here(t) && t.scalar_type() == x.scalar_type() && t.numel() == x.numel(), "zeroblock: ", what,
                  " must match x in dtype and size");
}

// Small vectors are handed to the kernels as dense fp32; copies holds a converted copy for the duration of the call.
inline const float* as_f32(const MaybeTensor& t, int64_t numel, std::vector<Tensor>& copies, const char* what) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(is_here(*t) && t->numel() == numel, "zeroblock: ", what, " must have ", numel, " elements on the ",
                  device_name());
  if (t->scalar_type() == ScalarType::Float && t->is_contiguous())
    return static_cast<const float*>(t->const_data_ptr());
  copies.push_back(to_f32(*t));
  return static_cast<const float*>(copies.back().const_data_ptr());
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Memory for a result, on the device of `like`; dense, in any order of the dimensions. Calls the C shim directly:
// torch::stable looks an operator up by name at every call, about 4 us (measured: python benchmarks/run.py --group
// overhead). Calls new_empty: empty_strided would bypass torch.utils.deterministic.fill_uninitialized_memory, by which
// the tests find unwritten outputs.
inline Tensor allocate(const Tensor& like, int64_t dims, const int64_t* size, const int64_t* stride, int32_t dtype) {
  bool contiguous = true;
  int64_t n = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    contiguous = contiguous && stride[d] == n;
    n *= size[d];
  }
  AtenTensorHandle memory = nullptr, result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), contiguous ? size : &n, contiguous ? dims : 1,
                                                          &dtype, nullptr, nullptr, 0, nullptr, &memory));
  Tensor flat(memory);
  if (contiguous) return flat;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory, dims, size, stride, 0, &result));
  return Tensor(result);
}

inline int32_t torch_dtype(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return aoti_torch_dtype_float32();
    case DType::kBF16:
      return aoti_torch_dtype_bfloat16();
    case DType::kF16:
      return aoti_torch_dtype_float16();
  }
  STD_TORCH_CHECK(false, "zeroblock: unknown dtype");
}

// Python names a dtype by its place in ZB_DTYPES.
inline DType dtype_at(int64_t place) {
  STD_TORCH_CHECK(place >= 0 && place <= static_cast<int64_t>(DType::kF16), "zeroblock: no such dtype");
  return static_cast<DType>(place);
}

// With the size and strides of t, which is dense.
inline Tensor dense_like(const Tensor& t, int32_t dtype) {
  int64_t *size = nullptr, *stride = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &size));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &stride));
  return allocate(t, t.dim(), size, stride, dtype);
}
inline int32_t dtype_id(const Tensor& t) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}
inline Tensor dense_like(const Tensor& t) { return dense_like(t, dtype_id(t)); }

// Contiguous fp32.
inline Tensor f32(const Tensor& like, const std::vector<int64_t>& size) {
  const int64_t dims = static_cast<int64_t>(size.size());
  std::vector<int64_t> stride(size.size());
  int64_t next = 1;
  for (int64_t d = dims - 1; d >= 0; next *= size[d] > 0 ? size[d] : 1, --d) stride[d] = next;
  return allocate(like, dims, size.data(), stride.data(), aoti_torch_dtype_float32());
}

// A result that is not wanted: an undefined tensor, None in Python.
inline Tensor absent() { return Tensor(); }

}  // namespace
