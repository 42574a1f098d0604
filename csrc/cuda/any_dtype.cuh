// Kernels whose tensors and operands come in dtypes of their own, and the second stage of sums over blocks.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace zeroblock::cuda {

// The element type of a kernel: T where all tensors are of it and operands are fp32 or T, Mixed where each has its own.
struct Mixed {};
template <class T>
constexpr bool kIsMixed = std::is_same_v<T, Mixed>;
// In which a thread keeps what it has read: nothing is narrowed.
template <class T>
using Kept = std::conditional_t<kIsMixed<T>, float, T>;

template <class T, int V>
__device__ __forceinline__ void load_as(const void* p, int64_t offset, float (&out)[V]) {
  constexpr int kWidth = V < kVector<T> ? V : kVector<T>;
#pragma unroll
  for (int j = 0; j < V; j += kWidth) {
    const Pack<T, kWidth> pack = load_pack<kWidth>(static_cast<const T*>(p) + offset + j);
#pragma unroll
    for (int k = 0; k < kWidth; k++) out[j + k] = pack[k];
  }
}
template <class T, int V>
__device__ __forceinline__ void store_as(void* p, int64_t offset, const float (&values)[V]) {
  constexpr int kWidth = V < kVector<T> ? V : kVector<T>;
#pragma unroll
  for (int j = 0; j < V; j += kWidth) {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int k = 0; k < kWidth; k++) pack.v[k] = from_float<T>(values[j + k]);
    store_pack<kWidth>(static_cast<T*>(p) + offset + j, pack);
  }
}

// f(element), the element type by its number.
template <class F>
__device__ __forceinline__ void with_element(DType dtype, F f) {
  if (dtype == DType::kF32) {
    f(float());
  } else if (dtype == DType::kBF16) {
    f(bf16());
  } else {
    f(f16());
  }
}

// V elements of an operand of fp32 or T, for Mixed of any dtype.
template <class T, int V>
__device__ __forceinline__ void load_any(const void* p, DType dtype, int64_t offset, float (&out)[V]) {
  if constexpr (kIsMixed<T>) {
    with_element(dtype, [&](auto element) { load_as<decltype(element)>(p, offset, out); });
  } else if (dtype == DType::kF32) {
    load_as<float>(p, offset, out);
  } else {
    load_as<T>(p, offset, out);
  }
}
template <class T, int V>
__device__ __forceinline__ void store_any(const Grad& g, int64_t offset, const float (&values)[V]) {
  if constexpr (kIsMixed<T>) {
    with_element(g.dtype, [&](auto element) { store_as<decltype(element)>(g.ptr, offset, values); });
  } else if (g.dtype == DType::kF32) {
    store_as<float>(g.ptr, offset, values);
  } else {
    store_as<T>(g.ptr, offset, values);
  }
}

// V elements of a tensor: of type T, for Mixed of its own dtype.
template <class T, int V>
__device__ __forceinline__ Pack<Kept<T>, V> load_tensor(const void* p, DType dtype, int64_t offset) {
  if constexpr (kIsMixed<T>) {
    Pack<float, V> pack;
    load_any<Mixed>(p, dtype, offset, pack.v);
    return pack;
  } else {
    return load_pack<V>(static_cast<const T*>(p) + offset);
  }
}
template <class T, int V>
__device__ __forceinline__ void store_tensor(void* p, DType dtype, int64_t offset, const float (&values)[V]) {
  if constexpr (kIsMixed<T>) {
    store_any<Mixed>(Grad{p, dtype}, offset, values);
  } else {
    store_floats<V>(static_cast<T*>(p) + offset, values);
  }
}
// As it will be read back from a tensor.
template <class T>
__device__ __forceinline__ Kept<T> rounded_to(DType dtype, float v) {
  if constexpr (kIsMixed<T>) {
    with_element(dtype, [&](auto element) { v = to_float(from_float<decltype(element)>(v)); });
    return v;
  } else {
    return from_float<T>(v);
  }
}

// One element of an operand of any dtype; `missing` where it is not given.
__device__ __forceinline__ float any_at(const Operand& o, int64_t offset, float missing) {
  float v[1] = {missing};
  if (o.ptr) load_any<Mixed>(o.ptr, o.dtype, offset, v);
  return v[0];
}
__device__ __forceinline__ void store_one(const Grad& g, int64_t offset, float value) {
  const float v[1] = {value};
  if (g.ptr) store_any<Mixed>(g, offset, v);
}

// ---- the second stage of sums ---------------------------------------------------------------------------------------

// A block adds up columns: lanes side by side, each every kSumLanes-th addend from first to last, then the lanes in
// order.
constexpr int kSumColumns = 32, kSumLanes = 8, kSumThreads = kSumColumns * kSumLanes;

struct ColumnSums {
  float* part;  // [kSumThreads] of shared memory
  int64_t column;
  int lane;
  bool inside, first;  // a column that exists; the thread of it that gets the sums
  __device__ ColumnSums(float* shared, int64_t block, int64_t columns) : part(shared) {
    column = block * kSumColumns + threadIdx.x % kSumColumns;
    lane = threadIdx.x / kSumColumns;
    inside = column < columns;
    first = inside && lane == 0;
  }
  // The sum of `count` numbers of the column, `stride` apart, in its first thread. All threads call it.
  __device__ float sum(const float* addends, int64_t count, int64_t stride) const {
    float v = 0;
    if (inside) {
      for (int64_t i = lane; i < count; i += kSumLanes) v += addends[i * stride + column];
    }
    part[threadIdx.x] = v;
    __syncthreads();
    v = 0;
    if (first) {
      for (int j = 0; j < kSumLanes; j++) v += part[j * kSumColumns + threadIdx.x];
    }
    __syncthreads();
    return v;
  }
};

inline int64_t sum_blocks(int64_t columns) { return ceil_div(columns, kSumColumns); }

}  // namespace zeroblock::cuda
