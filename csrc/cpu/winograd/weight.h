// The weight's transforms (tiles.h): G w G^T into panels [points, C, 2 L] (C padded to L and by 3 rows), and G^T dU G
// back out of them.
//
// Element (k, c, tap) of a weight lies at k * out + c * in + tap * tap_stride; either tap_stride or the stride of one
// channel is 1 (contiguous, channels-last), so that L x L blocks transposed in registers do all the moving.
#pragma once

#include "tiles.h"

namespace zeroblock {
namespace {

// Moves L output channels (the rows, `rows` of them exist) of L input channels (`cols` exist) between a weight and
// taps[c * 9 + tap], a vector over the output channels each. kStore: towards the weight.
template <bool kStore, class T>
ZB_INLINE void move_taps(WinogradWeight w, int64_t k, int64_t c, int rows, int cols, Vec* taps) {
  T* const base = static_cast<T*>(w.data) + k * w.out + c * w.in;
  const auto block = [&](T* p, int count, Vec* at, int step) {
    Vec v[kL];
    if constexpr (kStore) {
      for (int i = 0; i < kL; ++i) v[i] = i < count ? at[i * step] : zero();
      transpose(v);
      for (int i = 0; i < rows; ++i) store(p + i * w.out, v[i], count);
    } else {
      // The next block is far away, in more streams than the hardware's prefetchers follow.
      for (int i = 0; i < rows; ++i) __builtin_prefetch(p + i * w.out + kL * w.in);
      load_transposed(p, w.out, rows, count, v);
      for (int i = 0; i < count; ++i) at[i * step] = v[i];
    }
  };
  if (w.tap == 1 && w.in == 9) {  // 9 * cols consecutive floats a row
    for (int i = 0; i < 9 * cols; i += kL) {
      block(base + i, static_cast<int>(smaller(kL, 9 * cols - i)), taps + i, 1);
    }
  } else if (w.tap == 1 && kL >= 9) {
    for (int i = 0; i < cols; ++i) block(base + i * w.in, 9, taps + i * 9, 1);
  } else if (w.tap == 1) {
    for (int i = 0; i < cols; ++i) {
      block(base + i * w.in, kL, taps + i * 9, 1);
      block(base + i * w.in + kL, 9 - kL, taps + i * 9 + kL, 1);
    }
  } else if (w.out == 1) {
    for (int i = 0; i < cols; ++i) {
      for (int t = 0; t < 9; ++t) {
        T* p = base + i * w.in + t * w.tap;
        if constexpr (kStore) {
          store(p, taps[i * 9 + t], rows);
        } else {
          __builtin_prefetch(p + kL * w.in);
          taps[i * 9 + t] = load(p, rows);
        }
      }
    }
  } else {
    for (int t = 0; t < 9; ++t) block(base + t * w.tap, cols, taps + t, 9);
  }
}

// Floats between the points of a panel: padded, so that the points do not all fall into one set of the cache.
ZB_INLINE int64_t panel_point(int64_t C) { return (ceil_div(C, kL) * kL + 3) * kPanel; }

// Panel `panel` of the transformed weight to u [points, C, 2 L]; channels that do not exist are 0.
template <class F, class T>
ZB_LOOPS void weight_panel(WinogradWeight w, int64_t panel, float* u) {
  const int64_t padded = ceil_div(w.C, kL) * kL, point = panel_point(w.C);
  for (int64_t c = 0; c < padded; c += kL) {
    for (int half = 0; half < 2; ++half) {
      const int64_t k = panel * kPanel + half * kL;
      const int rows = static_cast<int>(larger(0, smaller(kL, w.K - k)));
      const int cols = static_cast<int>(smaller(kL, w.C - c));
      Vec taps[9 * kL];
      if (rows < kL || cols < kL) {
        for (int i = 0; i < 9 * kL; ++i) taps[i] = zero();
      }
      if (rows > 0) move_taps<false, T>(w, k, c, rows, cols, taps);
      float* const to = u + c * kPanel + half * kL;
      const auto transform = [&](auto tap) {
        for (int i = 0; i < kL; ++i) {
          both_dims<3, F::n>([](const Vec* a, Vec* b) { F::weight(a, b); },
                             [&](int r, int s) { return taps[i * 9 + tap(r, s)]; },
                             [&](int r, int s, Vec v) { store(to + i * kPanel + (r * F::n + s) * point, v); });
        }
      };
      w.flip ? transform([](int r, int s) { return 8 - r * 3 - s; })
             : transform([](int r, int s) { return r * 3 + s; });
    }
  }
}

// The weight gradient of one panel from du, laid out as a panel of u.
template <class F, class T>
ZB_LOOPS void weight_grad_panel(WinogradWeight w, int64_t panel, const float* du) {
  const int64_t padded = ceil_div(w.C, kL) * kL, point = panel_point(w.C);
  for (int half = 0; half < 2; ++half) {
    const int64_t k = panel * kPanel + half * kL;
    const int rows = static_cast<int>(larger(0, smaller(kL, w.K - k)));
    for (int64_t c = 0; rows > 0 && c < padded; c += kL) {
      Vec taps[9 * kL];
      for (int i = 0; i < kL; ++i) {
        const float* from = du + (c + i) * kPanel + half * kL;
        both_dims<F::n, 3>([](const Vec* a, Vec* b) { F::unweight(a, b); },
                           [&](int r, int s) { return load(from + (r * F::n + s) * point); },
                           [&](int r, int s, Vec v) { taps[i * 9 + r * 3 + s] = v; });
      }
      move_taps<true, T>(w, k, c, rows, static_cast<int>(smaller(kL, w.C - c)), taps);
    }
  }
}

}  // namespace
}  // namespace zeroblock
