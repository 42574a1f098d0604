// The one seam between nvcc and the emulator of tests/cuda/simt: launches, shared memory and inline PTX under one name
// each.
#pragma once

#ifdef ZB_SIMT
#include "simt.h"
#define ZB_SHARED SIMT_SHARED
#define ZB_DYNAMIC_SHARED SIMT_DYNAMIC_SHARED
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define ZB_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define ZB_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char dynamic_raw[]; \
  T* name = reinterpret_cast<T*>(dynamic_raw)
#endif

#include <cstdint>

#ifndef ZB_SIMT
#include <atomic>
#include <map>
#include <mutex>
#include <utility>
#endif

namespace zeroblock::cuda {

// a * b, rounded: never a part of a fused multiply-add, whose difference from the rounded product would be left where
// products cancel.
#ifdef ZB_SIMT
__device__ __forceinline__ float rounded_product(float a, float b) { return a * b; }
#else
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;  // with bf16 the names of ZB_DTYPES

#ifndef ZB_SIMT
// ask(device) >= 0 for the current device, asked once: of what does not change, a launch asks cudaGetDevice alone.
template <class Ask>
int of_device(Ask ask) {
  constexpr int kMost = 64;
  static std::atomic<int> known[kMost];  // what was said, plus 1
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMost) return ask(device);
  int found = known[device].load(std::memory_order_relaxed);
  if (found == 0) known[device].store(found = ask(device) + 1, std::memory_order_relaxed);
  return found - 1;
}

// A kernel may have so much dynamic shared memory: asked for where it did not have as much before.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (status != cudaSuccess || bytes <= most) return status;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) most = bytes;
  return status;
}
#endif

// Launches kernel<<<grid, block, bytes, stream>>>(args...) in clusters of so many blocks; dynamic shared memory above
// 48 KB is asked for first. Returns a cudaError_t as int, 0 for success. Never waits.
template <class... Params, class... Args>
int launch_clusters(unsigned cluster, void (*kernel)(Params...), dim3 grid, int block, size_t bytes, void* stream,
                    const Args&... args) {
#ifdef ZB_SIMT
  (void)stream;
  return SIMT_LAUNCH_CLUSTER(kernel, cluster, grid, dim3(block), bytes, args...);
#else
  if (bytes > 48 * 1024) {
    const cudaError_t status = allow_shared(reinterpret_cast<const void*>(kernel), bytes);
    if (status != cudaSuccess) {
      (void)cudaGetLastError();  // reported here; the next launch starts clean
      return static_cast<int>(status);
    }
  }
  if (cluster > 1) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    (void)cudaLaunchKernelEx(&config, kernel, args...);
    return static_cast<int>(cudaGetLastError());
  }
  // clang-format off
  kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  // clang-format on
  return static_cast<int>(cudaGetLastError());
#endif
}
template <class Kernel, class... Args>
int launch(Kernel kernel, dim3 grid, int block, size_t bytes, void* stream, const Args&... args) {
  return launch_clusters(1, kernel, grid, block, bytes, stream, args...);
}

// The shared memory that a block of this device may ask for.
inline size_t shared_limit() {
#ifdef ZB_SIMT
  return simt::machine().shared_limit;
#else
  return of_device([](int device) {
    int bytes = 48 * 1024;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
  });
#endif
}

// The blocks that a cluster may have on every device that knows clusters; 1 where this device or the code that was
// compiled for it does not.
template <class Kernel>
unsigned cluster_limit(Kernel kernel) {
#ifdef ZB_SIMT
  (void)kernel;
  return simt::machine().cluster_limit;
#else
  return of_device([kernel](int device) {  // all kernels are compiled for the same architectures
    int known = 0;
    cudaFuncAttributes code{};
    const bool knows = cudaDeviceGetAttribute(&known, cudaDevAttrClusterLaunch, device) == cudaSuccess && known &&
                       cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90;
    return knows ? 8 : 1;
  });
#endif
}

// ---- one instruction, one function ----------------------------------------------------------------------------------

#ifdef ZB_SIMT

inline void check_aligned(const void* p, size_t bytes) { simt::check_aligned(p, bytes); }
using Word = unsigned long long;
inline Word load_relaxed(const Word* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline void store_relaxed(Word* p, Word v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
inline void copy_async_16(void* dst, const void* src, bool valid) { simt::copy_async_16(dst, src, valid); }
inline void copy_async_commit() { simt::copy_async_commit(); }
template <int N>
void copy_async_wait() {
  simt::copy_async_wait(N);
}
constexpr bool kKnowsClusters = true;
using simt::cluster_arrive;
using simt::cluster_peer;
using simt::cluster_wait;
inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { simt::ldmatrix<4, false>(r, row); }
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) {
  simt::mma_m16n8k16(d, a, b, simt::widen_bf16);
}
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], f16) {
  simt::mma_m16n8k16(d, a, b, simt::widen_fp16);
}

#else

__device__ __forceinline__ void check_aligned(const void*, size_t) {}
using Word = unsigned long long;
__device__ __forceinline__ Word load_relaxed(const Word* p) { return *reinterpret_cast<const volatile Word*>(p); }
__device__ __forceinline__ void store_relaxed(Word* p, Word v) { *reinterpret_cast<volatile Word*>(p) = v; }
// 16 bytes from global to shared memory, zeros when not valid; past L1, since no other thread of the block reads them.
__device__ __forceinline__ void copy_async_16(void* dst, const void* src, bool valid) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(dst));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
// The cluster's barrier in two halves, so that work may stand between them; every thread calls both. Arriving releases,
// waiting acquires, also shared memory of the neighbours.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kKnowsClusters = true;
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Where block `rank` of the cluster has what this block has at p in shared memory.
template <class T>
__device__ __forceinline__ T* cluster_peer(T* p, unsigned rank) {
  unsigned long long address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(address);
}
#else
constexpr bool kKnowsClusters = false;
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <class T>
__device__ __forceinline__ T* cluster_peer(T* p, unsigned) {
  return p;
}
#endif
#define ZB_MMA(type)                                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
// d += a b on fragments of 16x16 and 16x8; the last argument names the element type.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) {
  ZB_MMA("bf16");
}
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], f16) {
  ZB_MMA("f16");
}
#undef ZB_MMA

#endif

}  // namespace zeroblock::cuda
