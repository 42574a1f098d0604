// The machine: clusters one after another, the blocks of a cluster at once, one fiber per CUDA thread, barriers, shared
// memory. Without clusters a block is a cluster of its own.
//
// A fiber runs until it waits (barrier, warp operation) or ends. With a seed, clusters run in random order, threads are
// resumed in random order, and after a barrier any thread may go first. Shared memory is all ones (a NaN in every
// floating type) when a block starts. ThreadSanitizer sees each fiber as a thread of its own; a switch orders nothing,
// a barrier does, so a race on shared or global memory is reported whatever the schedule was, also between blocks.
#pragma once

#include <sys/mman.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "sanitizers.h"

namespace simt {

// What a GPU would leave undefined: divergent barriers, deadlock, bad masks, misaligned vectors.
struct error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr unsigned kMaxThreads = 1024, kMaxCluster = 8;
#if defined(__SANITIZE_THREAD__)
constexpr unsigned kStacks = 4352;  // every thread of a launch has its own, see prepare_fiber
#else
constexpr unsigned kStacks = kMaxThreads * kMaxCluster;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

enum class State : uint8_t { kReady, kBarrier, kWarp, kCluster, kDone };

struct alignas(64) Slot {
  unsigned char bytes[64];
};

// One meeting of the lanes of `mask`; lives until the last of them has taken its result.
struct WarpOp {
  unsigned mask = 0, arrived = 0, left = 0;
  int kind = 0;
  char order = 0;
  Slot slot[32];
};

struct Warp {
  std::vector<WarpOp*> pending, pool;
};

struct AsyncCopy {
  void* dst;
  const void* src;
  unsigned bytes, total;  // the rest up to total is zeroed
  int group;
};

struct Block;

struct Fiber {
  uint3 index;
  unsigned linear, lane;
  Block* block;
  Warp* warp;
  State state;
  void* sp = nullptr;
  char* stack = nullptr;
  unsigned barriers = 0, wait_mask = 0;
  const char* where = "";
  bool arrived = false;  // at the open phase of the cluster's barrier
  unsigned phase = 0;    // of the cluster's barrier, how many it has passed
  int line = 0;          // where it arrived
  int group = 0;         // the open cp.async group
  std::vector<AsyncCopy> copies;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

struct SharedArray {
  const void* key;  // null: the dynamic one
  char* data;
  size_t bytes;
};

// What ThreadSanitizer orders memory by, one variable each.
struct Orders {
  char barrier[2], cluster[2], exit;
};

struct Block {
  uint3 index{};
  unsigned rank = 0;  // in its cluster
  Fiber* fibers = nullptr;
  std::vector<Warp> warps;
  std::vector<SharedArray> shared;
  char* dynamic_shared = nullptr;
  unsigned waiting = 0, alive = 0;
  Orders* orders = nullptr;
};

enum class LaunchMode { kRun, kRefuse, kRecord, kRefuseClusters };

struct LaunchRecord {
  unsigned threads;
  size_t dynamic_bytes;
  unsigned cluster;
};

struct Stats {
  uint64_t launches = 0, clusters = 0, blocks = 0, threads = 0, switches = 0;  // clusters: of several blocks
  uint64_t products = 0;                                                       // FLOPs of mma.sync
};

// Each block synchronises through variables of its own: shared ones would order one block after another.
constexpr unsigned kOrders = 4096;

struct Machine {
  // settings
  uint64_t seed = 0;                   // 0: everything in order
  LaunchMode mode = LaunchMode::kRun;  // kRefuse: launches fail, as without resources; kRecord: they are only noted
  size_t shared_limit = 163 * 1024;    // of a block: the GPU that is played is an sm_80,
  unsigned cluster_limit = 1;          // which has no clusters
  uint64_t last_blocks = 0;            // of a launch only so many run, the last ones; 0: all
  Stats stats;
  std::vector<LaunchRecord> records;
  // the launch
  dim3 grid, block;
  unsigned threads = 0;  // of a block
  size_t dynamic_bytes = 0;
  std::function<void()> body;
  std::mt19937_64 random;
  std::string failure;
  // the cluster
  Block blocks[kMaxCluster];
  unsigned cluster = 1;  // how many of them
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  Fiber* current = nullptr;
  unsigned alive = 0, arrived = 0, phase = 0, generation = 0;
  char* stacks = nullptr;
  void* scheduler_sp = nullptr;
  Orders orders[kOrders] = {};
  uint64_t started = 0;  // threads of this launch
  char launch_order = 0, end_order = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
  std::vector<void*> tsan_fibers;  // of the threads of a launch
#endif
};

inline Machine the_machine;
SIMT_NO_TSAN inline Machine& machine() { return the_machine; }
SIMT_NO_TSAN inline uint3 thread_index() { return the_machine.current->index; }
SIMT_NO_TSAN inline uint3 block_index() { return the_machine.current->block->index; }
SIMT_NO_TSAN inline dim3 block_size() { return the_machine.block; }
SIMT_NO_TSAN inline dim3 grid_size() { return the_machine.grid; }
SIMT_NO_TSAN inline char* dynamic_shared() { return the_machine.current->block->dynamic_shared; }

inline std::string at(const Fiber& f) {
  const uint3& b = f.block->index;
  char text[240];
  snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u) at %s", b.x, b.y, b.z, f.index.x, f.index.y,
           f.index.z, f.where);
  return text;
}

inline void throw_if_failed() {
  if (!machine().failure.empty()) throw error(machine().failure);
}

// Saves the callee-saved registers and the stack pointer in *save, and goes on where `load` was saved (x86-64).
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp,(%rdi)\n"
      "movq %rsi,%rsp\n popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

// From the current fiber to the scheduler; returns when the fiber is resumed.
SIMT_NO_TSAN inline void yield([[maybe_unused]] bool dying = false) {
  Machine& m = machine();
  Fiber* me = m.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(dying ? nullptr : &me->fake_stack, m.bottom, m.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(m.tsan, 1);  // 1: the switch itself orders nothing
#endif
  switch_stack(&me->sp, m.scheduler_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine().current->fake_stack, nullptr, nullptr);
#endif
}

SIMT_NO_TSAN inline void resume(Fiber& f) {
  Machine& m = machine();
  m.current = &f;
  m.stats.switches++;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.fake_stack, f.stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f.tsan, 1);
#endif
  switch_stack(&m.scheduler_sp, f.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.fake_stack, nullptr, nullptr);
#endif
}

inline void make_ready(Fiber& f) {
  f.state = State::kReady;
  machine().ready.push_back(&f);
}

inline void wait_as(State state) {
  machine().current->state = state;
  yield();
}

}  // namespace simt
