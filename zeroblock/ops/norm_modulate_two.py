"""norm_modulate_two: one norm with two modulations, norm(x) * (1 + scale) + shift and the same with the other pair,
each operand [B, D]. Backward reads x once and rounds the sum of both gradients once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference as ref
from ..backends.base import MaybeTensor
from ..backends.select import select
from . import shapes
from .layer_norm_modulate import traced
from .register import Grads, Op, through

_OPERANDS = "Tensor? shift, Tensor? scale, Tensor? shift2, Tensor? scale2"
FORWARD = Op(
    f"norm_modulate_two(Tensor x, {_OPERANDS}, float eps, bool rms) -> (Tensor, Tensor, Tensor, Tensor)",
    differentiable=2,
)
BACKWARD = Op(
    f"norm_modulate_two_bwd(Tensor? dy, Tensor? dy2, Tensor x, Tensor? mean, Tensor rstd, {_OPERANDS}, bool rms) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    device_arg=2,
)


@FORWARD.forward
def norm_modulate_two(
    x: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    shift2: MaybeTensor,
    scale2: MaybeTensor,
    eps: float,
    rms: bool,
    *,
    direct: bool = False,
) -> tuple[Tensor, Tensor, MaybeTensor, Tensor]:
    """(y, y2, mean, rstd)"""
    if not direct and (route := FORWARD.route(x, shift, scale, shift2, scale2)):
        return route(x, shift, scale, shift2, scale2, eps, rms)
    return select("layer_norm_modulate", x).norm_modulate_two(x, shift, scale, shift2, scale2, eps, rms)


@FORWARD.fake
def _fake(
    x: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    shift2: MaybeTensor,
    scale2: MaybeTensor,
    eps: float,
    rms: bool,
) -> tuple[Tensor, ...]:
    tokens = x.shape[:2]
    mean = shapes.empty(x) if rms else shapes.statistics(x, *tokens)
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, shapes.statistics(x, *tokens)


@BACKWARD.forward
def norm_modulate_two_bwd(
    dy: MaybeTensor,
    dy2: MaybeTensor,
    x: Tensor,
    mean: MaybeTensor,
    rstd: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    shift2: MaybeTensor,
    scale2: MaybeTensor,
    rms: bool,
    *,
    direct: bool = False,
) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """The gradients of (x, shift, scale, shift2, scale2); of a result that has none, None."""
    if not direct and (route := BACKWARD.route(dy, dy2, x, mean, rstd, shift, scale, shift2, scale2)):
        return route(dy, dy2, x, mean, rstd, shift, scale, shift2, scale2, rms)
    backend, mean = select("layer_norm_modulate_bwd", x), None if rms else mean
    if dy is not None and dy2 is not None:
        return backend.norm_modulate_two_bwd(dy, dy2, x, mean, rstd, shift, scale, shift2, scale2, rms)
    one, pair = (dy, (shift, scale)) if dy2 is None else (dy2, (shift2, scale2))
    assert one is not None
    dx, dshift, dscale, _, _ = backend.layer_norm_modulate_bwd(one, x, mean, rstd, *pair, None, None, rms)
    return (dx, dshift, dscale, None, None) if dy2 is None else (dx, None, None, dshift, dscale)


@BACKWARD.fake
def _fake_bwd(
    dy: MaybeTensor,
    dy2: MaybeTensor,
    x: Tensor,
    mean: MaybeTensor,
    rstd: Tensor,
    shift: MaybeTensor,
    scale: MaybeTensor,
    shift2: MaybeTensor,
    scale2: MaybeTensor,
    rms: bool,
) -> tuple[Tensor, ...]:
    given = [dy is not None, dy is not None, dy2 is not None, dy2 is not None]
    return x.new_empty(x.shape), *shapes.grads_where(given, shift, scale, shift2, scale2, like=x)


@FORWARD.definition
def definition(
    x: Tensor, shift: MaybeTensor, scale: MaybeTensor, shift2: MaybeTensor, scale2: MaybeTensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    if rms:
        return tuple(ref.rms_norm_modulate(x, *pair, eps=eps) for pair in ((shift, scale), (shift2, scale2)))  # type: ignore[return-value]
    return traced(x, shift, scale, None, None, eps), traced(x, shift2, scale2, None, None, eps)


@FORWARD.backward(through(definition))
def _backward(
    inputs: Sequence[Any], needed: Sequence[bool], dy: MaybeTensor, dy2: MaybeTensor, mean: MaybeTensor, rstd: Tensor
) -> Grads:
    x, shift, scale, shift2, scale2, _, rms = inputs
    return *norm_modulate_two_bwd(dy, dy2, x, mean, rstd, shift, scale, shift2, scale2, rms), None, None
