// What the threads of a block share: the barrier, the memory, and the end.
#pragma once

#include "machine.h"

namespace simt {

// The end of the open phase of the cluster's barrier, when every thread that has not returned has arrived.
inline void finish_phase() {
  Machine& m = machine();
  if (m.arrived == 0 || m.arrived != m.alive) return;
  const Fiber* first = nullptr;
  m.arrived = 0;
  m.phase++;
  for (Fiber& f : m.fibers) {
    if (!f.arrived || f.phase != m.phase - 1) continue;
    if (first && first->line != f.line && m.failure.empty()) {
      m.failure = "divergent barrier.cluster: lines " + std::to_string(first->line) + " and " + std::to_string(f.line);
    }
    first = &f;
    if (f.state == State::kCluster) make_ready(f);
  }
}

// A block that has ended gives its shared memory back: to ThreadSanitizer a write, which races with every read by a
// neighbour that no barrier has ordered before it; AddressSanitizer forbids the memory, others find NaN.
inline void end_block(Block& block, char* order) {
  acquire(order);
  for (size_t i = 0;; i++) {
    SharedArray array;
    {
      Quiet quiet;
      if (i >= block.shared.size()) break;
      array = block.shared[i];
    }
    memset(array.data, 0xFF, array.bytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(array.data, array.bytes);
#endif
  }
}

// The first function of every fiber; it never returns, and ThreadSanitizer must not count it among the calls.
SIMT_NO_TSAN inline void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.bottom, &m.size);
#endif
  acquire(&m.launch_order);
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
  release(&m.end_order);
  Block* block;
  Orders* orders;
  bool last;
  {
    Quiet quiet;
    block = m.current->block;
    orders = block->orders;
  }
  release(&orders->exit);
  {
    Quiet quiet;
    Fiber& me = *m.current;
    me.state = State::kDone;
    if (me.arrived && me.phase == m.phase) m.arrived--;
    m.alive--;
    last = --block->alive == 0 && m.cluster > 1;
    finish_phase();
  }
  if (last) end_block(*block, &orders->exit);
  yield(true);
  __builtin_unreachable();
}

inline void sync_threads(const char* where) {
  Machine& m = machine();
  Block* block;
  char* order;
  {
    Quiet quiet;
    m.current->where = where;
    throw_if_failed();
    block = m.current->block;
    order = &block->orders->barrier[m.current->barriers++ & 1];
  }
  release(order);
  {
    Quiet quiet;
    if (++block->waiting == m.threads) {
      block->waiting = 0;
      for (unsigned i = 0; i < m.threads; i++) {
        Fiber& f = block->fibers[i];
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

// Shared memory: fresh heap memory for each block, so that the sanitizers know its extent and lifetime.
inline char* shared_array(Block& block, const void* key, size_t bytes) {
  for (SharedArray& s : block.shared) {
    if (s.key == key) return s.data;
  }
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes)) abort();
  memset(p, 0xFF, bytes);
  block.shared.push_back({key, static_cast<char*>(p), bytes});
  return static_cast<char*>(p);
}
inline char* shared_array(const void* key, size_t bytes) {
  Quiet quiet;
  return shared_array(*machine().current->block, key, bytes);
}

}  // namespace simt
