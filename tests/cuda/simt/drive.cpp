// Every kernel of csrc/cuda in every dtype and layout over shapes that reach its variants, on heap blocks of exact
// size: what the sanitizer builds run. Values are the parity suite's business; here an unwritten (NaN) output is an
// error, and so is any report. Few blocks show a race as well as many, and ThreadSanitizer pays for every thread.
//
// drive [seed [op [bug]]]: op is one of those in main, or "all"; bug the number of a mistake that a test has planted
// into a kernel beside the right code.
#include "norm_calls.h"

int planted_bug = 0;

namespace {

void drive_zero_flags() {
  for (int size : {2, 4, 8}) {
    for (int64_t n : {0, 1, 7, 8, 9, 5003}) drive_zero_flag(n, 1, {n % 2 == 0, n % 2 == 0}, n % 3 == 0, size);
  }
  for (int bits = 0; bits < 8; bits++) {  // several blocks
    drive_zero_flag(9000, 7001, {(bits & 1) != 0, (bits & 2) != 0}, (bits & 4) != 0);
  }
}

// Of the forward and of the backward kernel: enough for half of the groups below, not for a whole one.
std::array<size_t, 2> little_shared(bool channels_last) {
  if (channels_last) return {44 * 1024, 52 * 1024};
  return {8 * 1024, 12 * 1024};
}

void drive_group_norms(DType dtype) {
  for (bool last : {false, true}) {
    drive_group_norm_silu(dtype, last, 2, 16, 2, 24);                             // on chip
    drive_group_norm_silu(dtype, last, 1, 12, 2, 35);                             // one element at a time
    drive_group_norm_silu(dtype, last, 1, 8, 1, 1100, {little_shared(last), 1});  // chunks, the last one shorter
  }
}

// Clusters of two blocks, the second chunk shorter; forward and backward.
void drive_clusters(DType dtype) {
  const uint64_t before = simt::machine().stats.clusters;
  drive_group_norm_silu(dtype, false, 1, 8, 2, dtype == DType::kF32 ? 500 : 1000, {little_shared(false), 2});
  drive_group_norm_silu(dtype, true, 1, 8, 2, 1000, {little_shared(true), 2});
  if (simt::machine().stats.clusters != before + 6) failures++;
}

void drive_row_norms(DType dtype) {
  for (const bool gated : {false, true}) {
    const RowOptions o{gated, false, !gated, true};
    drive_row_norm(dtype, o, 2, 9, 48);  // teams share a block
    drive_row_norm(dtype, o, 1, 3, 37);  // one element at a time
    // A team of all warps, and columns beyond its registers: those of the backward kernel, then of both.
    const RowOptions per_token{gated, false, false, true, true, true};
    drive_row_norm(dtype, per_token, 1, 2, dtype == DType::kF32 ? 3080 : 6152);
    drive_row_norm(dtype, per_token, 1, 2, 2051);
  }
  drive_row_norm(dtype, {false, true, true}, 2, 3, 520);
}

void drive_gate_residuals(DType dtype) {
  drive_gate_residual(dtype, GateKind::kSample, 1, 340, 48);                                // several chunks
  drive_gate_residual(dtype, GateKind::kSample, 1, 8, dtype == DType::kF32 ? 1032 : 2056);  // two tiles of columns
  drive_gate_residual(dtype, GateKind::kSample, 1, 3, 301);
  drive_gate_residual(dtype, GateKind::kChannel, 2, 9, 37);
  drive_gate_residual(dtype, GateKind::kToken, 1, 9, 40);
  drive_gate_residual(dtype, GateKind::kScalar, 1, 1, 2600);
  drive_gate_residual(dtype, GateKind::kScalar, 1, 1, 37);
}

void drive_channel_norms(DType dtype) {
  const int64_t pack = dtype == DType::kF32 ? 4 : 8;
  for (bool last : {false, true}) {
    drive_channel_norm(dtype, last, {}, 2, 24, 10 * pack);                           // several tiles
    drive_channel_norm(dtype, last, {true, false, false, true}, 1, 261, 35);         // one element at a time
    drive_channel_norm(dtype, last, {false, false, false}, 1, 66 * pack, 2 * pack);  // several warps of a pixel
  }
  drive_channel_norm(dtype, true, {true, false, false}, 1, pack, 600);  // several blocks that add up
}

void drive_residual_norms(DType dtype) {
  constexpr RowKind none = RowKind::kNone, one = RowKind::kOne, token = RowKind::kToken, chosen = RowKind::kIndexed;
  constexpr RowKind sample = RowKind::kSample;
  drive_residual_norm(dtype, {sample, sample, sample, true, true, true, true}, 2, 19, 48);  // teams share a block
  drive_residual_norm(dtype, {token, token, token, true, true, true, true, true}, 1, 5, 40);
  drive_residual_norm(dtype, {one, one, one, true, false, false, false, false, true, true, true}, 2, 5, 37);
  NormOptions indexed{chosen, chosen, chosen, true, true, true};
  indexed.K = 5, indexed.tail = 16;
  drive_residual_norm(dtype, indexed, 2, 37, 24);  // several chunks, the last one shorter
  // Two warps share a row, and the sums are not in shared memory; without sums, a block of one row.
  NormOptions large{sample, sample, sample, false, false, true};
  drive_residual_norm(dtype, large, 1, 34, 520);
  large.shared = 0;
  drive_residual_norm(dtype, large, 1, 34, 520);
  indexed.shared = 0, indexed.affine = false;
  drive_residual_norm(dtype, indexed, 1, 37, 24);
  drive_residual_norm(dtype, {token, token, token, false, false, true}, 1, 2, 2064);
  NormOptions mixed{sample, token, one};
  mixed.wide = true, mixed.mixed = true;
  drive_residual_norm(dtype, mixed, 1, 3, 44);
  drive_residual_norm(dtype, mixed, 1, 3, 37);
  NormOptions branch{none};
  branch.norm = false;
  drive_residual_norm(dtype, branch, 1, 3, 40);
  NormOptions norm{none, none, none, true, true};
  norm.branch = false;
  drive_residual_norm(dtype, norm, 1, 3, 40);
}

void drive_convolutions(DType dtype) {
  if (dtype == DType::kF32) return;  // tensor cores take half precision
  for (bool norm : {false, true}) {
    drive_conv_residual(dtype, {3, norm}, 1, 9, 17, 40, 24);
    drive_conv_residual(dtype, {1, norm}, 1, 3, 5, 168, 128);  // wide tiles, more blocks of channels than stages
    drive_conv_residual(dtype, {3, norm, true, true}, 1, 3, 5, 8, 8);
  }
  drive_conv_residual(dtype, {3, false, false, false, false}, 1, 3, 5, 8, 8);  // no bias
}

void drive(const std::string& op) {
  auto wanted = [&](const char* name) { return op == "all" || op == name; };
  if (wanted("zero_flag")) drive_zero_flags();
  for (DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    if (wanted("group_norm_silu")) drive_group_norms(dtype);
    if (wanted("clusters")) drive_clusters(dtype);
    if (wanted("row_norm")) drive_row_norms(dtype);
    if (wanted("channel_rms_norm_silu")) drive_channel_norms(dtype);
    if (wanted("residual_norm_modulate")) drive_residual_norms(dtype);
    if (wanted("gate_residual")) drive_gate_residuals(dtype);
    if (wanted("conv_residual")) drive_convolutions(dtype);
  }
}

}  // namespace

int main(int argc, char** argv) {
  simt::machine().seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1;
  planted_bug = argc > 3 ? atoi(argv[3]) : 0;
  try {
    drive(argc > 2 ? argv[2] : "all");
  } catch (const simt::error& e) {
    printf("simt::error: %s\n", e.what());
    return 1;
  }
  printf("%lld calls, %d failures\n", static_cast<long long>(launched), failures);
  return failures ? 1 : 0;
}
