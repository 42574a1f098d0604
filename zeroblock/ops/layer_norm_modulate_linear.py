"""layer_norm_modulate_linear: linear(layer_norm(x) * (1 + scale) + shift)."""

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
from ..steps.linear import linear_grads
from . import shapes
from .layer_norm_modulate import traced as norm
from .register import Grads, Op, through

FORWARD = Op(
    "layer_norm_modulate_linear(Tensor x, Tensor? shift, Tensor? scale, Tensor weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor)",
)
BACKWARD = Op(
    "layer_norm_modulate_linear_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? shift, Tensor? scale, "
    "Tensor weight, float eps, bool has_bias, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    device_arg=1,
)


@FORWARD.forward
def layer_norm_modulate_linear(
    x: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    weight: Tensor,
    bias: MaybeTensor,
    eps: float,
    *,
    direct: bool = False,
) -> tuple[Tensor, MaybeTensor, Tensor]:
    """(y, mean, rstd)"""
    if not direct and (route := FORWARD.route(x, shift, scale, weight, bias)):
        return route(x, shift, scale, weight, bias, eps)
    backend = select("layer_norm_modulate_linear", x)
    h, mean, rstd = backend.layer_norm_modulate(x, shift, scale, None, None, eps, False)
    return backend.norm_linear(h.to(weight.dtype), weight, bias), mean, rstd


@FORWARD.fake
def _fake(
    x: Tensor, shift: MaybeTensor, scale: MaybeTensor, weight: Tensor, bias: MaybeTensor, eps: float
) -> tuple[Tensor, ...]:
    op = "layer_norm_modulate_linear"
    _checks.floating(op, 1, x=x, shift=shift, scale=scale, weight=weight, bias=bias)
    _checks.modulated(op, x, eps, shift=shift, scale=scale)
    _checks.linear(op, x.shape[2], weight, bias)
    _checks.same_dtype(op, weight=weight, bias=bias)
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=weight.dtype)
    return y, shapes.statistics(x, *x.shape[:2]), shapes.statistics(x, *x.shape[:2])


@BACKWARD.forward
def layer_norm_modulate_linear_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    weight: Tensor,
    eps: float,
    has_bias: bool,
    mask: Sequence[bool],
    *,
    direct: bool = False,
) -> tuple[MaybeTensor, ...]:
    """The gradients of (x, shift, scale, weight, bias). mask: whether those of the norm (the first three), of the
    weight and of the bias are wanted."""
    if not direct and (route := BACKWARD.route(dy, x, mean, rstd, shift, scale, weight)):
        return route(dy, x, mean, rstd, shift, scale, weight, eps, has_bias, mask)
    backend, h = select("layer_norm_modulate_linear_bwd", x), x
    if mask[1]:
        h = backend.layer_norm_modulate(x, shift, scale, None, None, eps, False)[0].to(weight.dtype)
    dh, dweight, dbias = linear_grads(backend, dy.to(weight.dtype), h, weight, has_bias, mask)
    if dh is None:
        return None, None, None, dweight, dbias
    dx, dshift, dscale, _, _ = backend.layer_norm_modulate_bwd(dh, x, mean, rstd, shift, scale, None, None, False)
    return dx, dshift, dscale, dweight, dbias


@BACKWARD.fake
def _fake_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    weight: Tensor,
    eps: float,
    has_bias: bool,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    bias = weight[:, 0] if has_bias else None
    norm = shapes.grads_where([mask[0]] * 3, x, shift, scale, like=x)
    return *norm, *shapes.grads_where([mask[1], mask[2] and has_bias], weight, bias, like=x)


@FORWARD.definition
def traced(x: Tensor, shift: MaybeTensor, scale: MaybeTensor, weight: Tensor, bias: MaybeTensor, eps: float) -> Tensor:
    return F.linear(cast(norm(x, shift, scale, None, None, eps), weight.dtype), weight, bias)


def _reference(
    x: Tensor, shift: MaybeTensor, scale: MaybeTensor, weight: Tensor, bias: MaybeTensor, eps: float
) -> Tensor:
    return ref.layer_norm_modulate_linear(x, shift, scale, weight, bias, eps=eps)


@FORWARD.backward(through(_reference))
def _backward(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor, mean: Tensor, rstd: Tensor) -> Grads:
    x, shift, scale, weight, bias, eps = inputs
    mask = [any(needed[:3]), needed[3], needed[4]]
    grads = layer_norm_modulate_linear_bwd(dy, x, mean, rstd, shift, scale, weight, eps, bias is not None, mask)
    return *grads, None
