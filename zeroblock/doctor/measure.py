"""Plain SGD steps in place, and what they show: the first non-zero gradient of every parameter."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .. import functional, zero
from .._dtypes import FLOATING
from .factors import Ranks, Watcher, rank, sample, sites, units
from .tape import Recorder, Tape

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Measurement:
    """What was seen in the steps, of parameters by name."""

    steps: int = 0  # taken
    first: dict[str, int | None] = field(default_factory=dict)  # the step of the first non-zero gradient; None: in none
    losses: list[float] = field(default_factory=list)  # one for each step
    arrived: set[str] = field(default_factory=set)  # got a gradient, zero or not
    identical: set[str] = field(default_factory=set)  # their units are identical and got equal gradients in every step
    ranks: dict[str, Ranks] = field(default_factory=dict)  # of `interesting` parameters, when they first moved


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """The conditions of every step: training mode, gradients, nothing compiled, zeroblock's ops in plain PyTorch."""
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"), zero.reference_only():
        model.train()
        yield


def call_loss(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    """The loss, checked: one number that depends on a trainable parameter."""
    shapes = tree_map(lambda t: list(t.shape) if isinstance(t, Tensor) else t, batch)
    try:
        value = loss(model, batch)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"doctor: the batch {shapes} does not fit into the device's memory: {error}") from error
    except Exception as error:
        raise ValueError(f"doctor: model and loss failed on the batch {shapes}: {_brief(error)}") from error
    if not isinstance(value, Tensor):
        raise TypeError(f"doctor: loss must return a scalar Tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"doctor: loss must return a scalar, got shape {list(value.shape)}")
    if not value.requires_grad:
        raise ValueError("doctor: loss must depend on a parameter with requires_grad, got one that depends on none")
    return value


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def with_grads(parameters: dict[str, nn.Parameter]) -> set[str]:
    return {name for name, p in parameters.items() if p.grad is not None}


def clear_grads(parameters: dict[str, nn.Parameter], kept: set[str]) -> None:
    """Drops the gradients of the last step; those the caller had (`kept`) are zeroed in place, so that no second set
    of them is needed."""
    for name, p in parameters.items():
        if name in kept and p.grad is not None:
            p.grad.detach().zero_()
        else:
            p.grad = None


def record(model: nn.Module, batch: Any, loss: Loss) -> Tape:
    """The tape of one step, without an update."""
    parameters = trainable(model)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    data = {f"batch[{i}]": t for i, t in enumerate(tree_flatten(batch)[0]) if isinstance(t, Tensor)}
    recorder = Recorder(named, data)
    kept = with_grads(parameters)
    clear_grads(parameters, kept)
    for name in kept:
        recorder.follow(parameters[name].grad, False)  # type: ignore[arg-type]
    with recorder:
        value = call_loss(model, batch, loss)
        recorder.mark_backward()
        value.sum().backward()
    return recorder.finish({name: p.grad for name, p in parameters.items()})


def is_zero(tensors: list[Tensor]) -> list[bool]:
    """Which tensors are exactly zero: those that the op takes in one launch per device, others one by one."""
    verdicts: list[bool | None] = [None] * len(tensors)
    groups: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        if zero.is_plain_tensor(t) and t.dtype in FLOATING and t.numel():
            groups.setdefault(t.device, []).append(i)
        else:
            verdicts[i] = not bool(t.detach().ne(0).any())
    for indices in groups.values():
        found = functional.is_zero(*(tensors[i].detach() for i in indices)).tolist()
        for i, verdict in zip(indices, found, strict=True):
            verdicts[i] = verdict
    return [bool(v) for v in verdicts]


def identical_units(t: Tensor) -> bool:
    """More than one unit, and all of them the same."""
    u = units(t.detach())
    return u.shape[0] > 1 and bool((u[:2] == u[:1]).all()) and bool((u == u[:1]).all())


def _alike(grad: Tensor) -> bool:
    """The gradients of all units agree up to rounding. (Reductions of equal numbers differ in their last bits.)"""
    u = units(grad)
    spread, size = (u - u[:1]).abs().max(), u.abs().max()
    return bool(spread <= math.sqrt(torch.finfo(grad.dtype).eps) * size)


def measure(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    steps: int,
    lr: float,
    tape: Tape | None,
    interesting: set[str],
    progress: Callable[[int, str], None],
) -> Measurement:
    """`steps` plain SGD steps. Ranks are taken of the `interesting` parameters, when they first move or at the end."""
    parameters = trainable(model)
    result = Measurement(first=dict.fromkeys(parameters))
    kept = with_grads(parameters)
    alike = {name for name, p in parameters.items() if identical_units(p)}
    waiting = set(interesting)
    where = sites(tape, interesting) if tape is not None else {}
    for step in range(1, steps + 1):
        clear_grads(parameters, kept)
        with Watcher(tape or Tape(), {n: s for n, s in where.items() if n in waiting}) as watcher:
            value = call_loss(model, batch, loss)
            value.sum().backward()
        result.losses.append(float(value.detach()))
        grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        result.arrived |= {name for name in grads if tape is None or name in tape.grads}
        zeros = is_zero(list(grads.values()))
        for (name, grad), is_null in zip(grads.items(), zeros, strict=True):
            if not is_null and result.first[name] is None:
                result.first[name] = step
            if name in waiting and (not is_null or step == steps):
                waiting.discard(name)
                result.ranks[name] = _ranks(grad, watcher.samples.get(name))
            if name in alike and not is_null and not _alike(grad):
                alike.discard(name)
        with torch.no_grad():
            for name, grad in grads.items():
                parameters[name].add_(grad, alpha=-lr)
        del grads, grad
        result.steps = step
        progress(step, f"loss {result.losses[-1]:.4g}")
    result.identical = {name for name in alike if result.first[name] is not None}
    for name in result.identical & result.ranks.keys():
        u = sample(units(parameters[name].detach()))
        known = result.ranks[name]
        result.ranks[name] = Ranks(known.h, known.dy, known.grad, rank_of_differences(u))
    return result


def rank_of_differences(u: Tensor) -> tuple[int, int]:
    """How many directions the units differ in, up to the rounding of their common part."""
    difference = (u - u[:1]).double()
    singular = torch.linalg.svdvals(difference)
    tolerance = math.sqrt(torch.finfo(u.dtype).eps) * max(float(u.double().norm()), 1e-300)
    return int((singular > tolerance).sum()), min(u.shape)


def _ranks(grad: Tensor, factors: tuple[Tensor, Tensor] | None) -> Ranks:
    of_grad = rank(sample(units(grad.detach())))
    if factors is None:
        return Ranks(grad=of_grad)
    return Ranks(rank(factors[0]), rank(factors[1]), of_grad)
