"""What `zb.freeze` keeps for a weight: packed copies for oneDNN, and whether the weight is zero.

No cheap test proves a copy current (fused optimizers and writes through .data leave no trace), so copies exist only
between `freeze` and `unfreeze`, while the user promises not to write the weight. Every use compares address, shape,
strides, version and, on the CPU, a sample of the elements with what they were, and raises where they differ;
freeze(check=True) keeps the original and compares every bit.
Other threads may infer meanwhile: a copy is published when it is complete, and whoever finds none uses the weight.
Other ways of preparing a convolution's weight register in `CONV_PACKERS` (steps/winograd.py).
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._layout import CHANNELS_LAST
from ..backends.base import Backend


class Geometry(NamedTuple):
    """Of a convolution; one number per dimension of space."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


ONEDNN = torch.backends.mkldnn.is_available()
_reorder_conv: Any = torch.ops.mkldnn._reorder_convolution_weight if ONEDNN else None
_reorder_linear: Any = torch.ops.mkldnn._reorder_linear_weight if ONEDNN else None
_MKLDNN = getattr(torch, "_mkldnn")  # noqa: B009  (a layout torch's stubs leave out)

# oneDNN adds up a whole float32 dot product in one chain. Longer ones are cut, so that errors stay within twice MKL's.
LONGEST = 1024


def bounds(length: int, longest: int) -> list[tuple[int, int]]:
    """(start, stop) of as few pieces as there can be, of about one size."""
    count = max(1, -(-length // max(1, longest)))
    size = max(1, -(-length // (16 * count))) * 16  # whole vectors
    return [(i, min(i + size, length)) for i in range(0, length, size)]


def why_not_packed(weight: Tensor) -> str | None:
    """None when oneDNN can pack weights of this device and dtype, else the reason."""
    if not weight.is_cpu:
        return f"the weight is on {weight.device.type}: only the CPU's library takes packed weights"
    if not ONEDNN:
        return "this build of torch has no oneDNN"
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return None if supported.get(weight.dtype, False) else f"oneDNN packs no {weight.dtype} on this processor"


def _pack_conv(backend: Backend, weight: Tensor, geometry: Geometry) -> Tensor | None:
    stride, padding, dilation, groups = geometry
    if weight.dim() not in CHANNELS_LAST or why_not_packed(weight) is not None:
        return None
    dense = weight.detach().contiguous(memory_format=CHANNELS_LAST[weight.dim()])
    return _reorder_conv(dense, padding, stride, dilation, groups, None)


# name: (backend, weight, geometry) -> the weight prepared, or None where that way does not apply.
CONV_PACKERS: dict[str, Callable[[Backend, Tensor, Geometry], Tensor | None]] = {"onednn": _pack_conv}


def _bits(t: Tensor) -> Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().view(integers[t.element_size()])


# How many elements are compared at each use: at least SAMPLE, and one in EVERY of a large weight. The first take 0.2 us
# (measured: python benchmarks/overhead.py), one element from memory as long as some 500 products (measured:
# python benchmarks/run.py --group frozen).
SAMPLE, EVERY = 64, 8192

_memory: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.restype, _memory.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_INTEGERS = {1: "b", 2: "h", 4: "i", 8: "q"}


def sample_step(shape: tuple[int, ...]) -> int:
    """The distance between compared elements of a weight that lies in memory without gaps.

    Long steps end at the golden section of a row, and no step has a factor in common with the shape, so that half the
    rows, half the columns or one tap of a kernel are never passed over.
    """
    numel = math.prod(shape)
    row = numel // shape[0]
    step = max(1, numel // max(SAMPLE, numel // EVERY))
    if step > 0.618 * row:
        step = int((int(step / row - 0.618) + 0.618) * row)
    while math.gcd(step, numel) > 1:  # ends at 1
        step -= 1
    return step


def _integers(memory: Any, size: int) -> memoryview[int]:
    return memory.cast(_INTEGERS[size])


def _sample(t: Tensor) -> memoryview[int] | None:
    """A view of elements of t, as integers, for as long as its storage lives; None where that is not to be had."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    if not t.is_cpu or t.numel() == 0 or t.dim() == 0 or span != t.numel():
        return None
    size = t.element_size()
    readable = _memory(t.data_ptr(), t.numel() * size, 0x100)  # PyBUF_READ
    return _integers(readable, size)[:: sample_step(t.shape)]


class Copy:
    """The frozen state of one parameter; several modules may share it."""

    def __init__(self, parameter: Tensor, zero: bool):
        key = id(parameter)
        self.parameter = weakref.ref(parameter, lambda dead: _forget(key, dead))
        self.storage = parameter.untyped_storage()  # kept, so that nothing else can come to lie at the same address
        self.pointer = parameter.data_ptr()
        self.shape, self.stride = parameter.shape, parameter.stride()
        self.version = None if parameter.is_inference() else parameter._version
        self.zero = zero
        self.sample = _sample(parameter)
        self.expected = (
            None if self.sample is None else _integers(memoryview(self.sample.tobytes()), parameter.element_size())
        )
        self.original: Tensor | None = None
        self.convs: dict[tuple[str, Geometry], Tensor] = {}
        self.pieces: list[Tensor] = []
        self.decisions: dict[Hashable, bool] = {}
        self.owners = 0
        if self.sample is None and parameter.is_cpu:
            self.keep_original()  # a weight with gaps in memory

    def keep_original(self) -> None:
        if self.original is None:
            self.original = self._alive().detach().clone()

    def _alive(self) -> Tensor:
        parameter = self.parameter()
        assert parameter is not None
        return parameter

    def pack_conv(self, backend: Backend, geometry: Geometry) -> None:
        weight = self._alive()
        for name, pack in CONV_PACKERS.items():
            if (name, geometry) not in self.convs and (packed := pack(backend, weight, geometry)) is not None:
                self.convs[name, geometry] = packed

    def pack_linear(self) -> None:
        weight = self._alive().detach()
        length = weight.shape[1]
        cuts = bounds(length, LONGEST if weight.dtype == torch.float32 else length)
        if not self.pieces:
            self.pieces = [_reorder_linear(weight[:, start:stop].contiguous()) for start, stop in cuts]

    def nbytes(self) -> int:
        """Memory the copies take beside the weight itself."""
        kept = [*self.convs.values(), *self.pieces]
        sizes = [torch.ops.mkldnn._nbytes(t) if t.layout is _MKLDNN else t.nbytes for t in kept]
        return sum(sizes) + (0 if self.original is None else self.original.nbytes)

    def changed(self) -> str | None:
        """ "moved" or "written" when the parameter was, since it was frozen, as far as can be told; else None."""
        t = self.parameter()
        if t is None:
            return None
        if t.data_ptr() != self.pointer or t.stride() != self.stride or t.shape != self.shape:
            return "moved"
        if (self.version is not None and t._version != self.version) or self.sample != self.expected:
            return "written"
        if self.original is not None and not torch.equal(_bits(t), _bits(self.original)):
            return "written"
        return None

    def verify(self) -> None:
        """Raises RuntimeError when the parameter has `changed`."""
        what = self.changed()
        if what is not None:
            raise RuntimeError(
                f"zeroblock: a parameter of shape {list(self.shape)} was {what} while frozen; "
                "call zeroblock.unfreeze(model) before changing it, or zeroblock.freeze(model) again"
            )


copies: dict[int, Copy] = {}


def _forget(key: int, parameter: weakref.ref[Tensor]) -> None:
    copy = copies.get(key)
    if copy is not None and copy.parameter is parameter:
        copies.pop(key, None)


def forget_changed(parameter: Tensor) -> None:
    """The copy of a parameter that has changed is dropped: layers of other models that share it use the weight."""
    copy = current(parameter)
    if copy is not None and copy.changed() is not None:
        _forget(id(parameter), copy.parameter)


def prepare(parameter: Tensor, zero: Callable[[Tensor], bool], check: bool) -> Copy:
    """The copy of this parameter, or a new one for `publish`."""
    copy = current(parameter)
    if copy is None:
        copy = Copy(parameter, zero(parameter))
    if check:
        copy.keep_original()
    return copy


def publish(copy: Copy) -> weakref.ref[Tensor]:
    """Others may use the copy from now on. It has one owner more, who gives the result to `drop`."""
    copy.owners += 1
    copies[id(copy.parameter())] = copy
    return copy.parameter


def drop(parameter: weakref.ref[Tensor]) -> None:
    """One owner less of the copy that was published under this reference."""
    t = parameter()
    copy = None if t is None else current(t)
    if copy is not None and copy.parameter is parameter:
        copy.owners -= 1
        if copy.owners == 0:
            _forget(id(t), parameter)


def current(t: Tensor) -> Copy | None:
    """What freeze keeps for t, not verified."""
    copy = copies.get(id(t)) if copies else None
    return copy if copy is not None and copy.parameter() is t else None


def is_frozen(t: Tensor) -> bool:
    return bool(copies) and current(t) is not None


def find(t: Tensor) -> Copy | None:
    """What freeze keeps for t, verified; None where t is not frozen."""
    if not copies:
        return None
    copy = current(t)
    if copy is not None:
        copy.verify()
    return copy


def decide_once(question: Hashable, parameters: tuple[Tensor, ...], decide: Callable[[], bool]) -> bool:
    """decide(), remembered while every parameter is frozen."""
    found = [find(p) for p in parameters]
    first = found[0]
    if first is None or None in found:
        return decide()
    key = (question, *found[1:])  # a weight may be shared by layers whose biases differ
    if key not in first.decisions:
        first.decisions[key] = decide()
    return first.decisions[key]


def any_frozen(tensors: list[Tensor]) -> Tensor | None:
    """The first frozen one among these."""
    return next((t for t in tensors if is_frozen(t)), None) if copies else None
