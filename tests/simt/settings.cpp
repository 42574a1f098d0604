// What a test may set in a library that holds emulated kernels.
#include "simt.h"

extern "C" void simt_seed(uint64_t seed) { simt::machine().seed = seed; }
extern "C" uint64_t simt_launches() { return simt::machine().stats.launches; }

// 0: launches run, 1: they fail, 2: they are only noted.
extern "C" void simt_mode(int mode) {
  simt::machine().mode = static_cast<simt::LaunchMode>(mode);
  simt::machine().records.clear();
}
extern "C" uint64_t simt_records() { return simt::machine().records.size(); }
extern "C" uint64_t simt_record_threads(uint64_t i) { return simt::machine().records[i].threads; }
extern "C" uint64_t simt_record_bytes(uint64_t i) { return simt::machine().records[i].dynamic_bytes; }
