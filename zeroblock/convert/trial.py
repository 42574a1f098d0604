"""A call for a proof: what it gives, and how that is compared."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Both forwards run in float32: what rounds differently is below, another formula is far above.
TOLERANCE = 1e-3


class Result(NamedTuple):
    """What a call gave: its structure, the floating tensors in it and the gradients of its floating inputs, and the
    random stream afterwards."""

    structure: Any
    tensors: list[Tensor]
    stream: Tensor


def run(method: Any, args: tuple, kwargs: dict[str, Any], gradients: bool) -> Result:
    inputs = [t.clone().requires_grad_(gradients) if is_floating(t) else copy.deepcopy(t) for t in args]
    kwargs = copy.deepcopy(kwargs)
    with torch.set_grad_enabled(gradients):
        # Non-leaves like in a model: blocks may write into their input's successors, never into the input.
        result = method(*(t * 1 if is_floating(t) else t for t in inputs), **kwargs)
        # What it leaves in lists and dicts that it was given (caches of frames) is a result too.
        left = [t for t in (*inputs, *kwargs.values()) if isinstance(t, (list, dict))]
        result = (result, left) if left else result
        found, stream = tensors(result), torch.default_generator.get_state()
        if gradients:
            loss = torch.zeros(())
            for t in found:
                loss = loss + (t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum()
            wanted = [t for t in inputs if is_floating(t)]
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            found += [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
    return Result(structure(result), [t.detach() for t in found], stream)


def as_bfloat16(t: Any) -> Any:
    if t is torch.float32:  # an argument that names a dtype
        return torch.bfloat16
    return t.bfloat16() if is_floating(t) else t


def close(a: Tensor, b: Tensor) -> bool:
    # Everything is of size 1 here: what is a hundredth of that may be rounding alone (a norm cancels its bias).
    limit = TOLERANCE * max(a.norm().item(), 0.01 * a.numel() ** 0.5)
    return bool(torch.isfinite(a).all() and (a - b).norm() <= limit)


def is_floating(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def structure(result: Any) -> Any:
    """The classes of a result and of what it holds, shapes and dtypes of tensors."""
    if isinstance(result, Tensor):
        return result.shape, result.dtype
    if isinstance(result, dict):
        return type(result), [(key, structure(value)) for key, value in result.items()]
    return (type(result), list(map(structure, result))) if isinstance(result, (tuple, list)) else type(result)


def tensors(result: Any) -> list[Tensor]:
    """The floating tensors of a result, in the order in which a tuple, dict or model output holds them."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    values = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return [t for value in values for t in tensors(value)]
