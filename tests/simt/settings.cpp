// What a test may set in a library that holds emulated kernels.
#include "simt.h"

extern "C" void simt_seed(uint64_t seed) { simt::machine().seed = seed; }
extern "C" uint64_t simt_launches() { return simt::machine().stats.launches; }
