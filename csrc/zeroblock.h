// Parameter blocks and launchers shared by every native backend. No torch header may be included here.
//
// Conventions
//   * pointers are raw, sizes are int64_t, strides are in elements, never in bytes;
//   * x, y, dy, dx and other activations have the element type `dtype`;
//   * per-channel and per-sample vectors, statistics and reductions are always fp32;
//   * a null pointer means "argument not given" (inputs) or "gradient not wanted" (outputs);
//   * results do not depend on the number of threads: work is cut into pieces by shape alone.
#pragma once

#include <cstdint>

namespace zeroblock {

// Every element type, in one place: X(DType, the kernels' type, torch's ScalarType). bf16 and f16 are defined by
// cpu/vec/element.h and by cuda/platform.cuh.
#define ZB_DTYPES(X)       \
  X(kF32, float, Float)    \
  X(kBF16, bf16, BFloat16) \
  X(kF16, f16, Half)

#define ZB_ENUMERATOR(name, type, scalar_type) name,
enum class DType : int32_t { ZB_DTYPES(ZB_ENUMERATOR) };
#undef ZB_ENUMERATOR

// The binding hands in the framework's thread pool: run body(ctx, b, e) over disjoint ranges that cover [begin, end).
using ParallelBody = void (*)(void* ctx, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* ctx);

// y = act(((x - mean) * rstd * weight + bias) * (1 + scale) + shift), statistics over one group of one sample.
// x is [N, C, S] (channels_last == false) or [N, S, C] (true), dense. mean, rstd: [N, G]. With `frames`, which divide
// N, the samples are those of videos: x is [N / frames, C, frames, S], not channels_last.
struct GroupNormSilu {
  DType dtype;
  bool channels_last;
  bool silu;  // false: no activation
  int64_t N, C, G, S;
  int64_t frames = 1;
  float eps;
  const void* x;
  const float *weight, *bias;  // [C] or null (1, 0)
  const float *scale, *shift;  // [N, C] or null (0)
  float *mean, *rstd;          // written by fwd, read by bwd
  void* y;                     // fwd only
  // backward
  const void* dy;  // same layout as x
  void* dx;
  float *dweight, *dbias;  // [C] or null
  float *dscale, *dshift;  // [N, C] or null
  float* workspace;        // as many floats as the matching *_workspace function says
};

// The same with statistics over the C channels of each pixel, and no mean: G is 1, mean null, rstd [N, S] is 1 /
// sqrt(mean(x^2) + eps) where eps_inside, else sqrt(C) / max(norm, eps), negative where eps is no less.
struct ChannelRmsNormSilu : GroupNormSilu {
  bool eps_inside;
};

// A modulation operand seen as [B, T, D], last dimension contiguous. per_token == false: one row per sample, stride_b
// apart (0: one row for all). per_token == true: rows stride_b / stride_t apart.
struct Rows {
  const void* ptr;  // null: not given
  bool per_token;
  int64_t stride_b, stride_t;
  bool fp32;  // the elements; else, where per_token, they are of type dtype
};

// y = (xhat [* weight + bias]) * (1 + scale) + shift, xhat = (x - mean) * rstd; rms: mean = 0.
// x, y, dy, dx are dense [B, T, D]. mean, rstd: [B, T]; mean is null for rms.
struct LayerNormModulate {
  DType dtype;
  bool rms;
  int64_t B, T, D;
  float eps;
  const void* x;
  const float *weight, *bias;  // [D] or null
  Rows shift, scale;
  float *mean, *rstd;
  void* y;
  // backward; a per-token dshift is dy itself and is never asked for
  const void* dy;
  void* dx;
  float *dweight, *dbias;  // [D] or null
  float* dshift;           // [B, D] or null
  void* dscale;            // per_token ? of the type of scale, [B, T, D] : fp32 [B, D]; or null
  float* workspace;
};

// The same with a second modulation, y2 = xhat * (1 + scale2) + shift2: neither weight nor bias, all operands per
// sample.
struct LayerNormModulateTwo : LayerNormModulate {
  Rows shift2, scale2;
  void* y2;
  const void* dy2;
  float *dshift2, *dscale2;  // [B, D] or null
};

// y = residual + gate * branch, all dense [B, T, D]; gate a Rows, of type dtype where per_token, or one number for all
// (scalar_gate).
struct GateResidual {
  DType dtype;
  int64_t B, T, D;
  const void *residual, *branch;
  Rows gate;
  const float* scalar_gate;  // one element, or null
  void* y;
  // backward: dbranch = gate * dy; dgate = sum over T of dy * branch
  const void* dy;
  void* dbranch;  // or null
  void* dgate;    // per_token ? dtype [B, T, D] : fp32 [B, D] ([1] for scalar_gate); or null
  float* workspace;
};

// x_new = residual + gate * branch; y = layer_norm(x_new) * (1 + scale) + shift. x_new is rounded to dtype before its
// statistics are taken, so that y is exactly layer_norm_modulate(x_new).
// Backward, with dx_new the gradient that reaches x_new directly: dresidual = dx_new + LN-backward(dy);
// dbranch = gate * dresidual; dgate = sum over T of dresidual * branch.
struct GateResidualLayerNormModulate {
  DType dtype;
  int64_t B, T, D;
  float eps;
  const void *residual, *branch;
  Rows gate, shift, scale;
  void* x_new;  // written by fwd, read by bwd
  void* y;
  float *mean, *rstd;
  // backward
  const void* dx_new;  // or null (0)
  const void* dy;
  void* dresidual;
  void* dbranch;  // or null
  void* dgate;    // as in GateResidual, or null
  float* dshift;  // [B, D] or null
  void* dscale;   // as in LayerNormModulate, or null
  float* workspace;
};

// A shift, scale or gate in any of its forms, in its own type: one row for everything, one of each sample, of each
// token, or of which token (b, t) takes row index[b, t] of `count`. Rows are stride_r apart, those of samples stride_b.
enum class RowKind : int32_t { kNone, kOne, kSample, kToken, kIndexed };
struct RowOperand {
  RowKind kind;
  DType dtype;
  const void* ptr;
  int64_t stride_b, stride_r, count;
  const float* table;  // [D] added to every row, or null
  void* grad;          // kToken: of dtype, [B, T, D]; else fp32, [D], [B, D] or [B, count, D]; or null
  float* dtable;       // [D] or null
};

// x_new = residual + act(gate) * norm_b(branch); y = norm(x_new) [* weight + bias] * (1 + scale) + shift. act: tanh or
// nothing; norm_b: the RMS norm, or nothing, times branch_weight. x_new is rounded to its type before its statistics
// are taken. All dense [B, T, D], each of its own type. Without branch the norm is of residual, and x_new null; with no
// norm y is null.
// Backward, with dx_new the gradient that reaches x_new directly: dresidual = dx_new + norm-backward(dy), and on to
// branch and gate. x: what the norm was of.
struct ResidualNormModulate {
  int64_t B, T, D;
  const void* residual;
  const void* branch;
  void* x_new;
  void* y;
  DType residual_dtype, branch_dtype, x_dtype, y_dtype;
  RowOperand gate, shift, scale;
  bool tanh, branch_rms, norm, rms;
  float branch_eps, eps;
  const float *branch_weight, *weight, *bias;  // [D] or null
  const int32_t* index;                        // [B, T] or null; out of range: the nearest row
  float *mean, *rstd, *branch_rstd;            // [B, T]; null where there is no such norm, mean also for rms
  // backward
  const void* x;
  const void* dx_new;  // or null (0)
  const void* dy;      // or null (0)
  void* dresidual;     // of type residual_dtype, or null
  void* dbranch;       // or null
  float *dbranch_weight, *dweight, *dbias;
  float* workspace;
};

enum class Act : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// fwd: y = act(x). bwd: dx = dy * act'(x), and y = act(x) again when y is not null (one read of x serves both).
struct Activation {
  DType dtype;
  Act act;
  int64_t n;
  const void* x;
  void* y;
  const void* dy;
  void* dx;
};

// y = x + bias for a dense x seen as [R, C, S], bias along C; what is left of a zero branch. y may be x.
struct AddBias {
  DType dtype;
  int64_t R, C, S;
  const void* x;
  const float* bias;  // [C] or null (0)
  void* y;
};

// Memory that has to hold nothing but +0 and -0.
struct ZeroBytes {
  const void* data;
  int64_t bytes;
};

// A 3x3 weight seen as [K, C, 9]: element (k, c, tap) at data[k * out + c * in + tap * tap_stride], with the stride of
// the taps or of one of the channels 1. flip: taps in reverse (the data gradient, which also swaps K and C).
struct WinogradWeight {
  void* data;
  int64_t K, C, out, in, tap;
  bool flip;
};

// y = conv(x, weight) [+ bias] [+ residual], 3x3, stride 1, in fp32 by Winograd's F(tile x tile, 3x3), tile 2 or 4;
// with affine, x is first normalised and activated: silu((x - mean) * a + b). x, y, dy, residual, of type dtype as the
// weight is: [N, C | K, H, W] or, with channels_last, [N, H, W, C | K], dense. OH = H + 2 padding - 2, OW likewise.
struct Winograd {
  DType dtype;
  int tile;
  bool channels_last;
  int64_t N, C, K, H, W, OH, OW, padding;
  int64_t threads;  // that ParallelFor may run: decides who shares what, not the result
  const void* x;
  const float* affine;    // [N, 3, C]: mean, a, b; or null
  WinogradWeight weight;  // fwd and pack: read; wgrad: the gradient, written
  const float* packed;    // fwd: what pack wrote, or null: the weight is transformed on the way
  const float* bias;      // [K] or null
  const void* residual;   // or null
  void* y;                // fwd only
  float* u;               // pack only, winograd_packed_size floats
  const void* dy;         // wgrad only
};

// The kernels of one instruction set, in the parts that are compiled side by side (cpu/tables.h). Every *_workspace
// returns a number of floats.
struct ImageKernels {
  void (*group_norm_silu_fwd)(const GroupNormSilu&, ParallelFor);
  void (*group_norm_silu_bwd)(const GroupNormSilu&, ParallelFor);
  int64_t (*group_norm_silu_fwd_workspace)(const GroupNormSilu&);
  int64_t (*group_norm_silu_bwd_workspace)(const GroupNormSilu&);
  void (*group_norm_statistics)(const GroupNormSilu&, ParallelFor);  // mean and rstd; workspace as for fwd
  void (*group_norm_affine)(const GroupNormSilu&, float* affine);    // [N, 3, C] from mean and rstd
  void (*channel_rms_norm_silu_fwd)(const ChannelRmsNormSilu&, ParallelFor);
  void (*channel_rms_norm_silu_bwd)(const ChannelRmsNormSilu&, ParallelFor);
  int64_t (*channel_rms_norm_silu_fwd_workspace)(const ChannelRmsNormSilu&);
  int64_t (*channel_rms_norm_silu_bwd_workspace)(const ChannelRmsNormSilu&);
  void (*activation_fwd)(const Activation&, ParallelFor);
  void (*activation_bwd)(const Activation&, ParallelFor);
  void (*add_bias)(const AddBias&, ParallelFor);
  // Whether all of `tests` are zero by is_zero's rule; if so y has been written as add_bias writes it.
  bool (*residual_if_zero)(const ZeroBytes* tests, int count, int element_size, const AddBias&, ParallelFor);
};

struct ConvKernels {
  void (*winograd_fwd)(const Winograd&, ParallelFor);
  void (*winograd_wgrad)(const Winograd&, ParallelFor);
  void (*winograd_pack)(const Winograd&, ParallelFor);
  int64_t (*winograd_packed_size)(const Winograd&);
  // True when every one of the `bytes` bytes, read as elements of `element_size` (2, 4 or 8) bytes, is +0 or -0.
  bool (*is_zero)(const void* data, int64_t bytes, int element_size, ParallelFor);
  // Rows of a small operand, `stride` apart, to dense fp32; a small fp32 gradient to its operand's type.
  void (*widen)(DType, const void* from, int64_t rows, int64_t columns, int64_t stride, float* to);
  void (*narrow)(DType, const float* from, int64_t n, void* to);
};

struct RowKernels {
  void (*layer_norm_modulate_fwd)(const LayerNormModulate&, ParallelFor);
  void (*layer_norm_modulate_bwd)(const LayerNormModulate&, ParallelFor);
  int64_t (*layer_norm_modulate_bwd_workspace)(const LayerNormModulate&);
  void (*gate_residual_fwd)(const GateResidual&, ParallelFor);
  void (*gate_residual_bwd)(const GateResidual&, ParallelFor);
  int64_t (*gate_residual_bwd_workspace)(const GateResidual&);
  void (*layer_norm_modulate_two_fwd)(const LayerNormModulateTwo&, ParallelFor);
  void (*layer_norm_modulate_two_bwd)(const LayerNormModulateTwo&, ParallelFor);
  int64_t (*layer_norm_modulate_two_bwd_workspace)(const LayerNormModulateTwo&);
};

struct GatedNormKernels {
  void (*gate_residual_layer_norm_modulate_fwd)(const GateResidualLayerNormModulate&, ParallelFor);
  void (*gate_residual_layer_norm_modulate_bwd)(const GateResidualLayerNormModulate&, ParallelFor);
  int64_t (*gate_residual_layer_norm_modulate_bwd_workspace)(const GateResidualLayerNormModulate&);
};

struct ResidualNormKernels {
  void (*residual_norm_modulate_fwd)(const ResidualNormModulate&, ParallelFor);
  void (*residual_norm_modulate_bwd)(const ResidualNormModulate&, ParallelFor);
  int64_t (*residual_norm_modulate_bwd_workspace)(const ResidualNormModulate&);
};

struct CpuKernels : ImageKernels, ConvKernels, RowKernels, GatedNormKernels, ResidualNormKernels {
  const char* isa;
};

// The table for this processor, or null when it has neither AVX2+FMA+F16C nor AVX-512 (F, BW, DQ, VL).
const CpuKernels* cpu_kernels();

}  // namespace zeroblock
