// Bytes and products of every kernel, counted as it runs: what traffic.py makes its table of.
//
// Compiled with -fsanitize=thread, which calls __tsan_read and __tsan_write at every access to memory, but linked with
// the functions below in place of ThreadSanitizer. An access to a buffer of calls.h is counted; the rest is the
// emulator's. Prints "case launch buffer role bytes read read-once written written-once products" for each buffer that
// a launch touched: bytes asked for, and distinct ones; products are the launch's FLOPs on tensor cores.
#include "norm_calls.h"

namespace {

#define QUIET __attribute__((no_sanitize("thread"), noinline))

constexpr int kBuffers = 64;
struct Counted {
  char *begin, *end;
  Role role;
  int64_t read, read_once, written, written_once;
  unsigned char* seen;  // bit 0: read, bit 1: written
};
Counted buffers[kBuffers];
int count = 0;
Counted* last = nullptr;                           // where the last access fell
const char *lowest = nullptr, *highest = nullptr;  // of all buffers
uint64_t launch_number = 0;
const char* current_case = "";

QUIET void print_launch() {
  for (int i = 0; i < count; i++) {
    Counted& b = buffers[i];
    const long long size = b.end - b.begin;
    if (b.read || b.written) {
      printf("%s %llu %d %s %lld %lld %lld %lld %lld %lld\n", current_case, (unsigned long long)launch_number, i,
             b.role == Role::kScratch ? "scratch" : "data", size, (long long)b.read, (long long)b.read_once,
             (long long)b.written, (long long)b.written_once, (long long)simt::machine().stats.products);
    }
    b.read = b.read_once = b.written = b.written_once = 0;
    memset(b.seen, 0, size);
  }
  simt::machine().stats.products = 0;
}

QUIET Counted* buffer_at(const char* p) {
  if (last && p >= last->begin && p < last->end) return last;
  if (p < lowest || p >= highest) return nullptr;
  for (int i = 0; i < count; i++) {
    if (p >= buffers[i].begin && p < buffers[i].end) return last = &buffers[i];
  }
  return nullptr;
}

QUIET void access(const void* address, size_t bytes, bool write) {
  const simt::Machine& m = simt::the_machine;
  if (m.current == nullptr) return;  // the host
  const char* p = static_cast<const char*>(address);
  Counted* found = buffer_at(p);
  if (found == nullptr) return;
  if (m.stats.launches != launch_number) {
    print_launch();
    launch_number = m.stats.launches;
  }
  Counted& b = *found;
  (write ? b.written : b.read) += bytes;
  const unsigned char bit = 1 << write;
  unsigned char* seen = b.seen + (p - b.begin);
  int64_t fresh = 0;
  for (size_t k = 0; k < bytes; k++) {
    fresh += (seen[k] & bit) == 0;
    seen[k] |= bit;
  }
  (write ? b.written_once : b.read_once) += fresh;
}

QUIET void add_buffer(void* data, size_t bytes, Role role) {
  if (count == kBuffers) abort();
  char* p = static_cast<char*>(data);
  lowest = count == 0 || p < lowest ? p : lowest;
  highest = count == 0 || p + bytes > highest ? p + bytes : highest;
  buffers[count++] = {p, p + bytes, role, 0, 0, 0, 0, static_cast<unsigned char*>(calloc(bytes + 1, 1))};
}

// Runs one call: its buffers are counted while it lasts.
template <class Drive>
void run(const char* name, Drive drive) {
  current_case = name;
  drive();
  for (int i = 0; i < count; i++) free(buffers[i].seen);
  count = 0;
  last = nullptr;
}

constexpr Gpu kSm90{{227 * 1024, 227 * 1024}, 8};

void group_norm(const char* forward, DType dtype, bool last, int64_t C, int64_t side, Gpu gpu = {}) {
  run(forward, [=] { drive_group_norm_silu(dtype, last, 1, C, 32, side * side, gpu); });
}

}  // namespace

extern "C" {
#define ACCESS(size)                                                          \
  QUIET void __tsan_read##size(void* p) { access(p, size, false); }           \
  QUIET void __tsan_write##size(void* p) { access(p, size, true); }           \
  QUIET void __tsan_unaligned_read##size(void* p) { access(p, size, false); } \
  QUIET void __tsan_unaligned_write##size(void* p) { access(p, size, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
QUIET void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, false); }
QUIET void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, true); }
using Word = unsigned long long;
QUIET Word __tsan_atomic64_load(const volatile Word* p, int) { return *p; }
QUIET void __tsan_atomic64_store(volatile Word* p, Word v, int) { *p = v; }
QUIET int __tsan_atomic64_compare_exchange_strong(volatile Word* p, Word* before, Word v, int, int) {
  if (*p == *before) return *p = v, 1;
  return *before = *p, 0;
}
QUIET void __tsan_init() {}
QUIET void __tsan_func_entry(void*) {}
QUIET void __tsan_func_exit() {}
QUIET void __tsan_vptr_update(void**, void*) {}
QUIET void __tsan_vptr_read(void**) {}

void* __real_memcpy(void* to, const void* from, size_t bytes);
QUIET void* __wrap_memcpy(void* to, const void* from, size_t bytes) {  // cp.async
  access(from, bytes, false);
  return __real_memcpy(to, from, bytes);
}
}

int main() {
  on_buffer = add_buffer;
  on_launch = [](const char*) {
    print_launch();
    printf("%s end\n", current_case);
  };
  constexpr DType kHalf = DType::kBF16;
  group_norm("group_norm_silu-320x64-bf16-nchw", kHalf, false, 320, 64);
  group_norm("group_norm_silu-320x64-bf16-nchw-cluster", kHalf, false, 320, 64, kSm90);
  group_norm("group_norm_silu-320x64-bf16-nhwc", kHalf, true, 320, 64);
  group_norm("group_norm_silu-320x64-bf16-nhwc-cluster", kHalf, true, 320, 64, kSm90);
  group_norm("group_norm_silu-1280x8-bf16-nchw", kHalf, false, 1280, 8);
  group_norm("group_norm_silu-1280x8-bf16-nhwc", kHalf, true, 1280, 8);
  group_norm("group_norm_silu-640x16-fp32-nchw", DType::kF32, false, 640, 16);
  const ChannelOptions weight{true, false, false};
  run("channel_rms_norm_silu-96x64-bf16-nchw", [=] { drive_channel_norm(kHalf, false, weight, 1, 96, 4096); });
  run("channel_rms_norm_silu-96x64-bf16-nhwc", [=] { drive_channel_norm(kHalf, true, weight, 1, 96, 4096); });
  run("channel_rms_norm_silu-384x32-fp32-nchw", [=] { drive_channel_norm(DType::kF32, false, weight, 1, 384, 1024); });
  for (const bool wide : {false, true}) {
    run(wide ? "layer_norm_modulate-1152" : "layer_norm_modulate-384",
        [=] { drive_row_norm(kHalf, {}, 2, 256, wide ? 1152 : 384); });
  }
  run("layer_norm_modulate-3072", [] { drive_row_norm(kHalf, {}, 2, 64, 3072); });
  run("layer_norm_modulate-1152-token", [] { drive_row_norm(kHalf, {false, false, false, true, true}, 2, 256, 1152); });
  run("rms_norm_modulate-1152", [] { drive_row_norm(kHalf, {false, true}, 2, 256, 1152); });
  run("gate_residual_layer_norm_modulate-1152", [] { drive_row_norm(kHalf, {true}, 2, 256, 1152); });
  auto norm = [](RowKind kind) {
    NormOptions o{kind, kind, kind};
    o.wide = true, o.K = kind == RowKind::kIndexed ? 4 : 1;
    return o;
  };
  run("residual_norm_modulate-sample", [=] { drive_residual_norm(kHalf, norm(RowKind::kSample), 2, 256, 1152); });
  run("residual_norm_modulate-token", [=] { drive_residual_norm(kHalf, norm(RowKind::kToken), 2, 256, 1152); });
  run("residual_norm_modulate-indexed", [=] { drive_residual_norm(kHalf, norm(RowKind::kIndexed), 2, 256, 1152); });
  run("gate_residual-sample", [] { drive_gate_residual(kHalf, GateKind::kSample, 2, 256, 1152); });
  run("gate_residual-token", [] { drive_gate_residual(kHalf, GateKind::kToken, 2, 256, 1152); });
  run("gate_residual-channel", [] { drive_gate_residual(kHalf, GateKind::kChannel, 2, 256, 1152); });
  run("conv_residual-3x3", [] { drive_conv_residual(kHalf, {3, false, false}, 2, 16, 16, 128, 128); });
  run("conv_residual-3x3-zero", [] { drive_conv_residual(kHalf, {3, false, false, true}, 2, 16, 16, 128, 128); });
  run("conv_residual-1x1", [] { drive_conv_residual(kHalf, {1, false, false}, 2, 16, 16, 128, 128); });
  run("conv_residual-3x3-statistics", [] { drive_conv_residual(kHalf, {3}, 2, 16, 16, 128, 128); });
  run("group_norm_silu_conv_residual-1x1", [] { drive_conv_residual(kHalf, {1, true, false}, 2, 32, 32, 128, 128); });
  run("group_norm_silu_conv_residual-3x3", [] { drive_conv_residual(kHalf, {3, true, false}, 2, 16, 16, 128, 128); });
  run("zero_flag-dense", [] { drive_zero_flag(320 * 320 * 9, 0, {false, false}, false); });
  run("zero_flag-zero", [] { drive_zero_flag(320 * 320 * 9, 0, {true, true}, false); });
  return failures ? 1 : 0;
}
