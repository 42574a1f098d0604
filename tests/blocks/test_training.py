"""Twenty optimizer steps from zero initialisation stay as close to an fp64 run as eager's do, zero phase included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.testing import eager

from ..twins import EAGER
from .cases import tokens_body

STEPS = 20


class _UNet(nn.Module):
    """A ResBlock between two convolutions, the last one zero: its gradients are zero until that one has moved."""

    def __init__(self, ns: Any):
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.block = ns.ResBlock(64, 16, 0.0, use_scale_shift_norm=True)
        self.last = ns.ZeroConv2d(64, 3, 3, padding=1)

    def forward(self, x, emb):
        return self.last(self.block(self.first(x), emb))


class _DiT(nn.Module):
    def __init__(self, ns: Any):
        super().__init__()
        self.blocks = nn.ModuleList(ns.DiTBlock(32, 4) for _ in range(2))
        self.last = ns.FinalLayer(32, 1, 6)

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return self.last(x, c)


class _Residual(nn.Module):
    """x + layer(x), so that a zero layer alone is something to train."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


class Case(NamedTuple):
    build: Callable[[Any], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    zero_steps: dict[str, int]  # {name of a counter: at how many of the first steps the branch is skipped}
    lr: float = 0.5


_IMAGE, _EMB = (4, 64, 6, 6), (4, 16)
CASES = {
    "ResBlock-film": Case(
        lambda ns: ns.ResBlock(64, 16, 0.0, use_scale_shift_norm=True), (_IMAGE, _EMB), {"ResBlock": 1}
    ),
    "ResBlock-add-1x1": Case(lambda ns: ns.ResBlock(64, 16, 0.0, out_channels=32), (_IMAGE, _EMB), {"ResBlock": 1}),
    "ResBlock-add-down": Case(lambda ns: ns.ResBlock(64, 16, 0.0, down=True), (_IMAGE, _EMB), {"ResBlock": 1}),
    "ResBlock-checkpoint": Case(
        lambda ns: ns.ResBlock(64, 16, 0.0, use_checkpoint=True), (_IMAGE, _EMB), {"ResBlock": 1}
    ),
    "DiTBlock": Case(lambda ns: ns.DiTBlock(32, 4), ((4, 9, 32), (4, 32)), {"DiTBlock": 1}),
    "FinalLayer": Case(lambda ns: ns.FinalLayer(32, 1, 6), ((4, 9, 32), (4, 32)), {"FinalLayer": 1}),
    "ZeroConv2d": Case(lambda ns: _Residual(ns.ZeroConv2d(6, 6, 3, padding=1)), ((4, 6, 5, 7),), {"ZeroConv2d": 1}),
    "ZeroLinear": Case(lambda ns: _Residual(ns.ZeroLinear(12, 12)), ((4, 5, 12),), {"ZeroLinear": 1}),
    "FixupBasicBlock": Case(lambda ns: ns.FixupBasicBlock(8, 8), ((4, 8, 6, 6),), {"FixupBasicBlock": 1}, 0.2),
    "FixupBottleneck": Case(lambda ns: ns.FixupBottleneck(16, 4), ((4, 16, 6, 6),), {"FixupBottleneck": 1}, 0.2),
    "ReZero": Case(lambda ns: ns.ReZero(tokens_body()), ((4, 5, 12),), {"ReZero": 1}),
    "ResidualBranch": Case(
        lambda ns: ns.ResidualBranch(tokens_body(), eager.zero_module(nn.Linear(12, 12)), nn.Parameter(torch.ones(12))),
        ((4, 5, 12),),
        {"ResidualBranch": 1},
    ),
    "UNet": Case(_UNet, ((4, 3, 6, 6), _EMB), {"ZeroConv2d": 1, "ResBlock": 2}, 0.1),
    "DiT": Case(_DiT, ((4, 9, 32), (4, 32)), {"FinalLayer": 1, "DiTBlock": 2}),
}

OPTIMIZERS = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    # At the default eps of 1e-8 Adam turns gradients that are rounding noise into full steps.
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=1e-2, eps=1e-3),
}


class Run(NamedTuple):
    weights: torch.Tensor
    losses: torch.Tensor
    plans: list[dict[str, tuple[int, int]]]  # the counters of each step


def _flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(model: nn.Module, case: Case, optimizer: str, dtype: torch.dtype) -> Run:
    """Regression to a fixed target from fresh noise, the same batches in every dtype."""
    model.to(dtype)
    step = OPTIMIZERS[optimizer](model.parameters(), case.lr)
    generator = torch.Generator().manual_seed(2)
    target, losses, plans = None, [], []
    for _ in range(STEPS):
        inputs = [torch.randn(s, generator=generator).to(dtype) for s in case.shapes]
        testing.reset_counters()
        y = model(*inputs)
        if target is None:
            target = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        loss = (y - target).square().mean()
        step.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        step.step()
        losses.append(loss.detach())
        plans.append(testing.counters())
    return Run(_flat(model), torch.stack(losses), plans)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_follow_eager(name, optimizer):
    case = CASES[name]
    torch.manual_seed(0)
    model, plain = case.build(zb.nn), case.build(EAGER)
    plain.load_state_dict(model.state_dict())
    start = _flat(plain).double()
    exact = train(copy.deepcopy(plain), case, optimizer, torch.float64)
    eagerly = train(plain, case, optimizer, torch.float32)
    got = train(model, case, optimizer, torch.float32)

    moved = (exact.weights - start).norm() / start.norm()
    assert moved > 1e-2 and exact.losses[-1] != exact.losses[0], "nothing was trained"
    for key, count in case.zero_steps.items():
        skipped = [plan[key][1] > 0 for plan in got.plans]
        executed = [plan[key][0] > 0 for plan in got.plans]
        assert skipped == [i < count for i in range(STEPS)]
        assert executed == [i >= count for i in range(STEPS)]
    for what in ("weights", "losses"):
        a, b, x = (getattr(run, what).double() for run in (got, eagerly, exact))
        limit = 2 * (b - x).norm() + testing.rounding(torch.float32) * x.norm()
        assert (a - x).norm() <= limit, f"{what}: {(a - x).norm() / x.norm():.3g}, allowed {limit / x.norm():.3g}"
