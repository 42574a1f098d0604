"""layer_norm_modulate: (layer_norm(x) [* weight + bias]) * (1 + scale) + shift. RMS norm: `rms_norm_modulate.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from .. import reference as ref
from .._dtypes import cast
from ..backends.base import MaybeTensor
from ..backends.select import select
from ..reference import compute_dtype
from . import shapes
from .register import Grads, Op, through

FORWARD = Op(
    "layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    again=(0, lambda inputs, extra: _again(*inputs)),
)
BACKWARD = Op(
    "layer_norm_modulate_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? shift, Tensor? scale, "
    "Tensor? weight, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    device_arg=1,
)


@FORWARD.forward
def layer_norm_modulate(
    x: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    eps: float,
    *,
    direct: bool = False,
) -> tuple[Tensor, MaybeTensor, Tensor]:
    """(y, mean, rstd)"""
    if not direct and (route := FORWARD.route(x, shift, scale, weight, bias)):
        return route(x, shift, scale, weight, bias, eps)
    return select("layer_norm_modulate", x).layer_norm_modulate(x, shift, scale, weight, bias, eps, False)


def _again(*inputs: Any) -> Tensor:
    return layer_norm_modulate(*inputs, direct=True)[0]


@FORWARD.fake
def _fake(
    x: Tensor, shift: MaybeTensor, scale: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor, eps: float
) -> tuple[Tensor, ...]:
    op = "layer_norm_modulate"
    _checks.floating(op, 1, x=x, shift=shift, scale=scale, weight=weight, bias=bias)
    _checks.modulated(op, x, eps, shift=shift, scale=scale)
    _checks.shapes(op, (x.shape[2],), "[D]", weight=weight, bias=bias)
    return x.new_empty(x.shape), shapes.statistics(x, *x.shape[:2]), shapes.statistics(x, *x.shape[:2])


@BACKWARD.forward
def layer_norm_modulate_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    *,
    direct: bool = False,
) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """The gradients of (x, shift, scale, weight, bias)."""
    if not direct and (route := BACKWARD.route(dy, x, mean, rstd, shift, scale, weight, bias)):
        return route(dy, x, mean, rstd, shift, scale, weight, bias)
    backend = select("layer_norm_modulate_bwd", x)
    return backend.layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias, False)


@BACKWARD.fake
def _fake_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *shapes.small_grads(shift, scale, weight, bias, like=x)


@FORWARD.definition
def traced(
    x: Tensor, shift: MaybeTensor, scale: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor, eps: float
) -> Tensor:
    """By torch's layer norm of float32: one operation to trace and to differentiate, which inductor fuses."""
    wide = compute_dtype(x)
    if weight is not None:
        weight = cast(weight, wide)
    if bias is not None:
        bias = cast(bias, wide)
    return cast(ref.modulated(F.layer_norm(cast(x, wide), x.shape[-1:], weight, bias, eps), shift, scale), x.dtype)


def _reference(
    x: Tensor, shift: MaybeTensor, scale: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor, eps: float
) -> Tensor:
    return ref.layer_norm_modulate(x, shift, scale, eps=eps, weight=weight, bias=bias)


@FORWARD.backward(through(_reference))
def _backward(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor, mean: Tensor, rstd: Tensor) -> Grads:
    x, shift, scale, weight, bias, _ = inputs
    return *layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias), None
