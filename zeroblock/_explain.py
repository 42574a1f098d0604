"""`explain` and `info`: which backend runs, and why the others do not."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, zero
from ._version import NAMESPACE
from .backends import available
from .backends.base import Backend, Step
from .backends.dense import why_no_flag
from .backends.select import select
from .plan import describe
from .plan.mode import training

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
    plans: tuple[describe.Explanation, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: backend {self.backend}"]
        lines += [f"  {name} is not used: {why}" for name, why in self.not_used.items()]
        if self.zero_path is not None:
            lines.append(f"  zero path: {self.zero_path}")
            lines.append(f"  so far: {self.counters[0]} executed, {self.counters[1]} skipped")
        lines += [f"  {line}" for plan in self.plans for line in f"plan {plan}".splitlines()]
        return "\n".join(lines)


def explain(op_name: str | nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run `zeroblock.<op_name>(*args, **kwargs)`, why not the others, and what its zero path sees.

    Nothing is computed (a weight's zero test aside).

    Args:
        op_name: the name of a function of zeroblock; or a block of an accelerated model: its plan says which forward
            the call would take, zeroblock's ("fused") or its own ("library").
        *args, **kwargs: its arguments.

    Returns an Explanation, printable. Raises ValueError for an unknown function, TypeError for wrong arguments.
    """
    if isinstance(op_name, nn.Module):
        return _block(op_name, args, kwargs)
    function = getattr(functional, op_name, None)
    if function is None or op_name.startswith("_") or not inspect.isfunction(function):
        raise ValueError(f"explain: op_name must name a function of zeroblock, got {op_name!r}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    tensors = [v for value in arguments.values() for v in (value if isinstance(value, tuple) else (value,))]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    if not tensors:
        raise TypeError(f"explain: {op_name} needs at least one tensor")
    x, backend = tensors[0], select(op_name, tensors[0])
    if zero.transforms_active():
        reason = "a torch.func transform or forward-mode AD is active"
        others = {name: reason for name in available.BACKENDS if name != "reference"}
        return Explanation(op_name, "reference", others, _zero_path(op_name, backend, arguments, ()), _counted(op_name))
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plans = _plans(op_name, backend, arguments, recorded)
    name, other = backend.name, f"the {available.forced()} backend is forced"
    if name == "planned":
        name = plans[0].choice.split()[0] if plans else "library"
        other = f"the plan has chosen {plans[0].choice}" if plans else "the op has no kernel of its own"
    not_used = {
        each: available.why_not(each, op_name, x) or other
        for each in available.BACKENDS
        if each not in (name, "reference")
    }
    path = _zero_path(op_name, backend, arguments, plans)
    return Explanation(op_name, name, not_used, path, _counted(op_name), plans)


def _block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    name = type(block).__name__
    applied = getattr(type(block), "_zeroblock", None)
    if applied is None:
        raise ValueError(f"explain: op_name must be a block that accelerate converted, got {name}")
    family, choice = applied.family, applied.choice
    plan = None if choice is None else choice.explain(block, family.forward, applied.method, args, kwargs)
    return Explanation(name, family.backend, {}, None, _counted(family.name), () if plan is None else (plan,))


def _counted(op: str) -> tuple[int, int]:
    return zero.executed.get(op, 0), zero.skipped.get(op, 0)


def _plans(op: str, backend: Backend, arguments: dict[str, Any], recorded: bool) -> tuple[describe.Explanation, ...]:
    """The planned steps of a dense call."""
    if op in _HAS_ZERO_PATH:
        test = zero.test_of(op, arguments["zero_skip"], arguments["weight"])
        arguments = {**arguments, "zero_skip": test}
    with training(recorded):
        return tuple(_explained(step) for step in backend.steps(op, arguments, recorded))


def _explained(step: Step) -> describe.Explanation:
    """Backward's steps are not themselves differentiated."""
    planned_op, args = step
    if not planned_op.name.endswith(("_bwd", "_dgrad", "_wgrad")):
        return planned_op.explain(*args)
    with training(False):
        return planned_op.explain(*args)


def _zero_path(
    op: str, backend: Backend, arguments: dict[str, Any], plans: tuple[describe.Explanation, ...]
) -> str | None:
    if op not in _HAS_ZERO_PATH:
        return None
    weight, policy = arguments["weight"], arguments["zero_skip"]
    if policy == "never":
        return 'off (zero_skip="never")'
    if zero.test_of(op, policy, weight) == zero.DEVICE:
        library = why_no_flag(op, arguments) or backend.why_no_zero_path(op, arguments, plans)
        if library is not None:
            return f'off: the GEMM is a library call ({library}); zero_skip="sync" reads the verdict back'
        flagged = "the kernels of the op leave early while the weight is zero, its backward GEMMs run"
        hint = backend.hint(weight)
        return f"a flag on the device: {flagged}" if hint is None else f"{hint}; a flag on the device where {flagged}"
    found = zero.is_exactly_zero(weight)
    return "weight is exactly zero now: the tail is skipped" if found else "weight is not zero now: the tail runs"


def _gpu_backend(name: str) -> str:
    reason, backend = available.missing(name), available.gpu_backend(name)
    if backend is None or backend.missing is not None:
        return f"{reason}"
    made = f"built for {available.cuda().archs()}" if name == "cuda" else f"triton {sys.modules['triton'].__version__}"
    on_cpu = "on CPU tensors where forced" if backend.device == "cpu" else "for GPU tensors"
    return f"{made}, {reason if reason is not None else on_cpu}"


def info() -> str:
    """What is built and why not, in a few lines."""
    if available.CPU_MISSING is None:
        cpu = f"built, running on {getattr(torch.ops, NAMESPACE)._cpu_isa()}"
    else:
        cpu = f"not used: {available.CPU_MISSING}"
    return "\n".join(
        [
            f"torch {torch.__version__}",
            f"cpu kernels: {cpu}",
            f"triton kernels: {_gpu_backend('triton')}",
            f"cuda kernels: {_gpu_backend('cuda')}",
        ]
    )
