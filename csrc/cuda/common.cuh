// Shared device code: 16-byte packs, operands of either dtype, sums in a fixed order, SiLU.
#pragma once

#include "cuda_kernels.h"
#include "platform.cuh"

namespace zeroblock::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  return __float2half(v);
}

// V elements moved by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
  __device__ __forceinline__ float operator[](int k) const { return to_float(v[k]); }
};

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p) {
  check_aligned(p, sizeof(T) * V);
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack) {
  check_aligned(p, sizeof(T) * V);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}
template <int V, class T>
__device__ __forceinline__ void store_floats(T* p, const float (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int k = 0; k < V; k++) pack.v[k] = from_float<T>(values[k]);
  store_pack<V>(p, pack);
}

// Elements [offset, offset + V) of an operand of dtype fp32 or T; `missing` where the operand is not given.
template <class T, int V>
__device__ __forceinline__ void load_operand(const Operand& o, int64_t offset, float missing, float (&out)[V]) {
  if (o.ptr == nullptr) {
#pragma unroll
    for (int k = 0; k < V; k++) out[k] = missing;
  } else if (o.dtype == DType::kF32) {
    constexpr int kWidth = V < 4 ? V : 4;
#pragma unroll
    for (int j = 0; j < V; j += kWidth) {
      const Pack<float, kWidth> pack = load_pack<kWidth>(static_cast<const float*>(o.ptr) + offset + j);
#pragma unroll
      for (int k = 0; k < kWidth; k++) out[j + k] = pack[k];
    }
  } else {
    const Pack<T, V> pack = load_pack<V>(static_cast<const T*>(o.ptr) + offset);
#pragma unroll
    for (int k = 0; k < V; k++) out[k] = pack[k];
  }
}
template <class T>
__device__ __forceinline__ float operand_at(const Operand& o, int64_t offset, float missing) {
  float v[1];
  load_operand<T, 1>(o, offset, missing, v);
  return v[0];
}

template <class T>
__device__ __forceinline__ void store_grad(const Grad& g, int64_t offset, float value) {
  if (g.ptr == nullptr) return;
  if (g.dtype == DType::kF32) {
    static_cast<float*>(g.ptr)[offset] = value;
  } else {
    static_cast<T*>(g.ptr)[offset] = from_float<T>(value);
  }
}

// V neighbouring elements of a gradient that is wanted.
template <class T, int V>
__device__ __forceinline__ void store_grads(const Grad& g, int64_t offset, const float (&values)[V]) {
  if (g.dtype != DType::kF32) return store_floats<V>(static_cast<T*>(g.ptr) + offset, values);
  constexpr int kWidth = V < 4 ? V : 4;
#pragma unroll
  for (int j = 0; j < V; j += kWidth) {
    float part[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; k++) part[k] = values[j + k];
    store_floats<kWidth>(static_cast<float*>(g.ptr) + offset + j, part);
  }
}

__device__ __forceinline__ bool branch_is_zero(const uint8_t* zero) { return zero != nullptr && *zero != 0; }

// A sum of any length in one thread: cut after so many addends, for each that follows rounds what came before.
struct LongSum {
  static constexpr int kAddends = 8;
  float total = 0, part = 0;
  int count = 0;
  __device__ __forceinline__ void add(float v) {
    part += v;
    if (++count < kAddends) return;
    total += part;
    part = 0;
    count = 0;
  }
  __device__ __forceinline__ float value() const { return total + part; }
};

// 1 / sqrt(variance + eps); NaN for a variance beyond fp32, where 0 would hide it.
__device__ __forceinline__ float rstd_of(float variance, float eps) {
  return rsqrtf((variance < 0.0f ? 0.0f : variance) + 0.0f * variance + eps);
}

// Over `lanes` (a power of two, at most 32) neighbouring lanes; every one of them gets the sum.
__device__ __forceinline__ float lanes_sum(float v, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}
__device__ __forceinline__ float warp_sum(float v) { return lanes_sum(v, 32); }

// Half precision takes the fast exponential: its error is far below the result's rounding.
template <class T>
__device__ __forceinline__ float exp_for(float x) {
  return sizeof(T) == 4 ? expf(x) : __expf(x);
}
template <class T>
__device__ __forceinline__ float sigmoid(float z) {
  return 1.0f / (1.0f + exp_for<T>(-z));
}
template <class T>
__device__ __forceinline__ float silu(float z) {
  return z / (1.0f + exp_for<T>(-z));
}
template <class T>
__device__ __forceinline__ float silu_derivative(float z) {
  const float s = sigmoid<T>(z);
  return s * (1.0f + z * (1.0f - s));
}

// ---- host side ------------------------------------------------------------------------------------------------------

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether V elements at a time may be read from an operand whose rows start at multiples of its strides.
inline bool is_vectorised(const Operand& o, int V) {
  return o.ptr == nullptr || (is_aligned(o.ptr) && o.stride_b % V == 0 && o.stride_t % V == 0);
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(T()) for the element type.
template <class F>
int with_dtype(DType dtype, F f) {
  switch (dtype) {
#define ZB_CASE(name, type, scalar_type) \
  case DType::name:                      \
    return f(type());
    ZB_DTYPES(ZB_CASE)
#undef ZB_CASE
  }
  return f(float());
}

inline int element_size(DType dtype) {
  return with_dtype(dtype, [](auto element) { return static_cast<int>(sizeof(element)); });
}
inline int pack_size(DType dtype) { return 16 / element_size(dtype); }

// Blocks that a launch aims for where it may choose: enough to fill a large GPU several times, few enough that partial
// sums stay a small part of the traffic (python -m tests.cuda.simt.traffic). No GPU has timed them (guess).
constexpr int64_t kElementwiseBlocks = 1024;   // gate_residual forward and two-pass group norms
constexpr int64_t kSummingBlocks = 512;        // gate_residual backward: a block writes partial sums
constexpr int64_t kRowNormBlocks = 448;        // backward of row norms: a block writes three rows of partial sums
constexpr int64_t kZeroFlagBlocks = 256;       // more would start after the flag is cleared
constexpr int64_t kOnChipBlocks = 96;          // fewer blocks leave most of a GPU idle: then not one block per group,
constexpr int64_t kClusterBlocks = 64;         // nor a cluster,
constexpr size_t kSmallSlabBytes = 32 * 1024;  // unless a slab is small anyway

}  // namespace zeroblock::cuda
