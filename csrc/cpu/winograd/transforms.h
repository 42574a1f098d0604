// The transforms of Winograd's minimal filtering (Lavin and Gray, arXiv:1509.09308) in one dimension and in two.
#pragma once

#include "../vec/vec.h"

namespace zeroblock {
namespace {

// The transforms of one dimension. m outputs, n = m + 2 points; V is a Vec.
//   input:  out[n] = B^T in[n]      output:   out[m] = A^T in[n]     weight:   out[n] = G in[3]
//   and, for the weight gradient, the transposes of the last two:
//   spread: out[n] = A in[m]        unweight: out[3] = G^T in[n]
struct F2 {  // points 0, 1, -1, infinity
  static constexpr int m = 2, n = 4;
  ZB_INLINE static void input(const Vec* d, Vec* o) {
    o[0] = d[0] - d[2], o[1] = d[1] + d[2], o[2] = d[2] - d[1], o[3] = d[1] - d[3];
  }
  ZB_INLINE static void output(const Vec* p, Vec* o) { o[0] = p[0] + (p[1] + p[2]), o[1] = (p[1] - p[2]) - p[3]; }
  ZB_INLINE static void weight(const Vec* g, Vec* o) {
    const Vec half = set1(0.5f), even = g[0] + g[2];
    o[0] = g[0], o[1] = half * (even + g[1]), o[2] = half * (even - g[1]), o[3] = g[2];
  }
  ZB_INLINE static void spread(const Vec* y, Vec* o) {
    o[0] = y[0], o[1] = y[0] + y[1], o[2] = y[0] - y[1], o[3] = zero() - y[1];
  }
  ZB_INLINE static void unweight(const Vec* u, Vec* o) {
    const Vec half = set1(0.5f), even = half * (u[1] + u[2]);
    o[0] = u[0] + even, o[1] = half * (u[1] - u[2]), o[2] = even + u[3];
  }
};

struct F4 {  // points 0, 1, -1, 2, -2, infinity
  static constexpr int m = 4, n = 6;
  ZB_INLINE static void input(const Vec* d, Vec* o) {
    const Vec two = set1(2.0f), four = set1(4.0f), five = set1(5.0f);
    const Vec a = fnmadd(four, d[2], d[4]), b = fnmadd(four, d[1], d[3]), c = d[4] - d[2], e = two * (d[3] - d[1]);
    o[0] = fmadd(four, d[0], fnmadd(five, d[2], d[4]));
    o[1] = a + b, o[2] = a - b, o[3] = c + e, o[4] = c - e;
    o[5] = fmadd(four, d[1], fnmadd(five, d[3], d[5]));
  }
  ZB_INLINE static void output(const Vec* p, Vec* o) {
    const Vec s1 = p[1] + p[2], d1 = p[1] - p[2], s2 = p[3] + p[4], d2 = p[3] - p[4];
    o[0] = p[0] + (s1 + s2), o[1] = fmadd(set1(2.0f), d2, d1);
    o[2] = fmadd(set1(4.0f), s2, s1), o[3] = fmadd(set1(8.0f), d2, d1) + p[5];
  }
  ZB_INLINE static void weight(const Vec* g, Vec* o) {
    const Vec sixth = set1(1.0f / 6), even = g[0] + g[2];
    const Vec far = fmadd(set1(0.25f), g[0], g[2]), odd = set1(0.5f) * g[1];
    o[0] = set1(0.25f) * g[0];
    o[1] = zero() - sixth * (even + g[1]), o[2] = sixth * (g[1] - even);
    o[3] = sixth * (far + odd), o[4] = sixth * (far - odd), o[5] = g[2];
  }
  ZB_INLINE static void spread(const Vec* y, Vec* o) {
    const Vec even = y[0] + y[2], odd = y[1] + y[3], two = set1(2.0f), four = set1(4.0f);
    const Vec far_even = fmadd(four, y[2], y[0]), far_odd = two * fmadd(four, y[3], y[1]);
    o[0] = y[0], o[1] = even + odd, o[2] = even - odd, o[3] = far_even + far_odd, o[4] = far_even - far_odd;
    o[5] = y[3];
  }
  ZB_INLINE static void unweight(const Vec* u, Vec* o) {
    const Vec sixth = set1(1.0f / 6), s1 = u[1] + u[2], d1 = u[1] - u[2], s2 = u[3] + u[4], d2 = u[3] - u[4];
    o[0] = fmadd(sixth, fmadd(set1(0.25f), s2, zero() - s1), set1(0.25f) * u[0]);
    o[1] = sixth * fmadd(set1(0.5f), d2, zero() - d1);
    o[2] = fmadd(sixth, s2 - s1, u[5]);
  }
};

// f in both dimensions: first down each of the `in` columns, then along the `out` rows that this leaves. read(row,
// column) gives the input, write(row, column, v) takes the output.
template <int in, int out, class OneDim, class Read, class Write>
ZB_INLINE void both_dims(const OneDim& f, const Read& read, const Write& write) {
  Vec half[out][in];
#pragma GCC unroll 6
  for (int j = 0; j < in; ++j) {
    Vec column[in], result[out];
#pragma GCC unroll 6
    for (int i = 0; i < in; ++i) column[i] = read(i, j);
    f(column, result);
#pragma GCC unroll 6
    for (int i = 0; i < out; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < out; ++i) {
    Vec result[out];
    f(half[i], result);
#pragma GCC unroll 6
    for (int j = 0; j < out; ++j) write(i, j, result[j]);
  }
}

}  // namespace
}  // namespace zeroblock
