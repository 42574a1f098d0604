// What a test may set in a library that holds emulated kernels.
#include "simt.h"

extern "C" void simt_seed(uint64_t seed) { simt::machine().seed = seed; }
extern "C" uint64_t simt_launches() { return simt::machine().stats.launches; }

extern "C" uint64_t simt_clusters() { return simt::machine().stats.clusters; }

// The GPU that is played: the shared memory that a block may have, and the blocks of a cluster (1: it has none).
extern "C" void simt_gpu(uint64_t shared, uint64_t cluster) {
  simt::machine().shared_limit = shared;
  simt::machine().cluster_limit = static_cast<unsigned>(cluster);
}

// Of a launch only the last so many blocks run; 0: all.
extern "C" void simt_last_blocks(uint64_t blocks) { simt::machine().last_blocks = blocks; }

// 0: launches run, 1: they fail, 2: they are only noted, 3: those of clusters fail.
extern "C" void simt_mode(int mode) {
  simt::machine().mode = static_cast<simt::LaunchMode>(mode);
  simt::machine().records.clear();
}
extern "C" uint64_t simt_records() { return simt::machine().records.size(); }
extern "C" uint64_t simt_record_threads(uint64_t i) { return simt::machine().records[i].threads; }
extern "C" uint64_t simt_record_bytes(uint64_t i) { return simt::machine().records[i].dynamic_bytes; }
extern "C" uint64_t simt_record_cluster(uint64_t i) { return simt::machine().records[i].cluster; }
