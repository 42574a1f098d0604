// Picks the kernel table at run time. Compiled for the baseline processor: nothing here may use wider vectors.
#include "tables.h"

namespace zeroblock {

ZB_TABLES(avx2)
ZB_TABLES(avx512)

const CpuKernels* cpu_kernels() {
  static const CpuKernels* const table = []() -> const CpuKernels* {
    static const CpuKernels avx2 = ZB_KERNELS(avx2), avx512 = ZB_KERNELS(avx512);
    __builtin_cpu_init();
    const bool f16c = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (f16c && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return &avx512;
    }
    return f16c ? &avx2 : nullptr;
  }();
  return table;
}

}  // namespace zeroblock
