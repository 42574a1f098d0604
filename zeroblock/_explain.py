"""`explain` and `info`: which backend runs, and why the others do not."""

from __future__ import annotations

import dataclasses
import inspect
import sys
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
    if zero.test_of(op, policy, weight) == zero.DEVICE:
        h = arguments["x"] if "x" in arguments else arguments["h"]
        P, name = _backends.select(op, h), "conv_residual" if "conv" in op else op
        library = P.why_library(name, h, weight, arguments.get("gate"), arguments["residual"])
        if library is not None:
            return f'off: the GEMM is a library call ({library}); zero_skip="sync" reads the verdict back'
        return (
            "a flag on the device: the kernels of the op leave early while the weight is zero, its backward GEMMs run"
        )
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
    backend, transforms = _backends.select(op_name, x).NAME, zero.transforms_active()
    if transforms:
        backend = "reference"
    not_used = {}
    for name in _backends.BACKENDS:
        if name in (backend, "reference"):
            continue
        if transforms:
            not_used[name] = "a torch.func transform or forward-mode AD is active"
        else:
            reason = _backends.why_not(name, op_name, x)
            not_used[name] = reason or f"the {_backends.forced()} backend is forced"
    counters = (zero.executed.get(op_name, 0), zero.skipped.get(op_name, 0))
    return Explanation(op_name, backend, not_used, _zero_path(op_name, bound.arguments), counters)


def _gpu_backend(name: str) -> str:
    reason = _backends.missing(name)
    if reason is not None:
        return f"not used: {reason}"
    where = "in the interpreter, for CPU tensors where forced" if _backends.interprets() else "for GPU tensors"
    return f"triton {sys.modules['triton'].__version__}, {where}" if name == "triton" else where


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
