"""3x3 convolutions by Winograd's minimal filtering (csrc/cpu/winograd.h): what can take them, and which tile.

    y = conv(act(norm(x)), weight) + bias + residual        2-D, stride 1, padding 0 or 1, groups 1, on the CPU

Tile 2, F(2x2, 3x3), saves a factor of 2.25 of the products and keeps the error budget (at most twice the library's
error plus one rounding). Tile 4, F(4x4, 3x3), saves a factor of 4; its relative error is 1e-6 to 5e-6, about ten times
the library's and a hundredth of TF32's, so it needs the user's word: `precision="fast"` or
torch.set_float32_matmul_precision("high"). Images and weights of 16 bits take tile 4: computed in float32 and rounded
once, they are as exact as the library's. Results do not depend on the number of threads. A value that is not finite
reaches every output of the tiles that read it, as NaN.

P is the primitives module, `_cpu`. Nothing is remembered between calls but scratch memory, at most 48 MB for the
calling thread and two panels of weights for each worker: the weights are transformed at every call, panel by panel,
unless `pack` did it beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._layout import add_residual, as_layout, channels_last_format
from ..plan.planned import reduced_allowed

FEW_CHANNELS = 32  # with fewer, the transforms outweigh the products


class Norm(NamedTuple):
    """silu(group_norm(x) * (1 + scale) + shift), applied as the convolution reads x; mean, rstd: [N, num_groups]."""

    num_groups: int
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def is_half(t: Tensor) -> bool:
    return t.dtype is torch.bfloat16 or t.dtype is torch.float16


def tile_for(precision: str | None = None) -> int:
    """The tile for a precision: 2 for "strict", 4 for "fast"; None: what the user allowed."""
    if precision is None:
        precision = "fast" if reduced_allowed() else "strict"
    return {"strict": 2, "fast": 4}[precision]


def plan_name(tile: int) -> str:
    """What plans and frozen weights call it."""
    return f"winograd {tile}x{tile}"


def usable(P: Any, x: Tensor, weight: Tensor, padding: Sequence[int]) -> bool:
    """Whether `conv` and `conv_grads` can compute this convolution, by metadata alone."""
    return (
        P.NAME == "cpu"
        and weight.dim() == 4
        and tuple(weight.shape[2:]) == (3, 3)
        and tuple(padding) in ((0, 0), (1, 1))
        and x.dtype == weight.dtype
        and (x.dtype is torch.float32 or is_half(x))
        and x.device.type == weight.device.type == "cpu"
        and x.shape[1] == weight.shape[1]
        and (weight.is_contiguous() or channels_last_format(weight) is not None)
        and weight.numel() > 0
        and x.shape[0] > 0
        and min(x.shape[2:]) + 2 * padding[0] > 2
    )


def worthwhile(batch: int, in_channels: int, out_channels: int, height: int, width: int, tile: int) -> bool:
    """The fixed rule, where nothing was measured; height and width are the output's."""
    tiles = batch * -(-height // tile) * -(-width // tile)
    filled = batch * height * width / (tiles * tile * tile)
    return min(in_channels, out_channels) >= FEW_CHANNELS and tiles >= 16 and filled > 0.7


def choose(P: Any, x: Tensor, weight: Tensor, padding: Sequence[int]) -> int:
    """The tile by the fixed rule; 0 where the library's convolution is to be taken. In half precision that is always
    so: how fast processors are there differs by an order of magnitude, which only a measurement shows."""
    if x.dtype != torch.float32 or not usable(P, x, weight, padding):
        return 0
    height, width = (n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True))
    tile = tile_for()
    return tile if worthwhile(x.shape[0], x.shape[1], weight.shape[0], height, width, tile) else 0


def statistics(P: Any, x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, rstd), [N, num_groups] each, of the groups of x."""
    layout = channels_last_format(x)
    return P.group_norm_statistics(as_layout(x, layout), num_groups, eps, layout is not None)


def pack(P: Any, weight: Tensor, tile: int) -> Tensor:
    """The transformed weight for `conv(packed=...)`: 16/9 of its memory for tile 2, 4 times for tile 4."""
    return P.winograd_pack(weight, tile, False)


def _layout_of(x: Tensor, weight: Tensor) -> torch.memory_format | None:
    """The memory format of the output, as the library chooses it."""
    return channels_last_format(x) or channels_last_format(weight)


def _affine(P: Any, x: Tensor, norm: Norm | None) -> Tensor | None:
    if norm is None:
        return None
    groups, mean, rstd, weight, bias, scale, shift = norm
    cl = channels_last_format(x) is not None
    return P.group_norm_affine(x, mean, rstd, weight, bias, scale, shift, groups, cl)


def conv(
    P: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: Sequence[int],
    *,
    tile: int,
    norm: Norm | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """conv(x) [+ bias] [+ residual], x normalised and activated first where a norm is given. A fresh tensor.

    x [N, C, H, W], weight [K, C, 3, 3]; `packed` is pack(P, weight, tile) of this very weight.
    """
    layout = _layout_of(x, weight)
    x = as_layout(x, layout)
    size = (x.shape[0], weight.shape[0], *(n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True)))
    fused = (
        residual is not None
        and residual.dtype == x.dtype
        and residual.shape == size
        and residual.is_contiguous(memory_format=layout or torch.contiguous_format)
    )
    y = P.winograd_conv(
        x, _affine(P, x, norm), weight, packed, bias, residual if fused else None, padding[0], tile, False,
        layout is not None,
    )  # fmt: skip
    return add_residual(None if fused else residual, y)


def conv_grads(
    P: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    padding: Sequence[int],
    mask: Sequence[bool],
    *,
    tile: int,
    norm: Norm | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dweight, dbias) of conv(h), h = x or act(norm(x)), each only where mask asks; dweight laid out as weight."""
    layout = _layout_of(x, weight)
    dy, cl = as_layout(dy, layout), layout is not None
    dh = dweight = None
    if mask[0]:
        dh = P.winograd_conv(dy, None, weight, None, None, None, 2 - padding[0], tile, True, cl)
    if mask[1]:
        x = as_layout(x, layout)
        dweight = P.winograd_weight_grad(dy, x, _affine(P, x, norm), weight, padding[0], tile, cl)
    return dh, dweight, dy.sum((0, 2, 3)) if mask[2] and has_bias else None
