// Warp operations: shuffles, votes, __syncwarp, ldmatrix and mma.sync.
//
// A warp operation is a meeting that the lanes of its mask join, each with a value; when all have come, each reads what
// it needs. Only __syncwarp orders memory. Different operations of one mask that meet are an error.
#pragma once

#include "machine.h"

namespace simt {

constexpr int kSyncWarp = 1, kShuffle = 10, kShuffleXor = 11, kShuffleDown = 12, kShuffleUp = 13, kBallot = 20,
              kMma = 30, kLdmatrix = 40;
constexpr unsigned kFullMask = ~0u;

inline WarpOp* join(unsigned mask, int kind, const char* where, const void* value, size_t bytes) {
  Machine& m = machine();
  WarpOp* op = nullptr;
  Fiber* me;
  unsigned expected;
  {
    Quiet quiet;
    me = m.current;
    Warp& warp = *me->warp;
    me->where = where;
    throw_if_failed();
    const unsigned rest = m.threads - (me->linear & ~31u), present = rest >= 32 ? kFullMask : (1u << rest) - 1;
    expected = mask & present;
    if (!(mask >> me->lane & 1)) throw error("warp operation: the calling lane is not in its mask; " + at(*me));
    if ((mask & ~present) && mask != kFullMask) {
      throw error("warp operation: the mask names lanes that do not exist; " + at(*me));
    }
    for (WarpOp* o : warp.pending) {
      if (o->mask == mask) op = o;
    }
    if (!op) {
#if !defined(__SANITIZE_THREAD__)  // reused memory would carry an older operation's history
      if (!warp.pool.empty()) {
        op = warp.pool.back();
        warp.pool.pop_back();
      }
#endif
      if (!op) op = new WarpOp;
      op->mask = mask;
      op->arrived = 0;
      op->kind = kind;
      op->left = __builtin_popcount(expected);
      warp.pending.push_back(op);
    }
    if (op->kind != kind) throw error("warp operation: lanes of one warp meet in different ones; " + at(*me));
    memcpy(op->slot[me->lane].bytes, value, bytes);
  }
  if (kind == kSyncWarp) release(&op->order);
  {
    Quiet quiet;
    op->arrived |= 1u << me->lane;
    if (op->arrived == expected) {
      std::vector<WarpOp*>& pending = me->warp->pending;
      pending.erase(std::find(pending.begin(), pending.end(), op));
      const unsigned first = me->linear & ~31u;
      for (unsigned i = first; i < first + 32 && i < m.threads; i++) {
        Fiber& f = me->block->fibers[i];
        if (&f != me && f.state == State::kWarp && f.wait_mask == mask) make_ready(f);
      }
      if (m.seed) {
        make_ready(*me);
        yield();
      }
    } else {
      me->wait_mask = mask;
      wait_as(State::kWarp);
    }
    throw_if_failed();
  }
  if (kind == kSyncWarp) acquire(&op->order);
  return op;
}

inline void leave(WarpOp* op) {
  Quiet quiet;
  if (--op->left) return;
#if defined(__SANITIZE_THREAD__)
  delete op;
#else
  machine().current->warp->pool.push_back(op);
#endif
}

// The values that the lanes of a warp brought to one operation.
template <class T>
class Exchange {
 public:
  Exchange(unsigned mask, const T& value, int kind, const char* where) {
    static_assert(sizeof(T) <= sizeof(Slot));
    op_ = join(mask, kind, where, &value, sizeof(T));
  }
  Exchange(const Exchange&) = delete;
  ~Exchange() { leave(op_); }
  T operator[](unsigned lane) const {
    Quiet quiet;
    T value;
    memcpy(&value, op_->slot[lane].bytes, sizeof(T));
    return value;
  }

 private:
  WarpOp* op_;
};

struct SyncWarp {
  const char* where;
  void operator()(unsigned mask = kFullMask) const {
    const char nothing = 0;
    leave(join(mask, kSyncWarp, where, &nothing, 1));
  }
};

template <class T>
T shuffle(const char* where, int kind, unsigned mask, T value, int arg, int width = 32) {
  unsigned self;
  {
    Quiet quiet;
    self = machine().current->lane;
  }
  const int lane = int(self), base = lane & ~(width - 1);
  int source = lane;
  if (kind == kShuffle) source = base + (arg & (width - 1));
  if (kind == kShuffleXor && (lane ^ arg) < base + width) source = lane ^ arg;
  if (kind == kShuffleDown && lane + arg < base + width) source = lane + arg;
  if (kind == kShuffleUp && lane - arg >= base) source = lane - arg;
  const Exchange<T> values(mask, value, kind, where);
  if (!(mask >> source & 1)) {
    Quiet quiet;
    throw error("shuffle: reads a lane outside its mask; " + at(*machine().current));
  }
  return values[source];
}

inline unsigned ballot(const char* where, unsigned mask, bool vote) {
  const Exchange<unsigned> votes(mask, vote, kBallot, where);
  Quiet quiet;
  const Machine& m = machine();
  const unsigned first = m.current->linear & ~31u;
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32 && first + lane < m.threads; lane++) {
    if ((mask >> lane & 1) && votes[lane]) result |= 1u << lane;
  }
  return result;
}

// ldmatrix .m8n8.xN.b16: lane i gives the address of row i % 8 of matrix i / 8; lane l receives, of each matrix, the
// elements 2 (l % 4) + {0, 1} of row l / 4 (transposed: of that column).
template <int N, bool kTransposed>
void ldmatrix(unsigned (&r)[N], const void* row) {
  const char* where = "ldmatrix";
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    Quiet quiet;
    throw error("ldmatrix: a row address is not 16-byte aligned; " + at(*machine().current));
  }
  const Exchange<const void*> rows(kFullMask, row, kLdmatrix + 2 * N + kTransposed, where);
  unsigned lane;
  {
    Quiet quiet;
    lane = machine().current->lane;
  }
  const unsigned group = lane / 4, pair = lane % 4 * 2;
  for (int i = 0; i < N; i++) {
    unsigned short half[2];
    for (unsigned j = 0; j < 2; j++) {
      const unsigned source = 8 * i + (kTransposed ? pair + j : group), element = kTransposed ? group : pair + j;
      half[j] = static_cast<const unsigned short*>(rows[source])[element];
    }
    r[i] = half[0] | unsigned(half[1]) << 16;
  }
}

// mma.sync.m16n8k16, fp32 accumulators; `widen` turns 16 bits into a float. Fragments (g = lane / 4, t = lane % 4):
//   A register i: row g + 8 (i % 2), columns 2t + 8 (i / 2) + {0, 1};   B register i: rows 2t + 8i + {0, 1}, column g;
//   C register i: row g + 8 (i / 2), column 2t + i % 2.
template <class Widen>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Widen widen) {
  struct Fragments {
    unsigned a[4], b[2];
  } mine;
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.b, b, sizeof mine.b);
  const Exchange<Fragments> fragments(kFullMask, mine, kMma, "mma.sync");
  Quiet quiet;
  machine().stats.products += 2 * 16 * 8 * 16 / 32;  // of each lane
  const unsigned lane = machine().current->lane, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float sum = 0;
    for (unsigned k = 0; k < 16; k++) {
      const Fragments left = fragments[row % 8 * 4 + k % 8 / 2], right = fragments[column * 4 + k % 8 / 2];
      const unsigned x = left.a[row / 8 + 2 * (k / 8)] >> 16 * (k % 2), y = right.b[k / 8] >> 16 * (k % 2);
      sum += widen(x & 0xFFFF) * widen(y & 0xFFFF);
    }
    d[i] += sum;
  }
}

}  // namespace simt
