"""An operand of one batch beside one of several: shape, values and every gradient as eager broadcasts them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import eager

from ..twins import EAGER, Case

IMAGE, TOKENS, VECTOR = (64, 4, 3), (5, 32), (32,)


class Conditioned(nn.Module):
    """A body whose result has the larger batch of x and c."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, c):
        return self.linear(x + c[:, None])


class Gate(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight), nn.init.zeros_(self.linear.bias)

    def forward(self, c):
        return self.linear(c)


def _resblock(**options):
    return Case(lambda ns: ns.ResBlock(64, 32, 0.0, **options), (IMAGE, VECTOR), "out_layers.3.weight", "ResBlock")


def _branch(gate=lambda: None):
    return Case(
        lambda ns: ns.ResidualBranch(Conditioned(32), nn.Linear(32, 32), gate()),
        (TOKENS, VECTOR),
        "tail.weight",
        "ResidualBranch",
    )


CASES = {
    "ResBlock-add": _resblock(),
    "ResBlock-film": _resblock(use_scale_shift_norm=True),
    "ResBlock-film-up-wider": _resblock(use_scale_shift_norm=True, up=True, out_channels=96),
    "DiTBlock": Case(
        lambda ns: ns.DiTBlock(32, 4), (TOKENS, VECTOR), "adaLN_modulation.1.weight", "DiTBlock", rows=(2, 5)
    ),
    "FinalLayer": Case(lambda ns: ns.FinalLayer(32, 2, 3), (TOKENS, VECTOR), "linear.weight", "FinalLayer"),
    "ReZero": Case(lambda ns: ns.ReZero(Conditioned(32)), (TOKENS, VECTOR), "resweight", "ReZero"),
    "ResidualBranch": _branch(),
    "ResidualBranch-scalar": _branch(lambda: nn.Parameter(torch.ones(1))),
    "ResidualBranch-gated": _branch(lambda: Gate(32)),
    "ZeroLinear": Case(lambda ns: ns.ZeroLinear(32, 32), (TOKENS, TOKENS), "weight", "ZeroLinear"),
    "ZeroConv2d": Case(lambda ns: ns.ZeroConv2d(64, 64, 1), (IMAGE, IMAGE), "weight", "ZeroConv2d"),
}
BATCHES = {"x1": (1, 3), "c1": (3, 1)}


def assert_same(ours: nn.Module, theirs: nn.Module, inputs: list[torch.Tensor]) -> None:
    """In float64, where rounding cannot hide an error: result and gradients, then the result without gradients."""
    found = []
    for module in (ours.double(), theirs.double()):
        tensors = [t.double().requires_grad_() for t in inputs]
        torch.manual_seed(3)
        y = module(*tensors)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        grads = torch.autograd.grad((y * weights).sum(), [*tensors, *module.parameters()])
        with torch.no_grad():
            torch.manual_seed(3)
            quiet = module(*[t.detach() for t in tensors])
        found.append((y, quiet, *grads))
    assert [t.stride() for t in found[0][:2]] == [t.stride() for t in found[1][:2]]
    for got, expected in zip(*found, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def drawn(case: Case, batches: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(n, *shape) for n, shape in zip(batches, case.shapes, strict=True)]


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_modules(name, phase, batches):
    ours, theirs = CASES[name].pair(phase=phase)
    assert_same(ours, theirs, drawn(CASES[name], BATCHES[batches]))


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("ResBlock", "DiT", "Final"))])
def test_accelerated_blocks(name, phase, batches):
    _, theirs = CASES[name].pair(phase=phase)
    ours = copy.deepcopy(theirs)
    assert zb.accelerate(ours).blocks == 1
    for training in (True, False):
        assert_same(ours.train(training), theirs.train(training), drawn(CASES[name], BATCHES[batches]))


@pytest.mark.parametrize("batches", BATCHES)
def test_channels_last(batches):
    case = CASES["ResBlock-film"]
    ours, theirs = case.pair()
    x, emb = drawn(case, BATCHES[batches])
    assert_same(ours, theirs, [x.contiguous(memory_format=torch.channels_last), emb])


def test_dropout_is_drawn_for_the_larger_batch():
    torch.manual_seed(0)
    ours, theirs = (ns.ResBlock(64, 32, 0.5) for ns in (zb.nn, EAGER))
    nn.init.normal_(theirs.out_layers[3].weight)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, [torch.randn(1, *IMAGE), torch.randn(3, 32)])


def test_equal_batches_of_one_are_still_skipped():
    for name in ("ResBlock-film", "DiTBlock", "FinalLayer", "ReZero", "ResidualBranch"):
        ours, _ = CASES[name].pair()
        zb.testing.reset_counters()
        ours(*drawn(CASES[name], (1, 1)))
        executed, skipped = zb.testing.counters()[CASES[name].counter]
        assert skipped and not executed, name


def test_more_frames_of_embedding_than_of_images():
    """sgm's blocks along time: an embedding for each frame."""
    from ..convert import oracles

    torch.manual_seed(0)
    theirs = oracles.SgmResBlock(64, 16, dims=3, kernel_size=[3, 1, 1], exchange_temb_dims=True)
    ours = copy.deepcopy(theirs)
    assert zb.accelerate(ours).blocks == 1
    for frames in ((1, 3), (3, 1)):
        assert_same(ours, theirs, [torch.randn(2, 64, frames[0], 4, 4), torch.randn(2, frames[1], 16)])


def test_tokens_made_in_inference_mode_can_be_trained_on():
    """Eager saves nothing of what a norm without parameters is given."""
    for kind in ("DiTBlock", "FinalLayer"):
        case = CASES[kind]
        for phase in ("zero", "dense"):
            ours, theirs = case.pair(phase=phase)
            accelerated = copy.deepcopy(theirs)
            zb.accelerate(accelerated)
            with torch.inference_mode():
                x, c = drawn(case, (2, 2))
            c = c.clone()
            expected = torch.autograd.grad(theirs(x, c).square().sum(), list(theirs.parameters()))
            for module in (ours, accelerated):
                got = torch.autograd.grad(module(x, c).square().sum(), list(module.parameters()))
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_eager_twin_is_the_reference_of_these_shapes():
    """The twin itself broadcasts: the tests above compare something."""
    y = eager.ResBlock(64, 32, 0.0)(torch.randn(1, *IMAGE), torch.randn(3, 32))
    assert y.shape == (3, *IMAGE)
