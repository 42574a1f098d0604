// Picks the kernel table at run time. Compiled for the baseline processor: nothing here may use wider vectors.
#include "../zeroblock.h"

namespace zeroblock {

extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;

const CpuKernels* cpu_kernels() {
  static const CpuKernels* const table = []() -> const CpuKernels* {
    __builtin_cpu_init();
    const bool f16c = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (f16c && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return &kernels_avx512;
    }
    return f16c ? &kernels_avx2 : nullptr;
  }();
  return table;
}

}  // namespace zeroblock
