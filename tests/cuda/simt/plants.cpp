// Small kernels with one planted bug each, and correct ones: what the emulator itself must catch, and must leave alone.
// plants NAME [seed]: prints "finished VALUES" or "simt::error: ..."; sanitizer reports go to stderr.
#include <cstdio>
#include <vector>

#include "simt.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

struct alignas(16) Four {
  float v[4];
};

// ---- correct --------------------------------------------------------------------------------------------------------

__global__ void reverse(float* y) {
  SIMT_SHARED(float, t, [64]);
  t[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = t[63 - threadIdx.x];
}
__global__ void warp_sum(float* y) {
  float v = threadIdx.x;
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(kAll, v, o);
  y[threadIdx.x] = v + __shfl_sync(kAll, v, 3) + __shfl_up_sync(kAll, v, 1) + __shfl_down_sync(kAll, v, 1);
}
__global__ void count(float* y) {
  unsigned* total = reinterpret_cast<unsigned*>(y);
  if (threadIdx.x % 2) atomicAdd(total, 1u);
}
__global__ void exchange(float* y) {
  SIMT_SHARED(float, t, [64]);
  t[threadIdx.x] = threadIdx.x;
  __syncwarp();
  y[threadIdx.x] = t[threadIdx.x ^ 1];
}
__global__ void async(float* y) {
  SIMT_DYNAMIC_SHARED(float, t);
  simt::copy_async_16(t + 4 * threadIdx.x, y + 4 * threadIdx.x, threadIdx.x != 1);
  simt::copy_async_commit();
  simt::copy_async_wait(0);
  __syncthreads();
  y[threadIdx.x] = t[threadIdx.x];
}
// y = A B for A[16, 16] = i + 2 k (small integers), B[16, 8] = k - n, by one warp; exact in bf16.
__global__ void product(float* y) {
  SIMT_DYNAMIC_SHARED(unsigned short, t);  // A [16, 16], then B transposed [8, 16]
  const unsigned lane = threadIdx.x, g = lane / 4, q = lane % 4;
  auto bits = [](float f) { return __bfloat16_as_ushort(__float2bfloat16(f)); };
  for (unsigned i = lane; i < 256; i += 32) t[i] = bits(i / 16 + 2.0f * (i % 16));
  for (unsigned i = lane; i < 128; i += 32) t[256 + i] = bits(float(i % 16) - i / 16);
  __syncwarp();
  unsigned a[4], b[2];
  float d[4] = {};
  simt::ldmatrix<4, false>(a, t + lane % 16 * 16 + lane / 16 * 8);
  simt::ldmatrix<2, false>(b, t + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  simt::mma_m16n8k16(d, a, b, simt::widen_bf16);
  for (unsigned i = 0; i < 4; i++) y[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = d[i];
}
// Every block of the cluster takes from the next one what that keeps in dynamic and in static shared memory.
__global__ void cluster(float* y) {
  SIMT_DYNAMIC_SHARED(float, t);
  SIMT_SHARED(float, u, [32]);
  const unsigned rank = simt::cluster_rank(), next = (rank + 1) % gridDim.x;
  t[threadIdx.x] = rank * 100.0f + threadIdx.x;
  u[threadIdx.x] = rank * 1000.0f;
  simt::cluster_arrive();
  simt::cluster_wait();
  y[blockIdx.x * 32 + threadIdx.x] = *simt::cluster_peer(t + 31 - threadIdx.x, next) + *simt::cluster_peer(u, next);
  simt::cluster_arrive();
  simt::cluster_wait();
}

// ---- planted --------------------------------------------------------------------------------------------------------

__global__ void no_barrier(float* y) {
  SIMT_SHARED(float, t, [64]);
  t[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = t[63 - threadIdx.x];
}
__global__ void no_sync_warp(float* y) {
  SIMT_SHARED(float, t, [64]);
  t[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = t[threadIdx.x ^ 1];
}
__global__ void no_async_wait(float* y) {
  SIMT_DYNAMIC_SHARED(float, t);
  simt::copy_async_16(t + 4 * threadIdx.x, y + 4 * threadIdx.x, true);
  simt::copy_async_commit();
  simt::copy_async_wait(1);
  const float early = t[4 * threadIdx.x];
  simt::copy_async_wait(0);
  y[4 * threadIdx.x] = early;
}
__global__ void never_waits(float* y) {
  SIMT_DYNAMIC_SHARED(float, t);
  simt::copy_async_16(t + 4 * threadIdx.x, y + 4 * threadIdx.x, true);
  simt::copy_async_commit();
}
__global__ void reads_unwritten(float* y) {
  SIMT_SHARED(float, t, [64]);
  if (threadIdx.x) t[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = t[threadIdx.x];
}
__global__ void shared_overflow(float* y) {
  SIMT_SHARED(float, t, [64]);
  t[threadIdx.x + 1] = 1;
  y[threadIdx.x] = 1;
}
__global__ void dynamic_overflow(float* y) {
  SIMT_DYNAMIC_SHARED(float, t);
  t[threadIdx.x + 1] = 1;
  y[threadIdx.x] = 1;
}
__global__ void global_overflow(float* y) { y[threadIdx.x + 225] = 1; }
__global__ void misaligned(float* y) {
  float* p = y + 1 + 4 * threadIdx.x;
  simt::check_aligned(p, 16);
  *reinterpret_cast<Four*>(p) = Four{};
}
__global__ void returns_early(float* y) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
__global__ void divergent(float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    y[0] = 1;
    __syncthreads();
  }
}
__global__ void lane_outside_mask(float* y) { y[threadIdx.x] = __shfl_xor_sync(0xffu, 1.0f, 16); }
__global__ void dead_lanes(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 8);
}
__global__ void blocks_collide(float* y) { y[threadIdx.x] = blockIdx.x; }
// Only thread 0 of each block, after barriers.
__global__ void first_threads_collide(float* y) {
  SIMT_SHARED(float, t, [256]);
  t[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) y[0] = t[255];
}

// The barriers of `cluster`, one of them left out each time. Block 1 reads late, block 0 has nothing more to do.
template <bool kBefore, bool kAfter, bool kLateMap>
__global__ void cluster_without(float* y) {
  SIMT_DYNAMIC_SHARED(float, t);
  float* neighbour = simt::cluster_peer(t + threadIdx.x, 0);
  t[threadIdx.x] = 1;
  if (kBefore) {
    simt::cluster_arrive();
    simt::cluster_wait();
  }
  if (simt::cluster_rank() == 1) {
    for (int i = 0; kBefore && i < 4; i++) __syncthreads();
    if (kLateMap) neighbour = simt::cluster_peer(t + threadIdx.x, 0);
    y[threadIdx.x] = *neighbour;
  }
  if (kAfter) {
    simt::cluster_arrive();
    simt::cluster_wait();
  }
}
__global__ void cluster_arrives_twice(float*) {
  simt::cluster_arrive();
  simt::cluster_arrive();
}
__global__ void cluster_never_arrives(float*) { simt::cluster_wait(); }
__global__ void cluster_divergent(float*) {
  if (simt::cluster_rank()) {
    simt::cluster_arrive();
  } else {
    simt::cluster_arrive();
  }
  simt::cluster_wait();
}
__global__ void cluster_deadlock(float*) {
  if (simt::cluster_rank()) {
    simt::cluster_arrive();
    simt::cluster_wait();
  } else if (threadIdx.x) {
    __syncthreads();
  }
}
__global__ void cluster_stranger(float* y) {
  SIMT_DYNAMIC_SHARED(float, t);
  y[0] = *simt::cluster_peer(t, 2);
}
__global__ void cluster_global(float* y) { y[0] = *simt::cluster_peer(y, 1); }

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  simt::machine().seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
  simt::machine().cluster_limit = simt::kMaxCluster;
  std::vector<float> values(256, 1.0f);  // a heap block of its exact size
  float* y = values.data();
  bool known = false;
  auto run = [&](const char* kernel, auto f, int blocks, int threads, size_t bytes, int cluster = 1) {
    if (name != kernel) return;
    known = true;
    SIMT_LAUNCH_CLUSTER(f, cluster, dim3(blocks), dim3(threads), bytes, y);
  };
  try {
    if (name == "count") values[0] = 0;
    run("reverse", reverse, 1, 64, 0);
    run("warp_sum", warp_sum, 1, 32, 0);
    run("count", count, 5, 64, 0);
    run("exchange", exchange, 1, 64, 0);
    run("async", async, 1, 32, 512);
    run("product", product, 1, 32, 768);
    run("no_barrier", no_barrier, 1, 64, 0);
    run("no_sync_warp", no_sync_warp, 1, 64, 0);
    run("no_async_wait", no_async_wait, 1, 32, 512);
    run("never_waits", never_waits, 1, 32, 512);
    run("reads_unwritten", reads_unwritten, 1, 64, 0);
    run("shared_overflow", shared_overflow, 1, 64, 0);
    run("dynamic_overflow", dynamic_overflow, 1, 64, 256);
    run("global_overflow", global_overflow, 1, 32, 0);
    run("misaligned", misaligned, 1, 32, 0);
    run("returns_early", returns_early, 1, 64, 0);
    run("divergent", divergent, 1, 64, 0);
    run("lane_outside_mask", lane_outside_mask, 1, 32, 0);
    run("dead_lanes", dead_lanes, 1, 32, 0);
    run("blocks_collide", blocks_collide, 2, 32, 0);
    run("cluster", cluster, 4, 32, 128, 4);
    run("cluster_no_barrier", cluster_without<false, true, false>, 2, 32, 128, 2);
    run("cluster_reads_the_dead", cluster_without<true, false, false>, 2, 32, 128, 2);
    run("cluster_maps_the_dead", cluster_without<true, false, true>, 2, 32, 128, 2);
    run("cluster_arrives_twice", cluster_arrives_twice, 2, 32, 0, 2);
    run("cluster_never_arrives", cluster_never_arrives, 2, 32, 0, 2);
    run("cluster_divergent", cluster_divergent, 2, 32, 0, 2);
    run("cluster_deadlock", cluster_deadlock, 2, 32, 0, 2);
    run("cluster_stranger", cluster_stranger, 2, 32, 128, 2);
    run("cluster_global", cluster_global, 2, 32, 128, 2);
    run("cluster_too_large", cluster, 16, 32, 128, 16);
    run("cluster_half", cluster, 3, 32, 128, 2);
    run("large_shared", reverse, 1, 64, 1 << 18);
    run("first_threads_collide", first_threads_collide, 3, 256, 0);
    run("empty_grid", reverse, 0, 64, 0);
    run("large_block", reverse, 1, 2048, 0);
  } catch (const simt::error& e) {
    printf("simt::error: %s\n", e.what());
    return 0;
  }
  if (!known) return 2;
  printf("finished");
  for (float v : values) printf(" %g", v);
  printf("\n");
  return 0;
}
