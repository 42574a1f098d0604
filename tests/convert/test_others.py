"""Fixup, ReZero, PixArt, latent diffusion's transformer and ControlNet, accelerated."""

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import assert_bitwise_equal, counters, eager, reset_counters

from . import oracles_tokens as oracles
from .cases import Case, assert_drop_in, randomize_


class PixArt(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.final_layer = oracles.PixArtBlock(24, 2), oracles.T2IFinalLayer(24, 6)

    def forward(self, x, y, t):
        return self.final_layer(self.block(x, y, t), t[:, :24])


def fixup(kind, inplanes, planes, stride=1, downsample=lambda: None):
    return Case(
        lambda: kind(inplanes, planes, stride, downsample()),
        lambda: (torch.randn(2, inplanes, 6, 6),),
        {"FixupBlock": 1},
        1,
    )


def rezero(dropout):
    return Case(
        lambda: oracles.RZTXEncoderLayer(16, 2, 32, dropout),
        lambda: (torch.randn(5, 2, 16),),
        {"RZTXEncoderLayer": 2},
        2,
    )


CASES = {
    "fixup": fixup(eager.FixupBasicBlock, 8, 8),
    "fixup-cifar-down": fixup(eager.FixupBasicBlock, 8, 16, 2, lambda: nn.AvgPool2d(1, stride=2)),
    "fixup-bottleneck": fixup(eager.FixupBottleneck, 16, 4),
    "fixup-imagenet-down": fixup(eager.FixupBottleneck, 8, 4, 2, lambda: nn.Conv2d(8, 16, 1, stride=2, bias=False)),
    "rezero": rezero(0.0),
    "rezero-dropout": rezero(0.2),
    "pixart": Case(
        PixArt,
        lambda: (torch.randn(2, 5, 24), torch.randn(2, 3, 24), torch.randn(2, 144)),
        {"T2IFinalLayer": 1, "ZeroLayer": 1},
        3,
        skipped_inference={"T2IFinalLayer": 1, "PixArtBlock": 1},
    ),
    "spatial-transformer": Case(
        lambda: oracles.SpatialTransformer(32, 8),
        lambda: (torch.randn(2, 32, 4, 4), torch.randn(2, 3, 8)),
        {"ZeroLayer": 1},
        2,
        skipped_inference={"SpatialTransformer": 1, "ZeroLayer": 1},
    ),
    "controlnet": Case(
        oracles.ControlNet,
        lambda: (torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 3, 8)),
        # Four zero convolutions and the hint's; two ResBlocks, and the transformer's projection.
        {"ZeroLayer": 6, "ResBlock": 2},
        10,
        skipped_inference={"ControlNet": 1, "ZeroLayer": 6, "ResBlock": 2, "SpatialTransformer": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_drop_in(name):
    assert_drop_in(CASES[name])


# ---- whole branches in inference ------------------------------------------------------------------------------------


@torch.no_grad()
def skipped_by(family, model, inputs):
    reset_counters()
    y = model(*inputs)
    return y, counters()


@torch.no_grad()
def test_zero_control_branch_is_not_run_in_inference():
    case = CASES["controlnet"]
    torch.manual_seed(0)
    theirs = case.make().eval()
    for layer in (*theirs.zero_convs, theirs.middle_block_out):
        nn.init.normal_(layer[0].bias)
    ours = copy.deepcopy(theirs)
    zb.accelerate(ours)
    inputs = case.inputs()
    expected = theirs(*inputs)
    ours(*inputs)  # the first time at this size the original runs and is compared
    reset_counters()
    got = ours(*inputs)
    assert counters() == {"ControlNet": (0, 1)}
    for a, b in zip(got, expected, strict=True):
        assert_bitwise_equal(a, b)
        assert a.stride() == b.stride() and a.data_ptr() != b.data_ptr()
    nn.init.ones_(ours.zero_convs[2][0].weight)
    nn.init.ones_(theirs.zero_convs[2][0].weight)
    for a, b in zip(ours(*inputs), theirs(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Louder(oracles.ControlNet):
    """A fork that adds something of its own to the results."""

    def forward(self, *args):
        return [y + 1 for y in super().forward(*args)]


@torch.no_grad()
def test_fork_that_returns_something_else_is_never_skipped():
    case = CASES["controlnet"]
    ours = type("ControlNet", (Louder,), {})().eval()
    plain = copy.deepcopy(ours)
    zb.accelerate(ours)
    inputs = case.inputs()
    for _ in range(3):
        for a, b in zip(ours(*inputs), plain(*inputs), strict=True):
            assert torch.equal(a, b) and a.any()


@torch.no_grad()
def test_spatial_transformer_is_not_run_in_inference():
    case = CASES["spatial-transformer"]
    model = case.make().eval()
    nn.init.normal_(model.proj_out.bias)
    plain = copy.deepcopy(model)
    zb.accelerate(model)
    inputs = case.inputs()
    model(*inputs)
    model.transformer_blocks = None  # it is not looked at any more
    assert torch.equal(model(*inputs), plain(*inputs))


def test_dropout_in_a_whole_branch_keeps_it_running():
    model = CASES["spatial-transformer"].make().train()
    model.transformer_blocks.append(nn.Dropout(0.5))
    zb.accelerate(model)
    inputs = CASES["spatial-transformer"].inputs()
    reset_counters()
    with torch.no_grad():
        model(*inputs), model(*inputs)
    assert "SpatialTransformer" not in counters()


def test_masked_attention_of_rezero():
    ours, theirs = oracles.RZTXEncoderLayer(16, 2, 32, 0.0), oracles.RZTXEncoderLayer(16, 2, 32, 0.0)
    ours.load_state_dict(randomize_(theirs).state_dict())
    zb.accelerate(ours)
    x = torch.randn(4, 2, 16)
    mask = torch.triu(torch.full((4, 4), float("-inf")), 1)
    torch.testing.assert_close(ours(x, src_mask=mask), theirs(x, src_mask=mask), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours(x), theirs(x, src_mask=mask))
