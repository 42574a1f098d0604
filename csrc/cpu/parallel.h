// The caller's thread pool, for a lambda.
#pragma once

#include "vec/element.h"

namespace zeroblock {
namespace {

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
