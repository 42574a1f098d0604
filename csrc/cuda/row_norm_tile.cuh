// How the row norms (layer_norm_modulate, rms_norm_modulate, gate_residual_layer_norm_modulate) cut their work.
//
// A team of W warps owns a row; thread i of the team owns the packs i, i + 32 W, ... of every row it sees. The first NV
// of them stay in registers, later ones (of rows longer than a team's registers) are read again. A block holds several
// teams.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace zeroblock::cuda {

constexpr int kMaxTeamWarps = 16, kMaxTeamWarpsBwd = 24;  // at most 32

struct Teams {
  int V, warps, per_block, threads;
  int64_t chunk, chunks;  // backward: rows of a block, blocks of a sample
};

struct Team {
  int lane, step, index, first_warp, warps;
  __device__ explicit Team(const Teams& t) {
    step = 32 * t.warps;
    index = threadIdx.x / step;
    lane = threadIdx.x % step;
    warps = t.warps;
    first_warp = index * t.warps;
  }
  // The team's sum, to every thread of it. All threads of the block call it; `part` is used by one call between two
  // barriers, so successive calls take different ones.
  __device__ float sum(float v, float* part) const {
    v = warp_sum(v);
    if (warps == 1) return v;
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    const int i = threadIdx.x % 32;
    return warp_sum(i < warps ? part[first_warp + i] : 0.0f);
  }
};

// ---- host side ------------------------------------------------------------------------------------------------------

// NV packs per thread; V elements a pack when every row starts at 16 bytes.
inline Teams row_norm_teams(const RowNorm& p, int NV, int V, int max_warps) {
  Teams t{};
  t.V = V;
  const int64_t packs = ceil_div(p.D, V);
  const int64_t warps = ceil_div(packs, 32 * NV);
  t.warps = static_cast<int>(warps < max_warps ? warps : max_warps);
  t.per_block = t.warps < 8 ? 8 / t.warps : 1;
  t.threads = 32 * t.warps * t.per_block;
  const int64_t most = ceil_div(p.T, t.per_block), wanted = ceil_div(kRowNormBlocks, p.B > 0 ? p.B : 1);
  const int64_t chunks = wanted < most ? wanted : most;
  t.chunk = chunks > 0 ? ceil_div(ceil_div(p.T, chunks), t.per_block) * t.per_block : 1;
  t.chunks = ceil_div(p.T, t.chunk);
  return t;
}

inline int row_norm_vector(const RowNorm& p) {
  const int vector = pack_size(p.dtype);
  bool whole = p.D % vector == 0;
  for (const void* t : {p.x, p.branch, p.dy, p.dx_new, static_cast<const void*>(p.y), static_cast<const void*>(p.x_new),
                        static_cast<const void*>(p.dx), static_cast<const void*>(p.dbranch),
                        static_cast<const void*>(p.dscale_token.ptr), static_cast<const void*>(p.dgate_token.ptr)}) {
    whole = whole && is_aligned(t);
  }
  for (const Operand* o : {&p.weight, &p.bias, &p.shift, &p.scale, &p.gate}) whole = whole && is_vectorised(*o, vector);
  return whole ? vector : 1;
}

// Calls f(T(), V constant, gate constant).
template <class F>
int with_row_norm_shape(const RowNorm& p, int V, F f) {
  return with_dtype(p.dtype, [&](auto element) {
    auto with_gate = [&](auto width) {
      return p.branch ? f(element, width, std::true_type()) : f(element, width, std::false_type());
    };
    return V > 1 ? with_gate(std::integral_constant<int, kVector<decltype(element)>>())
                 : with_gate(std::integral_constant<int, 1>());
  });
}

}  // namespace zeroblock::cuda
