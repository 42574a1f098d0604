// Prints what three launches ask the CUDA runtime for (host_runtime.cpp); then three on another device, the last with
// more shared memory. Nothing runs.
#include <cstdio>

#include "platform.cuh"

extern int current_device;

__global__ void nothing(int) {}

static void call(size_t bytes) {
  using namespace zeroblock::cuda;
  shared_limit();
  launch_clusters(cluster_limit(nothing), nothing, dim3(8), 32, bytes, nullptr, 0);
  std::printf("\n");
}

int main() {
  for (int i = 0; i < 3; i++) call(100000);
  current_device = 1;
  call(100000);
  call(90000);
  call(110000);
}
