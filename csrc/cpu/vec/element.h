// The element types of the CPU kernels, and two attributes that every kernel uses.
//
// Every kernel is compiled once per instruction set. Everything here lives in an anonymous namespace, and no std
// template is used: an inline function that two objects share could be taken by the linker from the AVX-512 one and
// crash an older processor (test_kernel_objects_share_no_inline_function).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../../zeroblock.h"

#define ZB_INLINE inline __attribute__((always_inline))
// For a loop nest: everything it calls, generic lambdas above all, becomes part of it. Its arguments come by value, so
// that the compiler can keep them in registers across stores.
#define ZB_LOOPS __attribute__((flatten, noinline))
// For a lambda in an inner loop: inlined before arrays are split into registers.
#define ZB_BODY __attribute__((always_inline))

namespace zeroblock {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Calls f(T*) with a null pointer of the element type that dtype names.
template <class F>
ZB_INLINE void with_type(DType dtype, const F& f) {
#define ZB_CALL(name, type, scalar_type) \
  if (dtype == DType::name) return f(static_cast<type*>(nullptr));
  ZB_DTYPES(ZB_CALL)
#undef ZB_CALL
  __builtin_unreachable();
}

}  // namespace
}  // namespace zeroblock
