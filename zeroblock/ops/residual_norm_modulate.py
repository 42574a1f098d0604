"""residual_norm_modulate: x_new = residual + act(gate) * norm_b(branch) and y = norm(x_new) * (1 + scale) + shift, with
operands of every form, each part optional: without a branch the norm is of the residual, without a norm (0) there is
x_new alone. The plain forms have ops of their own (`layer_norm_modulate.py`, `gate_residual.py`, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.base import MaybeTensor
from ..backends.residual_norm import Branch, Needed, Norm, ResidualNormGrads, Rows, Stats
from ..backends.select import select
from ..reference import compute_dtype
from ..reference_rows import gated_branch, norm_modulate
from . import shapes
from .register import Grads, Op, recorded_grads

NO_NORM, LAYER, RMS = 0, 1, 2

_OPERANDS = (
    "Tensor? branch, Tensor? gate, Tensor? gate_table, bool tanh, bool branch_rms, Tensor? branch_weight, "
    "float branch_eps, int norm, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? shift_table, Tensor? scale, "
    "Tensor? scale_table, Tensor? index, float eps, ScalarType x_dtype, ScalarType y_dtype"
)
_NOTHING = (None,) * 4  # the gradients of what follows them
_SHIFT = 5  # the shift's place among the gradients after the branch's


def _saved(inputs: Sequence[Any], outputs: Sequence[MaybeTensor]) -> tuple[MaybeTensor, ...]:
    """What the norm was of, and the statistics."""
    x = inputs[0] if inputs[1] is None else outputs[0]
    return x if inputs[8] else None, *outputs[2:]


def _merely_added(inputs: Sequence[Any]) -> bool:
    """A branch without a gate, norm or weight, which backward does not read."""
    return inputs[1] is not None and inputs[2] is inputs[3] is inputs[6] is None and not inputs[5]


def _kept_as(inputs: Sequence[Any]) -> Sequence[Any]:
    """Without such a branch: what stands for it has one element."""
    if not _merely_added(inputs):
        return inputs
    branch = inputs[1]
    return inputs[0], branch.new_empty(()).expand(branch.shape), *inputs[2:]


def _norm_again(inputs: Sequence[Any], extra: Sequence[MaybeTensor]) -> Tensor:
    """y, of what was saved of the norm's operand."""
    nothing = (None, None, None, False, False, None, 0.0)
    return residual_norm_modulate(extra[0], *nothing, *inputs[8:], direct=True)[1]  # type: ignore[return-value, arg-type]


FORWARD = Op(
    f"residual_norm_modulate(Tensor residual, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    differentiable=2,
    residual=0,
    save=_saved,
    kept_as=_kept_as,
    again=(1, _norm_again),
)
BACKWARD = Op(
    "residual_norm_modulate_bwd(Tensor? dx_new, Tensor? dy, Tensor? x, Tensor? mean, Tensor? rstd, "
    f"Tensor? branch_rstd, {_OPERANDS}, ScalarType residual_dtype, bool[] needed) -> ({', '.join(['Tensor'] * 11)})",
    device_arg=None,
)


class Operands(NamedTuple):
    """All but the residual, as the schema has them."""

    branch: MaybeTensor
    gate: MaybeTensor
    gate_table: MaybeTensor
    tanh: bool
    branch_rms: bool
    branch_weight: MaybeTensor
    branch_eps: float
    norm: int
    weight: MaybeTensor
    bias: MaybeTensor
    shift: MaybeTensor
    shift_table: MaybeTensor
    scale: MaybeTensor
    scale_table: MaybeTensor
    index: MaybeTensor  # type: ignore[assignment]
    eps: float
    x_dtype: torch.dtype
    y_dtype: torch.dtype

    def differentiable(self) -> tuple[MaybeTensor, ...]:
        branch = (self.branch, self.gate, self.gate_table, self.branch_weight)
        return *branch, self.weight, self.bias, self.shift, self.shift_table, self.scale, self.scale_table

    def parts(self) -> tuple[Branch | None, Norm | None]:
        branch = norm = None
        if self.branch is not None:
            gate = Rows(self.gate, self.gate_table)
            rest = (self.tanh, self.branch_rms, self.branch_weight, self.branch_eps, self.x_dtype)
            branch = Branch(self.branch, gate, *rest)
        if self.norm != NO_NORM:
            shift, scale = Rows(self.shift, self.shift_table), Rows(self.scale, self.scale_table)
            norm = Norm(self.norm == RMS, self.weight, self.bias, shift, scale, self.eps, self.y_dtype)
        return branch, norm


@FORWARD.forward
def residual_norm_modulate(residual: Tensor, *operands: Any, direct: bool = False) -> tuple[MaybeTensor, ...]:
    """(x_new, y, mean, rstd, branch_rstd)"""
    if not direct and (route := FORWARD.route(residual, *operands[:3], operands[5], *operands[8:15])):
        return route(residual, *operands)
    given = Operands(*operands)
    x_new, y, stats = select("residual_norm_modulate", residual).residual_norm_modulate(
        residual, *given.parts(), given.index
    )
    return x_new, y, *stats


@FORWARD.fake
def _fake(residual: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    given = Operands(*operands)
    size, tokens = residual.shape, residual.shape[:2]
    x_new, y, mean, rstd, branch_rstd = (shapes.empty(residual) for _ in range(5))
    normed = residual
    if given.branch is not None:
        normed = x_new = residual.new_empty(size, dtype=given.x_dtype)
        if given.branch_rms:
            branch_rstd = shapes.statistics(given.branch, *tokens)
    if given.norm != NO_NORM:
        y, rstd = residual.new_empty(size, dtype=given.y_dtype), shapes.statistics(normed, *tokens)
        mean = shapes.statistics(normed, *tokens) if given.norm == LAYER else mean
    return x_new, y, mean, rstd, branch_rstd


@BACKWARD.forward
def residual_norm_modulate_bwd(
    dx_new: MaybeTensor,
    dy: MaybeTensor,
    x: MaybeTensor,
    mean: MaybeTensor,
    rstd: MaybeTensor,
    branch_rstd: MaybeTensor,
    *operands: Any,
    direct: bool = False,
) -> ResidualNormGrads:
    """The gradients of (residual, branch, gate, gate_table, branch_weight, weight, bias, shift, shift_table, scale,
    scale_table)."""
    given, (residual_dtype, needed) = Operands(*operands[:-2]), operands[-2:]
    tensors = (dx_new, dy, x, mean, rstd, branch_rstd)
    if not direct and (route := BACKWARD.route(*tensors, *given.differentiable(), given.index)):
        return route(*tensors, *operands)
    grads = _run_backward(tensors, given, residual_dtype, Needed(*needed))
    return ResidualNormGrads(*(g if n else None for g, n in zip(grads, needed, strict=True)))


def _run_backward(
    tensors: Sequence[MaybeTensor], given: Operands, residual_dtype: torch.dtype, needed: Needed
) -> ResidualNormGrads:
    dx_new, dy, x, mean, rstd, branch_rstd = tensors
    branch, norm = given.parts()
    if dy is None:
        norm = None
    if norm is None:
        x = None
    stats = Stats(
        mean if norm is not None and not norm.rms else None,
        rstd if norm is not None else None,
        branch_rstd if given.branch_rms else None,
    )
    first = given.branch if given.branch is not None else x
    assert first is not None
    grads = select("residual_norm_modulate_bwd", first).residual_norm_modulate_bwd(
        dx_new, dy, x, stats, branch, norm, given.index, residual_dtype, needed
    )
    if dy is None:
        grads = ResidualNormGrads(*grads[:5], *(_zeros(t) for t in given.differentiable()[4:]))
    return grads


def _zeros(t: MaybeTensor) -> MaybeTensor:
    return None if t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device)


@BACKWARD.fake
def _fake_bwd(*args: Any) -> tuple[Tensor, ...]:
    given, residual_dtype, needed = Operands(*args[6:-2]), args[-2], args[-1]
    like = next(t for t in args if isinstance(t, Tensor))
    first = given.branch if given.branch is not None else args[2]
    residual = first.new_empty(first.shape, dtype=residual_dtype) if needed[0] else None
    return shapes.grads_where(needed, residual, *given.differentiable(), like=like)


def _added(branch: Tensor, gate: MaybeTensor, table: MaybeTensor, weight: MaybeTensor, given: Operands) -> Tensor:
    return gated_branch(branch, gate, table, given.index, given.tanh, given.branch_rms, weight, given.branch_eps)


def _norm(x: Tensor, *modulation: Any) -> Tensor:
    weight, bias, shift, shift_table, scale, scale_table, given = modulation
    rows = (shift, shift_table, scale, scale_table, given.index)
    return norm_modulate(x, given.norm == RMS, weight, bias, *rows, given.eps, given.y_dtype)


@FORWARD.definition
def definition(residual: Tensor, *operands: Any) -> tuple[MaybeTensor, MaybeTensor]:
    """(x_new, y) in plain PyTorch."""
    given = Operands(*operands)
    x, x_new = residual, None
    if given.branch is not None:
        added = _added(given.branch, given.gate, given.gate_table, given.branch_weight, given)
        x = x_new = (added + residual.to(added.dtype)).to(given.x_dtype)  # in the layout of the branch
    return x_new, _norm(x, *given.differentiable()[4:], given) if given.norm != NO_NORM else None


def _double_backward(
    inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[MaybeTensor], extra: Sequence[MaybeTensor]
) -> Grads:
    """x, a saved output where there is a branch, carries the graph of residual, gate and branch."""
    given = Operands(*inputs[1:])
    dx, dy = _of_results(given, *grads)
    tensors = given.differentiable()
    of_branch: list[MaybeTensor] = [None] * 4
    of_norm: list[MaybeTensor] = [None] * 6
    if dy is not None:
        through, *of_norm = recorded_grads(_norm, (extra[0], *tensors[4:], given), dy)[:7]
        dx = through if dx is None else dx if through is None else dx + through
    if dx is not None and _merely_added(inputs):
        of_branch = [dx.to(given.branch.dtype), None, None, None]  # type: ignore[union-attr]
    elif given.branch is not None and dx is not None:
        of_branch = recorded_grads(_added, (*tensors[:4], given), dx.to(compute_dtype(given.branch)))[:4]
    return _in_place((dx, *of_branch, *of_norm))


def _of_results(given: Operands, dx_new: MaybeTensor, dy: MaybeTensor) -> tuple[MaybeTensor, MaybeTensor]:
    """The gradients of what there is: a compiler has one for an absent result, too."""
    return None if given.branch is None else dx_new, None if given.norm == NO_NORM else dy


def _in_place(grads: Sequence[MaybeTensor]) -> list[MaybeTensor]:
    """The gradients of residual and the operands that have one, as those of all inputs."""
    residual, branch, gate, gate_table, branch_weight, *of_norm = grads
    return [residual, branch, gate, gate_table, None, None, branch_weight, None, None, *of_norm, *_NOTHING]


@FORWARD.backward(_double_backward)
def _backward(
    inputs: Sequence[Any], needed: Sequence[bool], dx_new: MaybeTensor, dy: MaybeTensor, *saved: MaybeTensor
) -> Grads:
    given, residual_dtype = Operands(*inputs[1:]), inputs[0]
    dx_new, dy = _of_results(given, dx_new, dy)
    merely_added = _merely_added(inputs)
    if merely_added:
        assert given.branch is not None
        if given.norm == NO_NORM:
            return _in_place((None, None if dx_new is None else dx_new.to(given.branch.dtype), *(None,) * 9))
        given = given._replace(branch=saved[0].to(given.branch.dtype))  # type: ignore[union-attr]
    # Without dy the gradient of the residual is dx_new; a branch that is merely added has the residual's; and a shift
    # that each token has of its own has dy.
    residual, branch, gate, gate_table, _, _, branch_weight, _, _, weight, bias, shift, *of_norm = needed[:15]
    residual = residual and dy is not None
    shared = residual and branch and merely_added and given.branch.dtype == residual_dtype  # type: ignore[union-attr]
    own_dy = shift and dy is not None and _is_of_each_token(given.shift, given.index, dy)
    of_branch = (branch and not shared, gate, gate_table, branch_weight)
    reduced = Needed(residual, *of_branch, weight, bias, shift and not own_dy, *of_norm)
    tensors = (dx_new, dy, *saved)
    if route := BACKWARD.route(*tensors, *given.differentiable(), given.index):
        grads = route(*tensors, *given, residual_dtype, list(reduced))
    else:
        grads = _run_backward(tensors, given, residual_dtype, reduced)
    dresidual, dbranch, *grads = grads
    if own_dy:
        grads[_SHIFT] = dy
    dresidual = dresidual if residual else None
    return _in_place((dresidual, dresidual if shared else dbranch, *grads))


def _is_of_each_token(shift: MaybeTensor, index: MaybeTensor, dy: Tensor) -> bool:
    return shift is not None and index is None and shift.shape == dy.shape and shift.dtype == dy.dtype
