// The tables of the CPU kernels of one instruction set, each of them a file, table_*.cpp, that is compiled once per
// instruction set: -DZB_ISA=avx2 makes ZB_TABLE(rows) rows_avx2, and the compiler's flags choose the vectors of
// vec/vec.h. They are files of their own so that they are compiled side by side.
#pragma once

#include "../zeroblock.h"

#define ZB_TABLES(isa)                             \
  extern const ImageKernels images_##isa;          \
  extern const ConvKernels convs_##isa;            \
  extern const RowKernels rows_##isa;              \
  extern const GatedNormKernels gated_norms_##isa; \
  extern const ResidualNormKernels residual_norms_##isa;
// All of them: what initialises a CpuKernels.
#define ZB_KERNELS(isa) {images_##isa, convs_##isa, rows_##isa, gated_norms_##isa, residual_norms_##isa, #isa}

#define ZB_JOINED(a, b) a##_##b
#define ZB_NAME(part, isa) ZB_JOINED(part, isa)
#define ZB_TABLE(part) ZB_NAME(part, ZB_ISA)
