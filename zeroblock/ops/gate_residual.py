"""gate_residual: residual + gate * branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _checks
from .. import reference as ref
from .._layout import empty_like_dense
from ..backends import reference as reference_backend
from ..backends.base import MaybeTensor
from ..backends.select import select
from ..reference import promoted
from . import shapes
from .register import Grads, Op

FORWARD = Op("gate_residual(Tensor residual, Tensor gate, Tensor branch) -> Tensor", residual=0)
BACKWARD = Op(
    "gate_residual_bwd(Tensor dy, Tensor gate, Tensor branch, bool need_dgate, bool need_dbranch) -> (Tensor, Tensor)",
    device_arg=2,
)


@FORWARD.forward
def gate_residual(residual: Tensor, gate: Tensor, branch: Tensor, *, direct: bool = False) -> Tensor:
    if not direct and (route := FORWARD.route(residual, gate, branch)):
        return route(residual, gate, branch)
    return select("gate_residual", residual).gate_residual(residual, gate, branch)


@FORWARD.fake
def _fake(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    op = "gate_residual"
    _checks.floating(op, 3, residual=residual, gate=gate, branch=branch)
    _checks.same_shape(op, "branch", branch, "residual", residual.shape)
    _checks.gate(op, gate, branch.shape)
    return empty_like_dense(residual).to(promoted(residual, gate, branch))


@BACKWARD.forward
def gate_residual_bwd(
    dy: Tensor, gate: Tensor, branch: Tensor, need_dgate: bool, need_dbranch: bool, *, direct: bool = False
) -> tuple[MaybeTensor, MaybeTensor]:
    """The gradients of (gate, branch), each only where it is needed."""
    if not direct and (route := BACKWARD.route(dy, gate, branch)):
        return route(dy, gate, branch, need_dgate, need_dbranch)
    return select("gate_residual_bwd", branch).gate_residual_bwd(dy, gate, branch, need_dgate, need_dbranch)


@BACKWARD.fake
def _fake_bwd(dy: Tensor, gate: Tensor, branch: Tensor, need_dgate: bool, need_dbranch: bool) -> tuple[Tensor, Tensor]:
    (dgate,) = shapes.grads_where([need_dgate], gate, like=dy)
    return dgate, empty_like_dense(branch) if need_dbranch else shapes.empty(dy)


FORWARD.definition(ref.gate_residual)


def _double_backward(
    inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[MaybeTensor], extra: Sequence[Tensor]
) -> Grads:
    _, gate, branch = inputs
    (dy,) = grads
    assert dy is not None
    return None, *reference_backend.gate_residual_bwd(dy, gate, branch, True, True)


@FORWARD.backward(_double_backward)
def _backward(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor) -> Grads:
    _, gate, branch = inputs
    dgate = dbranch = None
    if needed[1] or needed[2]:
        dgate, dbranch = gate_residual_bwd(dy, gate, branch, needed[1], needed[2])
    return None, dgate, dbranch
