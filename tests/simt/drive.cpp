// Every launcher of csrc/cuda once over shapes that reach its variants, on heap blocks of exact size: what the
// sanitizer builds run. Values are the parity suite's business; here an unwritten (NaN) output is an error, and so is
// any report. drive [seed]. With ZB_DRIVE_ONLY=<op> defined only that op is compiled in, and only its source need be
// linked.
#include "calls.h"

#define ZB_OP_ALL 0
#define ZB_OP_zero_flag 1
#define ZB_OP_group_norm_silu 2
#define ZB_OP_row_norm 3
#define ZB_OP_gate_residual 4
#define ZB_OP_conv_residual 5
#define ZB_OP_clusters 6
#ifndef ZB_DRIVE_ONLY
#define ZB_DRIVE_ONLY ZB_OP_ALL
#endif
#define ZB_DRIVES(op) (ZB_DRIVE_ONLY == ZB_OP_ALL || ZB_DRIVE_ONLY == op)

namespace {

#ifdef __SANITIZE_THREAD__
constexpr DType kTypes[] = {DType::kBF16};  // slow, and barriers do not depend on the type
#else
constexpr DType kTypes[] = {DType::kBF16, DType::kF32};
#endif

void drive() {
#if ZB_DRIVES(ZB_OP_zero_flag)
  for (int64_t n : {0, 1, 7, 8, 9, 4096, 5003}) drive_zero_flag(n, 1, n % 2 == 0);
#endif
  for (DType dtype : kTypes) {
    (void)dtype;
#if ZB_DRIVES(ZB_OP_group_norm_silu)
    for (bool last : {false, true}) {
      drive_group_norm_silu(dtype, last, 2, 16, 4, 24);   // on chip
      drive_group_norm_silu(dtype, last, 1, 12, 3, 35);   // one element at a time
      drive_group_norm_silu(dtype, last, 1, 8, 1, 8192);  // several chunks
    }
#endif
#if ZB_DRIVES(ZB_OP_row_norm)
    for (const bool gated : {false, true}) {
      const RowOptions o{gated, false, !gated, true};
      drive_row_norm(dtype, o, 2, 9, 48);    // teams share a block
      drive_row_norm(dtype, o, 1, 3, 37);    // one element at a time
      drive_row_norm(dtype, o, 2, 2, 4160);  // a team of all warps, and columns beyond its registers
    }
    drive_row_norm(dtype, {false, true, true}, 2, 3, 4160);
#endif
#if ZB_DRIVES(ZB_OP_gate_residual)
    drive_gate_residual(dtype, GateKind::kSample, 2, 70, 48);
    drive_gate_residual(dtype, GateKind::kSample, 1, 9, 37);
    drive_gate_residual(dtype, GateKind::kToken, 1, 9, 40);
    drive_gate_residual(dtype, GateKind::kScalar, 1, 1, 5000);
    drive_gate_residual(dtype, GateKind::kScalar, 1, 1, 37);
#endif
  }
#if ZB_DRIVES(ZB_OP_clusters)
  // Clusters of two blocks, the second chunk shorter; forward and backward.
  drive_group_norm_silu(DType::kBF16, false, 1, 8, 2, 1000, {{8 * 1024, 12 * 1024}, 2});
  drive_group_norm_silu(DType::kBF16, true, 1, 8, 2, 1000, {{44 * 1024, 52 * 1024}, 2});
  if (simt::machine().stats.clusters != 6) failures++;
#endif
#if ZB_DRIVES(ZB_OP_conv_residual)
  for (bool norm : {false, true}) {
    drive_conv_residual(DType::kBF16, {3, norm}, 1, 9, 17, 40, 24);
    drive_conv_residual(DType::kF16, {1, norm}, 1, 3, 5, 160, 136);
  }
#endif
}

}  // namespace

int main(int argc, char** argv) {
  simt::machine().seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1;
  try {
    drive();
  } catch (const simt::error& e) {
    printf("simt::error: %s\n", e.what());
    return 1;
  }
  printf("%lld calls, %d failures\n", static_cast<long long>(launched), failures);
  return failures ? 1 : 0;
}
