// zero_flag: flags[i] = 1 when every element of tensor i is +0 or -0, by its bits: all but the sign are zero.
// grid: x pieces of a tensor, y tensors; a block reads 16 bytes per thread and step and leaves at the first bit found,
// by itself or by another block. Reduction order: every block adds to one word that it is done, in the low 16 bits, and
// whether it has found anything, in a field of the tensor; who finds in the sum that all are done writes the flag and
// clears the word. Sums of integers: any order gives the same flag. Zero path: this kernel writes the flag that the
// others read.
#include "common.cuh"

namespace zeroblock::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // packs a thread reads before it tests them: 64 bytes in flight
// Bits of a word: blocks that are done, of all tensors that share it; those that have found something, of each.
constexpr int kDone = 16, kFound = 12;
static_assert(kDone + kFound * kZeroFlagTogether <= 64 && kZeroFlagBlocks * kZeroFlagTensors < 1 << kDone);
static_assert(kZeroFlagBlocks < 1 << kFound);

// The bits other than the sign, OR-reduced. fp64: the low word counts whole.
__device__ __forceinline__ unsigned magnitude(const Pack<unsigned, 4>& p, unsigned even, unsigned odd) {
  return (p.v[0] & even) | (p.v[1] & odd) | (p.v[2] & even) | (p.v[3] & odd);
}

template <class T>
__device__ __forceinline__ bool element_is_zero(const void* data, int64_t i) {
  return static_cast<T>(static_cast<const T*>(data)[i] << 1) == 0;
}

__device__ bool element_is_zero(const void* data, int64_t i, int size) {
  if (size == 2) return element_is_zero<unsigned short>(data, i);
  return size == 4 ? element_is_zero<unsigned>(data, i) : element_is_zero<unsigned long long>(data, i);
}

__device__ __forceinline__ Word found_by(Word word, int field) {
  return word >> (kDone + kFound * field) & ((1ull << kFound) - 1);
}

__global__ void __launch_bounds__(kThreads) zero_flag_kernel(ZeroFlag p) {
  const int tensor = blockIdx.y, size = p.element_size[tensor];
  const char* data = static_cast<const char*>(p.data[tensor]);
  const int64_t bytes = p.bytes[tensor];
  const int field = p.any_of ? tensor : 0, fields = p.any_of ? p.count : 1, index = p.any_of ? 0 : tensor;
  Word* word = p.words + index;
  const unsigned odd = size == 2 ? 0x7fff7fffu : 0x7fffffffu;
  const unsigned even = size == 8 ? 0xffffffffu : odd;
  // Elements before the first and after the last whole 16 bytes: one thread each.
  int64_t head = (16 - reinterpret_cast<uintptr_t>(data) % 16) % 16;
  if (head > bytes) head = bytes;
  const int64_t packs = (bytes - head) / 16, tail = head + packs * 16;
  bool found = false;
  if (blockIdx.x == 0) {
    const int64_t edge = head / size + (bytes - tail) / size;
    if (threadIdx.x < edge) {
      const int64_t i = threadIdx.x < head / size ? threadIdx.x : tail / size + (threadIdx.x - head / size);
      found = !element_is_zero(data, i, size);
    }
  }
  const unsigned* words = reinterpret_cast<const unsigned*>(data + head);
  const int64_t step = int64_t(gridDim.x) * kThreads * kUnroll;
  for (int64_t base = int64_t(blockIdx.x) * kThreads * kUnroll; base < packs && !found; base += step) {
    unsigned bits = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const int64_t i = base + u * kThreads + threadIdx.x;
      if (i < packs) bits |= magnitude(load_pack<4>(words + 4 * i), even, odd);
    }
    found = bits != 0;
    if (found_by(load_relaxed(word), field) != 0) break;
  }
  ZB_SHARED(bool, of_warp, [kThreads / 32]);
  found = __any_sync(kAllLanes, found);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = found;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; w++) found |= of_warp[w];
  const Word mine = 1 + (static_cast<Word>(found) << (kDone + kFound * field));
  const Word all = atomicAdd(word, mine) + mine;
  if ((all & ((1ull << kDone) - 1)) != static_cast<Word>(gridDim.x) * fields) return;
  int flag = 0;
  for (int f = 0; f < fields; f++) flag |= found_by(all, f) == 0;
  p.flags[index] = flag;
  store_relaxed(word, 0);
}

}  // namespace

int zero_flag(const ZeroFlag& p, void* stream) {
  if (p.count == 0) return 0;
  int64_t longest = 0;
  for (int i = 0; i < p.count; i++) longest = p.bytes[i] > longest ? p.bytes[i] : longest;
  const int64_t pieces = ceil_div(longest, 16 * kThreads * kUnroll);
  const unsigned blocks = pieces < 1 ? 1 : pieces > kZeroFlagBlocks ? kZeroFlagBlocks : static_cast<unsigned>(pieces);
  return launch(zero_flag_kernel, dim3(blocks, p.count), kThreads, 0, stream, p);
}

#ifdef ZB_SIMT
const char* error_string(int) { return "refused by the emulator"; }
#else
const char* error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
#endif

}  // namespace zeroblock::cuda
