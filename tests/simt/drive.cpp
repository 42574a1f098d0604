// Every launcher of csrc/cuda once over shapes that reach its variants, on heap blocks of exact size: what the
// sanitizer builds run. Values are the parity suite's business; here an unwritten (NaN) output is an error, and so is
// any report. drive [seed]. With ZB_DRIVE_ONLY=<op> defined only that op is compiled in, and only its source need be
// linked.
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "cuda/cuda_kernels.h"
#include "simt.h"

#define ZB_OP_ALL 0
#define ZB_OP_zero_flag 1
#define ZB_OP_group_norm_silu 2
#define ZB_OP_row_norm 3
#define ZB_OP_gate_residual 4
#define ZB_OP_conv_residual 5
#ifndef ZB_DRIVE_ONLY
#define ZB_DRIVE_ONLY ZB_OP_ALL
#endif
#define ZB_DRIVES(op) (ZB_DRIVE_ONLY == ZB_OP_ALL || ZB_DRIVE_ONLY == op)

namespace {

using namespace zeroblock;
using namespace zeroblock::cuda;

int failures = 0;
int64_t launched = 0;

// Device memory: exactly the bytes of n elements. Inputs are small numbers, outputs NaN.
class Buffer {
 public:
  Buffer(DType dtype, int64_t n, bool input) : dtype_(dtype), n_(n), bytes_(n * (dtype == DType::kF32 ? 4 : 2)) {
    void* p = nullptr;
    if (posix_memalign(&p, 16, bytes_)) abort();
    data_.reset(static_cast<char*>(p));
    memset(p, 0xFF, bytes_);
    for (int64_t i = 0; input && i < n; i++) set(i, float((i * 37 + 11) % 64) / 32 - 1);
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
  void* input(int64_t n) { return keep(dtype_, n, true); }
  void* output(int64_t n) { return outputs_.emplace_back(make(dtype_, n, false))->get(); }
  float* numbers(int64_t n) { return static_cast<float*>(keep(DType::kF32, n, true)); }
  float* statistics(int64_t n) { return outputs_.emplace_back(make(DType::kF32, n, false))->floats(); }
  float* scratch(int64_t n) { return static_cast<float*>(keep(DType::kF32, n, false)); }
  Operand operand(int64_t n, bool per_token = false, int64_t stride_b = 0, int64_t stride_t = 0) {
    return {input(n), dtype_, per_token, stride_b, stride_t};
  }
  Grad grad(int64_t n) { return {output(n), dtype_}; }
  void launched(int status) {
    ::launched++;
    if (status) failures++;
  }

 private:
  Buffer* make(DType dtype, int64_t n, bool input) { return buffers_.emplace_back(new Buffer(dtype, n, input)).get(); }
  void* keep(DType dtype, int64_t n, bool input) { return make(dtype, n, input)->get(); }
  const char* what_;
  DType dtype_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<Buffer*> outputs_;
};

#if ZB_DRIVES(ZB_OP_zero_flag)
void drive_zero_flag() {
  for (int64_t n : {0, 1, 7, 8, 9, 4096, 5003}) {
    Call call("zero_flag", DType::kBF16);
    std::vector<uint8_t> flags(2, 77);
    ZeroFlag p{};
    p.count = 2;
    for (int i = 0; i < 2; i++) {
      p.data[i] = call.input(n + i);
      p.bytes[i] = (n + i) * 2;
      p.element_size[i] = 2;
    }
    p.flags = flags.data();
    call.launched(zero_flag(p, nullptr));
    if (flags[0] != (n == 0) || flags[1] != 0) failures++;
  }
}
#endif

#if ZB_DRIVES(ZB_OP_group_norm_silu)
// shared: what a block may have in the forward kernel, about the double in the backward one; 0: enough.
void drive_group_norm_silu(DType dtype, bool channels_last, int64_t N, int64_t C, int64_t G, int64_t S,
                           size_t shared = 0) {
  simt::Machine& m = simt::machine();
  const size_t before = m.shared_limit;
  const uint64_t clusters = m.stats.clusters;
  if (shared) m.shared_limit = shared, m.cluster_limit = simt::kMaxCluster;
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
  if (shared) m.shared_limit += 8 * 1024;
  call.launched(group_norm_silu_bwd(p, nullptr));
  m.shared_limit = before, m.cluster_limit = 1;
  if ((m.stats.clusters > clusters) != (shared > 0)) failures++;
}
#endif

#if ZB_DRIVES(ZB_OP_row_norm)
void drive_row_norm(DType dtype, bool gated, bool rms, int64_t B, int64_t T, int64_t D) {
  Call call(gated ? "gate_residual_layer_norm_modulate" : "layer_norm_modulate", dtype);
  RowNorm p{};
  p.dtype = dtype;
  p.rms = rms;
  p.B = B, p.T = T, p.D = D, p.eps = 1e-6f;
  const int64_t n = B * T * D;
  p.x = call.input(n);
  p.scale = call.operand(B * D, false, D), p.shift = call.operand(n, true, T * D, D);
  if (gated) {
    p.branch = call.input(n);
    p.gate = call.operand(B * D, false, D);
    p.x_new = call.output(n);
  } else {
    p.weight = call.operand(D), p.bias = call.operand(D);
  }
  p.mean = rms ? nullptr : call.statistics(B * T);
  p.rstd = call.statistics(B * T);
  p.y = call.output(n);
  call.launched(row_norm_fwd(p, nullptr));
  if (gated) p.x = p.x_new;
  p.x_new = p.y = nullptr;
  p.dy = call.input(n);
  p.dx = call.output(n);
  p.dscale = call.grad(B * D);
  if (gated) {
    p.dx_new = call.input(n);
    p.dbranch = call.output(n);
    p.dgate = call.grad(B * D);
  } else {
    p.dweight = call.grad(D), p.dbias = call.grad(D);
  }
  p.workspace = call.scratch(row_norm_bwd_workspace(p));
  call.launched(row_norm_bwd(p, nullptr));
}
#endif

#if ZB_DRIVES(ZB_OP_gate_residual)
void drive_gate_residual(DType dtype, bool scalar, int64_t B, int64_t T, int64_t D) {
  Call call("gate_residual", dtype);
  cuda::GateResidual p{};
  p.dtype = dtype;
  p.B = B, p.T = T, p.D = D;
  const int64_t n = B * T * D;
  p.residual = call.input(n), p.branch = call.input(n);
  p.gate = scalar ? call.operand(1) : call.operand(B * D, false, D);
  p.scalar_gate = scalar ? p.gate.ptr : nullptr;
  p.y = call.output(n);
  call.launched(gate_residual_fwd(p, nullptr));
  p.y = nullptr;
  p.dy = call.input(n);
  p.dbranch = call.output(n);
  p.dgate = call.grad(scalar ? 1 : B * D);
  p.workspace = call.scratch(gate_residual_bwd_workspace(p));
  call.launched(gate_residual_bwd(p, nullptr));
}
#endif

#if ZB_DRIVES(ZB_OP_conv_residual)
void drive_conv_residual(DType dtype, int kernel, bool norm, int64_t N, int64_t H, int64_t W, int64_t C, int64_t K) {
  Call call(norm ? "group_norm_silu_conv_residual" : "conv_residual", dtype);
  ConvResidual p{};
  p.dtype = dtype;
  p.kernel = kernel;
  p.N = N, p.H = H, p.W = W, p.C = C, p.K = K, p.G = 4;
  p.x = call.input(N * H * W * C);
  if (norm) {
    p.mean = call.numbers(N * p.G), p.rstd = call.numbers(N * p.G);
    p.weight = call.operand(C), p.bias = call.operand(C);
    p.scale = call.operand(N * C, false, C), p.shift = call.operand(N * C, false, C);
  }
  p.filter = call.input(K * kernel * kernel * C);
  p.conv_bias = call.operand(K);
  p.residual = call.input(N * H * W * K);
  p.y = call.output(N * H * W * K);
  p.partial = call.statistics(N * conv_residual_tiles(p) * K * kConvMoments);
  call.launched(conv_residual_fwd(p, nullptr));
  ConvMoments m{N, H, W, K, 4, 1e-5f, p.partial, call.statistics(N * 4), call.statistics(N * 4)};
  call.launched(conv_moments(m, nullptr));
}
#endif

#ifdef __SANITIZE_THREAD__
constexpr DType kTypes[] = {DType::kBF16};  // slow, and barriers do not depend on the type
#else
constexpr DType kTypes[] = {DType::kBF16, DType::kF32};
#endif

void drive() {
#if ZB_DRIVES(ZB_OP_zero_flag)
  drive_zero_flag();
#endif
  for (DType dtype : kTypes) {
    (void)dtype;
#if ZB_DRIVES(ZB_OP_group_norm_silu)
    for (bool last : {false, true}) {
      drive_group_norm_silu(dtype, last, 2, 16, 4, 24);   // on chip
      drive_group_norm_silu(dtype, last, 1, 12, 3, 35);   // one element at a time
      drive_group_norm_silu(dtype, last, 1, 8, 1, 8192);  // several chunks
      if (dtype == DType::kBF16) {                        // clusters of two blocks, the second chunk shorter
        drive_group_norm_silu(dtype, last, 1, 8, 2, 1000, (last ? 44 : 8) * 1024);
      }
    }
#endif
#if ZB_DRIVES(ZB_OP_row_norm)
    for (bool gated : {false, true}) {
      drive_row_norm(dtype, gated, false, 2, 9, 48);    // teams share a block
      drive_row_norm(dtype, gated, false, 1, 3, 37);    // one element at a time
      drive_row_norm(dtype, gated, false, 2, 2, 4160);  // a team of all warps, and columns beyond its registers
    }
    drive_row_norm(dtype, false, true, 2, 3, 4160);
#endif
#if ZB_DRIVES(ZB_OP_gate_residual)
    for (bool scalar : {false, true}) {
      drive_gate_residual(dtype, scalar, scalar ? 1 : 2, scalar ? 1 : 70, scalar ? 5000 : 48);
      drive_gate_residual(dtype, scalar, 1, scalar ? 1 : 9, 37);
    }
#endif
  }
#if ZB_DRIVES(ZB_OP_conv_residual)
  for (bool norm : {false, true}) {
    drive_conv_residual(DType::kBF16, 3, norm, 1, 9, 17, 40, 24);
    drive_conv_residual(DType::kF16, 1, norm, 1, 3, 5, 160, 136);
  }
#endif
}

}  // namespace

int main(int argc, char** argv) {
  simt::machine().seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1;
  try {
    drive();
  } catch (const simt::error& e) {
    printf("simt::error: %s\n", e.what());
    return 1;
  }
  printf("%lld calls, %d failures\n", static_cast<long long>(launched), failures);
  return failures ? 1 : 0;
}
