"""Repairs of Triton's interpreter that the tests need: `install()` before the first launch.

What Triton 3.8 gets wrong or hides when TRITON_INTERPRET=1, and what happens here instead:
  * bf16 is kept as its bits in uint16, so arithmetic, dots and reductions are garbage and casts truncate; fp8 likewise
    -> real numpy dtypes (ml_dtypes), casts round to nearest even, dots and sums accumulate in fp32;
  * float32 dots run in full precision -> rounded to tf32 where the kernel asks for tf32;
  * a masked load without `other` gives 0 where a GPU gives anything -> NaN, or -1 for integers;
  * programs always run in the same order -> any order, see `program_order`;
  * int32 overflow passes silently -> an error;
  * libdevice functions do nothing -> numpy's;
  * tl.reduce with an own combine function takes 0.25 ms per element -> whole slices at a time;
  * sums run sequentially along outer axes -> as a tree;
  * triton 3.6 takes int() of arrays with one element, which numpy 2.4 refuses -> item();
  * every call of a device function patches triton.language again, and leaves it patched -> once per launch, undone.
One process either interprets or compiles: the variable is read when a kernel is decorated.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
import triton.runtime.interpreter as I  # noqa: E402
from triton.language import core  # noqa: E402,F401  (_everything names it)

EXTENDED = {
    "bf16": ml_dtypes.bfloat16,
    "fp8e5": ml_dtypes.float8_e5m2,
    "fp8e4nv": ml_dtypes.float8_e4m3fn,
    "fp8e4b8": ml_dtypes.float8_e4m3fnuz,
    "fp8e5b16": ml_dtypes.float8_e5m2fnuz,
}
_stock_np_dtype = I._get_np_dtype
_stock_launch = I.GridExecutor.__call__
_stock_patch_tensor = I._patch_lang_tensor


def np_dtype(dtype) -> np.dtype:
    """The numpy dtype of a Triton type; pointers are uint64."""
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    if not isinstance(element, tl.pointer_type) and element.name in EXTENDED:
        return np.dtype(EXTENDED[element.name])
    return _stock_np_dtype(dtype)


def _is_extended(a: np.ndarray) -> bool:
    return a.dtype.kind == "V"


def _to_tf32(a: np.ndarray) -> np.ndarray:
    """fp32 with 10 bits of mantissa, rounded to nearest."""
    bits = np.ascontiguousarray(a).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(a), rounded, a)


def _poison(dtype: np.dtype) -> np.ndarray:
    if dtype.kind in "iu":
        return np.array(-1, np.int64).astype(dtype)
    return np.array(True) if dtype.kind == "b" else np.array(np.nan, np.float32).astype(dtype)


class Builder(I.InterpreterBuilder):
    """The interpreter's table of operations, repaired."""

    order_seed: int | None = None

    def get_bf16(self, value):
        return I.TensorHandle(np.array([value], ml_dtypes.bfloat16), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        a, scalar = src.data, dst_type.scalar
        target = np_dtype(scalar)
        if _is_extended(a) or (target.kind == "V" and a.dtype != np.float64):
            a = a.astype(np.float32)  # exact for every extended type
        with np.errstate(all="ignore"):
            return I.TensorHandle(a.astype(target), scalar)

    create_si_to_fp = create_ui_to_fp = create_fp_to_si = create_fp_to_ui = cast_impl
    create_fp_ext = create_fp_trunc = cast_impl

    def create_int_cast(self, src, dst_type, is_signed):
        return self.cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return self.cast_impl(src, dst_type)

    def create_fabs(self, arg):
        return I.TensorHandle(np.abs(arg.data), arg.dtype.scalar)

    def create_rsqrt(self, arg):
        with np.errstate(all="ignore"):
            return I.TensorHandle((1 / np.sqrt(arg.data)).astype(arg.data.dtype), arg.dtype.scalar)

    def create_fma(self, x, y, z):
        wide = {np.dtype(np.float32): np.float64, np.dtype(ml_dtypes.bfloat16): np.float32}.get(x.data.dtype)
        a, b, c = (t.data if wide is None else t.data.astype(wide) for t in (x, y, z))
        return I.TensorHandle((a * b + c).astype(z.data.dtype), z.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        lhs, rhs = a.data, b.data
        if lhs.dtype == np.float32 and input_precision == I._ir.INPUT_PRECISION.TF32:
            lhs, rhs = _to_tf32(lhs), _to_tf32(rhs)
        exact = {np.dtype(np.float64): np.float64, np.dtype(np.int32): np.int32}
        wide = exact.get(d.data.dtype, np.float32)
        y = np.matmul(lhs.astype(wide), rhs.astype(wide)) + d.data.astype(wide)
        return I.TensorHandle(y.astype(d.data.dtype), d.dtype.scalar)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        if other is None:
            element = ptrs.get_element_ty()
            other = I.TensorHandle(np.full(ptrs.data.shape, _poison(np_dtype(element))), element)
        return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def set_grid_dim(self, nx, ny, nz):
        super().set_grid_dim(nx, ny, nz)
        count = nx * ny * nz
        self._order = None if self.order_seed is None else np.random.default_rng(self.order_seed).permutation(count)

    def set_grid_idx(self, x, y, z):
        if self._order is not None:
            nx, ny, nz = self.grid_dim
            i = int(self._order[(x * ny + y) * nz + z])
            x, y, z = i // (ny * nz), i // nz % ny, i % nz
        super().set_grid_idx(x, y, z)


def _sum(self, input):
    """A tree of halves, as lanes and warps add up: numpy's order is sequential along outer axes, and less exact."""
    a = input.handle.data
    wide = a.astype(np.float32) if _is_extended(a) else a
    axis = self.axis
    if axis is not None and wide.dtype.kind == "f":
        while (n := wide.shape[axis]) > 1 and n % 2 == 0:
            low, high = np.split(wide, 2, axis=axis)
            wide = low + high
    return self.to_tensor(np.sum(wide, axis=axis, keepdims=self.keep_dims).astype(a.dtype), input.dtype)


def _reduce(self, input):
    """tl.reduce with any associative combine function: a pairwise tree over whole slices."""
    tensors, axis = self.unravel(input, self.axis)
    types, data = [t.dtype for t in tensors], [t.handle.data for t in tensors]
    is_vector = data[0].ndim == 1
    if is_vector:  # a slice of a vector would be a scalar
        data, axis = [a.reshape(-1, 1) for a in data], 0

    def part(start: int, stop: int):
        rows = range(start, stop)
        return [self.to_tensor(np.take(a, rows, axis=axis), t) for a, t in zip(data, types, strict=True)]

    while (n := data[0].shape[axis]) > 1:
        combined = self.combine_fn(*part(0, n // 2), *part(n // 2, n // 2 * 2))
        combined = combined if isinstance(combined, (tuple, tl.tuple)) else (combined,)
        odd = [np.take(a, range(n // 2 * 2, n), axis=axis) for a in data]
        data = [np.concatenate([c.handle.data, o], axis=axis) for c, o in zip(combined, odd, strict=True)]
    if is_vector:
        data = [a.reshape(1) if self.keep_dims else a.reshape(())[()] for a in data]
    elif not self.keep_dims:
        data = [np.squeeze(a, axis=axis) for a in data]
    return [self.to_tensor(a, t) for a, t in zip(data, types, strict=True)]


def _fma(a, b, c):
    return (np.asarray(a, np.float64) * b + c).astype(np.asarray(a).dtype)


def _erf(x):
    return I.np_erf_fp64(np.asarray(x, np.float64))


LIBDEVICE = {
    "tanh": np.tanh,
    "fast_tanhf": np.tanh,
    "exp": np.exp,
    "fast_expf": np.exp,
    "expm1": np.expm1,
    "log1p": np.log1p,
    "erf": _erf,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "pow": np.power,
    "rint": np.rint,
    "div_rn": np.divide,
    "fast_dividef": np.divide,
    "fma": _fma,
}


def _libdevice(function):
    def call(*args, **_):
        operands = [I.interpreter_semantic.to_tensor(a) for a in args]
        like = max(operands, key=lambda t: t.handle.data.size)
        with np.errstate(all="ignore"):
            result = np.asarray(function(*(t.handle.data for t in operands))).astype(like.handle.data.dtype)
        shape = tl.block_type(like.dtype, like.shape) if like.shape else like.dtype
        return tl.tensor(I.TensorHandle(result, like.dtype), shape)

    return call


def _everything() -> None:
    """Its globals name both modules that device functions use, `tl` and `core`."""


def _launch(self, *args, **kwargs):
    scope = I._patch_lang(_everything)
    try:
        return _stock_launch(self, *args, **kwargs)
    finally:
        scope.restore()


def _patch_tensor(tensor, scope) -> None:
    _stock_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _call_device_function(self, *args, **kwargs):
    return self.rewrite()(*args, **kwargs)


def install(builder: type[Builder] = Builder) -> None:
    """Repairs the interpreter of this process; again with a subclass of what is installed, that takes over."""
    if not isinstance(tl.sum, I.InterpretedFunction):
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: this process compiles kernels")
    from triton.language.extra import libdevice

    I._get_np_dtype = np_dtype
    I.ReduceOps.sum, I.ReduceOps.generic_reduce = _sum, _reduce
    I.InterpretedFunction.__call__ = _call_device_function
    I.GridExecutor.__call__ = _launch
    I._patch_lang_tensor = _patch_tensor
    if issubclass(builder, type(I.interpreter_builder)) or not isinstance(I.interpreter_builder, Builder):
        I.interpreter_builder.__class__ = builder  # other modules hold this very object
    I.interpreter_builder.options = I.InterpreterOptions(debug=True)  # int32 overflow raises
    for name, function in LIBDEVICE.items():
        setattr(libdevice, name, _libdevice(function))


@contextlib.contextmanager
def program_order(seed: int | None) -> Iterator[None]:
    """Programs of the launches in the block run in this random order; None: in that of their indices."""
    before, Builder.order_seed = Builder.order_seed, seed
    try:
        yield
    finally:
        Builder.order_seed = before
