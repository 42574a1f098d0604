"""Operands of one batch beside operands of many, as eager broadcasts them. The fused ops take equal batches alone, and
a skipped branch cannot be asked for the size of its result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._layout import is_settled
from ..plan.mode import rounds_as_eager
from ..reference import added, modulation


def same_batch(x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the batch of the larger one, where the other has a batch of 1."""
    n, m = x.size(0), condition.size(0)
    if n == m:
        return x, condition
    if m == 1:
        return x, condition.expand(n, *condition.shape[1:])
    # A copy: kernels and memory formats know no batch that repeats itself.
    return (x.expand(m, *x.shape[1:]).clone(), condition) if n == 1 else (x, condition)


def tokens_and_condition(x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    """`same_batch` for a block whose first layer is a norm without parameters, of which eager saves nothing: training
    takes an x that was made in inference mode too."""
    if torch.is_grad_enabled() and cannot_be_saved(x):
        x = x.clone()
    return (x, condition) if x.size(0) == condition.size(0) else same_batch(x, condition)


def cannot_be_saved(x: Tensor) -> bool:
    """Made in inference mode and used outside of it: autograd refuses to keep it for a backward."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.is_inference()


def may_grow(residual: Tensor, operands: Iterable[Any], channels: int | None = None) -> bool:
    """Whether residual + branch(*operands) may be larger than the residual: it has a size of 1 where an operand has
    more. `channels`: a dimension whose size is known to be the branch's."""
    size = residual.shape
    if 1 not in size:
        return False
    skipped = None if channels is None else channels % len(size)
    for t in operands:
        if not isinstance(t, Tensor) or t.dim() == 0:
            continue
        if t.dim() != len(size):
            if t.dim() > 1 and size[0] == 1 < t.shape[0]:
                return True
        elif any(n == 1 < m and d != skipped for d, (n, m) in enumerate(zip(size, t.shape, strict=True))):
            return True
    return False


def fits_gate(gate: Tensor, size: torch.Size) -> bool:
    """Whether the ops take this gate for a branch of tokens [B, T, D]: [1], [D], [B, D] or [B, T, D]."""
    shape = gate.shape
    if len(shape) == 1:
        return shape[0] == 1 or len(size) == 3 and shape[0] == size[-1]
    return len(size) == 3 and (shape == size or len(shape) == 2 and shape[0] == size[0] and shape[1] == size[2])


def add_gated(residual: Tensor, gate: Tensor, branch: Tensor, *, tokens: bool = False) -> Tensor:
    """residual + gate * branch, whatever is broadcast, in the layout that eager gives; of the `tokens` of a transformer
    block in that of the branch."""
    # The op returns what is dense; a permuted residual is added to.
    fits = residual.shape == branch.shape and fits_gate(gate, branch.shape) and is_settled(residual)
    if fits and not rounds_as_eager():
        return functional.gate_residual(residual, gate, branch)
    branch = modulation(gate) * branch
    return added(residual, branch) if tokens else residual + branch
