// The machine: blocks one after another, one fiber per CUDA thread, barriers, shared memory.
//
// A fiber runs until it waits (barrier, warp operation) or ends. With a seed, blocks run in random order, threads are
// resumed in random order, and after a barrier any thread may go first. Shared memory is all ones (a NaN in every
// floating type) when a block starts. ThreadSanitizer sees each fiber as a thread of its own; a switch orders nothing,
// a barrier does, so a race on shared or global memory is reported whatever the schedule was.
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

constexpr unsigned kMaxThreads = 1024;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

enum class State : uint8_t { kReady, kBarrier, kWarp, kDone };

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

struct Fiber {
  uint3 index;
  unsigned linear, lane;
  Warp* warp;
  State state;
  void* sp = nullptr;
  char* stack = nullptr;
  unsigned barriers = 0, wait_mask = 0;
  const char* where = "";
  int group = 0;  // the open cp.async group
  std::vector<AsyncCopy> copies;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

struct SharedArray {
  const void* key;
  char* data;
};

enum class LaunchMode { kRun, kRefuse, kRecord };

struct LaunchRecord {
  unsigned threads;
  size_t dynamic_bytes;
};

struct Stats {
  uint64_t launches = 0, blocks = 0, threads = 0, switches = 0;
};

// Each block synchronises through variables of its own: shared ones would order one block after another.
constexpr unsigned kBarrierOrders = 4096;

struct Machine {
  // settings
  uint64_t seed = 0;                   // 0: everything in order
  bool ordered_blocks = true;          // false: blocks are concurrent for ThreadSanitizer, as they are on a GPU
  LaunchMode mode = LaunchMode::kRun;  // kRefuse: launches fail, as without resources; kRecord: they are only noted
  Stats stats;
  std::vector<LaunchRecord> records;
  // the launch
  dim3 grid, block;
  uint3 block_index{};
  std::function<void()> body;
  std::mt19937_64 random;
  std::string failure;
  // the block
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> ready;
  std::vector<SharedArray> shared;
  Fiber* current = nullptr;
  unsigned threads = 0, waiting = 0, alive = 0, generation = 0;
  char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  char* stacks = nullptr;
  void* scheduler_sp = nullptr;
  char barrier_order[kBarrierOrders][2] = {}, block_order[2] = {}, launch_order = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

inline Machine the_machine;
SIMT_NO_TSAN inline Machine& machine() { return the_machine; }
SIMT_NO_TSAN inline uint3 thread_index() { return the_machine.current->index; }
SIMT_NO_TSAN inline uint3 block_index() { return the_machine.block_index; }
SIMT_NO_TSAN inline dim3 block_size() { return the_machine.block; }
SIMT_NO_TSAN inline dim3 grid_size() { return the_machine.grid; }
SIMT_NO_TSAN inline char* dynamic_shared() { return the_machine.dynamic_shared; }

inline std::string at(const Fiber& f) {
  const uint3& b = machine().block_index;
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
  machine().ready.push_back(f.linear);
}

inline void wait_as(State state) {
  machine().current->state = state;
  yield();
}

// The first function of every fiber.
inline void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.bottom, &m.size);
#endif
  unsigned parity;
  bool ordered;
  {
    Quiet quiet;
    parity = m.generation & 1;
    ordered = m.ordered_blocks;
  }
  acquire(&m.launch_order);
  if (ordered) acquire(&m.block_order[parity ^ 1]);
  try {
    m.body();
    Quiet quiet;
    if (m.failure.empty() && !m.current->copies.empty()) {
      m.failure = "cp.async: a thread returned with copies it never waited for; " + at(*m.current);
    }
  } catch (std::exception& e) {
    Quiet quiet;
    if (m.failure.empty()) m.failure = e.what();
  }
  release(&m.block_order[parity]);
  {
    Quiet quiet;
    m.current->state = State::kDone;
    m.alive--;
  }
  yield(true);
  __builtin_unreachable();
}

inline void sync_threads(const char* where) {
  Machine& m = machine();
  char* order;
  {
    Quiet quiet;
    m.current->where = where;
    throw_if_failed();
    order = &m.barrier_order[m.generation % kBarrierOrders][m.current->barriers++ & 1];
  }
  release(order);
  {
    Quiet quiet;
    if (++m.waiting == m.threads) {
      m.waiting = 0;
      for (Fiber& f : m.fibers) {
        if (&f == m.current || f.state != State::kBarrier) continue;
        if (strcmp(f.where, where)) throw error("divergent __syncthreads: " + at(f) + " meets " + at(*m.current));
        make_ready(f);
      }
      if (m.seed) {
        make_ready(*m.current);
        yield();
      }
    } else {
      wait_as(State::kBarrier);
    }
    throw_if_failed();
  }
  acquire(order);
}

// A __shared__ array: fresh heap memory for each block, so that the sanitizers know its extent and lifetime.
inline char* shared_array(const void* key, size_t bytes) {
  Quiet quiet;
  std::vector<SharedArray>& arrays = machine().shared;
  for (SharedArray& s : arrays) {
    if (s.key == key) return s.data;
  }
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes)) abort();
  memset(p, 0xFF, bytes);
  arrays.push_back({key, static_cast<char*>(p)});
  return static_cast<char*>(p);
}

}  // namespace simt
