// Running a grid: the scheduler, deadlock detection, and the launch itself.
#pragma once

#include "machine.h"

namespace simt {

inline void prepare_fiber(Fiber& f, unsigned i) {
  Machine& m = machine();
  f.linear = i;
  f.index = {i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y)};
  f.lane = i & 31;
  f.warp = &m.warps[i >> 5];
  f.stack = m.stacks + size_t(i) * kStackBytes;
  f.barriers = 0;
  f.where = "the start";
  f.copies.clear();
  f.group = 0;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.stack, kStackBytes);
  f.fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  f.tsan = __tsan_create_fiber(0);
#endif
  // What switch_stack pops: six registers, then fiber_main as the return address; the stack 16-byte aligned as at a
  // call.
  void** sp = reinterpret_cast<void**>(f.stack + kStackBytes) - 3;
  *sp = nullptr;
  *--sp = reinterpret_cast<void*>(fiber_main);
  sp -= 6;
  memset(sp, 0, 6 * sizeof(void*));
  f.sp = sp;
  make_ready(f);
}

inline void report_deadlock() {
  Machine& m = machine();
  unsigned barrier = 0, warp = 0, done = 0;
  const Fiber* example = nullptr;
  for (const Fiber& f : m.fibers) {
    barrier += f.state == State::kBarrier;
    warp += f.state == State::kWarp;
    done += f.state == State::kDone;
    if (!example && f.state != State::kDone) example = &f;
  }
  char text[200];
  snprintf(text, sizeof text, "deadlock: %u threads in __syncthreads, %u in a warp operation, %u returned; ", barrier,
           warp, done);
  m.failure = text + at(*example);
}

inline void run_fibers() {
  Machine& m = machine();
  while (!m.ready.empty()) {
    std::vector<unsigned> queue;
    queue.swap(m.ready);
    if (m.seed) std::shuffle(queue.begin(), queue.end(), m.random);
    for (unsigned i : queue) resume(m.fibers[i]);
    if (m.ready.empty() && m.alive && m.failure.empty()) report_deadlock();
    if (!m.failure.empty()) {  // everybody unwinds
      for (Fiber& f : m.fibers) {
        if (f.state == State::kBarrier || f.state == State::kWarp) make_ready(f);
      }
    }
  }
}

inline void run_block() {
  Machine& m = machine();
  m.waiting = 0;
  m.alive = m.threads;
  m.ready.clear();
  m.generation++;
  m.stats.blocks++;
  m.stats.threads += m.threads;
#if defined(__SANITIZE_THREAD__)
  mmap(m.stacks, size_t(m.threads) * kStackBytes, PROT_READ | PROT_WRITE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);  // stacks without a history
#endif
  {
    Quiet quiet;
    if (m.dynamic_bytes) {
      void* p = nullptr;
      if (posix_memalign(&p, 128, m.dynamic_bytes)) abort();
      m.dynamic_shared = static_cast<char*>(p);
      memset(p, 0xFF, m.dynamic_bytes);
    }
    for (unsigned i = 0; i < m.threads; i++) prepare_fiber(m.fibers[i], i);
  }
  release(&m.launch_order);
  {
    Quiet quiet;
    run_fibers();
#if defined(__SANITIZE_THREAD__)
    for (Fiber& f : m.fibers) __tsan_destroy_fiber(f.tsan);
#endif
    for (Warp& w : m.warps) {  // left over only after a failure
      w.pool.insert(w.pool.end(), w.pending.begin(), w.pending.end());
      w.pending.clear();
    }
    for (SharedArray& s : m.shared) free(s.data);
    m.shared.clear();
    free(m.dynamic_shared);
    m.dynamic_shared = nullptr;
  }
}

// Runs body() for every thread of every block. Throws simt::error for what a GPU would leave undefined.
// Returns 0, or 1 where the launch was refused.
inline int launch(dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> body) {
  Machine& m = machine();
  m.threads = block.x * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (m.threads == 0 || m.threads > kMaxThreads || blocks == 0) {
    throw error("launch: a grid of " + std::to_string(blocks) + " blocks of " + std::to_string(m.threads) +
                " threads cannot be launched");
  }
  if (m.mode == LaunchMode::kRefuse) return 1;
  if (m.mode == LaunchMode::kRecord) {
    m.records.push_back({m.threads, dynamic_bytes});
    return 0;
  }
  m.grid = grid;
  m.block = block;
  m.dynamic_bytes = dynamic_bytes;
  m.body = std::move(body);
  m.failure.clear();
  if (!m.stacks) {
    m.stacks = static_cast<char*>(mmap(nullptr, size_t(kMaxThreads) * kStackBytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (m.stacks == MAP_FAILED) abort();
  }
  m.fibers.resize(m.threads);
  m.warps.resize((m.threads + 31) / 32);
  m.random.seed(m.seed + m.stats.launches++);  // each launch its own order
#if defined(__SANITIZE_THREAD__)
  m.tsan = __tsan_get_current_fiber();
#endif
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; i++) order[i] = i;
  if (m.seed) std::shuffle(order.begin(), order.end(), m.random);
  for (uint64_t i : order) {
    m.block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (uint64_t(grid.x) * grid.y))};
    run_block();
    if (!m.failure.empty()) break;
  }
  m.current = nullptr;
  acquire(&m.block_order[0]);
  acquire(&m.block_order[1]);
  if (!m.failure.empty()) throw error(m.failure);
  return 0;
}

}  // namespace simt
