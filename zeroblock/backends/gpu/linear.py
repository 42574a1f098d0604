"""residual + gate * linear(act(h)) on a GPU as a planned step: the library's GEMM and Triton's configurations."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..._layout import alignment
from ...plan.describe import describe_alignment, describe_operand, describe_rows, describe_weight, dtype_name
from ...plan.planned import PlannedOp
from ...steps.flag import DEVICE, executed
from ...steps.linear import LinearGateCall, library_linear_gate
from .gemms import TRITON_GEMMS, UNMEASURED, OwnGemm, library_settings, own_way
from .hinted import HintedStep


def _signature(call: LinearGateCall) -> tuple:
    _, h, weight, bias, gate, residual, activation, zero_skip, save_branch = call
    return (
        (h.shape, h.stride(), h.dtype, h.device),
        (weight.shape, weight.stride(), weight.dtype),
        bias is None,
        gate if gate is None else (gate.shape, gate.stride(), gate.dtype),
        residual if residual is None else (residual.stride(), residual.dtype),
        (activation, zero_skip, save_branch),
        library_settings(h),
        alignment(h, weight, bias, gate, residual),
    )


def _describe(call: LinearGateCall) -> str:
    _, h, weight, bias, gate, residual, activation, _, save_branch = call
    parts = [f"{describe_rows(h)} * {describe_weight(weight)} {dtype_name(weight)}"]
    for name, t in (("bias", bias), ("gate", gate), ("residual", residual)):
        if t is not None:
            parts.append(f"{name} {describe_operand(t)}")
    parts.append(f"{activation}")
    if save_branch:
        parts.append("branch kept")
    return ", ".join([*parts, f"{library_settings(h)}"]) + describe_alignment(h, weight, bias, gate, residual)


def _work(call: LinearGateCall) -> int:
    return 2 * call.h.numel() * call.weight.shape[0]


def _own_way(call: LinearGateCall) -> str:
    _, h, weight, _, gate, residual, _, _, _ = call
    return own_way("linear_gate_residual", h.shape[:-1].numel(), weight, h, weight, gate, residual, None)


def _library(call: LinearGateCall) -> tuple[Tensor, Tensor, Tensor]:
    y, branch = library_linear_gate(call)
    return y, branch, executed(call.h)


def _own(gemm: OwnGemm, call: LinearGateCall) -> tuple[Tensor, Tensor, Tensor]:
    flag = call.backend.zero_flag(call.tested()) if call.zero_skip == DEVICE else None
    y, branch = gemm.backend.own_linear_gate(call, flag, gemm.config)
    return y, branch, executed(call.h) if flag is None else flag


def _why_not(gemm: OwnGemm, call: LinearGateCall) -> str | None:
    return gemm.why_not("linear_gate_residual", call.h, call.weight, call.gate, call.residual, None)


# (y, branch, skipped)
LINEAR_GATE_RESIDUAL = PlannedOp(
    "linear_gate_residual",
    _library,
    signature=_signature,
    describe=_describe,
    work=_work,
)
FLAGGED_LINEAR = PlannedOp(
    "flagged linear_gate_residual",
    _library,
    signature=_signature,
    describe=_describe,
    work=_work,
    rule=_own_way,
    unmeasured=UNMEASURED,
)
for _gemm in TRITON_GEMMS:
    for _step in (LINEAR_GATE_RESIDUAL, FLAGGED_LINEAR):
        _step.add(_gemm.name, partial(_own, _gemm), partial(_why_not, _gemm))
HINTED_LINEAR = HintedStep(LINEAR_GATE_RESIDUAL, FLAGGED_LINEAR)
