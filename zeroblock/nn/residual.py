"""Any residual branch, skipped while it is zero: ResidualBranch, ReZero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.broadcast import add_gated
from ..blocks.layers import is_plain_conv
from ..blocks.residual import residual_branch
from ..blocks.skip import Tail


class ResidualBranch(nn.Module):
    """y = shortcut(x) + gate * tail(body(x, *args)).

    body: any module. tail: nn.Conv1d/2d/3d or nn.Linear, the branch's last layer. gate: None (1), a parameter or tensor
    ([1]; for tokens also [D], [B, D], [B, T, D]; for images [C] or [N, C]), or a module called with *args. shortcut:
    None (identity) or a module; it may change the shape as the tail does. While the tail's weight or the gate is
    exactly zero, the matmuls of the branch do not run and gradients are exact (contract: zeroblock/zero.py).

    In training a body that may draw random numbers runs even where its result is not wanted, so that the random stream
    stays eager's: anything but the deterministic layers of torch.nn. `draws_random_numbers = False` on a module of your
    own says that it is one of those, `draws_random_numbers = True` that it draws in eval mode too, where nothing else
    is taken to. A parameter that the body has and does not use gets a gradient of zeros while the branch is zero.
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
        name, policy, body, tail = type(self).__name__, self.zero_skip, self.body, self.tail
        _, y = residual_branch(name, policy, residual, body, tail, gate, (x, *args), modules=(body,))
        if y is not None:
            return y
        branch = tail(body(x, *args))
        if gate is None:
            return residual + branch
        if gate.numel() == 1 or branch.dim() == 3 and not is_plain_conv(tail):
            return add_gated(residual, gate.view(-1) if gate.numel() == 1 else gate, branch)
        return residual + Tail(tail).broadcast(gate, branch.dim()) * branch


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
        name, body, gate = type(self).__name__, self.body, self.resweight
        _, y = residual_branch(name, self.zero_skip, x, body, None, gate, (x, *args), modules=(body,))
        return add_gated(x, gate, body(x, *args)) if y is None else y
