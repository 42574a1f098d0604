// Calls of every launcher of csrc/cuda on heap blocks of exact size, for drive.cpp and traffic.cpp.
#pragma once

#include <array>
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "cuda/cuda_kernels.h"
#include "simt.h"

namespace {

using namespace zeroblock;
using namespace zeroblock::cuda;

int failures = 0;
int64_t launched = 0;
// Told of each buffer, and of the end of each launcher; what traffic.cpp listens to.
enum class Role { kInput, kOutput, kScratch };
void (*on_buffer)(void* data, size_t bytes, Role) = nullptr;
void (*on_launch)(const char* op) = nullptr;

// Device memory: exactly the bytes of n elements. Inputs are small numbers, outputs NaN.
class Buffer {
 public:
  Buffer(DType dtype, int64_t n, Role role) : dtype_(dtype), n_(n), bytes_(n * (dtype == DType::kF32 ? 4 : 2)) {
    void* p = nullptr;
    if (posix_memalign(&p, 16, bytes_)) abort();
    data_.reset(static_cast<char*>(p));
    memset(p, 0xFF, bytes_);
    if (on_buffer) on_buffer(p, bytes_, role);
    for (int64_t i = 0; role == Role::kInput && i < n; i++) set(i, float((i * 37 + 11) % 64) / 32 - 1);
  }
  void* get() const { return data_.get(); }
  float* floats() const { return reinterpret_cast<float*>(data_.get()); }
  void check_written(const char* what) const {
    for (int64_t i = 0; i < n_; i++) {
      if (!std::isnan(at(i))) continue;
      printf("%s: element %lld was not written\n", what, static_cast<long long>(i));
      failures++;
      return;
    }
  }

 private:
  struct Free {
    void operator()(char* p) const { free(p); }
  };
  void set(int64_t i, float v) {
    if (dtype_ == DType::kF32) reinterpret_cast<float*>(data_.get())[i] = v;
    if (dtype_ == DType::kBF16) reinterpret_cast<__nv_bfloat16*>(data_.get())[i] = __float2bfloat16(v);
    if (dtype_ == DType::kF16) reinterpret_cast<__half*>(data_.get())[i] = __float2half(v);
  }
  float at(int64_t i) const {
    if (dtype_ == DType::kF32) return reinterpret_cast<const float*>(data_.get())[i];
    if (dtype_ == DType::kBF16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data_.get())[i]);
    return __half2float(reinterpret_cast<const __half*>(data_.get())[i]);
  }
  DType dtype_;
  int64_t n_;
  size_t bytes_;
  std::unique_ptr<char, Free> data_;
};

// Buffers of one call; outputs are checked when it ends.
class Call {
 public:
  Call(const char* what, DType dtype) : what_(what), dtype_(dtype) {}
  ~Call() {
    for (const Buffer* b : outputs_) b->check_written(what_);
  }
  void* input(int64_t n) { return make(dtype_, n, Role::kInput)->get(); }
  void* output(int64_t n) { return outputs_.emplace_back(make(dtype_, n, Role::kOutput))->get(); }
  float* numbers(int64_t n) { return make(DType::kF32, n, Role::kInput)->floats(); }
  float* statistics(int64_t n) { return outputs_.emplace_back(make(DType::kF32, n, Role::kOutput))->floats(); }
  float* scratch(int64_t n) { return make(DType::kF32, n, Role::kScratch)->floats(); }
  Operand operand(int64_t n, bool per_token = false, int64_t stride_b = 0, int64_t stride_t = 0) {
    return {input(n), dtype_, per_token, stride_b, stride_t};
  }
  Operand modulation(bool per_token, int64_t B, int64_t T, int64_t D) {
    return per_token ? operand(B * T * D, true, T * D, D) : operand(B * D, false, D);
  }
  Grad grad(int64_t n) { return {output(n), dtype_}; }
  void launched(int status) {
    ::launched++;
    if (status) failures++;
    if (on_launch) on_launch(what_);
  }

 private:
  Buffer* make(DType dtype, int64_t n, Role role) { return buffers_.emplace_back(new Buffer(dtype, n, role)).get(); }
  const char* what_;
  DType dtype_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<Buffer*> outputs_;
};

// Two tensors of n and n + more elements, zero or not: a flag of each, or one of either, by words that a launch leaves
// as it found them.
inline void drive_zero_flag(int64_t n, int64_t more, std::array<bool, 2> zero, bool any_of, int size = 2) {
  Call call("zero_flag", DType::kBF16);
  std::array<int32_t, 2> flags = {77, 77};
  std::array<unsigned long long, 2> words = {};
  ZeroFlag p{};
  p.count = 2;
  p.any_of = any_of;
  for (int i = 0; i < 2; i++) {
    p.bytes[i] = (n + i * more) * size;
    void* data = call.input((n + i * more) * size / 2);
    if (zero[i]) memset(data, 0, p.bytes[i]);
    p.data[i] = data;
    p.element_size[i] = size;
    if (p.bytes[i] == 0) zero[i] = true;
  }
  p.flags = flags.data();
  p.words = words.data();
  call.launched(zero_flag(p, nullptr));
  const int both = zero[0] || zero[1];
  failures += flags[0] != (any_of ? both : zero[0]) || flags[1] != (any_of ? 77 : zero[1]);
  failures += words[0] != 0 || words[1] != 0;
}

// A GPU with so much shared memory for a block of the forward and of the backward kernel.
struct Gpu {
  std::array<size_t, 2> shared = {163 * 1024, 163 * 1024};
  unsigned cluster = 1;
};

inline void drive_group_norm_silu(DType dtype, bool channels_last, int64_t N, int64_t C, int64_t G, int64_t S,
                                  Gpu gpu = {}) {
  simt::Machine& m = simt::machine();
  m.shared_limit = gpu.shared[0], m.cluster_limit = gpu.cluster;
  Call call(channels_last ? "group_norm_silu channels-last" : "group_norm_silu", dtype);
  cuda::GroupNormSilu p{};
  p.dtype = dtype;
  p.channels_last = channels_last;
  p.silu = true;
  p.N = N, p.C = C, p.G = G, p.S = S, p.eps = 1e-5f;
  p.x = call.input(N * C * S);
  p.weight = call.operand(C), p.bias = call.operand(C);
  p.scale = call.operand(N * C, false, C), p.shift = call.operand(N * C, false, C);
  p.mean = call.statistics(N * G), p.rstd = call.statistics(N * G);
  p.y = call.output(N * C * S);
  p.workspace = call.scratch(group_norm_silu_fwd_workspace(p));
  call.launched(group_norm_silu_fwd(p, nullptr));
  p.dy = call.input(N * C * S);
  p.dx = call.output(N * C * S);
  p.y = nullptr;
  p.dweight = call.grad(C), p.dbias = call.grad(C), p.dscale = call.grad(N * C), p.dshift = call.grad(N * C);
  p.workspace = call.scratch(group_norm_silu_bwd_workspace(p));
  m.shared_limit = gpu.shared[1];
  call.launched(group_norm_silu_bwd(p, nullptr));
  m.shared_limit = Gpu().shared[0], m.cluster_limit = 1;
}

struct RowOptions {
  bool gated = false, rms = false, affine = false;
  bool shift_per_token = false, scale_per_token = false, gate_per_token = false;
};

inline void drive_row_norm(DType dtype, RowOptions o, int64_t B, int64_t T, int64_t D) {
  Call call(o.gated ? "gate_residual_layer_norm_modulate" : o.rms ? "rms_norm_modulate" : "layer_norm_modulate", dtype);
  RowNorm p{};
  p.dtype = dtype;
  p.rms = o.rms;
  p.B = B, p.T = T, p.D = D, p.eps = 1e-6f;
  const int64_t n = B * T * D;
  p.x = call.input(n);
  p.scale = call.modulation(o.scale_per_token, B, T, D), p.shift = call.modulation(o.shift_per_token, B, T, D);
  if (o.gated) {
    p.branch = call.input(n);
    p.gate = call.modulation(o.gate_per_token, B, T, D);
    p.x_new = call.output(n);
  }
  if (o.affine) p.weight = call.operand(D), p.bias = call.operand(D);
  p.mean = o.rms ? nullptr : call.statistics(B * T);
  p.rstd = call.statistics(B * T);
  p.y = call.output(n);
  call.launched(row_norm_fwd(p, nullptr));
  if (o.gated) p.x = p.x_new;
  p.x_new = p.y = nullptr;
  p.dy = call.input(n);
  p.dx = call.output(n);
  if (o.scale_per_token) {
    p.dscale_token = call.grad(n);
  } else {
    p.dscale = call.grad(B * D);
    if (!o.shift_per_token) p.dshift = call.grad(B * D);
  }
  if (o.gated) {
    p.dx_new = call.input(n);
    p.dbranch = call.output(n);
    if (o.gate_per_token) {
      p.dgate_token = call.grad(n);
    } else {
      p.dgate = call.grad(B * D);
    }
  }
  if (o.affine) p.dweight = call.grad(D), p.dbias = call.grad(D);
  p.workspace = call.scratch(row_norm_bwd_workspace(p));
  call.launched(row_norm_bwd(p, nullptr));
}

enum class GateKind { kScalar, kChannel, kSample, kToken };

inline void drive_gate_residual(DType dtype, GateKind kind, int64_t B, int64_t T, int64_t D) {
  const bool scalar = kind == GateKind::kScalar, per_token = kind == GateKind::kToken;
  Call call("gate_residual", dtype);
  cuda::GateResidual p{};
  p.dtype = dtype;
  p.B = B, p.T = T, p.D = D;
  const int64_t n = B * T * D;
  p.residual = call.input(n), p.branch = call.input(n);
  p.gate = scalar                       ? call.operand(1)
           : kind == GateKind::kChannel ? call.operand(D)
                                        : call.modulation(per_token, B, T, D);
  p.scalar_gate = scalar ? p.gate.ptr : nullptr;
  p.y = call.output(n);
  call.launched(gate_residual_fwd(p, nullptr));
  p.y = nullptr;
  p.dy = call.input(n);
  p.dbranch = call.output(n);
  if (per_token) {
    p.dgate_token = call.output(n);
  } else {
    p.dgate = call.grad(scalar ? 1 : B * D);
  }
  p.workspace = call.scratch(gate_residual_bwd_workspace(p));
  call.launched(gate_residual_bwd(p, nullptr));
}

struct ConvOptions {
  int kernel;
  bool norm = false, statistics = true, zero = false, bias = true;
};

inline void drive_conv_residual(DType dtype, ConvOptions o, int64_t N, int64_t H, int64_t W, int64_t C, int64_t K) {
  Call call(o.norm ? "group_norm_silu_conv_residual" : "conv_residual", dtype);
  ConvResidual p{};
  p.dtype = dtype;
  p.kernel = o.kernel;
  p.N = N, p.H = H, p.W = W, p.C = C, p.K = K, p.G = 4;
  p.x = call.input(N * H * W * C);
  if (o.norm) {
    p.mean = call.numbers(N * p.G), p.rstd = call.numbers(N * p.G);
    p.norm_weight = call.operand(C), p.norm_bias = call.operand(C);
    p.scale = call.operand(N * C, false, C), p.shift = call.operand(N * C, false, C);
  }
  p.weight = call.input(K * o.kernel * o.kernel * C);
  if (o.bias) p.bias = call.operand(K);
  p.residual = call.input(N * H * W * K);
  p.y = call.output(N * H * W * K);
  const uint8_t flag = o.zero;
  p.zero = &flag;
  if (o.statistics) p.partial = call.statistics(N * conv_residual_tiles(p) * K * kConvMoments);
  call.launched(conv_residual_fwd(p, nullptr));
  if (!o.statistics) return;
  ConvMoments m{N, H, W, K, 4, 1e-5f, p.partial, call.statistics(N * 4), call.statistics(N * 4)};
  call.launched(conv_moments(m, nullptr));
}

}  // namespace
