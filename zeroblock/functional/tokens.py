"""Of tokens [B, T, D]: modulated norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, ops, zero
from .. import reference as ref
from ..backends.base import MaybeTensor
from . import operands
from .general import NORMS, Modulated, residual_norm
from .rounding import eager_norm

Pair = tuple[Tensor | None, Tensor | None]  # shift and scale
Four = tuple[MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]


@overload
def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
    second: None = None,
    y_dtype: torch.dtype | None = None,
    rounding: str = "once",
) -> Tensor: ...


@overload
def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
    second: Pair,
    y_dtype: torch.dtype | None = None,
    rounding: str = "once",
) -> tuple[Tensor, Tensor]: ...


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
    second: Pair | None = None,
    y_dtype: torch.dtype | None = None,
    rounding: str = "once",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = layer_norm(x) * (1 + scale) + shift, the adaLN of DiT blocks.

    Args:
        x: [B, T, D]; float32, bfloat16, float16 (float64 by the reference).
        shift, scale: [D], [B, D] (broadcast over T; views of a chunked tensor need no copy) or [B, F, D] where F
            divides T: row f serves the T / F tokens from f T / F on; or None. B may be 1, as may the batch of x. Of any
            floating dtype, used as they are.
        eps: >= 0, added to the variance.
        weight, bias: [D] or None.
        shift_table, scale_table: [D] or None, added to every row of shift and scale in fp32.
        index: [T] or [B, T], int32 or int64: shift and scale are then rows [K, D] or [B, K, D], of which token t takes
            row index[b, t]. In [0, K): else ValueError on a CPU, and the nearest row on a GPU.
        second: (shift, scale) of a second modulation of the same norm, with the same tables: (y, y2) is returned. On a
            CPU, where all operands are [B, D] and no more is given, x is read once, else once for each.
        y_dtype: of y; None: that of x.
        rounding: "once", or "eager": PyTorch's operators one after another, with their roundings.

    Returns y like x. Saved for backward: x, mean, rstd.
    Raises TypeError (kind, dtype), ValueError (shape, value, device).
    Source: Peebles & Xie 2023, facebookresearch/DiT `modulate`.

    >>> y = layer_norm_modulate(torch.randn(2, 16, 64), torch.randn(2, 64), torch.randn(2, 64))
    """
    op = "layer_norm_modulate"
    if second is not None:
        shared: dict[str, Any] = {
            "eps": eps,
            "weight": weight,
            "bias": bias,
            "shift_table": shift_table,
            "scale_table": scale_table,
        }
        shared |= {"index": index, "y_dtype": y_dtype, "rounding": rounding}
        return _twice(layer_norm_modulate, x, (shift, scale), second, shared)
    traced = is_compiling()
    if traced:
        mixed = _checks.mixed(x, shift, scale, weight, bias)
    else:
        mixed = _checks.floating(op, 1, x=x, shift=shift, scale=scale, weight=weight, bias=bias)
        _checks.tokens(op, "x", x)
    taken = None
    if shift_table is scale_table is index is y_dtype is None and rounding == "once":
        taken = operands.modulated(op, x, shift, scale)
    if taken is None:
        a = Modulated(NORMS["layer"], weight, bias, shift, scale, shift_table, scale_table, eps, y_dtype)
        return _modulated(op, x, a, index, rounding)
    x, shift, scale = taken
    if not traced:
        _checks.eps_value(op, eps)
        _checks.shapes(op, (x.shape[2],), "[D]", weight=weight, bias=bias)
    if mixed and operands.needs_fp64(x, shift, scale, weight, bias):
        return layer_norm_modulate(x.double(), shift, scale, eps=eps, weight=weight, bias=bias).to(x.dtype)
    if zero.transforms_active():
        return ref.layer_norm_modulate(x, shift, scale, eps=eps, weight=weight, bias=bias)
    return ops.layer_norm_modulate(x, shift, scale, weight, bias, eps)[0]


def _twice(
    norm: Callable[..., Any], x: Tensor, first: Pair, second: Pair, shared: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    op = norm.__name__
    if not isinstance(second, tuple) or len(second) != 2:
        raise TypeError(f"{op}: second must be (shift, scale), got {type(second).__name__}")
    if (rows := _two_rows(op, x, first, second, shared)) is not None and not zero.transforms_active():
        return ops.norm_modulate_two(x, *rows, float(shared["eps"]), norm is rms_norm_modulate)[:2]
    return norm(x, *first, **shared), norm(x, *second, **shared)


def _two_rows(op: str, x: Tensor, first: Pair, second: Pair, shared: dict[str, Any]) -> Four | None:
    """The four operands for the op of both modulations: on a CPU, one row for each sample, and nothing else given."""
    if any(v is not None for arg, v in shared.items() if arg not in ("eps", "rounding")):
        return None
    if shared["rounding"] != "once" or not isinstance(x, Tensor) or not x.is_cpu or x.dim() != 3:
        return None
    rows = (*first, *second)
    size = (x.shape[0], x.shape[2])
    if any(v is not None and (not isinstance(v, Tensor) or v.shape != size) for v in rows):
        return None
    if not is_compiling():
        names = {"shift": rows[0], "scale": rows[1], "second[0]": rows[2], "second[1]": rows[3]}
        _checks.floating(op, 1, x=x, **names)
        _checks.tokens(op, "x", x)
        _checks.eps_value(op, shared["eps"])
    return None if operands.needs_fp64(x, *rows) else rows


def _modulated(op: str, x: Tensor, a: Modulated, index: Tensor | None, rounding: str) -> Tensor:
    """What is not the plain form."""
    _checks.choice(op, "rounding", rounding, ("once", "eager"))
    mixed = _checks.floating(
        op,
        1,
        x=x,
        weight=a.weight,
        bias=a.bias,
        shift=a.shift,
        scale=a.scale,
        shift_table=a.shift_table,
        scale_table=a.scale_table,
    )
    if rounding == "eager":
        return eager_norm(op, x, a, index)
    y: Tensor = residual_norm(op, x, None, a, index, mixed)[1]
    return y


@overload
def rms_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
    second: None = None,
    y_dtype: torch.dtype | None = None,
    rounding: str = "once",
) -> Tensor: ...


@overload
def rms_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
    second: Pair,
    y_dtype: torch.dtype | None = None,
    rounding: str = "once",
) -> tuple[Tensor, Tensor]: ...


def rms_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
    second: Pair | None = None,
    y_dtype: torch.dtype | None = None,
    rounding: str = "once",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) [* weight] * (1 + scale) + shift.

    Args:
        x: [B, T, D]; float32, bfloat16, float16 (float64 by the reference).
        shift, scale: as for layer_norm_modulate.
        eps: >= 0, added to the mean square.
        weight: [D] or None.
        shift_table, scale_table, index, second, y_dtype, rounding: as for layer_norm_modulate.

    Returns y like x. Saved for backward: x, rstd.
    Raises TypeError (kind, dtype), ValueError (shape, value, device).
    Source: Zhang & Sennrich 2019.
    """
    op = "rms_norm_modulate"
    if second is not None:
        shared: dict[str, Any] = {"eps": eps, "weight": weight, "shift_table": shift_table, "scale_table": scale_table}
        shared |= {"index": index, "y_dtype": y_dtype, "rounding": rounding}
        return _twice(rms_norm_modulate, x, (shift, scale), second, shared)
    traced = is_compiling()
    if traced:
        mixed = _checks.mixed(x, shift, scale, weight)
    else:
        mixed = _checks.floating(op, 1, x=x, shift=shift, scale=scale, weight=weight)
        _checks.tokens(op, "x", x)
    taken = None
    if shift_table is scale_table is index is y_dtype is None and rounding == "once":
        taken = operands.modulated(op, x, shift, scale)
    if taken is None:
        a = Modulated(NORMS["rms"], weight, None, shift, scale, shift_table, scale_table, eps, y_dtype)
        return _modulated(op, x, a, index, rounding)
    x, shift, scale = taken
    if not traced:
        _checks.eps_value(op, eps)
        _checks.shapes(op, (x.shape[2],), "[D]", weight=weight)
    if mixed and operands.needs_fp64(x, shift, scale, weight):
        return rms_norm_modulate(x.double(), shift, scale, eps=eps, weight=weight).to(x.dtype)
    if zero.transforms_active():
        return ref.rms_norm_modulate(x, shift, scale, eps=eps, weight=weight)
    return ops.rms_norm_modulate(x, shift, scale, weight, eps)[0]
