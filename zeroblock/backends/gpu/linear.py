"""residual + gate * linear(act(h)) on a GPU as a planned step: the library's GEMM and Triton's configurations."""

from __future__ import annotations

from ... import _compose_linear, zero
from ...plan.measure import describe_rows, describe_weight, dtype_name
from ...plan.planned import PlannedOp
from .. import available as _backends
from .gemms import CANDIDATES, describe_flag, judge, rule, settings, why_not


def _linear_describe(P, h, weight, bias, gate, residual, activation, zero_skip, save_branch):
    parts = [
        f"{describe_rows(h)} * {describe_weight(weight)} {dtype_name(weight)}",
        describe_flag(zero_skip == zero.DEVICE),
    ]
    for name, t in (("bias", bias), ("gate", gate), ("residual", residual)):
        if t is not None:
            parts.append(f"{name} {dtype_name(t)} {'one' if t.dim() == 1 and t.numel() == 1 else f'{t.dim()}-D'}")
    return ", ".join([*parts, f"{activation}", *(["branch kept"] if save_branch else []), f"{settings(h)}"])


# (y, branch, verdict) as (P, h, weight, bias, gate, residual, activation, zero_skip, save_branch).
LINEAR = PlannedOp(
    "linear_gate_residual",
    _compose_linear.library_linear,
    signature=lambda P, h, weight, bias, gate, residual, activation, zero_skip, save_branch: (
        h.shape, h.stride(), h.dtype, h.device, weight.shape, weight.stride(), weight.dtype, bias is None,
        gate if gate is None else (gate.shape, gate.dtype),
        residual if residual is None else (residual.stride(), residual.dtype),
        activation, zero_skip, save_branch, settings(h),
    ),
    describe=_linear_describe,
    work=lambda P, h, weight, *rest: 2 * h.numel() * weight.shape[0],
    lead=1,
    rule=lambda P, h, weight, bias, gate, residual, activation, zero_skip, save_branch: (
        rule(
            "linear_gate_residual", h.shape[:-1].numel(), weight, h, weight, gate, residual, None,
            zero_skip == zero.DEVICE,
        )
    ),
)  # fmt: skip


def _add(name: str, backend: str, options: dict[str, str]) -> None:
    def run(P, h, weight, bias, gate, residual, activation, zero_skip, save_branch):
        flag = judge(P, [weight] if gate is None or save_branch else [weight, gate], zero_skip)
        module = _backends._load(backend)
        return _compose_linear.own_linear(
            P, module, h, weight, bias, gate, residual, activation, flag, save_branch, **options
        )

    def refuses(P, h, weight, bias, gate, residual, activation, zero_skip, save_branch):
        return why_not(backend, "linear_gate_residual", options, h, weight, gate, residual, None)

    LINEAR.add(name, run, refuses)


for _candidate in CANDIDATES:
    if _candidate[1] == "triton":
        _add(*_candidate)
