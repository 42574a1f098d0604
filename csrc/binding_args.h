// How tensors become the raw arguments of zeroblock.h. Private to bindings.cpp: no other file may include torch
// headers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "zeroblock.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using namespace zeroblock;

const CpuKernels& kernels() {
  const CpuKernels* table = cpu_kernels();
  STD_TORCH_CHECK(table != nullptr, "zeroblock: this processor has neither AVX2+FMA+F16C nor AVX-512");
  return *table;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* ctx) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(ctx, b, e); });
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      STD_TORCH_CHECK(false, "zeroblock: the CPU kernels take float32, bfloat16 and float16");
  }
}

// [N, C, *S] read as [N, C, S] or, with channels_last, as [N, S, C].
void check_dense(const Tensor& t, bool channels_last, const char* what) {
  bool ok = t.is_cpu();
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

void check_like(const Tensor& t, const Tensor& x, const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == x.scalar_type() && t.numel() == x.numel(), "zeroblock: ", what,
                  " must match x in dtype and size");
}

// Small vectors are handed to the kernels as dense fp32; keep holds a converted copy for the duration of the call.
const float* as_f32(const MaybeTensor& t, int64_t numel, std::vector<Tensor>& keep, const char* what) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->numel() == numel, "zeroblock: ", what, " must have ", numel,
                  " elements on the CPU");
  if (t->scalar_type() == ScalarType::Float && t->is_contiguous())
    return static_cast<const float*>(t->const_data_ptr());
  keep.push_back(torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float)));
  return static_cast<const float*>(keep.back().const_data_ptr());
}

// A [B, D] operand (or one broadcast row, [D]) becomes fp32 rows; a [B, T, D] operand keeps its strides.
Rows as_rows(const MaybeTensor& t, const Tensor& x, std::vector<Tensor>& keep, const char* what) {
  if (!t.has_value()) return {nullptr, false, 0, 0};
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  if (t->dim() == 3) {
    STD_TORCH_CHECK(t->is_cpu() && t->size(0) == B && t->size(1) == T && t->size(2) == D &&
                        (D <= 1 || t->stride(2) == 1) && t->scalar_type() == x.scalar_type(),
                    "zeroblock: ", what, " per token must be [B, T, D] in the dtype of x, last dimension contiguous");
    return {t->const_data_ptr(), true, t->stride(0), t->stride(1)};
  }
  if (t->dim() == 2 && t->scalar_type() == ScalarType::Float && t->is_cpu() && t->size(0) == B && t->size(1) == D &&
      (D <= 1 || t->stride(1) == 1)) {
    return {t->const_data_ptr(), false, t->stride(0), 0};
  }
  const bool one_row = t->dim() == 1;
  return {as_f32(t, one_row ? D : B * D, keep, what), false, one_row ? 0 : D, 0};
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor f32(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

// Scratch memory of one call, not initialised.
struct Workspace {
  explicit Workspace(int64_t floats) : data(floats > 0 ? new float[floats] : nullptr) {}
  std::unique_ptr<float[]> data;
};

// A result that was not asked for: an undefined tensor, None in Python.
Tensor absent() { return Tensor(); }

}  // namespace
