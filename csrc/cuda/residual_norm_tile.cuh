// How residual_norm_modulate cuts its work.
//
// A team of warps owns a row; thread i of it owns the packs i, i + 32 warps, ... of every row it sees and keeps them in
// registers, kKept elements: rows are of kMostRow columns at most. A block holds several teams where rows are short.
#pragma once

#include <array>

#include "any_dtype.cuh"

namespace zeroblock::cuda {

constexpr int kKept = 16;
constexpr int kMaxRowWarps = static_cast<int>(kMostRow) / (32 * kKept), kRowThreads = 32 * kMaxRowWarps;
constexpr int kBlockWarps = 4;  // at least, of several teams if need be
constexpr int kMixedVector = 4;

struct RowTeams {
  int V, warps, per_block, threads;
};

struct RowTeam {
  int lane, step, index, warps;
  __device__ explicit RowTeam(const RowTeams& t) : step(32 * t.warps), warps(t.warps) {
    index = threadIdx.x / step;
    lane = threadIdx.x % step;
  }
  // Sums over the team, to every thread of it. All threads of the block call it; `part` is used by one call between two
  // barriers, so successive calls take different ones.
  template <int Q>
  __device__ __forceinline__ void sum(float (&v)[Q], float (*part)[kMaxRowWarps]) const {
#pragma unroll
    for (int q = 0; q < Q; q++) {
      v[q] = warp_sum(v[q]);
      if (warps > 1 && threadIdx.x % 32 == 0) part[q][threadIdx.x / 32] = v[q];
    }
    if (warps == 1) return;
    __syncthreads();
#pragma unroll
    for (int q = 0; q < Q; q++) {
      const float* sums = part[q] + index * warps;
      v[q] = sums[0];
      for (int i = 1; i < warps; i++) v[q] += sums[i];
    }
  }
  __device__ __forceinline__ float sum(float v, float (*part)[kMaxRowWarps]) const {
    float one[1] = {v};
    sum(one, part);
    return one[0];
  }
};

// f(i, d): the columns d .. d + V of the team's i-th pack of this thread.
template <int V, class F>
__device__ __forceinline__ void each_pack(const RowTeam& team, int D, F f) {
#pragma unroll
  for (int i = 0; i < kKept / V; i++) {
    const int d = (team.lane + i * team.step) * V;
    if (d < D) f(i, d);
  }
}

// The row that token t of sample b takes of what an index chooses from; t itself without an index.
__device__ __forceinline__ int64_t chosen_row(const ResidualNorm& p, int64_t b, int64_t t) {
  if (p.index == nullptr) return t;
  const int64_t k = p.index[b * p.T + t];
  return k < 0 ? 0 : k < p.K ? k : p.K - 1;
}
// Where the row of an operand begins: of token t, or the k-th of sample b.
__device__ __forceinline__ int64_t row_begin(const RowOperand& o, int64_t b, int64_t t, int64_t k) {
  const int64_t row = o.kind == RowKind::kToken ? t : o.kind == RowKind::kIndexed ? k : 0;
  return b * o.rows.stride_b + row * o.rows.stride_t;
}
// Columns d .. d + V of the row that begins there, with the table's; 0 without an operand.
template <class T, int V>
__device__ __forceinline__ void load_row(const RowOperand& o, int64_t begin, int64_t d, float (&out)[V]) {
#pragma unroll
  for (int k = 0; k < V; k++) out[k] = 0.0f;
  if (o.kind == RowKind::kNone) return;
  load_any<T>(o.rows.ptr, o.rows.dtype, begin + d, out);
  if (o.table.ptr == nullptr) return;
  float table[V];
  load_any<T>(o.table.ptr, o.table.dtype, d, table);
#pragma unroll
  for (int k = 0; k < V; k++) out[k] += table[k];
}
// out *= columns d .. d + V of an operand [D], where it is given.
template <class T, int V>
__device__ __forceinline__ void times(const Operand& o, int64_t d, float (&out)[V]) {
  if (o.ptr == nullptr) return;
  float v[V];
  load_any<T>(o.ptr, o.dtype, d, v);
#pragma unroll
  for (int k = 0; k < V; k++) out[k] = rounded_product(out[k], v[k]);
}
template <class T, int V>
__device__ __forceinline__ void plus(const Operand& o, int64_t d, float (&out)[V]) {
  if (o.ptr == nullptr) return;
  float v[V];
  load_any<T>(o.ptr, o.dtype, d, v);
#pragma unroll
  for (int k = 0; k < V; k++) out[k] += v[k];
}

// ---- host side ------------------------------------------------------------------------------------------------------

struct RowTensor {
  const void* ptr;
  DType dtype;
};
inline std::array<RowTensor, 12> tensors_of(const ResidualNorm& p) {
  auto of_tokens = [](const RowOperand& o) {
    return RowTensor{o.kind == RowKind::kToken ? o.drows.ptr : nullptr, o.drows.dtype};
  };
  return {{{p.residual, p.residual_dtype},
           {p.branch, p.branch_dtype},
           {p.x_new, p.x_dtype},
           {p.y, p.y_dtype},
           {p.x, p.x_dtype},
           {p.dx_new, p.x_dtype},
           {p.dy, p.y_dtype},
           {p.dresidual, p.residual_dtype},
           {p.dbranch, p.branch_dtype},
           of_tokens(p.gate),
           of_tokens(p.shift),
           of_tokens(p.scale)}};
}
inline std::array<const Operand*, 9> operands_of(const ResidualNorm& p) {
  return {{&p.branch_weight, &p.weight, &p.bias, &p.gate.rows, &p.gate.table, &p.shift.rows, &p.shift.table,
           &p.scale.rows, &p.scale.table}};
}

inline RowTeams row_teams(const ResidualNorm& p, int V) {
  RowTeams t{};
  t.V = V;
  t.warps = static_cast<int>(ceil_div(ceil_div(p.D, V), 32 * (kKept / V)));
  t.per_block = t.warps < kBlockWarps ? kBlockWarps / t.warps : 1;
  t.threads = 32 * t.warps * t.per_block;
  return t;
}

// f(element, V constant): Mixed where tensors are of several types, or operands of neither theirs nor fp32.
template <class F>
int with_row_shape(const ResidualNorm& p, F f) {
  bool aligned = true, uniform = true;
  const DType dtype = p.branch ? p.branch_dtype : p.x ? p.x_dtype : p.residual_dtype;
  const auto tensors = tensors_of(p);
  for (size_t i = 0; i < tensors.size(); i++) {
    const RowTensor& t = tensors[i];
    const bool of_operand = i >= 9;
    aligned = aligned && is_aligned(t.ptr);
    uniform = uniform && (!t.ptr || t.dtype == dtype || (of_operand && t.dtype == DType::kF32));
  }
  for (const Operand* o : operands_of(p))
    uniform = uniform && (!o->ptr || o->dtype == dtype || o->dtype == DType::kF32);
  const int vector = uniform ? pack_size(dtype) : kMixedVector;
  for (const Operand* o : operands_of(p)) aligned = aligned && is_vectorised(*o, vector);
  const bool whole = aligned && p.D % vector == 0;
  if (!uniform) {
    return whole ? f(Mixed(), std::integral_constant<int, kMixedVector>())
                 : f(Mixed(), std::integral_constant<int, 1>());
  }
  return with_dtype(dtype, [&](auto element) {
    return whole ? f(element, std::integral_constant<int, kVector<decltype(element)>>())
                 : f(element, std::integral_constant<int, 1>());
  });
}

}  // namespace zeroblock::cuda
