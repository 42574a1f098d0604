"""`explain` and `info`: which backend runs, and why the others do not."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from . import _checks, functional, zero
from ._compose import planned
from ._explain_gpu import explain_gpu
from .backends import available as _backends
from .plan import planned as _plan
from .steps.conv import CONV, unit_geometry
from .steps.linear import LINEAR
from .steps.norm_conv import NORM_CONV

_HAS_ZERO_PATH = ("conv_residual", "group_norm_silu_conv_residual", "linear_gate_residual")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would do. `not_used` maps every other backend to the reason; `zero_path` is None for ops without
    one; `plans` are its steps that can be done in several ways, with the times measured."""

    op: str
    backend: str
    not_used: dict[str, str]
    zero_path: str | None
    counters: tuple[int, int]
    plans: tuple[_plan.Explanation, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: backend {self.backend}"]
        lines += [f"  {name} is not used: {why}" for name, why in self.not_used.items()]
        if self.zero_path is not None:
            lines.append(f"  zero path: {self.zero_path}")
            lines.append(f"  so far: {self.counters[0]} executed, {self.counters[1]} skipped")
        lines += [f"  {line}" for plan in self.plans for line in f"plan {plan}".splitlines()]
        return "\n".join(lines)


def _why_library(op: str, a: dict[str, Any], plans: tuple[_plan.Explanation, ...]) -> str | None:
    """Why no flag on the device stops the GEMM of an op, or None."""
    h = a["x"] if "x" in a else a["h"]
    P: Any = _backends.select(op, h)
    if planned(P):
        return None if _gpu_gemms().has_zero_path(plans[0].choice) else f"the plan: {plans[0].why}"
    padding = _padding(op, a) if "padding" in a else None
    name = "conv_residual" if "conv" in op else op
    return P.why_library(name, h, a["weight"], a.get("gate"), a["residual"], padding)


def _gpu_gemms() -> Any:
    from .backends.gpu import gemms as _gpu_gemms

    return _gpu_gemms


def _padding(op: str, a: dict[str, Any]) -> list[int]:
    x = a["x"] if "x" in a else a["h"]
    return _checks.convolution(op, x.shape[1], x, a["weight"], a["bias"], a["residual"], a["padding"])


def _zero_path(op: str, arguments: dict[str, Any], plans: tuple[_plan.Explanation, ...]) -> str | None:
    if op not in _HAS_ZERO_PATH:
        return None
    weight, policy = arguments["weight"], arguments["zero_skip"]
    if policy == "never":
        return 'off (zero_skip="never")'
    if zero.test_of(op, policy, weight) == zero.DEVICE:
        library = _why_library(op, arguments, plans)
        if library is not None:
            return f'off: the GEMM is a library call ({library}); zero_skip="sync" reads the verdict back'
        return (
            "a flag on the device: the kernels of the op leave early while the weight is zero, its backward GEMMs run"
        )
    found = zero.is_exactly_zero(weight)
    return "weight is exactly zero now: the tail is skipped" if found else "weight is not zero now: the tail runs"


def _plans(op: str, P: Any, a: dict[str, Any]) -> tuple[_plan.Explanation, ...]:
    """The planned steps of a dense call (`_compose.py`)."""
    if planned(P):
        return explain_gpu(op, P, a)
    weight: Any = a.get("weight")
    bias = a.get("bias")
    if op in ("conv_residual", "group_norm_silu_conv_residual"):
        x, residual = a["h" if op == "conv_residual" else "x"], a["residual"]
        geometry = unit_geometry(_padding(op, a))
        h = x if x.dtype == weight.dtype else torch.empty_like(x, dtype=weight.dtype)
        plans = (CONV.explain(P, h, weight, bias, residual, geometry),)
        if op == "conv_residual":
            return plans
        norm = (x, a["num_groups"], a["norm_weight"], a["norm_bias"], a["eps"], a["scale"], a["shift"], a["keep"])
        return NORM_CONV.explain(P, *norm, a["dropout_p"], weight, bias, residual, geometry), *plans
    if op in ("layer_norm_modulate_linear", "linear_gate_residual") and P.NAME == "cpu":
        x = a["h" if op == "linear_gate_residual" else "x"]
        h = x if x.dtype == weight.dtype else torch.empty_like(x, dtype=weight.dtype)
        return (LINEAR.explain(P, h, weight, bias, None),)
    return ()


def explain(op_name: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run `zeroblock.<op_name>(*args, **kwargs)`, why not the others, and what its zero path sees.

    Nothing is computed (a weight's zero test aside). Raises ValueError for an unknown op, TypeError for wrong
    arguments.
    """
    function = getattr(functional, op_name, None)
    if function is None or op_name.startswith("_") or not inspect.isfunction(function):
        raise ValueError(f"explain: op_name must name a function of zeroblock, got {op_name!r}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    tensors = [v for value in bound.arguments.values() for v in (value if isinstance(value, tuple) else (value,))]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    if not tensors:
        raise TypeError(f"explain: {op_name} needs at least one tensor")
    x = tensors[0]
    primitives, transforms = _backends.select(op_name, x), zero.transforms_active()
    backend: str = "reference" if transforms else primitives.NAME
    plans: tuple[_plan.Explanation, ...] = ()
    if not transforms:
        training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        before, _plan.state.training = _plan.state.training, training
        try:
            plans = _plans(op_name, primitives, bound.arguments)
        finally:
            _plan.state.training = before
    other = f"the {_backends.forced()} backend is forced"
    if not transforms and planned(primitives):
        backend = plans[0].choice.split()[0] if plans else "library"
        other = f"the plan has chosen {plans[0].choice}" if plans else "the op has no kernel of its own"
    not_used = {}
    for name in _backends.BACKENDS:
        if name in (backend, "reference"):
            continue
        if transforms:
            not_used[name] = "a torch.func transform or forward-mode AD is active"
        else:
            reason = _backends.why_not(name, op_name, x)
            not_used[name] = reason or other
    counters = (zero.executed.get(op_name, 0), zero.skipped.get(op_name, 0))
    return Explanation(op_name, backend, not_used, _zero_path(op_name, bound.arguments, plans), counters, plans)


def _gpu_backend(name: str) -> str:
    reason, module = _backends.missing(name), _backends._load(name)
    if module is None or module.MISSING is not None:
        return f"{reason}"
    made = f"built for {module.archs()}" if name == "cuda" else f"triton {sys.modules['triton'].__version__}"
    on_cpu = "on CPU tensors where forced" if module.device == "cpu" else "for GPU tensors"
    return f"{made}, {reason if reason is not None else on_cpu}"


def info() -> str:
    """What is built and why not, in a few lines."""
    if _backends.CPU_MISSING is None:
        cpu = f"built, running on {torch.ops.zeroblock._cpu_isa()}"
    else:
        cpu = f"not used: {_backends.CPU_MISSING}"
    return "\n".join(
        [
            f"torch {torch.__version__}",
            f"cpu kernels: {cpu}",
            f"triton kernels: {_gpu_backend('triton')}",
            f"cuda kernels: {_gpu_backend('cuda')}",
        ]
    )
