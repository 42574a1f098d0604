// Running a grid: the scheduler, deadlock detection, and the launch itself.
#pragma once

#include "block.h"

namespace simt {

// To ThreadSanitizer every thread of a launch is a thread with a stack of its own: a shared one would order what two
// blocks do. Between launches all is ordered, so the next one takes the same again; making them is what takes long.
inline void prepare_fiber(Fiber& f, Block& block, unsigned i) {
  Machine& m = machine();
  f.block = &block;
  f.linear = i;
  f.index = {i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y)};
  f.lane = i & 31;
  f.warp = &block.warps[i >> 5];
#if defined(__SANITIZE_THREAD__)
  const uint64_t number = m.started++;
  if (number == m.tsan_fibers.size()) m.tsan_fibers.push_back(__tsan_create_fiber(0));
  f.tsan = m.tsan_fibers[number];
#else
  const uint64_t number = &f - m.fibers.data();
#endif
  f.stack = m.stacks + number * kStackBytes;
  f.barriers = 0;
  f.where = "the start";
  f.copies.clear();
  f.group = 0;
  f.arrived = false;
  f.phase = 0;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.stack, kStackBytes);
  f.fake_stack = nullptr;
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
  unsigned barrier = 0, cluster = 0, warp = 0, done = 0;
  const Fiber* example = nullptr;
  for (const Fiber& f : m.fibers) {
    barrier += f.state == State::kBarrier;
    cluster += f.state == State::kCluster;
    warp += f.state == State::kWarp;
    done += f.state == State::kDone;
    if (!example && f.state != State::kDone) example = &f;
  }
  char text[200];
  snprintf(text, sizeof text,
           "deadlock: %u threads in __syncthreads, %u in barrier.cluster, %u in a warp operation, %u returned; ",
           barrier, cluster, warp, done);
  m.failure = text + at(*example);
}

inline void run_fibers() {
  Machine& m = machine();
  while (!m.ready.empty()) {
    std::vector<Fiber*> queue;
    queue.swap(m.ready);
    if (m.seed) std::shuffle(queue.begin(), queue.end(), m.random);
    for (Fiber* f : queue) resume(*f);
    if (m.ready.empty() && m.alive && m.failure.empty()) report_deadlock();
    if (!m.failure.empty()) {  // everybody unwinds
      for (Fiber& f : m.fibers) {
        if (f.state != State::kReady && f.state != State::kDone) make_ready(f);
      }
    }
  }
}

// Runs the blocks first, first + 1, ... of the grid, one cluster.
inline void run_cluster(uint64_t first) {
  Machine& m = machine();
  const unsigned count = m.cluster;
  m.alive = m.threads * count;
  m.arrived = m.phase = 0;
  m.ready.clear();
  m.stats.blocks += count;
  m.stats.clusters += count > 1;
  m.stats.threads += m.alive;
  {
    Quiet quiet;
    for (unsigned rank = 0; rank < count; rank++) {
      Block& block = m.blocks[rank];
      const uint64_t i = first + rank;
      block.index = {unsigned(i % m.grid.x), unsigned(i / m.grid.x % m.grid.y),
                     unsigned(i / (uint64_t(m.grid.x) * m.grid.y))};
      block.rank = rank;
      block.fibers = m.fibers.data() + rank * m.threads;
      block.warps.resize((m.threads + 31) / 32);
      block.waiting = 0;
      block.alive = m.threads;
      block.orders = &m.orders[m.generation++ % kOrders];
      block.dynamic_shared = m.dynamic_bytes ? shared_array(block, nullptr, m.dynamic_bytes) : nullptr;
      for (unsigned t = 0; t < m.threads; t++) prepare_fiber(block.fibers[t], block, t);
    }
  }
  release(&m.launch_order);
  {
    Quiet quiet;
    run_fibers();
    for (unsigned rank = 0; rank < count; rank++) {
      Block& block = m.blocks[rank];
      for (Warp& w : block.warps) {  // left over only after a failure
        w.pool.insert(w.pool.end(), w.pending.begin(), w.pending.end());
        w.pending.clear();
      }
      for (SharedArray& s : block.shared) {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(s.data, s.bytes);
#endif
        free(s.data);
      }
      block.shared.clear();
    }
  }
}

// Runs body() for every thread of every block; blocks that follow one another in x form clusters of `cluster`. Throws
// simt::error for what a GPU would leave undefined. Returns 0, or 1 where the launch was refused.
inline int launch(dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> body, unsigned cluster = 1) {
  Machine& m = machine();
  m.threads = block.x * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (m.threads == 0 || m.threads > kMaxThreads || blocks == 0 || dynamic_bytes > m.shared_limit) {
    throw error("launch: a grid of " + std::to_string(blocks) + " blocks of " + std::to_string(m.threads) +
                " threads and " + std::to_string(dynamic_bytes) + " bytes cannot be launched");
  }
  if (cluster == 0 || cluster > m.cluster_limit || grid.x % cluster) {
    throw error("launch: clusters of " + std::to_string(cluster) + " of " + std::to_string(grid.x) +
                " blocks cannot be launched");
  }
  if (m.mode == LaunchMode::kRefuse || (m.mode == LaunchMode::kRefuseClusters && cluster > 1)) return 1;
  if (m.mode == LaunchMode::kRecord) {
    m.records.push_back({m.threads, dynamic_bytes, cluster});
    return 0;
  }
  m.grid = grid;
  m.block = block;
  m.dynamic_bytes = dynamic_bytes;
  m.body = std::move(body);
  m.failure.clear();
  if (!m.stacks) {
    m.stacks = static_cast<char*>(mmap(nullptr, size_t(kStacks) * kStackBytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (m.stacks == MAP_FAILED) abort();
  }
  m.fibers.resize(size_t(m.threads) * cluster);
  m.cluster = cluster;
  m.random.seed(m.seed + m.stats.launches++);  // each launch its own order
#if defined(__SANITIZE_THREAD__)
  if (blocks * m.threads > kStacks) {
    throw error("launch: " + std::to_string(blocks * m.threads) + " threads are too many for ThreadSanitizer here");
  }
  m.tsan = __tsan_get_current_fiber();
  m.started = 0;
#endif
  const uint64_t left_out = m.last_blocks && m.last_blocks < blocks ? blocks - m.last_blocks : 0;
  std::vector<uint64_t> order((blocks - left_out) / cluster);
  for (uint64_t i = 0; i < order.size(); i++) order[i] = left_out + i * cluster;
  if (m.seed) std::shuffle(order.begin(), order.end(), m.random);
  for (uint64_t first : order) {
    run_cluster(first);
    if (!m.failure.empty()) break;
  }
  m.current = nullptr;
  acquire(&m.end_order);
  if (!m.failure.empty()) throw error(m.failure);
  return 0;
}

}  // namespace simt
