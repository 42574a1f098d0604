"""The primitives on a GPU, each a planned step (`_plan.py`): the library's kernels (`_library.py`), Triton's
configurations, the CUDA kernels. `_backends.select` gives this module for GPU tensors unless a backend is forced.

Where nothing is measured (capture, torch.compile, deterministic algorithms, ZEROBLOCK_PLAN=fixed, tensors of less than
WORTH bytes) the rule is: Triton with the configuration that its launcher picks by size, else the CUDA kernel, else the
library. "triton x16" is Triton's kernel with 16 numbers of a tile per thread, instead of the launcher's own choice.
Convolutions and linears: `_gpu_convs.py`, `_gpu_linear.py`; their candidates and rule: `_gpu_gemms.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import reference as ref
from ...plan.measure import describe_images, describe_rows, dtype_name
from ...plan.planned import PlannedOp
from .. import available as _backends
from .. import eager as _library
from ..eager import add_bias as _library_add_bias
from .gemms import TRITON

NAME = "planned"
WORTH = 1 << 18  # bytes of the leading tensor: less takes a GPU a launch, whatever runs
_TENSORS = (Tensor, nn.Parameter)
STEPS: dict[str, PlannedOp] = {}


def signature(*args: Any) -> tuple:
    """Of any arguments: layout, dtype and place of the tensors, the values of the rest."""
    return tuple([(a.shape, a.stride(), a.dtype, a.device) if type(a) in _TENSORS else a for a in args])


def describe(names: list[str], lead: int, args: tuple) -> str:
    """The leading tensor in buckets; of the others what distinguishes kernels: dtype and number of dimensions."""
    x = args[lead]
    parts = [describe_images(x) if x.dim() > 3 else describe_rows(x)]
    for i, (name, a) in enumerate(zip(names, args, strict=True)):
        if isinstance(a, Tensor):
            if i != lead:
                kind = "one" if a.dim() == 1 and a.numel() == 1 else f"{a.dim()}-D"
                parts.append(f"{name} {dtype_name(a)} {kind}")
        elif a is not None and name != "eps":
            parts.append(f"{name}={a}")
    return ", ".join(parts)


def _own(backend: str, name: str, lead: int, options: dict[str, Any]) -> tuple[Callable, Callable]:
    """(run, why_not) of a backend's primitive."""

    def run(*args):
        return getattr(_backends._load(backend), name)(*args, **options)

    def refuses(*args):
        reason = _backends.why_not(backend, name, args[lead])
        return TRITON.why_not_tile(name, args[lead]) if reason is None and "per_thread" in options else reason

    return run, refuses


def _step(name: str, lead: int = 0, backends: tuple[str, ...] = ("triton", "cuda"), split: bool = False) -> PlannedOp:
    def rule(*args):
        return next((b for b in backends if _backends.why_not(b, name, args[lead]) is None), "library")

    library = getattr(_library, name)
    names = list(inspect.signature(library).parameters)
    step = PlannedOp(
        name,
        library,
        signature=signature,
        describe=lambda *args: describe(names, lead, args),
        work=lambda *args: args[lead].numel() * args[lead].element_size(),
        lead=lead,
        rule=rule,
        worth=WORTH,
    )
    for backend in backends:
        step.add(backend, *_own(backend, name, lead, {}))
    if split:  # a group in two passes over more programs, also where one program holds it
        step.add("triton split", *_own("triton", name, lead, {"split": True}))
    for per_thread in () if TRITON is None else TRITON.PER_THREAD.get(name, ())[1:]:
        step.add(f"triton x{per_thread}", *_own("triton", name, lead, {"per_thread": per_thread}))
    STEPS[name] = step
    return step


_group_norm_silu = _step("group_norm_silu", split=True)
_group_norm_silu_bwd = _step("group_norm_silu_bwd", lead=1, split=True)
layer_norm_modulate = _step("layer_norm_modulate")
layer_norm_modulate_bwd = _step("layer_norm_modulate_bwd", lead=1)
gate_residual = _step("gate_residual")
gate_residual_bwd = _step("gate_residual_bwd", lead=2)
gate_residual_layer_norm_modulate = _step("gate_residual_layer_norm_modulate")
gate_residual_layer_norm_modulate_bwd = _step("gate_residual_layer_norm_modulate_bwd", lead=1)
_activation = _step("activation", backends=("triton",))
activation_bwd = _step("activation_bwd", lead=1, backends=("triton",))


def group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu, flag=None):
    return _group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu, flag)


def group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, flag=None):
    return _group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, flag)


def activation(x, name, flag=None):
    return _activation(x, name, flag)


def linear(x, weight, bias, activation=None):
    """act(x @ weight.T + bias)"""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if activation is None else _activation(y, activation, None)


def _backend(op: str, x: Tensor) -> Any:
    """The first backend with kernels for a step that is not planned, or None."""
    name = next((b for b in ("triton", "cuda") if _backends.why_not(b, op, x) is None), None)
    return None if name is None else _backends._load(name)


def add_bias(x, bias, dim):
    module = _backend("add_bias", x)
    return (_library_add_bias if module is None else module.add_bias)(x, bias, dim)


def zero_flags(tensors: list[Tensor], any_of: bool = False) -> Tensor:
    """Integers or bools [len(tensors)] on their device: which are exactly zero; with any_of int32 [1], whether one is.
    Nothing is read back."""
    module = _backend("is_zero", tensors[0])
    if module is not None:
        return module.zero_flags(tensors, any_of)
    flags = ref.is_zero(*tensors)
    return flags.any().view(1).to(torch.int32) if any_of else flags


def is_zero(t: Tensor) -> bool:
    """Reads the answer back to the host."""
    return bool(zero_flags([t])[0])


def why_library(op: str, h: Tensor, weight: Tensor, *rest: Any) -> str | None:
    """CONV, NORM_CONV and LINEAR decide, the own GEMMs among their candidates."""
    return "the plan decides"


from .convs import CONV as CONV  # noqa: E402  (these steps call the primitives above)
from .convs import DGRAD as DGRAD  # noqa: E402
from .convs import NORM_CONV as NORM_CONV  # noqa: E402
from .convs import WGRAD as WGRAD  # noqa: E402
from .linear import LINEAR as LINEAR  # noqa: E402
