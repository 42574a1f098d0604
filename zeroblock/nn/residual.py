"""Any residual branch, skipped while it is zero: ResidualBranch, ReZero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, zero
from ..blocks import layers as _common
from ..blocks.one_pass import residual_if_zero
from ..blocks.skip import Branch, Tail, skipped_branch


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
    random: bool | None = None,
) -> Tensor | None:
    """residual + gate * tail(body(*activations)) when that branch is zero and may be skipped; None: compute it densely.

    `modules` are the submodules that a skip bypasses, the tail's excepted; their parameters get zero gradients.
    `random`: whether the body may draw random numbers (None: look at the modules).
    """
    if tail is not None and not (_common.is_plain_conv(tail) or _common.is_plain_linear(tail)):
        return None
    judged = gate if tail is None else tail.weight
    if judged is None or not zero.may_skip_branch(name, policy, judged):
        return None
    bypassed = modules if tail is None else (*modules, tail)
    if not zero.bypassable(bypassed):
        return None
    if gate is None and tail is not None and not torch.is_grad_enabled():
        y = residual_if_zero(tail, residual)
        if y is not None and random is None:
            random = any(map(_common.may_draw, modules))
        if y is None or not (random or y is NotImplemented):
            zero.count(name, y is not None)
            return y
    description = Tail(tail)
    if tail is not None and residual.shape[1 if description.is_conv else -1] != tail.weight.shape[0]:
        return None  # eager broadcasts or raises
    found = _common.decide(name, description, gate)
    if found is None:
        return None
    if random is None:
        random = any(map(_common.may_draw, modules))
    branch = Branch(
        description,
        activations,
        _common.parameters_of(*modules),
        _Replayable(body) if random else lambda *a: (body(*a),),
        lambda h: h,
        residual,
        zero_gate=found == "gate",
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


class ResidualBranch(nn.Module):
    """y = shortcut(x) + gate * tail(body(x, *args)).

    body: any module. tail: nn.Conv1d/2d/3d or nn.Linear, the branch's last layer. gate: None (1), a parameter or tensor
    ([1]; for tokens also [D], [B, D], [B, T, D]; for images [C] or [N, C]), or a module called with *args. shortcut:
    None (identity) or a module; it may change the shape as the tail does. While the tail's weight or the gate is
    exactly zero, the matmuls of the branch do not run and gradients are exact (contract: zeroblock/zero.py).

    In training a body that may draw random numbers runs even where its result is not wanted, so that the random stream
    stays eager's: anything but the deterministic layers of torch.nn. `draws_random_numbers = False` on a module of your
    own says that it is one of those.
    """

    zero_skip = "auto"

    def __init__(self, body: nn.Module, tail: nn.Module, gate: Any = None, shortcut: nn.Module | None = None):
        super().__init__()
        self.body = body
        self.tail = tail
        self.gate = gate
        self.shortcut = shortcut

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        gate = self.gate(*args) if isinstance(self.gate, nn.Module) else self.gate
        y = residual_branch(
            type(self).__name__, self.zero_skip, residual, self.body, self.tail, gate, (x, *args), modules=(self.body,)
        )
        if y is not None:
            return y
        branch = self.tail(self.body(x, *args))
        if gate is None:
            return residual + branch
        if gate.numel() == 1 or branch.dim() == 3 and not _common.is_plain_conv(self.tail):
            return functional.gate_residual(residual, gate.view(-1) if gate.numel() == 1 else gate, branch)
        return residual + Tail(self.tail).broadcast(gate, branch.dim()) * branch


class ReZero(nn.Module):
    """y = x + resweight * body(x, *args), resweight [1] zero at the start.

    While resweight is exactly zero the body runs at most once, without a graph, for the gradient of resweight.
    Source: Bachlechner et al. 2021, majumderb/rezero.
    """

    zero_skip = "auto"

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        self.resweight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        y = residual_branch(
            type(self).__name__, self.zero_skip, x, self.body, None, self.resweight, (x, *args), modules=(self.body,)
        )
        return functional.gate_residual(x, self.resweight, self.body(x, *args)) if y is None else y
