"""Which planned steps a call on a GPU takes, for `explain`: forward, and backward where it will run.

Tensors that stand for others have their shape, dtype and layout; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..._layout import as_frames, of_each_frame
from ..._padding import is_padded
from ...steps.conv import CONV, ConvCall, empty_conv_output, unit_geometry
from ...steps.flag import DEVICE, NEVER
from ...steps.linear import LinearGateCall
from ...steps.padded import calls as padded_calls
from ..base import Backend, GroupNorm, MaybeTensor, Step
from ..dense import ConvArguments
from . import norms_gates as steps
from .conv_grads import CONV_DGRAD, CONV_WGRAD, FLAGGED_DGRAD, DgradCall, WgradCall
from .convs import (
    CONV_RESIDUAL,
    HINTED_CONV,
    HINTED_NORM_CONV,
    FlaggedConvCall,
    FlaggedNormConvCall,
)
from .hinted import FlaggedCall, HintedStep
from .linear import HINTED_LINEAR, LINEAR_GATE_RESIDUAL


def steps_of(backend: Backend, op: str, a: dict[str, Any], training: bool) -> Iterator[Step]:
    """The op's own step first."""
    if op == "group_norm_silu":
        x, scale, shift = a["x"], a["scale"], a["shift"]
        if a["per_frame"]:
            x, scale, shift = as_frames(x), of_each_frame(scale, x.shape[2]), of_each_frame(shift, x.shape[2])
        norm = GroupNorm(a["num_groups"], a["weight"], a["bias"], a["eps"], scale, shift, None, 0.0)
        for backward in (False, True) if training else (False,):
            yield _group_norm(x, norm, a["activation"] == "silu", backward)
    elif op == "channel_rms_norm_silu":
        x, weight, bias, scale, shift = (a[name] for name in ("x", "weight", "bias", "scale", "shift"))
        silu, inside = a["activation"] == "silu", a["eps_mode"] == "inside"
        yield steps.CHANNEL_RMS_NORM_SILU, (x, weight, bias, a["eps"], inside, scale, shift, silu)
        if training:
            rstd = _statistics(x, x.shape[0], *x.shape[2:])
            yield steps.CHANNEL_RMS_NORM_SILU_BWD, (x, x, rstd, weight, bias, scale, shift, silu)
    elif op in ("layer_norm_modulate", "rms_norm_modulate", "layer_norm_modulate_linear"):
        yield from _row_norm(backend, op, a, training)
    elif op == "gate_residual":
        residual, gate, branch = a["residual"], a["gate"], a["branch"]
        yield steps.GATE_RESIDUAL, (residual, gate, branch)
        if training:
            yield steps.GATE_RESIDUAL_BWD, (residual, gate, branch, True, True)
    elif op == "gate_residual_layer_norm_modulate":
        x, gate, shift, scale = a["branch"], a["gate"], a["shift"], a["scale"]
        yield steps.GATE_RESIDUAL_LAYER_NORM_MODULATE, (a["residual"], gate, x, shift, scale, a["eps"])
        if training:
            stat = _statistics(x, *x.shape[:2])
            yield steps.GATE_RESIDUAL_LAYER_NORM_MODULATE_BWD, (x, x, x, stat, stat, gate, x, shift, scale)
    elif op == "linear_gate_residual":
        h, weight, gate = a["h"], a["weight"], a["gate"]
        kept = training and gate is not None and gate.requires_grad
        inputs = h, weight, a["bias"], gate, a["residual"], a["activation"], a["zero_skip"], kept
        yield _hinted(HINTED_LINEAR, LinearGateCall(backend, *inputs))
    elif op in ("conv_residual", "group_norm_silu_conv_residual"):
        yield from _convolution(backend, ConvArguments.of(op, a), a["zero_skip"], training)


def _statistics(x: Tensor, *size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.float32)


def _group_norm(x: Tensor, norm: GroupNorm, silu: bool, backward: bool, flag: MaybeTensor = None) -> Step:
    groups, weight, bias, eps, scale, shift, _, _ = norm
    if not backward:
        return steps.GROUP_NORM_SILU, (x, groups, weight, bias, eps, scale, shift, silu, flag)
    stat = _statistics(x, x.shape[0], groups)
    return steps.GROUP_NORM_SILU_BWD, (x, x, stat, stat, weight, bias, scale, shift, groups, silu, flag)


def _row_norm(backend: Backend, op: str, a: dict[str, Any], training: bool) -> Iterator[Step]:
    x, rms, linear = a["x"], op.startswith("rms"), op.endswith("linear")
    weight, bias = (None, None) if linear else (a["weight"], a.get("bias"))
    operands, stat = (a["shift"], a["scale"], weight, bias), _statistics(x, *x.shape[:2])
    yield steps.LAYER_NORM_MODULATE, (x, *operands, a["eps"], rms)
    if linear:
        h = torch.empty_like(x, dtype=a["weight"].dtype)
        call = LinearGateCall(backend, h, a["weight"], a["bias"], None, None, None, NEVER, False)
        yield LINEAR_GATE_RESIDUAL, (call,)
    if training:
        yield steps.LAYER_NORM_MODULATE_BWD, (x, x, None if rms else stat, stat, *operands, rms)


def _hinted(step: HintedStep[Any], call: FlaggedCall) -> Step:
    """The plan that would run now."""
    return step.step(call) if call.zero_skip == DEVICE else (step.dense, (call,))


def why_not_flagged(backend: Backend, op: str, a: dict[str, Any]) -> str | None:
    """Why no kernel of ours reads the flag of a call; None where one does."""
    step: HintedStep[Any] = HINTED_CONV
    call: FlaggedCall
    if op == "linear_gate_residual":
        h, weight, gate = a["h"], a["weight"], a["gate"]
        inputs = h, weight, a["bias"], gate, a["residual"], a["activation"], DEVICE, False
        step, call = HINTED_LINEAR, LinearGateCall(backend, *inputs)
    else:
        x, h, norm, weight, bias, residual, padding = ConvArguments.of(op, a)
        call = FlaggedConvCall(backend, h, weight, bias, residual, padding, DEVICE)
    if step.has_zero_path(call):
        return None
    return "; ".join(f"{name}: {c.why_not(call)}" for name, c in step.flagged.candidates.items() if name != "library")


def _convolution(backend: Backend, a: ConvArguments, zero_skip: int, training: bool) -> Iterator[Step]:
    x, h, norm, weight, bias, residual, padding = a
    if is_padded(padding, weight):
        for part in padded_calls(backend, h, weight, padding):
            yield CONV_RESIDUAL, (FlaggedConvCall(backend, part.h, part.weight, bias, None, part.padding, NEVER),)
        return
    flag: MaybeTensor = None
    if norm is None:
        step, args = _hinted(HINTED_CONV, FlaggedConvCall(backend, h, weight, bias, residual, padding, zero_skip))
        yield step, args
    else:
        call = FlaggedNormConvCall(backend, x, norm, weight, bias, residual, padding, zero_skip)
        step, args = _hinted(HINTED_NORM_CONV, call)
        yield step, args
    flag = h.new_empty(1, dtype=torch.int32) if args[0].zero_skip == DEVICE else None
    if norm is not None:
        choice = step.explain(*args).choice
        if "fused" not in choice and "folded" not in choice:
            yield _group_norm(x, norm, True, False, None if choice.startswith("library") else flag)
    yield CONV, (ConvCall(backend, h, weight, bias, residual, unit_geometry(padding)),)
    if not training:
        return
    dy = empty_conv_output(h, weight, unit_geometry(padding), h.dtype)
    has_bias = bias is not None
    yield CONV_DGRAD if flag is None else FLAGGED_DGRAD, (DgradCall(backend, dy, h, weight, flag, padding),)
    yield CONV_WGRAD, (WgradCall(backend, dy, h, weight, has_bias, padding, (True, has_bias)),)
    if norm is not None:
        yield _group_norm(x, norm, True, True, flag)
