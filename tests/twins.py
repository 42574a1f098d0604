"""A block beside its eager twin: how the tests of blocks, of the zero contract and of conversion compare the two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import zeroblock as zb
from zeroblock.testing import assert_error_budget, eager, eager_video

Results = dict[str, Tensor]


class EagerZeroLayer(nn.Module):
    """residual + layer(x); goes before the layer's class."""

    def forward(self, x, residual=None):
        y = super().forward(x)
        return y if residual is None else residual + y


def _eager_zero_layer(kind: type) -> Callable[..., nn.Module]:
    layer = type(kind.__name__, (EagerZeroLayer, kind), {})
    return lambda *args, **kwargs: eager.zero_module(layer(*args, **kwargs))


# The eager twin of each module of zb.nn, under its name.
EAGER = SimpleNamespace(
    **vars(eager),
    ZeroConv1d=_eager_zero_layer(nn.Conv1d),
    ZeroConv2d=_eager_zero_layer(nn.Conv2d),
    ZeroConv3d=_eager_zero_layer(nn.Conv3d),
    ZeroLinear=_eager_zero_layer(nn.Linear),
    **{n: getattr(eager_video, n) for n in ("CausalConv3d", "ChannelRMSNorm", "VideoResBlock")},
)


@dataclasses.dataclass(frozen=True)
class Case:
    """build(ns) makes the block from `zb.nn` or EAGER; in the zero phase the parameter `tail` is zero."""

    build: Callable[[Any], nn.Module]
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    tail: str
    counter: str  # under which zb.testing.counters() counts the block
    rows: tuple[int, ...] | None = None  # only these of the six gates, shifts and scales are zero, in the bias as well
    half: bool = True  # PyTorch can run the eager block in bf16 and fp16 on a CPU

    def pair(self, dtype: torch.dtype = torch.float32, phase: str = "zero") -> tuple[nn.Module, nn.Module]:
        """(ours, eager's): the same weights, none of them special but the zero ones."""
        torch.manual_seed(7)
        ours, theirs = self.build(zb.nn), self.build(EAGER)
        with torch.no_grad():
            for p in ours.parameters():
                p.add_(0.1 * torch.randn_like(p))
            if phase == "zero":
                self._zero(ours)
        ours.to(dtype)
        theirs.to(dtype).load_state_dict(ours.state_dict())
        return ours, theirs

    def _zero(self, block: nn.Module) -> None:
        if self.rows is None:
            self.weight(block).zero_()
            return
        for p in (self.weight(block), block.get_parameter(self.tail.replace("weight", "bias"))):
            for i, row in enumerate(self.rows):
                p.chunk(6)[row].fill_(-0.0 if i % 2 else 0.0)

    def weight(self, block: nn.Module) -> nn.Parameter:
        return block.get_parameter(self.tail)

    def example(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in self.shapes)


def random_like(y: Tensor, seed: int = 2) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)


def redrawn(inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Other values in tensors of the same shapes, dtypes and layouts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator)) for t in inputs]


def gradients(module: nn.Module, inputs, y: Tensor, dy: Tensor) -> dict[str, Tensor | None]:
    """{name: gradient} of every input and parameter; a missing one is None."""
    names = [*(f"input {i}" for i in range(len(inputs))), *(n for n, _ in module.named_parameters())]
    tensors = [*inputs, *module.parameters()]
    found = iter(torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy, allow_unused=True))
    return {n: next(found) for n, t in zip(names, tensors, strict=True) if t.requires_grad}


def run(module: nn.Module, inputs, seed: int = 2, autocast: torch.dtype | None = None):
    """(y, {name: gradient}) for a random gradient of y, the same for the same seed."""
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = module(*inputs)
    return y, gradients(module, inputs, y, random_like(y, seed))


def results(block: nn.Module, inputs: list[Tensor]) -> Results:
    """{"y": output, name: gradient of that input or parameter}, each of which there must be; dropout from a seed."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    torch.manual_seed(3)
    y, found = run(block, leaves)
    assert (missing := [name for name, g in found.items() if g is None]) == [], f"no gradient: {missing}"
    return {"y": y.detach(), **found}


def judged(judge: Callable[[range], None]) -> None:
    """judge(seeds) on one draw. Its error is itself a chance: a miss is judged again, on eight others together."""
    try:
        judge(range(1))
    except AssertionError:
        judge(range(1, 9))


def assert_within_budget(sample: Callable[[int], tuple[Results, Results, Results]]) -> None:
    """sample(seed) -> (ours, eager's, fp64): every tensor of ours is within twice eager's error."""

    def judge(seeds: range) -> None:
        found = [sample(seed) for seed in seeds]
        assert all(got.keys() == plain.keys() == exact.keys() for got, plain, exact in found)
        for key in found[0][2]:
            tensors = (torch.stack([result[i][key] for result in found]) for i in range(3))
            assert_error_budget(*tensors, key, draws=True)

    judged(judge)


def assert_gradients(*draws: tuple[dict, dict, dict]) -> None:
    """(ours, eager's, fp64), of one draw or several: the same tensors, exact zeros where eager has them, the rest by
    error budget, all of them together.

    Each gradient is measured relative to its own norm: a wrong one shows, however small, while a single number that
    eager happens to hit exactly does not set the budget.
    """
    joint: list[list[Tensor]] = [[], [], []]
    for got, expected, exact in draws:
        assert got.keys() == expected.keys()
        names = []
        for name, g in expected.items():
            assert (got[name] is None) == (g is None), f"{name}: {got[name]}, eager has {g}"
            if g is None:
                continue
            assert got[name].dtype == g.dtype and got[name].shape == g.shape, name
            if not g.any():
                assert not got[name].any(), f"{name}: not zero"
            elif (g.double() - exact[name]).norm() < exact[name].norm():  # the others cancel
                names.append(name)
        scales = {n: exact[n].norm() for n in names}
        for rows, found in zip(joint, (got, expected, exact), strict=True):
            rows.append(torch.cat([(found[n].double() / scales[n]).flatten() for n in names]))
    assert_error_budget(*(torch.stack(rows) for rows in joint), f"gradients of {', '.join(names)}", draws=True)
