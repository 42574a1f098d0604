"""residual + gate * linear(act(h)) on a GPU as a planned step: the library's GEMM and Triton's configurations."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..._layout import alignment
from ...plan.describe import describe_alignment, describe_operand, describe_rows, describe_weight, dtype_name
from ...plan.planned import PlannedOp
from ...steps.flag import DEVICE
from ...steps.linear import LinearGateCall, library_linear_gate
from .gemms import TRITON_GEMMS, OwnGemm, describe_flag, library_settings, rule, zero_flag


def _signature(call: LinearGateCall) -> tuple:
    _, h, weight, bias, gate, residual, activation, zero_skip, save_branch = call
    return (
        (h.shape, h.stride(), h.dtype, h.device),
        (weight.shape, weight.stride(), weight.dtype),
        bias is None,
        gate if gate is None else (gate.shape, gate.dtype),
        residual if residual is None else (residual.stride(), residual.dtype),
        (activation, zero_skip, save_branch),
        library_settings(h),
        alignment(h, weight, bias, gate, residual),
    )


def _describe(call: LinearGateCall) -> str:
    _, h, weight, bias, gate, residual, activation, zero_skip, save_branch = call
    parts = [
        f"{describe_rows(h)} * {describe_weight(weight)} {dtype_name(weight)}",
        describe_flag(zero_skip == DEVICE),
    ]
    for name, t in (("bias", bias), ("gate", gate), ("residual", residual)):
        if t is not None:
            parts.append(f"{name} {describe_operand(t)}")
    parts.append(f"{activation}")
    if save_branch:
        parts.append("branch kept")
    return ", ".join([*parts, f"{library_settings(h)}"]) + describe_alignment(h, weight, bias, gate, residual)


def _work(call: LinearGateCall) -> int:
    return 2 * call.h.numel() * call.weight.shape[0]


def _rule(call: LinearGateCall) -> str:
    _, h, weight, _, gate, residual, _, zero_skip, _ = call
    rows, flagged = h.shape[:-1].numel(), zero_skip == DEVICE
    return rule("linear_gate_residual", rows, weight, h, weight, gate, residual, None, flagged)


def _own(gemm: OwnGemm, call: LinearGateCall) -> tuple[Tensor, Tensor, Tensor]:
    flag = zero_flag(call.backend, call.tested(), call.zero_skip)
    return gemm.backend.own_linear_gate(call, flag, gemm.config)


def _why_not(gemm: OwnGemm, call: LinearGateCall) -> str | None:
    return gemm.why_not("linear_gate_residual", call.h, call.weight, call.gate, call.residual, None)


# (y, branch, skipped)
LINEAR_GATE_RESIDUAL = PlannedOp(
    "linear_gate_residual",
    library_linear_gate,
    signature=_signature,
    describe=_describe,
    work=_work,
    rule=_rule,
)
for _gemm in TRITON_GEMMS:
    LINEAR_GATE_RESIDUAL.add(_gemm.name, partial(_own, _gemm), partial(_why_not, _gemm))
