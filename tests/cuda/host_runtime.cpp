// The functions of the CUDA runtime that launches call: each says its name, and knows no GPU.
#include <cuda_runtime_api.h>

#include <cstdio>

int current_device = 0;

extern "C" {
cudaError_t cudaGetDevice(int* device) {
  std::printf(" cudaGetDevice");
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  std::printf(" cudaDeviceGetAttribute");
  *value = 1;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  std::printf(" cudaFuncGetAttributes");
  found->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  std::printf(" cudaFuncSetAttribute");
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return cudaSuccess; }
}
