"""`explain` and `info`: which backend runs, and why the others do not."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor

from . import _backends, functional, zero

_HAS_ZERO_PATH = ("conv_residual", "group_norm_silu_conv_residual", "linear_gate_residual")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would do. `not_used` maps every other backend to the reason; `zero_path` is None for ops without
    one."""

    op: str
    backend: str
    not_used: dict[str, str]
    zero_path: str | None
    counters: tuple[int, int]

    def __str__(self) -> str:
        lines = [f"{self.op}: backend {self.backend}"]
        lines += [f"  {name} is not used: {why}" for name, why in self.not_used.items()]
        if self.zero_path is not None:
            lines.append(f"  zero path: {self.zero_path}")
            lines.append(f"  so far: {self.counters[0]} executed, {self.counters[1]} skipped")
        return "\n".join(lines)


def _zero_path(op: str, arguments: dict[str, Any]) -> str | None:
    if op not in _HAS_ZERO_PATH:
        return None
    weight, policy = arguments["weight"], arguments["zero_skip"]
    if policy == "never":
        return 'off (zero_skip="never")'
    if not zero.may_skip(op, policy, weight):
        return f'off: no device-side flag on {weight.device.type} yet; zero_skip="sync" reads the verdict back'
    found = zero.is_exactly_zero(weight)
    return "weight is exactly zero now: the tail is skipped" if found else "weight is not zero now: the tail runs"


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
    backend = _backends.select(op_name, x).NAME
    not_used = {}
    if zero.transforms_active():
        backend, not_used["cpu"] = "reference", "a torch.func transform or forward-mode AD is active"
    elif backend == "reference":
        not_used["cpu"] = _backends.why_not_cpu(x) or "the reference backend is forced"
    not_used["triton"] = "this version has no triton kernels"
    if backend != "cuda":
        not_used["cuda"] = _backends.why_not_cuda(x) or "another backend is forced"
    counters = (zero.executed.get(op_name, 0), zero.skipped.get(op_name, 0))
    return Explanation(op_name, backend, not_used, _zero_path(op_name, bound.arguments), counters)


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
            "triton kernels: not in this version",
            f"cuda kernels: {_backends.cuda_missing() or f'built for {_backends._cuda.archs()}'}",
        ]
    )
