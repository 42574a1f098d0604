"""What `zb.freeze` keeps for a weight: packed copies for oneDNN, and whether the weight is zero.

No cheap test proves a copy current (fused optimizers and writes through .data leave no trace), so copies exist only
between `freeze` and `unfreeze`, while the user promises not to write the weight. What a cheap test does show, another
address or version, raises at the next use; freeze(check=True) keeps the original and compares every bit at every use.
Other ways of preparing a convolution's weight register in `CONV_PACKERS` (steps/winograd.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
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
    if weight.device.type != "cpu":
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


class Copy:
    """The frozen state of one parameter; several modules may share it."""

    def __init__(self, parameter: Tensor, zero: bool, check: bool):
        key = id(parameter)
        self.parameter = weakref.ref(parameter, lambda _: _forget(key, self))
        self.pointer = parameter.data_ptr()
        self.version = None if parameter.is_inference() else parameter._version
        self.zero = zero
        self.original = parameter.detach().clone() if check else None
        self.convs: dict[tuple[str, Geometry], Tensor] = {}
        self.pieces: list[Tensor] = []
        self.decisions: dict[str, bool] = {}
        self.owners = 0

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

    def verify(self) -> None:
        """Raises RuntimeError when the parameter was written or moved since it was frozen, as far as can be told."""
        t = self.parameter()
        if t is None:
            return
        moved = t.data_ptr() != self.pointer
        written = self.version is not None and t._version != self.version
        if not (moved or written) and self.original is not None:
            written = not torch.equal(_bits(t), _bits(self.original))
        if moved or written:
            what = "moved" if moved else "written"
            raise RuntimeError(
                f"zeroblock: a parameter of shape {list(t.shape)} was {what} while frozen; "
                "call zeroblock.unfreeze(model) before changing it, or zeroblock.freeze(model) again"
            )


copies: dict[int, Copy] = {}


def _forget(key: int, copy: Copy) -> None:
    if copies.get(key) is copy:
        del copies[key]


def add(parameter: Tensor, zero: bool, check: bool) -> Copy:
    """The copy of this parameter, made if there is none, with one owner more."""
    copy = current(parameter)
    if copy is None:
        copy = copies[id(parameter)] = Copy(parameter, zero, check)
    copy.owners += 1
    return copy


def drop(parameter: Tensor) -> None:
    """One owner less."""
    copy = current(parameter)
    if copy is not None:
        copy.owners -= 1
        if copy.owners == 0:
            _forget(id(parameter), copy)


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


def decide_once(name: str, parameters: tuple[Tensor, ...], decide: Callable[[], bool]) -> bool:
    """decide(), remembered while every parameter is frozen."""
    found = [find(p) for p in parameters]
    first = found[0]
    if first is None or None in found:
        return decide()
    if name not in first.decisions:
        first.decisions[name] = decide()
    return first.decisions[name]


def any_frozen(tensors: list[Tensor]) -> Tensor | None:
    """The first frozen one among these."""
    return next((t for t in tensors if is_frozen(t)), None) if copies else None
