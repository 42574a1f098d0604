// Thread-block clusters: barrier.cluster in its two halves, and the shared memory of a neighbour (mapa).
//
// As on sm_90: the barrier waits for every thread of the cluster that has not returned; arriving releases, waiting
// acquires; the memory of a block ends with its last thread.
#pragma once

#include "block.h"

namespace simt {

inline unsigned cluster_rank() {
  Quiet quiet;
  return machine().current->block->rank;
}

inline void cluster_arrive(int line = __builtin_LINE()) {
  Machine& m = machine();
  char* order;
  {
    Quiet quiet;
    Fiber& me = *m.current;
    me.where = "barrier.cluster.arrive";
    me.line = line;
    throw_if_failed();
    if (me.arrived) throw error("barrier.cluster: a thread arrives twice; " + at(me));
    order = &m.blocks[0].orders->cluster[me.phase & 1];
  }
  release(order);
  Quiet quiet;
  m.current->arrived = true;
  m.arrived++;
  finish_phase();
}

inline void cluster_wait() {
  Machine& m = machine();
  char* order;
  {
    Quiet quiet;
    Fiber& me = *m.current;
    me.where = "barrier.cluster.wait";
    throw_if_failed();
    if (!me.arrived) throw error("barrier.cluster: a thread waits that did not arrive; " + at(me));
    order = &m.blocks[0].orders->cluster[me.phase & 1];
    if (me.phase == m.phase) {
      wait_as(State::kCluster);
    } else if (m.seed) {
      make_ready(me);
      yield();
    }
    throw_if_failed();
    me.arrived = false;
    me.phase++;
  }
  acquire(order);
}

// Where block `rank` of the cluster has what this block has at p, a place in shared memory.
template <class T>
T* cluster_peer(T* p, unsigned rank) {
  Quiet quiet;
  Machine& m = machine();
  Fiber& me = *m.current;
  me.where = "mapa";
  if (rank >= m.cluster) {
    throw error("mapa: the cluster has no block " + std::to_string(rank) + "; " + at(me));
  }
  Block& peer = m.blocks[rank];
  const char* address = reinterpret_cast<const char*>(p);
  for (const SharedArray& array : me.block->shared) {
    if (address < array.data || address >= array.data + array.bytes) continue;
    if (peer.alive == 0) throw error("mapa: block " + std::to_string(rank) + " has returned; " + at(me));
    return reinterpret_cast<T*>(shared_array(peer, array.key, array.bytes) + (address - array.data));
  }
  throw error("mapa: not a place in shared memory; " + at(me));
}

}  // namespace simt
