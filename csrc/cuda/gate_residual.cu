// gate_residual: y = residual + gate * branch; backward dbranch = gate dy, dgate = sum over T of dy branch.
// residual, branch [B, T, D] dense; gate one number, or rows per sample or token. grid: one block per (sample, chunk of
// rows, tile of columns); a thread keeps its columns and steps through rows. Bytes: each tensor once.
// Reduction order of dgate: a thread's rows, threads, chunks, each in index order. Zero path: none, no flag is read.
#include <type_traits>

#include "common.cuh"

namespace zeroblock::cuda {
namespace {

constexpr int kThreads = 256;

struct Tiles {
  int V, tx, ty;
  int64_t columns, chunk, chunks;  // tiles of columns; rows of a block, blocks of a sample's rows
};

struct Place {
  int64_t b, chunk, begin, end, d;
  int first_row;
  bool active;
  __device__ Place(const GateResidual& p, const Tiles& t) {
    const int64_t block = blockIdx.x, tile = block % t.columns;
    chunk = block / t.columns % t.chunks;
    b = block / (t.columns * t.chunks);
    begin = chunk * t.chunk;
    end = begin + t.chunk < p.T ? begin + t.chunk : p.T;
    first_row = threadIdx.x / t.tx;
    d = (tile * t.tx + threadIdx.x % t.tx) * t.V;
    active = first_row < t.ty && d < p.D;
  }
};

template <class T, int V>
__device__ __forceinline__ void load_gate(const GateResidual& p, const Place& at, int64_t t, float (&gate)[V]) {
  if (p.scalar_gate) {
    const Operand scalar{p.scalar_gate, p.gate.dtype, false, 0, 0};
    const float g = operand_at<T>(scalar, 0, 0.0f);
#pragma unroll
    for (int k = 0; k < V; k++) gate[k] = g;
  } else {
    load_operand<T>(p.gate, at.b * p.gate.stride_b + t * p.gate.stride_t + at.d, 0.0f, gate);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) gate_residual_fwd_kernel(GateResidual p, Tiles tiles) {
  const Place at(p, tiles);
  if (!at.active) return;
  float gate[V] = {};
  if (!p.gate.per_token) load_gate<T>(p, at, 0, gate);
  for (int64_t t = at.begin + at.first_row; t < at.end; t += tiles.ty) {
    const int64_t i = (at.b * p.T + t) * p.D + at.d;
    Pack<T, V> y = load_pack<V>(static_cast<const T*>(p.residual) + i);
    const Pack<T, V> branch = load_pack<V>(static_cast<const T*>(p.branch) + i);
    if (p.gate.per_token) load_gate<T>(p, at, t, gate);
#pragma unroll
    for (int k = 0; k < V; k++) y.v[k] = from_float<T>(y[k] + gate[k] * branch[k]);
    store_pack<V>(static_cast<T*>(p.y) + i, y);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) gate_residual_bwd_kernel(GateResidual p, Tiles tiles) {
  ZB_SHARED(float, part, [kThreads * V]);
  const Place at(p, tiles);
  const bool summed = p.dgate.ptr != nullptr;
  float sums[V] = {};
  if (at.active) {
    float gate[V] = {};
    if (p.dbranch && !p.gate.per_token) load_gate<T>(p, at, 0, gate);
    for (int64_t t = at.begin + at.first_row; t < at.end; t += tiles.ty) {
      const int64_t i = (at.b * p.T + t) * p.D + at.d;
      const Pack<T, V> dy = load_pack<V>(static_cast<const T*>(p.dy) + i);
      if (p.dbranch) {
        float dbranch[V];
        if (p.gate.per_token) load_gate<T>(p, at, t, gate);
#pragma unroll
        for (int k = 0; k < V; k++) dbranch[k] = gate[k] * dy[k];
        store_floats<V>(static_cast<T*>(p.dbranch) + i, dbranch);
      }
      if (summed || p.dgate_token) {
        const Pack<T, V> branch = load_pack<V>(static_cast<const T*>(p.branch) + i);
        float dgate[V];
#pragma unroll
        for (int k = 0; k < V; k++) {
          dgate[k] = dy[k] * branch[k];
          sums[k] += dgate[k];
        }
        if (p.dgate_token) store_floats<V>(static_cast<T*>(p.dgate_token) + i, dgate);
      }
    }
  }
  if (!summed) return;
  if (p.scalar_gate) {  // one number for the block
    float sum = 0;
#pragma unroll
    for (int k = 0; k < V; k++) sum += sums[k];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kThreads / 32; w++) sum += part[w];
      p.workspace[blockIdx.x] = sum;
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < V; k++) part[threadIdx.x * V + k] = sums[k];
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) % tiles.columns * tiles.tx * V;
  float* partial = p.workspace + (at.b * tiles.chunks + at.chunk) * p.D + first;
  for (int i = threadIdx.x; i < tiles.tx * V && first + i < p.D; i += kThreads) {
    float sum = 0;
    for (int j = 0; j < tiles.ty; j++) sum += part[j * tiles.tx * V + i];
    partial[i] = sum;
  }
}

// One thread per sample and column adds the chunks.
template <class T>
__global__ void __launch_bounds__(kThreads) gate_residual_bwd_gate_kernel(GateResidual p, Tiles tiles) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.B * p.D) return;
  const int64_t b = i / p.D, d = i % p.D;
  float sum = 0;
  for (int64_t chunk = 0; chunk < tiles.chunks; chunk++) sum += p.workspace[(b * tiles.chunks + chunk) * p.D + d];
  store_grad<T>(p.dgate, i, sum);
}

// One block adds `count` blocks' numbers.
template <class T>
__global__ void __launch_bounds__(kThreads) gate_residual_bwd_scalar_kernel(GateResidual p, int64_t count) {
  ZB_SHARED(float, part, [kThreads / 32]);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += p.workspace[i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; w++) sum += part[w];
    store_grad<T>(p.dgate, 0, sum);
  }
}

// ---- host side ------------------------------------------------------------------------------------------------------

int vector_of(const GateResidual& p) {
  const int vector = pack_size(p.dtype);
  bool whole = p.D % vector == 0 && is_vectorised(p.gate, vector);
  for (const void* t : {p.residual, p.branch, p.dy, static_cast<const void*>(p.y), static_cast<const void*>(p.dbranch),
                        static_cast<const void*>(p.dgate_token)}) {
    whole = whole && is_aligned(t);
  }
  return whole ? vector : 1;
}

Tiles tiles_of(const GateResidual& p, int V) {
  Tiles t{};
  t.V = V;
  const int64_t packs = ceil_div(p.D, V);
  t.tx = static_cast<int>(packs < kThreads ? packs : kThreads);
  t.ty = kThreads / t.tx;
  t.columns = ceil_div(packs, t.tx);
  // A block that sums rows of dgate writes D numbers: fewer blocks, and enough rows in each, keep that a small part.
  const bool sums = p.dgate.ptr && !p.scalar_gate;
  const int64_t most = ceil_div(p.T, sums ? 8 * t.ty : t.ty),
                wanted = ceil_div(sums ? kSummingBlocks : kElementwiseBlocks, t.columns * p.B);
  t.chunk = ceil_div(ceil_div(p.T, wanted < most ? wanted : most), t.ty) * t.ty;
  t.chunks = ceil_div(p.T, t.chunk);
  return t;
}

template <class F>
int with_shape(const GateResidual& p, int V, F f) {
  return with_dtype(p.dtype, [&](auto element) {
    return V > 1 ? f(element, std::integral_constant<int, kVector<decltype(element)>>())
                 : f(element, std::integral_constant<int, 1>());
  });
}

}  // namespace

int gate_residual_fwd(const GateResidual& p, void* stream) {
  if (p.B * p.T * p.D == 0) return 0;
  const Tiles tiles = tiles_of(p, vector_of(p));
  const dim3 grid(static_cast<unsigned>(p.B * tiles.chunks * tiles.columns));
  return with_shape(p, tiles.V, [&](auto element, auto V) {
    return launch(gate_residual_fwd_kernel<decltype(element), decltype(V)::value>, grid, kThreads, 0, stream, p, tiles);
  });
}

int64_t gate_residual_bwd_workspace(const GateResidual& p) {
  if (p.B * p.T * p.D == 0 || p.dgate_token) return 0;
  const Tiles wide = tiles_of(p, pack_size(p.dtype)), narrow = tiles_of(p, 1);
  const int64_t chunks = wide.chunks > narrow.chunks ? wide.chunks : narrow.chunks;
  return p.B * chunks * (p.scalar_gate ? narrow.columns : p.D);
}

int gate_residual_bwd(const GateResidual& p, void* stream) {
  const bool empty = p.B * p.T * p.D == 0;
  const Tiles tiles = empty ? Tiles{} : tiles_of(p, vector_of(p));
  const int64_t blocks = p.B * tiles.chunks * tiles.columns;
  const int status = empty ? 0 : with_shape(p, tiles.V, [&](auto element, auto V) {
    return launch(gate_residual_bwd_kernel<decltype(element), decltype(V)::value>, dim3(static_cast<unsigned>(blocks)),
                  kThreads, 0, stream, p, tiles);
  });
  if (status || !p.dgate.ptr) return status;
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.scalar_gate) {
      return launch(gate_residual_bwd_scalar_kernel<T>, dim3(1), kThreads, 0, stream, p, blocks);
    }
    if (p.B * p.D == 0) return 0;
    return launch(gate_residual_bwd_gate_kernel<T>, dim3(static_cast<unsigned>(ceil_div(p.B * p.D, kThreads))),
                  kThreads, 0, stream, p, tiles);
  });
}

}  // namespace zeroblock::cuda
