// activation: y = act(x) and dx = dy * act'(x) for silu, tanh-gelu and gelu, elementwise on n values of fp32, bf16 or
// fp16, arithmetic in fp32. x is bounded where act has long become 0 or x, so that no inf - inf or 0 * inf appears; but
// below that bound y is 0 * x, NaN for -inf as in eager.
// Loop: pieces of kActivationStep elements shared between the threads. No reduction. Zero path: none; the caller
// decides (add_bias.h).
#pragma once

#include "rows/rows.h"

namespace zeroblock {
namespace {

// Elements of one piece of work: a whole number of vectors, so that only the last piece has a tail.
constexpr int64_t kActivationStep = 4096;

// act(x) and its derivative.
struct ActValue {
  Vec y, slope;
};

// s = sigmoid(z) and 1 - s = exp(-z) s, which stays exact where s rounds to 1; |z| <= 87.
struct Sigmoid {
  Vec s, rest;
  ZB_INLINE explicit Sigmoid(Vec z) {
    const Vec e = exp_bounded(zero() - z);
    s = reciprocal(set1(1.0f) + e);
    rest = e * s;
  }
};

// s = sigmoid(x): y = x s, slope = s (1 + x (1 - s)). Below -87 both are under 2e-36.
struct Silu {
  ZB_INLINE static ActValue at(Vec x) {
    const Vec bounded = min_with(87.0f, max_with(-87.0f, x)), one = set1(1.0f);
    const Sigmoid gate(bounded);
    return {zero_times_below(-87.0f, x, x * gate.s), gate.s * fmadd(bounded, gate.rest, one)};
  }
};

// 0.5 x (1 + tanh u) = x sigmoid(2 u), 2 u = a x + b x^3 with a = 2 sqrt(2 / pi), b = 0.044715 a.
struct GeluTanh {
  ZB_INLINE static ActValue at(Vec x) {
    const Vec bounded = min_with(9.9f, max_with(-9.9f, x)), one = set1(1.0f);
    const Vec a = set1(1.59576912f), b = set1(0.0713548163f), squared = bounded * bounded;
    const Sigmoid gate(bounded * fmadd(b, squared, a));
    const Vec du = fmadd(set1(3.0f) * b, squared, a);
    return {zero_times_below(-9.9f, x, x * gate.s), gate.s * fmadd(bounded * gate.rest, du, one)};
  }
};

// x Phi(x), slope = Phi(x) + x phi(x). With m = |x|: Phi(-m) = exp(-m^2 / 2) P(u) / (m + 3), u = (m - 3) / (m + 3),
// where P is a minimax polynomial of (m + 3) exp(m^2 / 2) Phi(-m) on [0, 13.2], 7e-8 relative. The rounding error of
// m^2 is put back into the exponential, so that Phi keeps its relative precision where it is small.
struct Gelu {
  ZB_INLINE static ActValue at(Vec x) {
    const Vec m = min_with(13.1f, magnitude(x)), bounded = where_negative(x, zero() - m, m), one = set1(1.0f);
    const Vec squared = m * m, lost = fmsub(m, m, squared);
    const Vec e = exp_bounded(set1(-0.5f) * squared), gauss = fmadd(set1(-0.5f) * lost, e, e);
    const Vec r = reciprocal(m + set1(3.0f)), u = fnmadd(set1(6.0f), r, one);
    Vec p = set1(-2.72994483e-4f);
    p = fmadd(p, u, set1(-9.12633201e-4f));
    p = fmadd(p, u, set1(1.07765081e-3f));
    p = fmadd(p, u, set1(6.93030376e-3f));
    p = fmadd(p, u, set1(-1.0479439e-2f));
    p = fmadd(p, u, set1(-4.72573824e-2f));
    p = fmadd(p, u, set1(2.30019256e-1f));
    p = fmadd(p, u, set1(-5.0933218e-1f));
    p = fmadd(p, u, set1(7.29083657e-1f));
    const Vec below = gauss * r * p;
    const Vec phi = where_negative(x, below, one - below);
    return {zero_times_below(-13.1f, x, x * phi), fmadd(bounded * set1(0.398942280f), gauss, phi)};
  }
};

template <class F>
ZB_INLINE void with_act(Act act, const F& f) {
  if (act == Act::kSilu) {
    f(Silu{});
  } else if (act == Act::kGeluTanh) {
    f(GeluTanh{});
  } else {
    f(Gelu{});
  }
}

// f(i, lanes) for every vector of n elements, in parallel.
template <class F>
ZB_INLINE void each_element(ParallelFor run, int64_t n, const F& f) {
  const int64_t steps = (n + kActivationStep - 1) / kActivationStep;
  parallel(run, 0, steps, kGrainElements / kActivationStep / 2, [&](int64_t begin, int64_t end) {
    each_column(begin * kActivationStep, end * kActivationStep < n ? end * kActivationStep : n, f);
    _mm_sfence();
  });
}

// Streaming needs a whole vector to start the array; every later one then does too.
template <class T, class A>
void activation_fwd_of(T*, A, const Activation& p, ParallelFor run) {
  const T* const x = static_cast<const T*>(p.x);
  T* const y = static_cast<T*>(p.y);
  const bool streamed = streams(y, kLanes, 2 * p.n * static_cast<int64_t>(sizeof(T)));
  each_element(run, p.n,
               [&](int64_t i, auto lanes) { store_or_stream(y + i, A::at(load(x + i, lanes)).y, lanes, streamed); });
}

template <class T, class A>
void activation_bwd_of(T*, A, const Activation& p, ParallelFor run) {
  const T* const x = static_cast<const T*>(p.x);
  const T* const dy = static_cast<const T*>(p.dy);
  T* const y = static_cast<T*>(p.y);
  T* const dx = static_cast<T*>(p.dx);
  const int64_t bytes = (y != nullptr ? 4 : 3) * p.n * static_cast<int64_t>(sizeof(T));
  const bool streamed = streams(dx, kLanes, bytes) && streams(y, kLanes, bytes);
  each_element(run, p.n, [&](int64_t i, auto lanes) {
    const ActValue value = A::at(load(x + i, lanes));
    store_or_stream(dx + i, load(dy + i, lanes) * value.slope, lanes, streamed);
    if (y != nullptr) store_or_stream(y + i, value.y, lanes, streamed);
  });
}

inline void activation_fwd(const Activation& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* t) { with_act(p.act, [&](auto a) { activation_fwd_of(t, a, p, run); }); });
}

inline void activation_bwd(const Activation& p, ParallelFor run) {
  with_type(p.dtype, [&](auto* t) { with_act(p.act, [&](auto a) { activation_bwd_of(t, a, p, run); }); });
}

}  // namespace
}  // namespace zeroblock
