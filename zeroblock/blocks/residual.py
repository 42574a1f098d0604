"""Any residual branch and any single layer, skipped while it is zero: y = residual + gate * tail(body(...))."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .broadcast import may_grow
from .decision import NOT_ALLOWED, SKIP_BY_GATE, SKIP_BY_WEIGHT, SKIPS, Answer, allowed, conclude, decide, judge
from .layers import is_plain_layer, may_draw, parameters_of
from .one_pass import residual_if_zero
from .skip import Branch, Tail, skipped_branch


def residual_branch(
    name: str,
    policy: str,
    residual: Tensor,
    body: Callable[..., Tensor],
    tail: nn.Module | None,
    gate: Tensor | None,
    activations: tuple[Tensor, ...],
    *,
    modules: tuple[nn.Module, ...],
    trusted: str | None = None,
) -> tuple[Answer, Tensor | None]:
    """The decision about residual + gate * tail(body(*activations)), and its value where the branch is skipped; None:
    compute it densely.

    tail: a layer, or None where the branch ends with the body. gate: None, or what multiplies the branch.
    modules: the submodules that a skip bypasses, the tail's excepted; their parameters get gradients of zeros.
    trusted: as `may_draw` is told, which is asked only where the branch is skipped.
    """
    if is_compiling():
        return NOT_ALLOWED, None  # before anything else that a compiler would have to trace
    weights: tuple[Tensor, ...] = ()
    bypassed = modules
    channels = None
    if tail is not None:
        if not is_plain_layer(tail):
            return NOT_ALLOWED, None
        bypassed = (*modules, tail)
        weight = tail._parameters["weight"]
        assert weight is not None
        channels = -1 if weight.dim() == 2 else 1
        if residual.shape[channels] != weight.shape[0] or may_grow(residual, activations, channels):
            return NOT_ALLOWED, None  # eager broadcasts or raises
        if gate is None and not torch.is_grad_enabled():
            answer, y = residual_if_zero(name, policy, tail, residual, bypassed)
            if answer not in SKIPS:
                return answer, None
            if y is None or any(may_draw(m, trusted) for m in modules):
                y = skip_residual(answer, residual, body, tail, None, activations, modules, trusted)
            return answer, y
        weights = (tail.weight,)  # type: ignore[assignment]  # a Module's attribute
    gates = () if gate is None else (gate,)
    if tail is None and may_grow(residual, activations) or may_grow(residual, gates, channels):
        return NOT_ALLOWED, None
    answer = decide(name, policy, weights, gates, bypassed) if weights or gates else NOT_ALLOWED
    if answer not in SKIPS:
        return answer, None
    return answer, skip_residual(answer, residual, body, tail, gate, activations, modules, trusted)


def skip_residual(
    answer: Answer,
    residual: Tensor,
    body: Callable[..., Tensor],
    tail: nn.Module | None,
    gate: Tensor | None,
    activations: tuple[Tensor, ...],
    modules: tuple[nn.Module, ...],
    trusted: str | None = None,
) -> Tensor:
    """The value of a branch as `residual_branch` takes it, for which `answer` was one of SKIPS."""
    random = any(may_draw(m, trusted) for m in modules)
    is_conv = tail is not None and not isinstance(tail, nn.Linear)
    if gate is not None and not is_conv and residual.dim() == 3 and gate.dim() in (2, 3):
        # [1, D], [B, 1, D] and the like: a gate of the sizes that the ops know.
        gate = gate.expand(residual.shape if gate.dim() == 3 else (residual.shape[0], residual.shape[2]))
    branch = Branch(
        Tail(tail),
        activations,
        parameters_of(*modules),
        _Replayable(body) if random else lambda *a: (body(*a),),
        lambda h: h,
        residual,
        zero_gate=answer is SKIP_BY_GATE,
        always_run=random,
        carried=residual is activations[0],
    )
    return skipped_branch(branch, residual, gate)


class _Replayable:
    """A body that draws random numbers: the first call draws, every later one sees the same stream and leaves no
    trace."""

    def __init__(self, body: Callable[..., Tensor]):
        self.body = body
        self.state: Tensor | None = None

    def __call__(self, *activations: Tensor) -> tuple[Tensor]:
        if self.state is None:
            self.state = torch.get_rng_state()
            return (self.body(*activations),)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            return (self.body(*activations),)


def skip_zero_layer(name: str, policy: str, layer: Any, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
    """residual + layer(x) of a plain layer that is zero and may be skipped; None: compute it densely."""
    weight = layer.weight
    if x.dim() != weight.dim() and not isinstance(layer, nn.Linear):
        return None
    if not allowed(name, policy, weight):
        return None
    tail = None
    if residual is not None:
        tail = Tail(layer)
        if residual.shape != tail.output_size(x):
            return None  # eager broadcasts or raises
    if conclude(name, judge((weight,), ()), ()) is not SKIP_BY_WEIGHT:
        return None
    return skipped_branch(Branch(tail or Tail(layer), (x,), (), lambda x: (x,), lambda x: x, x), residual)
