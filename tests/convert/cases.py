"""What the tests of accelerate() share: a foreign model against its accelerated copy, in every phase of its life."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

import zeroblock as zb
from zeroblock.testing import assert_error_budget, counters, eager, reset_counters

from ..twins import assert_gradients
from .model_cases import assert_trained_alike, outputs

DRAWS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """make() builds the foreign model with its own initialisation; inputs() are its positional arguments.

    `skipped`: {family: branches skipped by a training forward and backward}, {} where nothing is zero;
    `skipped_inference` where a forward without gradients differs. `branches`: rows of the report. `equal`: eager's
    result is reproduced exactly while everything is zero (no fused op runs outside the skipped branches). `exact` makes
    the float64 oracle of the untouched model.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    skipped: dict[str, int]
    branches: int
    lr: float = 0.1
    equal: bool = True
    skipped_inference: dict[str, int] | None = None
    exact: Callable[[nn.Module], nn.Module] = lambda m: copy.deepcopy(m).double()


def guided_block(**options):
    return eager.ResBlock(32, 16, 0.0, **options)


class Net(nn.Module):
    """Two of guided-diffusion's blocks, or the given ones, in `blocks`."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks or [guided_block(), guided_block(use_scale_shift_norm=True)])

    def forward(self, x, emb):
        for block in self.blocks:
            x = block(x, emb)
        return x


def example():
    return torch.randn(2, 32, 4, 4), torch.randn(2, 16)


def is_skipping(net):
    reset_counters()
    with torch.no_grad():
        net(*example())
    return any(skipped for _, skipped in counters().values())


def build(case: Case, randomize: bool = False, seed: int = 0) -> tuple[nn.Module, nn.Module, zb.convert.Report]:
    """(accelerated, untouched, report), the same weights in both."""
    torch.manual_seed(seed)
    theirs = case.make()
    ours = copy.deepcopy(theirs)
    report = zb.accelerate(ours)  # before the weights move: single layers are known by being zero
    if randomize:
        ours.load_state_dict(randomize_(theirs).state_dict())
    assert len(report.branches) == case.branches, report
    assert all(b.kind is zb.convert.Reason.PARTS for b in report.left_alone), report
    return ours, theirs, report


def randomize_(model: nn.Module) -> nn.Module:
    """Fresh random parameters everywhere, norm weights about 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            fresh = torch.randn_like(p, dtype=torch.float32) * 0.2
            p.copy_(fresh + 1 if p.dim() == 1 and name.endswith("weight") else fresh)
    return model


def arguments(case: Case, dtype: torch.dtype, seed: int = 1) -> tuple:
    """The inputs; floating ones in dtype and wanting a gradient."""
    torch.manual_seed(seed)
    return tuple(
        t.to(dtype).requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in case.inputs()
    )


def run(model: nn.Module, inputs: tuple, seed: int = 2) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """(floating outputs, {name: gradient}) for random gradients of the outputs; dropout drawn from `seed`."""
    torch.manual_seed(seed)
    ys = outputs(model(*inputs))
    generator = torch.Generator().manual_seed(seed)
    wanted = [y for y in ys if y.requires_grad]
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in wanted]
    named = {f"input {i}": t for i, t in enumerate(inputs) if isinstance(t, Tensor) and t.requires_grad}
    named |= {n: p for n, p in model.named_parameters() if p.requires_grad}
    for t in named.values():
        t.grad = None
    torch.autograd.backward(wanted, dys)  # reentrant checkpoints refuse autograd.grad
    return ys, {n: t.grad for n, t in named.items()}


def assert_drop_in(case: Case) -> None:
    """Forward, gradients and ten optimizer steps from the model's own initialisation, then with random weights, then
    inference."""
    assert_same(case, randomize=False)
    assert_same(case, randomize=True)
    assert_same_inference(case)
    assert_same_training(case)


def assert_same(case: Case, randomize: bool) -> None:
    ours, theirs, _ = build(case, randomize)
    oracle = case.exact(theirs)
    draws = []
    for seed in range(1, 1 + DRAWS):
        exact_ys, exact = run(oracle, arguments(case, torch.float64, seed))
        expected_ys, expected = run(theirs, arguments(case, torch.float32, seed))
        reset_counters()
        ys, got = run(ours, arguments(case, torch.float32, seed))
        assert_skips({} if randomize else case.skipped)
        assert len(ys) == len(expected_ys) > 0
        for i, (y, expected_y, exact_y) in enumerate(zip(ys, expected_ys, exact_ys, strict=True)):
            assert y.dtype == expected_y.dtype
            if case.equal and case.skipped and not randomize:
                assert torch.equal(y, expected_y), f"output {i}: {(y - expected_y).abs().max()}"
            assert_error_budget(y.detach(), expected_y.detach(), exact_y.detach(), f"output {i}")
        for name, g in expected.items():  # eager says None where a parameter was never reached, we may say zero
            if g is None and got[name] is not None:
                assert not got[name].any(), name
                got[name] = None
        draws.append((got, expected, exact))
    assert_gradients(*draws)  # of several draws: the largest error of one is luck


def assert_skips(expected: dict[str, int]) -> None:
    got = {name: skipped for name, (_, skipped) in counters().items() if skipped and name in zb.convert.families()}
    assert got == expected, counters()


def assert_same_inference(case: Case) -> None:
    ours, theirs, _ = build(case)
    with torch.no_grad():
        inputs = [t.detach() if isinstance(t, Tensor) else t for t in arguments(case, torch.float32)]
        ours.eval(), theirs.eval()
        expected = outputs(theirs(*inputs))
        reset_counters()
        got = outputs(ours(*inputs))
    assert_skips(case.skipped if case.skipped_inference is None else case.skipped_inference)
    for y, expected_y in zip(got, expected, strict=True):
        if case.equal and case.skipped:
            assert torch.equal(y, expected_y)
        torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-4)


def assert_same_training(case: Case) -> None:
    """Ten optimizer steps from the model's own initialisation end as close to an fp64 run as eager's do."""
    ours, theirs, _ = build(case)
    call = lambda model, i: model(*arguments(case, next(model.parameters()).dtype, seed=10 + i))  # noqa: E731
    assert_trained_alike(ours, theirs, case.exact(theirs), call, case.lr)
