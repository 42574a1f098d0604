// CUDA C++ kernels on the CPU: under g++ this header stands in for the CUDA runtime.
//
//   g++ -std=c++17 -fno-strict-aliasing -DZB_SIMT -I tests/cuda/simt -I $CUDA/include kernel.cu
//
// It executes what the CUDA programming model says, one fiber per thread, and turns what that model leaves undefined
// into an error, a NaN or a sanitizer report. Used by csrc/cuda/platform.cuh; README.md says what each build catches.
// Not modelled: forward progress between clusters, tensor maps and wgmma, textures, warp-level memory order other than
// __syncwarp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

// The host halves of the CUDA headers define these as attributes.
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)

#include "cluster.h"
#include "launch.h"
#include "warp.h"

#define SIMT_TEXT_(x) #x
#define SIMT_TEXT(x) SIMT_TEXT_(x)
#define SIMT_HERE (__FILE__ ":" SIMT_TEXT(__LINE__) "#" SIMT_TEXT(__COUNTER__))

#define SIMT_LAUNCH(kernel, grid, block, dynamic_bytes, ...) \
  simt::launch((grid), (block), (dynamic_bytes), [=] { (kernel)(__VA_ARGS__); })
#define SIMT_LAUNCH_CLUSTER(kernel, cluster, grid, block, dynamic_bytes, ...) \
  simt::launch((grid), (block), (dynamic_bytes), [=] { (kernel)(__VA_ARGS__); }, (cluster))
#define SIMT_SHARED(T, name, ...) \
  static char name##_key_;        \
  T(&name) __VA_ARGS__ = *reinterpret_cast<T(*) __VA_ARGS__>(simt::shared_array(&name##_key_, sizeof(T __VA_ARGS__)))
#define SIMT_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::dynamic_shared())

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
#define __syncthreads() simt::sync_threads(SIMT_HERE)
#define __syncwarp(...) simt::SyncWarp{SIMT_HERE}(__VA_ARGS__)
#define __shfl_sync(...) simt::shuffle(SIMT_HERE, simt::kShuffle, __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shuffle(SIMT_HERE, simt::kShuffleXor, __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle(SIMT_HERE, simt::kShuffleDown, __VA_ARGS__)
#define __shfl_up_sync(...) simt::shuffle(SIMT_HERE, simt::kShuffleUp, __VA_ARGS__)
#define __ballot_sync(mask, vote) simt::ballot(SIMT_HERE, mask, (vote) != 0)
#define __any_sync(mask, vote) (simt::ballot(SIMT_HERE, mask, (vote) != 0) != 0)

inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <class T>
T atomicAdd(T* p, T value) {
  T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &before, T(before + value), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}

namespace simt {

// Vector accesses: misalignment is an error in every build, not only under UBSan.
inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  Quiet quiet;
  throw error("misaligned access of " + std::to_string(bytes) + " bytes; " + at(*machine().current));
}

inline float widen_bf16(unsigned bits) {
  const unsigned u = bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline float widen_fp16(unsigned bits) {
  const unsigned short u = static_cast<unsigned short>(bits);
  return __half2float(__ushort_as_half(u));
}

// cp.async: the copy happens as late as the program allows, in wait_group; until then the destination is NaN.
inline void copy_async_16(void* dst, const void* src, bool valid) {
  check_aligned(dst, 16);
  if (valid) check_aligned(src, 16);
  memset(dst, 0xFF, 16);
  Quiet quiet;
  Fiber& f = *machine().current;
  f.copies.push_back({dst, src, valid ? 16u : 0u, 16u, f.group});
}
inline void copy_async_commit() {
  Quiet quiet;
  machine().current->group++;
}
// Completes all but the newest `keep` groups. The copies themselves are visible to the sanitizers.
inline void copy_async_wait(int keep) {
  std::vector<AsyncCopy> now;
  {
    Quiet quiet;
    Fiber& f = *machine().current;
    auto due = [&](const AsyncCopy& c) { return c.group < f.group - keep; };
    std::copy_if(f.copies.begin(), f.copies.end(), std::back_inserter(now), due);
    f.copies.erase(std::remove_if(f.copies.begin(), f.copies.end(), due), f.copies.end());
  }
  for (size_t i = 0;; i++) {
    AsyncCopy c;
    {
      Quiet quiet;
      if (i >= now.size()) break;
      c = now[i];
    }
    memcpy(c.dst, c.src, c.bytes);
    memset(static_cast<char*>(c.dst) + c.bytes, 0, c.total - c.bytes);
  }
}

}  // namespace simt
