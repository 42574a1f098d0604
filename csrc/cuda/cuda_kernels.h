// Parameter blocks and launchers of the CUDA kernels. No torch header and no CUDA header may be included here.
//
// Conventions, besides those of zeroblock.h
//   * every launcher returns a cudaError_t as int (0: launched), never waits and never allocates;
//   * small operands (affine parameters, modulation, gates) come in their own dtype, fp32 or that of x: no conversion
//     kernel runs before the real one;
//   * `zero`, when not null, points to one byte on the device, written by zero_flag: when it is 1 the branch is exactly
//     zero. A forward kernel inside the branch then leaves at once (its output stays unwritten and is not to be read,
//     statistics for backward are zeros), the last one writes what is left of the branch; a backward kernel writes zero
//     gradients.
#pragma once

#include "../zeroblock.h"

namespace zeroblock::cuda {

// An operand seen as [B, T, D], last dimension contiguous; strides of 0 broadcast. dtype: fp32 or that of x.
struct Operand {
  const void* ptr;  // null: not given
  DType dtype;
  bool per_token;
  int64_t stride_b, stride_t;
};

// A dense gradient of an operand, in that operand's dtype.
struct Grad {
  void* ptr;  // null: not wanted
  DType dtype;
};

struct GroupNormSilu {
  DType dtype;
  bool channels_last, silu;
  int64_t N, C, G, S;
  float eps;
  const void* x;
  Operand weight, bias, scale, shift;  // [C], [C], [N, C], [N, C]
  float *mean, *rstd;                  // [N, G]
  void* y;
  const void* dy;
  void* dx;
  Grad dweight, dbias, dscale, dshift;
  float* workspace;
  const uint8_t* zero;
};

// The RMS norm over the channels of each pixel; x is [N, C, S], or [N, S, C] where channels_last.
constexpr int64_t kMostNormedChannels = 1024;
struct ChannelRmsNormSilu {
  DType dtype;
  bool channels_last, silu, eps_inside;
  int64_t N, C, S;
  float eps;
  const void* x;
  Operand weight, bias, scale, shift;  // [C], [C], [N, C], [N, C], of any dtype
  float* rstd;                         // [N, S], as zeroblock.h says
  void* y;
  const void* dy;
  void* dx;
  Grad dweight, dbias, dscale, dshift;
  float* workspace;
};

// layer_norm_modulate and rms_norm_modulate; with a branch, x is first replaced by x_new = x + gate * branch.
struct RowNorm {
  DType dtype;
  bool rms;
  int64_t B, T, D;
  float eps;
  const void* x;  // fwd: the input or residual; bwd: the normalised tensor (x or x_new)
  Operand weight, bias, shift, scale;
  float *mean, *rstd;  // [B, T]; mean null for rms
  void* y;
  const void* branch;  // null: no gate
  Operand gate;
  void* x_new;
  // backward
  const void* dy;
  const void* dx_new;  // or null (0)
  void* dx;            // with a branch: dresidual
  void* dbranch;
  Grad dscale_token, dgate_token;              // [B, T, D], for operands given per token
  Grad dweight, dbias, dshift, dscale, dgate;  // [D], [D], [B, D] each; a per-token dshift is dy itself
  float* workspace;
};

// A shift, scale or gate: rows of one kind plus a table [D], each of its own dtype.
struct RowOperand {
  RowKind kind;
  Operand rows;   // stride_t: between tokens, or between the rows of which an index chooses one
  Operand table;  // or null
  Grad drows;     // dense; of rows [B, K, D] as of those [B, T, D]
  Grad dtable;
};

// residual_norm_modulate (zeroblock.h has the math): every part of it optional, every tensor of its own dtype.
constexpr int64_t kMostRow = 8192;  // columns, which a block keeps in registers
struct ResidualNorm {
  int64_t B, T, D;
  int64_t K;  // rows of which an index chooses; 1 without an index
  DType residual_dtype, branch_dtype, x_dtype, y_dtype;
  bool tanh, branch_rms, norm, rms;
  float branch_eps, eps;
  const void *residual, *branch;        // branch null: the norm is of the residual
  Operand branch_weight, weight, bias;  // [D]
  RowOperand gate, shift, scale;
  const int32_t* index;              // [B, T] or null; out of range: the nearest row
  float *mean, *rstd, *branch_rstd;  // [B, T]; null where there is no such norm, mean also for rms
  void *x_new, *y;
  // backward
  const int64_t* order;     // with an index: [B, T], the tokens of a sample in the order of their rows
  const int32_t* bounds;    // and [B, K + 1]: where in it those of each row begin
  const void* x;            // what the norm was of
  const void *dx_new, *dy;  // or null (0)
  void *dresidual, *dbranch;
  Grad dbranch_weight, dweight, dbias;
  float* workspace;
};

struct GateResidual {
  DType dtype;
  int64_t B, T, D;
  const void *residual, *branch;
  Operand gate;
  const void* scalar_gate;  // one element of gate.dtype, or null
  void* y;
  const void* dy;
  void* dbranch;
  void* dgate_token;  // [B, T, D]
  Grad dgate;         // [B, D], or [1] for a scalar gate
  float* workspace;
};

constexpr int kConvMoments = 3;

// y = residual + conv(act(norm(x))) + bias for channels-last x [N, H, W, C] (C and K multiples of 8, bf16 or fp16),
// 3x3 with padding 1 or 1x1, stride 1. mean == null: no prologue, y = residual + conv(x) + bias.
struct ConvResidual {
  DType dtype;
  int64_t N, H, W, C, K, G;
  int kernel;  // 3 or 1
  const void* x;
  const float *mean, *rstd;  // [N, G] or null
  Operand norm_weight, norm_bias, scale, shift;
  const void* weight;    // [K, kernel, kernel, C] (a channels-last weight)
  Operand bias;          // [K]
  const void* residual;  // [N, H, W, K] or null
  void* y;
  // Partial statistics of y for the next norm, or null: [N, conv_residual_tiles, K, kConvMoments]; of each channel over
  // a tile's pixels the mean, the rounding error of that mean, and the sum of centred squares.
  float* partial;
  const uint8_t* zero;
};

// mean and rstd [N, G] of y [N, H, W, K] from the partial statistics of its convolution.
struct ConvMoments {
  int64_t N, H, W, K, G;
  float eps;
  const float* partial;
  float *mean, *rstd;
};

// One table of pointers travels in the launch: nothing is copied to the device.
constexpr int kZeroFlagTensors = 64;
constexpr int kZeroFlagTogether = 4;  // under any_of
struct ZeroFlag {
  const void* data[kZeroFlagTensors];
  int64_t bytes[kZeroFlagTensors];
  int element_size[kZeroFlagTensors];  // 2, 4 or 8
  int count;
  bool any_of;
  int32_t* flags;             // [count], 1: every element is +0 or -0; under any_of [1]: of one tensor at least
  unsigned long long* words;  // [count], zeros, and zeros again when the kernel is done
};

int zero_flag(const ZeroFlag&, void* stream);
int group_norm_silu_fwd(const GroupNormSilu&, void* stream);
int group_norm_silu_bwd(const GroupNormSilu&, void* stream);
int64_t group_norm_silu_fwd_workspace(const GroupNormSilu&);  // in floats, as all of them
int64_t group_norm_silu_bwd_workspace(const GroupNormSilu&);
int channel_rms_norm_silu_fwd(const ChannelRmsNormSilu&, void* stream);
int channel_rms_norm_silu_bwd(const ChannelRmsNormSilu&, void* stream);
int64_t channel_rms_norm_silu_bwd_workspace(const ChannelRmsNormSilu&);  // when all pointers but it are set
int row_norm_fwd(const RowNorm&, void* stream);
int row_norm_bwd(const RowNorm&, void* stream);
int64_t row_norm_bwd_workspace(const RowNorm&);
int residual_norm_fwd(const ResidualNorm&, void* stream);
int residual_norm_bwd(const ResidualNorm&, void* stream);
int64_t residual_norm_bwd_workspace(const ResidualNorm&);  // when all pointers but it are set
int gate_residual_fwd(const GateResidual&, void* stream);
int gate_residual_bwd(const GateResidual&, void* stream);
int64_t gate_residual_bwd_workspace(const GateResidual&);
int conv_residual_fwd(const ConvResidual&, void* stream);
int conv_moments(const ConvMoments&, void* stream);
int64_t conv_residual_tiles(const ConvResidual&);  // per sample

// What went wrong, in words.
const char* error_string(int status);

}  // namespace zeroblock::cuda
