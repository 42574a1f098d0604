"""Convolutions in three dimensions as sums over the taps of their kernels in time: each is a convolution of images, the
frames, that plans for itself (Winograd's kernels among its ways).

    y[t] = conv(h[t - p], weight[0]) + conv(h[t - p + 1], weight[1]) + ...        kernel K x 3 x 3, float32, on the CPU

Each convolution adds what the taps before it gave. Frames are copied into a tensor of their own where they are not one
after the other in memory (channels first, or several samples): large ones when they are read, so that a few exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._layout import add_residual, alike, in_layout, in_layout_with
from ..backends.base import Backend, ConvGrads
from . import winograd
from .conv import CONV, ConvCall, conv_layout, empty_conv_output, unit_geometry
from .conv_bwd import CONV_BWD, ConvGradsCall

# Pixels of a frame, of all samples, from which on results are computed a few frames at a time: what is copied and added
# up on the way is no more than them (guess).
LARGE = 1 << 13


def _is_large(h: Tensor) -> bool:
    return h.shape[0] * h.shape[3] * h.shape[4] >= LARGE


def sums_large(backend: Backend, h: Tensor, weight: Tensor, padding: tuple[int, ...]) -> bool:
    """Whether the fixed rule takes this way for large frames."""
    return h.dim() == 5 and _is_large(h) and _rule(backend, h, weight, padding)


def _frames(x: Tensor, last: bool) -> Tensor:
    """[N, C, T, H, W] as frames [T, N, C, H, W], dense in the format of images (`last`: channels last)."""
    if last:
        return x.permute(2, 0, 3, 4, 1).contiguous().permute(0, 1, 4, 2, 3)
    return x.permute(2, 0, 1, 3, 4).contiguous()


def _taps(frames: int, taps: int, padding: int) -> Iterator[tuple[int, slice, slice]]:
    """(tap, the frames of the result that it reaches, the frames that it reads); first one that reaches them all."""
    count = frames + 2 * padding - taps + 1
    for k in sorted(range(taps), key=lambda k: abs(k - padding)):
        first, stop = max(0, padding - k), min(count, frames + padding - k)
        if stop > first:
            yield k, slice(first, stop), slice(first + k - padding, stop + k - padding)


def _conv(call: ConvCall) -> Tensor:
    backend, h, weight, bias, residual, geometry = call
    layout = conv_layout(h, weight, geometry)
    if _is_large(h) and (layout is None or h.shape[0] > 1):
        return _frame_by_frame(call)
    time, *space = geometry.padding
    frames, images, y = _frames(h, layout is not None), unit_geometry(space), torch.empty(0)
    for i, (k, outputs, inputs) in enumerate(_taps(h.shape[2], weight.shape[2], time)):
        x, w = frames[inputs], weight[:, :, k].contiguous()
        before = None if i == 0 else y[outputs].flatten(0, 1)
        step = CONV(ConvCall(backend, x.flatten(0, 1), w, bias if i == 0 else None, before, images))
        step = step.unflatten(0, x.shape[:2])
        if i == 0 or len(step) == len(y):
            y = step
        else:
            y[outputs] = step
    return in_layout_with(residual, y.permute(1, 2, 0, 3, 4), layout)


def _frame_by_frame(call: ConvCall) -> Tensor:
    """`_conv` by Winograd's kernels, with copies of no more frames than the kernel has taps."""
    backend, h, weight, bias, residual, geometry = call
    front, *space = geometry.padding
    images, tile = unit_geometry(space), winograd.tile_for()
    kernels = [weight[:, :, k].contiguous() for k in range(weight.shape[2])]
    prepared = [winograd.pack(backend, kernel, tile) for kernel in kernels]
    y = empty_conv_output(h, weight, geometry, weight.dtype)
    last, added = not y.is_contiguous(), residual if residual is not None and alike(residual, y) else None
    read: dict[int, Tensor] = {}
    for t in range(y.shape[2]):
        first, total = t - front, None
        for f in range(max(0, first), min(h.shape[2], first + len(kernels))):
            x, k = read.pop(f) if f in read else _frames(h[:, :, f : f + 1], last)[0], f - first
            if k > 0:  # the next result reads it too
                read[f] = x
            step = ConvCall(backend, x, kernels[k], bias if total is None else None, total, images)
            total = winograd.conv(tile, step, prepared=prepared[k])
        assert total is not None
        if added is None:
            y[:, :, t] = total
        else:
            torch.add(added[:, :, t], total, out=y[:, :, t])
    return y if added is not None else add_residual(residual, y)


def _conv_grads(call: ConvGradsCall) -> ConvGrads:
    backend, dy, h, weight, has_bias, padding, mask = call
    layout = conv_layout(h, weight, unit_geometry(padding))
    last = layout is not None
    frames, grads = _frames(h, last), _frames(dy, last)
    dh = frames.new_zeros(0) if not mask[0] else torch.zeros_like(frames)
    dweight = torch.zeros_like(weight, memory_format=layout or torch.contiguous_format)
    for k, outputs, inputs in _taps(h.shape[2], weight.shape[2], padding[0]):
        x, w = frames[inputs], weight[:, :, k].contiguous()
        step = grads[outputs].flatten(0, 1), x.flatten(0, 1), w, False, tuple(padding[1:]), (mask[0], mask[1], False)
        dx, dw, _ = CONV_BWD(ConvGradsCall(backend, *step))
        if dx is not None:
            dh[inputs] += dx.unflatten(0, x.shape[:2])
        if dw is not None:
            dweight[:, :, k] = dw
    dbias = dy.sum((0, 2, 3, 4)) if mask[2] and has_bias else None
    return in_layout(dh.permute(1, 2, 0, 3, 4), layout) if mask[0] else None, dweight if mask[1] else None, dbias


# ---- which calls ----------------------------------------------------------------------------------------------------


def _why_not(backend: Backend, h: Tensor, weight: Tensor, padding: tuple[int, ...] | None) -> str | None:
    if weight.dim() != 5 or h.dtype != torch.float32 or padding is None:
        return "kernels K x 3 x 3 of stride 1 in float32 on the CPU only"
    if 0 < 2 * padding[0] != weight.shape[2] - 1:
        return "no tap reaches every frame"
    usable = winograd.usable(backend, *_images(h, weight), padding[1:])
    return None if usable else "its frames are no case for Winograd's kernels"


def _images(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A frame, and what stands for a tap of the weight."""
    return h[:, :, 0], weight.new_empty(*weight.shape[:2], *weight.shape[3:])


def _why_not_conv(call: ConvCall) -> str | None:
    return _why_not(call.backend, call.h, call.weight, winograd.plain_padding(call.geometry))


def _why_not_grads(call: ConvGradsCall) -> str | None:
    return _why_not(call.backend, call.h, call.weight, call.padding)


def _rule(backend: Backend, h: Tensor, weight: Tensor, padding: tuple[int, ...] | None) -> bool:
    if padding is None or _why_not(backend, h, weight, padding) is not None:
        return False
    return winograd.choose(backend, *_images(h, weight), padding[1:]) != 0


def _rule_conv(call: ConvCall) -> bool:
    return _rule(call.backend, call.h, call.weight, winograd.plain_padding(call.geometry))


def _rule_grads(call: ConvGradsCall) -> bool:
    return _rule(call.backend, call.h, call.weight, call.padding)


CONV.add("sum over time", _conv, _why_not_conv, rule=_rule_conv)
CONV_BWD.add("sum over time", _conv_grads, _why_not_grads, rule=_rule_grads)
