"""The decision and its result in one pass over memory: inference of a branch of which, while zero, nothing but its
residual is left to compute. The rules are those of `decision.py` and `skip.py`, for operands that the kernel takes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import zero
from .._layout import is_dense, is_settled
from ..backends.select import select
from ..ops.residual_alone import residual_alone
from ..steps import packed as _packed
from .decision import NOT_ALLOWED, RUN, SKIP_BY_GATE, SKIP_BY_WEIGHT, Answer, allowed, conclude, judge
from .layers import is_plain_linear


def residual_if_zero(
    name: str, policy: str, layer: nn.Module, residual: Tensor, bypassed: Iterable[nn.Module | None]
) -> tuple[Answer, Tensor | None]:
    """`decide` for a branch without a gate that ends in `layer`, a plain convolution or linear, without gradients; and
    residual + bias where the weight is zero. None where it is not, or where the caller has to compute that sum."""
    weight = layer._parameters["weight"]
    assert weight is not None
    if not allowed(name, policy, weight):
        return NOT_ALLOWED, None
    bias = layer._parameters.get("bias")
    is_linear = weight.dim() == 2
    backend = _kernel(layer, weight, bias, residual, is_linear)
    fits = is_linear or residual.dim() == weight.dim()
    if backend is None or not fits or residual.size(-1 if is_linear else 1) != weight.size(0):
        y, answer = None, judge((layer.weight,), ())  # type: ignore[arg-type]  # a Module's attribute
    else:
        bias_last = is_linear or not residual.is_contiguous()
        y = backend.residual_if_zero(weight, None, 1, 1, residual, bias, bias_last)
        answer = RUN if y is None else SKIP_BY_WEIGHT
    answer = conclude(name, answer, bypassed)
    return (answer, y) if answer is SKIP_BY_WEIGHT else (answer, None)


def copy_if_gates_are_zero(
    name: str,
    policy: str,
    x: Tensor,
    modulation: Any,
    bypassed: Iterable[nn.Module | None],
    chunks: int,
    gates: tuple[int, ...],
) -> Tensor | None:
    """Without gradients: a copy of x while the `gates` among the `chunks` vectors that `modulation`, a plain linear,
    gives are zero whatever its input, so that nothing need be computed, not even the modulation; counted as a skip of
    a branch for each. None: the branches are to be looked at one by one."""
    if torch.is_grad_enabled() or is_compiling() or modulation is None or zero.transforms_active():
        return None
    weight = modulation._parameters.get("weight")
    if weight is None or zero.is_seen_nonzero(weight, gates[0] * (weight.numel() // chunks)):
        return None  # whatever else would have to hold
    if not is_plain_linear(modulation) or not allowed(name, policy, weight) or weight.shape[0] % chunks:
        return None
    bias = modulation._parameters.get("bias")
    backend = _kernel(modulation, weight, bias, x, True)
    if backend is not None:
        y = backend.residual_if_zero(weight, bias, chunks, _mask(gates), x, None, True)
    elif "weight" in modulation.__dict__ or "bias" in modulation.__dict__:
        return None  # attributes that hide the parameters
    else:
        parameters = (weight,) if bias is None else (weight, bias)
        y = copy_of_residual(x) if _rows_are_zero(parameters, chunks, gates) else None
    if y is None or conclude(name, SKIP_BY_GATE, bypassed, False, len(gates)) is not SKIP_BY_GATE:
        return None
    return y


def copy_of_residual(x: Tensor) -> Tensor:
    """What is left of a transformer block all of whose branches are skipped: contiguous, as when it runs."""
    dense = x.contiguous()
    return residual_alone(dense, None, None, -1, x.dtype, None, in_place=dense is not x)


@functools.cache
def _mask(parts: tuple[int, ...]) -> int:
    """As the kernel is told which parts have to be zero: the bits of their numbers."""
    return sum(1 << i for i in parts)


def _rows_are_zero(parameters: tuple[Tensor, ...], chunks: int, gates: tuple[int, ...]) -> bool:
    def decide() -> bool:
        if not all(map(zero.may_test, parameters)):
            return False
        return all(zero.is_exactly_zero(t.detach().unflatten(0, (chunks, -1))[i]) for i in gates for t in parameters)

    return _packed.decide_once(("gate rows", chunks, gates), parameters, decide)


def _kernel(layer: nn.Module, weight: Tensor, bias: Tensor | None, residual: Tensor, is_linear: bool) -> Any:
    """The backend whose kernel takes these operands, None where there is none. Asked only where a skip is `allowed`."""
    backend, dtype, fields = select("add_bias", residual), residual.dtype, layer.__dict__
    if (
        backend.residual_if_zero is None
        or (_packed.copies and (_packed.is_frozen(weight) or (bias is not None and _packed.is_frozen(bias))))
        or type(residual) not in zero.PLAIN_TYPES
        or residual.layout is not torch.strided
        or not _takes(weight, dtype)
        or (bias is not None and not _takes(bias, dtype))
        or "weight" in fields  # an attribute that hides the parameter
        or "bias" in fields
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    return backend if (residual.is_contiguous() if is_linear else is_settled(residual)) else None


def _takes(t: Tensor, dtype: torch.dtype) -> bool:
    plain = type(t) in zero.PLAIN_TYPES and t.dtype == dtype and t.layout is torch.strided and t.is_cpu
    return plain and (t.is_contiguous() or is_dense(t))
