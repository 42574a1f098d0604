// The caller's thread pool, for a lambda.
#pragma once

#include "vec/element.h"

namespace zeroblock {
namespace {

// Work below which a second thread costs more than it saves, since waking one and waiting for it takes some
// microseconds. python benchmarks/scaling.py shows the times with one thread and with two (guess).
constexpr int64_t kGrainElements = 32768;                             // of rows and activations
constexpr int64_t kGroupNormGrain = 16384;                            // elements with a sigmoid each
constexpr int64_t kZeroParallelBytes = int64_t{1} << 20;              // that is_zero reads
constexpr int64_t kPieceBytes = int64_t{32} << 10, kLeastPieces = 6;  // of add_bias: a piece, and pieces of a thread

// body(begin, end) over disjoint ranges that cover [begin, end), each at least `grain` long.
template <class Body>
ZB_INLINE void parallel(ParallelFor run, int64_t begin, int64_t end, int64_t grain, const Body& body) {
  run(
      begin, end, grain, [](void* ctx, int64_t b, int64_t e) { (*static_cast<const Body*>(ctx))(b, e); },
      const_cast<Body*>(&body));
}

// A ParallelFor of the calling thread.
inline void run_alone(int64_t begin, int64_t end, int64_t, ParallelBody body, void* ctx) { body(ctx, begin, end); }

}  // namespace
}  // namespace zeroblock
