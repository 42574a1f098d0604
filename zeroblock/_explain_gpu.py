"""Which planned steps a call on a GPU takes (`_gpu.py`), for `explain`: forward, and backward where it will run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _checks, zero
from ._compose import conv_size, empty_conv_output
from .plan import planned as _plan
from .steps.conv import CONV, unit_geometry


def explain_gpu(op: str, P: Any, a: dict[str, Any]) -> tuple[_plan.Explanation, ...]:
    """The op's own step first. Nothing is computed; tensors that stand for others have their dtype and dimensions."""
    return tuple(_explained(step, args) for step, args in _steps(op, P, a, _plan.state.training))


def _explained(step: _plan.PlannedOp, args: tuple) -> _plan.Explanation:
    """Backward's steps are not themselves differentiated."""
    before = _plan.state.training
    _plan.state.training = before and not step.name.endswith(("_bwd", "_dgrad", "_wgrad"))
    try:
        return step.explain(*args)
    finally:
        _plan.state.training = before


def _statistics(x: Tensor, *size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.float32)


def _norm(
    P: Any, a: dict[str, Any], backward: bool, weight: str, bias: str, silu: bool, flag: Tensor | None = None
) -> tuple[Any, tuple]:
    x, groups, w, b, scale, shift = a["x"], a["num_groups"], a[weight], a[bias], a["scale"], a["shift"]
    if not backward:
        return P.STEPS["group_norm_silu"], (x, groups, w, b, a["eps"], scale, shift, silu, flag)
    stat = _statistics(x, x.shape[0], groups)
    return P.STEPS["group_norm_silu_bwd"], (x, x, stat, stat, w, b, scale, shift, groups, silu, flag)


def _steps(op: str, P: Any, a: dict[str, Any], training: bool) -> Iterator[tuple[Any, tuple]]:
    if op == "group_norm_silu":
        for backward in (False, True)[: 1 + training]:
            yield _norm(P, a, backward, "weight", "bias", a["activation"] == "silu")
    elif op in ("layer_norm_modulate", "rms_norm_modulate", "layer_norm_modulate_linear"):
        x, rms, linear = a["x"], op.startswith("rms"), op.endswith("linear")
        weight, bias = (None, None) if linear else (a["weight"], a.get("bias"))
        operands, stat = (a["shift"], a["scale"], weight, bias), _statistics(x, *x.shape[:2])
        yield P.layer_norm_modulate, (x, *operands, a["eps"], rms)
        if linear:
            h = torch.empty_like(x, dtype=a["weight"].dtype)
            yield P.LINEAR, (P, h, a["weight"], a["bias"], None, None, None, zero.NEVER, False)
        if training:
            yield P.layer_norm_modulate_bwd, (x, x, None if rms else stat, stat, *operands, rms)
    elif op == "gate_residual":
        yield P.gate_residual, (a["residual"], a["gate"], a["branch"])
        if training:
            yield P.gate_residual_bwd, (a["residual"], a["gate"], a["branch"], True, True)
    elif op == "gate_residual_layer_norm_modulate":
        x, gate, film = a["branch"], a["gate"], (a["shift"], a["scale"])
        yield P.gate_residual_layer_norm_modulate, (a["residual"], gate, x, *film, a["eps"])
        if training:
            stat = _statistics(x, *x.shape[:2])
            yield P.gate_residual_layer_norm_modulate_bwd, (x, x, x, stat, stat, gate, x, *film)
    elif op == "linear_gate_residual":
        weight, gate = a["weight"], a["gate"]
        kept = training and gate is not None and gate.requires_grad
        inputs = (a["h"], weight, a["bias"], gate, a["residual"], a["activation"])
        yield P.LINEAR, (P, *inputs, zero.test_of(op, a["zero_skip"], weight), kept)
    elif op in ("conv_residual", "group_norm_silu_conv_residual"):
        yield from _convolution(op, P, a, training)


def _convolution(op: str, P: Any, a: dict[str, Any], training: bool) -> Iterator[tuple[Any, tuple]]:
    fused = op != "conv_residual"
    x, weight, bias, residual = a["x" if fused else "h"], a["weight"], a["bias"], a["residual"]
    padding = tuple(_checks.convolution(op, x.shape[1], x, weight, bias, residual, a["padding"]))
    ones, skip = [1] * len(padding), zero.test_of(op, a["zero_skip"], weight)
    h = x if x.dtype == weight.dtype else torch.empty_like(x, dtype=weight.dtype)
    flag = h.new_empty(1, dtype=torch.int32) if skip == zero.DEVICE else None
    if fused:
        norm = (x, a["num_groups"], a["norm_weight"], a["norm_bias"], a["eps"], a["scale"], a["shift"], a["keep"])
        args = (P, *norm, a["dropout_p"], weight, bias, residual, padding, skip)
        yield P.NORM_CONV, args
        choice = P.NORM_CONV.explain(*args).choice
        if "fused" not in choice and "folded" not in choice:
            yield _norm(P, a, False, "norm_weight", "norm_bias", True, None if choice == "library" else flag)
    else:
        yield P.CONV, (P, h, weight, bias, residual, padding, skip)
    yield CONV, (P, h, weight, bias, residual, unit_geometry(list(padding)))
    if not training:
        return
    dy = empty_conv_output(h, weight, conv_size((h.shape[0], *h.shape[2:]), weight, padding, ones, ones), h.dtype)
    yield P.DGRAD, (P, dy, h, weight, flag, padding)
    yield P.WGRAD, (P, dy, h, weight, bias is not None, padding, (True, bias is not None))
    if fused:
        yield _norm(P, a, True, "norm_weight", "norm_bias", True, flag)
