"""Norms, gates and activations on a GPU, each a planned step: the library's kernels (`eager.py`), Triton's
configurations, the CUDA kernels.

Where nothing is measured (capture, torch.compile, deterministic algorithms, ZEROBLOCK_PLAN=fixed, tensors of less than
WORTH bytes) the rule is: the CUDA kernels of a group norm that they alone read once, else Triton with the configuration
that its launcher picks by size, else the CUDA kernel, else the library. "triton x16" is Triton's kernel with 16 numbers
of a tile per thread, instead of the launcher's own choice; "triton split" a group norm in
two passes over more programs, also where one program holds a group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ...plan.describe import describe_alignment, describe_images, describe_operand, describe_rows
from ...plan.planned import PlannedOp
from ...steps.flag import is_plain_tensor
from .. import available
from ..base import Backend, MaybeTensor
from ..eager import EAGER
from ..residual_norm import Branch, Needed, Norm, ResidualNormGrads, Stats
from .one_read import prefers_cuda

P = ParamSpec("P")
R = TypeVar("R")

# Bytes of the first tensor: at 1 TB/s they pass in a quarter of a microsecond, a tenth of what any launch takes (model,
# not measured: benchmarks/roofline.md).
WORTH = 1 << 18
CUDA = available.cuda()
INSTALLED = available.triton() is not None
# Where triton is not installed `why_not` says so, and the methods that stand in are never called.
TRITON: Backend = available.triton() or EAGER
PER_THREAD: dict[str, tuple[int, ...]] = {}
if INSTALLED:
    from ..triton import PER_THREAD, why_not_tile


def signature(*args: Any, **_: Any) -> tuple:
    """Of any arguments: layout, dtype, place and `alignment` of the tensors, the values of the rest."""
    return tuple(
        [
            (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() % 16 == 0)
            if is_plain_tensor(a)
            else signature(*a)
            if isinstance(a, tuple)
            else (a.shape, a.stride(), a.dtype, a.device, type(a))
            if isinstance(a, Tensor)
            else a
            for a in args
        ]
    )


def _named(names: Iterable[str], args: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by name; those that travel as a named tuple one by one."""
    for name, a in zip(names, args, strict=False):  # a flag may be left out
        if isinstance(a, tuple):
            yield from _named([f"{name}.{field}" for field in getattr(a, "_fields", "")], a)
        else:
            yield name, a


def _describe(names: list[str], device_arg: int, *args: Any) -> str:
    """The first tensor in buckets; of the others what distinguishes kernels."""
    x, first = args[device_arg], names[device_arg]
    parts, given = [describe_images(x) if x.dim() > 3 else describe_rows(x)], list(_named(names, args))
    for name, a in given:
        if isinstance(a, Tensor):
            if name != first:
                parts.append(f"{name} {describe_operand(a)}")
        elif a is not None and not name.endswith("eps"):
            parts.append(f"{name}={a}")
    return ", ".join(parts) + describe_alignment(*(a for _, a in given if isinstance(a, Tensor)))


def _bytes(device_arg: int, *args: Any) -> int:
    return args[device_arg].numel() * args[device_arg].element_size()


def _why_not(backend: str, name: str, device_arg: int, *args: Any) -> str | None:
    return available.why_not(backend, name, args[device_arg])


def _why_not_cuda(name: str, device_arg: int, groups_arg: int | None, *args: Any) -> str | None:
    reason = available.why_not("cuda", name, args[device_arg])
    if reason is not None or groups_arg is None:
        return reason
    return CUDA.why_not_groups(args[device_arg], args[groups_arg])


def _why_not_tile(name: str, device_arg: int, *args: Any) -> str | None:
    return available.why_not("triton", name, args[device_arg]) or why_not_tile(name, args[device_arg])


def _reads_once(device_arg: int, groups_arg: int, *args: Any) -> bool:
    return prefers_cuda(args[device_arg], args[groups_arg], device_arg > 0)


def _rule(backends: tuple[str, ...], name: str, device_arg: int, *args: Any) -> str:
    return next((b for b in backends if available.why_not(b, name, args[device_arg]) is None), "library")


def _step(
    library: Callable[P, R], triton: Callable[P, R], cuda: Callable[P, R] | None, *, device_arg: int = 0
) -> PlannedOp[P, R]:
    """The step named as the methods given: by the library, by Triton, by CUDA (None: it has no such kernel)."""
    name, parameters = library.__name__, list(inspect.signature(library).parameters)
    groups_arg = parameters.index("num_groups") if "num_groups" in parameters else None
    step: PlannedOp[P, R] = PlannedOp(
        name,
        library,
        signature=signature,
        describe=partial(_describe, parameters, device_arg),
        work=partial(_bytes, device_arg),
        rule=partial(_rule, ("triton", "cuda") if cuda is not None else ("triton",), name, device_arg),
        device_arg=device_arg,
        worth=WORTH,
    )
    step.add("triton", triton, partial(_why_not, "triton", name, device_arg))
    if cuda is not None:
        reads_once = partial(_reads_once, device_arg, groups_arg) if groups_arg is not None and INSTALLED else None
        step.add("cuda", cuda, partial(_why_not_cuda, name, device_arg, groups_arg), rule=reads_once)
    # Triton's kernel as a plan may ask for it beside the launcher's own choice.
    choose = cast("Callable[..., R]", triton)
    if name.startswith("group_norm") and INSTALLED:
        step.add("triton split", partial(choose, split=True), partial(_why_not, "triton", name, device_arg))
    for per_thread in PER_THREAD.get(name, ())[1:]:
        run = partial(choose, per_thread=per_thread)
        step.add(f"triton x{per_thread}", run, partial(_why_not_tile, name, device_arg))
    return step


GROUP_NORM_SILU = _step(EAGER.group_norm_silu, TRITON.group_norm_silu, CUDA.group_norm_silu)
GROUP_NORM_SILU_BWD = _step(
    EAGER.group_norm_silu_bwd, TRITON.group_norm_silu_bwd, CUDA.group_norm_silu_bwd, device_arg=1
)
CHANNEL_RMS_NORM_SILU = _step(EAGER.channel_rms_norm_silu, TRITON.channel_rms_norm_silu, CUDA.channel_rms_norm_silu)
CHANNEL_RMS_NORM_SILU_BWD = _step(
    EAGER.channel_rms_norm_silu_bwd, TRITON.channel_rms_norm_silu_bwd, CUDA.channel_rms_norm_silu_bwd, device_arg=1
)
LAYER_NORM_MODULATE = _step(EAGER.layer_norm_modulate, TRITON.layer_norm_modulate, CUDA.layer_norm_modulate)
LAYER_NORM_MODULATE_BWD = _step(
    EAGER.layer_norm_modulate_bwd,
    TRITON.layer_norm_modulate_bwd,
    CUDA.layer_norm_modulate_bwd,
    device_arg=1,
)
GATE_RESIDUAL = _step(EAGER.gate_residual, TRITON.gate_residual, CUDA.gate_residual)
GATE_RESIDUAL_BWD = _step(EAGER.gate_residual_bwd, TRITON.gate_residual_bwd, CUDA.gate_residual_bwd, device_arg=2)
GATE_RESIDUAL_LAYER_NORM_MODULATE = _step(
    EAGER.gate_residual_layer_norm_modulate,
    TRITON.gate_residual_layer_norm_modulate,
    CUDA.gate_residual_layer_norm_modulate,
)
GATE_RESIDUAL_LAYER_NORM_MODULATE_BWD = _step(
    EAGER.gate_residual_layer_norm_modulate_bwd,
    TRITON.gate_residual_layer_norm_modulate_bwd,
    CUDA.gate_residual_layer_norm_modulate_bwd,
    device_arg=1,
)


def _rows_backward(backend: Backend) -> Callable[..., ResidualNormGrads]:
    """Its backward behind a tensor that is always there."""

    def residual_norm_modulate_bwd(
        like: Tensor,
        dx_new: MaybeTensor,
        dy: MaybeTensor,
        x: MaybeTensor,
        stats: Stats,
        branch: Branch | None,
        norm: Norm | None,
        index: MaybeTensor,
        residual_dtype: torch.dtype,
        needed: Needed,
    ) -> ResidualNormGrads:
        return backend.residual_norm_modulate_bwd(dx_new, dy, x, stats, branch, norm, index, residual_dtype, needed)

    return residual_norm_modulate_bwd


RESIDUAL_NORM_MODULATE = _step(EAGER.residual_norm_modulate, TRITON.residual_norm_modulate, CUDA.residual_norm_modulate)
RESIDUAL_NORM_MODULATE_BWD = _step(_rows_backward(EAGER), _rows_backward(TRITON), _rows_backward(CUDA))
ACTIVATION = _step(EAGER.activation, TRITON.activation, None)
ACTIVATION_BWD = _step(EAGER.activation_bwd, TRITON.activation_bwd, None, device_arg=1)
