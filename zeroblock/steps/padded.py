"""Convolutions whose padding is not zeros of one width on both sides, made of convolutions whose padding is. Paddings
are in the long form of `_padding.py`.

In time nothing is padded. Where a kernel reaches beyond the first or last frame, what lies outside is left out of the
kernel: a frame of zeros adds nothing, a repeated one adds its tap to that of the frame itself. So a causal 3x3x3
convolution computes its first frame with one tap, its second with two, and all others at once, from h itself; one frame
alone costs a third, by the kernels for images. In space, other padding than the library's (repeated edges, sides of
different width), is a copy of h, and in one or two dimensions it is so altogether.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import add_residual, alike, in_layout
from .._padding import Sides, padded, sides
from ..backends.base import Backend, ConvGrads, GroupNorm, MaybeTensor
from .conv import conv_layout, empty_conv_output, unit_geometry
from .flag import EXECUTED, NEVER, skipped
from .norm_conv import norm_grads, normalised
from .packed import Geometry
from .taps import sums_large

# Frames of the result that are computed at once where they are large: what is copied to its place is no more than them.
_AT_ONCE = 4


def _size(h: Tensor, weight: Tensor, padding: Sequence[int]) -> tuple[int, ...]:
    """The shape of the result."""
    spatial = zip(h.shape[2:], weight.shape[2:], sides(padding), strict=True)
    return h.shape[0], weight.shape[0], *(n + front + back - k + 1 for n, k, (front, back, _) in spatial)


def empty_output(h: Tensor, weight: Tensor, padding: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor like the result."""
    return empty_conv_output(h, weight, _geometry(padding), dtype, _size(h, weight, padding))


def layout_of(h: Tensor, weight: Tensor, padding: Sequence[int]) -> torch.memory_format | None:
    """`conv_layout` of the result."""
    return conv_layout(h, weight, _geometry(padding))


def _geometry(padding: Sequence[int]) -> Geometry:
    """That of a convolution of which torch chooses the layout as of this one."""
    return unit_geometry([max(front, back) for front, back, _ in sides(padding)])


# ---- which convolutions ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Frames `outputs` of the result: those of h in `inputs`, convolved with the taps of the kernel in `taps`."""

    outputs: slice
    inputs: slice
    taps: slice


ALL = Part(slice(None), slice(None), slice(None))


def _parts(frames: int, taps: int, time: tuple[int, int, int], most: int) -> Iterator[Part]:
    """In the order of frames; the whole kernel for as many frames at once as it fits, but no more than `most`."""
    front, back, _ = time
    count = frames + front + back - taps + 1
    whole = range(front, front + max(0, frames - taps + 1))
    t = 0
    while t < count:
        end = min(whole.stop, t + most) if t in whole else t + 1
        first, last = t - front, end - 1 - front + taps
        inside = slice(max(0, first), min(frames, last))
        yield Part(slice(t, end), inside, slice(inside.start - first, taps - (last - inside.stop)))
        t = end


def _kernel(weight: Tensor, taps: slice, repeated: int) -> Tensor:
    """The taps that are left; those beyond the edge are added to the nearest where the edge is `repeated`."""
    if taps.stop - taps.start == weight.shape[2]:
        return weight
    w = weight[:, :, taps]
    if not repeated:
        return w
    before, inner, after = weight[:, :, : taps.start + 1], w[:, :, 1:-1], weight[:, :, taps.stop - 1 :]
    if w.shape[2] == 1:
        return weight.sum(2, keepdim=True)
    return torch.cat([before.sum(2, keepdim=True), inner, after.sum(2, keepdim=True)], 2)


def _add_kernel_grad(dweight: Tensor, grad: Tensor, taps: slice, repeated: int) -> None:
    """The gradient of `_kernel` added to that of the weight."""
    dweight[:, :, taps] += grad
    if repeated:
        dweight[:, :, : taps.start] += grad[:, :, :1]
        dweight[:, :, taps.stop :] += grad[:, :, -1:]


class Split(NamedTuple):
    """How a call is carried out: the parts, longest first, whether the edges in time are repeated, the padding left to
    the library, and what is padded by a copy before."""

    parts: list[Part]
    repeated: int
    padding: tuple[int, ...]
    copied: Sides

    @classmethod
    def of(cls, h: Tensor, weight: Tensor, padding: Sequence[int], most: int = 0) -> Split:
        copied, left = sides(padding), [0] * (weight.dim() - 2)
        for i, (front, back, repeated) in enumerate(copied):
            if front == back and not (repeated and front):
                copied[i], left[i] = (0, 0, 0), front
        time, taps = copied[0], weight.shape[2]
        if len(copied) < 3 or not 0 < max(time[:2]) < taps:
            return cls([ALL], 0, tuple(left), copied)
        copied[0] = (0, 0, 0)
        parts = list(_parts(h.shape[2], taps, time, most or h.shape[2]))
        parts.sort(key=lambda p: p.inputs.start - p.inputs.stop)  # the longest first
        return cls(parts, time[2], tuple(left), copied)


def _padded(h: Tensor, padding: Sides) -> Tensor:
    return padded(h, [n for dimension in padding for n in dimension])


def _unpad(dh: Tensor, h: Tensor, padding: Sides) -> Tensor:
    """The gradient of `_padded`."""
    for i, (front, back, repeated) in enumerate(padding):
        if not repeated and (front or back):
            dh = dh.narrow(2 + i, front, dh.shape[2 + i] - front - back)
    widths = [n for front, back, r in reversed(padding) for n in ((front, back) if r else (0, 0))]
    if any(widths):
        backward = getattr(torch.ops.aten, f"replication_pad{len(padding)}d_backward").default
        dh = backward(dh.contiguous(), h, widths)
    return dh


class Call(NamedTuple):
    """A part as a convolution with zeros of one width on both sides; of one frame with one tap, in two dimensions."""

    part: Part
    h: Tensor
    weight: Tensor
    padding: tuple[int, ...]

    @classmethod
    def of(cls, part: Part, h: Tensor, weight: Tensor, split: Split) -> Call:
        padding = split.padding
        if part is not ALL:
            h, weight = h[:, :, part.inputs], _kernel(weight, part.taps, split.repeated)
            if h.shape[2] == weight.shape[2] == 1:
                h, weight, padding = h.squeeze(2), weight.squeeze(2), padding[1:]
        return cls(part, h, weight, padding)

    def frames(self, t: Tensor) -> Tensor:
        """A tensor like this convolution's input or output as frames."""
        return t if t.dim() == 5 or self.part is ALL else t.unsqueeze(2)

    def output(self, t: Tensor) -> Tensor:
        """This convolution's part of a tensor like the whole result."""
        t = t if self.part is ALL else t[:, :, self.part.outputs]
        return t if t.dim() == self.h.dim() else t.squeeze(2)


def calls(backend: Backend, h: Tensor, weight: Tensor, padding: Sequence[int]) -> list[Call]:
    """The convolutions that make up the call."""
    split = Split.of(h, weight, padding)
    if sums_large(backend, h, weight, (0, *split.padding[1:])):
        split = Split.of(h, weight, padding, _AT_ONCE)
    h = _padded(h, split.copied)
    return [Call.of(part, h, weight, split) for part in split.parts]


def ahead(h: Tensor, weight: Tensor, padding: Sequence[int]) -> tuple[Tensor, Sides]:
    """h with the padding that is a copy, and the padding that is left: for a caller who needs h no longer."""
    copied = Split.of(h, weight, padding).copied
    left = [(0, 0, 0) if any(now[:2]) else side for now, side in zip(copied, sides(padding), strict=True)]
    return _padded(h, copied), left


# ---- residual + conv(h) ---------------------------------------------------------------------------------------------


def conv_residual(
    backend: Backend, h: Tensor, weight: Tensor, bias: MaybeTensor, residual: MaybeTensor, padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(residual + conv(h), skipped) as `Backend.conv_residual` gives it. No kernel reads a flag."""
    ran, parts = skipped(h, EXECUTED), calls(backend, h, weight, padding)
    if parts[0].part is ALL:
        _, h, weight, left = parts[0]
        return backend.conv_residual(h, weight, bias, residual, left, NEVER)[0], ran
    y = empty_output(h, weight, padding, weight.dtype)
    added = residual if residual is not None and alike(residual, y) else None
    for call in parts:
        step = backend.conv_residual(call.h, call.weight, bias, None, call.padding, NEVER)[0]
        if added is None:
            call.output(y).copy_(step)
        else:
            torch.add(call.output(added), step, out=call.output(y))
        del step  # not held while the next one is computed
    return y if added is not None else add_residual(residual, y), ran


# ---- its gradients --------------------------------------------------------------------------------------------------


def conv_grads(
    backend: Backend,
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    has_bias: bool,
    padding: Sequence[int],
    mask: Sequence[bool],
) -> ConvGrads:
    """The gradients of (h, weight, bias), each only where mask asks."""
    split = Split.of(h, weight, padding)
    whole = _padded(h, split.copied) if mask[0] or mask[1] else h
    dwhole = dweight = None
    layout = layout_of(h, weight, padding) or torch.contiguous_format
    for part in split.parts if mask[0] or mask[1] else ():
        call = Call.of(part, whole, weight, split)
        wanted = [bool(mask[0]), bool(mask[1]), False]
        dx, dw, _ = backend.conv_grads(call.output(dy), call.h, call.weight, None, False, call.padding, wanted)
        if dx is not None:
            if dwhole is None:  # the first part reads every frame, and uses every tap, if any does
                dwhole = dx if dx.shape == whole.shape else torch.zeros_like(whole)
            if dwhole is not dx:
                dwhole[:, :, part.inputs] += call.frames(dx)
        if dw is not None:
            if dweight is None:
                dweight = dw if dw.shape == weight.shape else torch.zeros_like(weight, memory_format=layout)
            if dweight is not dw:
                _add_kernel_grad(dweight, call.frames(dw), part.taps, split.repeated)
    dh = None
    if dwhole is not None:
        dh = in_layout(_unpad(dwhole, h, split.copied), None if layout is torch.contiguous_format else layout)
    return dh, dweight, dy.sum([0, *range(2, dy.dim())]) if mask[2] and has_bias else None


# ---- with the norm in front -----------------------------------------------------------------------------------------


def norm_conv_residual(
    backend: Backend,
    x: Tensor,
    norm: GroupNorm,
    weight: Tensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    padding: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(residual + conv(norm(x)), mean, rstd, skipped) as `Backend.norm_conv_residual` gives it."""
    h, mean, rstd = normalised(backend, x, norm, weight.dtype)
    y, ran = conv_residual(backend, h, weight, bias, residual, padding)
    return y, mean, rstd, ran


def norm_conv_grads(
    backend: Backend,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm: GroupNorm,
    weight: Tensor,
    has_bias: bool,
    padding: Sequence[int],
    mask: Sequence[bool],
) -> tuple[MaybeTensor, ...]:
    """As `Backend.norm_conv_grads` gives them; h is computed again."""
    h = normalised(backend, x, norm, weight.dtype)[0] if mask[1] else x.to(weight.dtype)
    dh, dweight, dbias = conv_grads(backend, dy, h, weight, has_bias, padding, mask)
    upstream = (None,) * 5 if dh is None else norm_grads(backend, dh, x, mean, rstd, norm)
    return *upstream, dweight, dbias
