"""rms_norm_modulate: (rms_norm(x) [* weight]) * (1 + scale) + shift, by the kernels of `layer_norm_modulate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _checks
from .. import reference as ref
from ..backends.base import MaybeTensor
from ..backends.select import select
from . import shapes
from .register import Grads, Op, through

FORWARD = Op(
    "rms_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, float eps) -> (Tensor, Tensor)",
    again=(0, lambda inputs, extra: _again(*inputs)),
)
BACKWARD = Op(
    "rms_norm_modulate_bwd(Tensor dy, Tensor x, Tensor rstd, Tensor? shift, Tensor? scale, Tensor? weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    device_arg=1,
)


@FORWARD.forward
def rms_norm_modulate(
    x: Tensor, shift: MaybeTensor, scale: MaybeTensor, weight: MaybeTensor, eps: float, *, direct: bool = False
) -> tuple[Tensor, Tensor]:
    """(y, rstd)"""
    if not direct and (route := FORWARD.route(x, shift, scale, weight)):
        return route(x, shift, scale, weight, eps)
    backend = select("rms_norm_modulate", x)
    y, _, rstd = backend.layer_norm_modulate(x, shift, scale, weight, None, eps, True)
    return y, rstd


def _again(*inputs: Any) -> Tensor:
    return rms_norm_modulate(*inputs, direct=True)[0]


@FORWARD.fake
def _fake(x: Tensor, shift: MaybeTensor, scale: MaybeTensor, weight: MaybeTensor, eps: float) -> tuple[Tensor, Tensor]:
    op = "rms_norm_modulate"
    _checks.floating(op, 1, x=x, shift=shift, scale=scale, weight=weight)
    _checks.modulated(op, x, eps, shift=shift, scale=scale)
    _checks.shapes(op, (x.shape[2],), "[D]", weight=weight)
    return x.new_empty(x.shape), shapes.statistics(x, *x.shape[:2])


@BACKWARD.forward
def rms_norm_modulate_bwd(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    weight: MaybeTensor,
    *,
    direct: bool = False,
) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """The gradients of (x, shift, scale, weight)."""
    if not direct and (route := BACKWARD.route(dy, x, rstd, shift, scale, weight)):
        return route(dy, x, rstd, shift, scale, weight)
    backend = select("rms_norm_modulate_bwd", x)
    return backend.layer_norm_modulate_bwd(dy, x, None, rstd, shift, scale, weight, None, True)[:4]


@BACKWARD.fake
def _fake_bwd(
    dy: Tensor, x: Tensor, rstd: Tensor, shift: MaybeTensor, scale: MaybeTensor, weight: MaybeTensor
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *shapes.small_grads(shift, scale, weight, like=x)


@FORWARD.definition
def _reference(x: Tensor, shift: MaybeTensor, scale: MaybeTensor, weight: MaybeTensor, eps: float) -> Tensor:
    return ref.rms_norm_modulate(x, shift, scale, eps=eps, weight=weight)


@FORWARD.backward(through(_reference))
def _backward(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor, rstd: Tensor) -> Grads:
    x, shift, scale, weight, _ = inputs
    return *rms_norm_modulate_bwd(dy, x, rstd, shift, scale, weight), None
