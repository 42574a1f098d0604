"""The residual blocks of CompVis, of what was copied from them, and of score_sde, accelerated."""

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import assert_bitwise_equal, counters, reset_counters

from . import oracles_compvis as oracles
from .cases import Case, assert_drop_in, randomize_

C, EMB = 16, 12
SILU = nn.SiLU()


def block(kind=oracles.ResnetBlock, *args, given=(), size=(4, 6), zero=False, **options):
    """A case of a block of width C; `given`: what it is called with beside x."""
    name = "ResnetBlock" if kind.__name__ == "ResnetBlock" else "ResnetBlockDDPM"

    def make():
        made = kind(*args, **options)
        return oracles.zeroed(made) if zero else made

    def inputs():
        return torch.randn(2, C, *size), *(t if t is None else torch.randn(t) for t in given)

    return Case(make, inputs, {name: 1} if zero else {}, 1)


TEMB = ((2, EMB),)
CASES = {
    "autoencoder": block(oracles.ResnetBlock, C, C, given=(None,)),
    "autoencoder, zero": block(oracles.ResnetBlock, C, C, given=(None,), zero=True),
    "autoencoder, wider": block(oracles.ResnetBlock, C, 24, given=(None,)),
    "u-net": block(oracles.ResnetBlock, C, C, EMB, given=TEMB),
    "u-net, zero": block(oracles.ResnetBlock, C, 24, EMB, given=TEMB, zero=True),
    "u-net, dropout": block(oracles.ResnetBlock, C, C, EMB, 0.3, given=TEMB),
    "u-net, dropout, zero": block(oracles.ResnetBlock, C, C, EMB, 0.3, given=TEMB, zero=True),
    "u-net, 3x3 shortcut": block(oracles.ResnetBlock, C, 24, EMB, conv_shortcut=True, given=TEMB),
    "1-D": block(oracles.ResnetBlock, C, C, EMB, dims=1, given=TEMB, size=(6,)),
    "3-D": block(oracles.ResnetBlock, C, 24, EMB, dims=3, given=TEMB, size=(2, 4, 3)),
    "optional embedding": block(oracles.OptionalEmbedding, C, C, EMB, given=TEMB),
    "optional embedding, absent": block(oracles.OptionalEmbedding, C, C, zero=True),
    "flux": block(oracles.NoEmbedding, C, C),
    "flux, zero": block(oracles.NoEmbedding, C, C, zero=True),
    "flux, wider": block(oracles.NoEmbedding, C, 24),
    "in place": block(oracles.InPlace, C, C),
    "in place, dropout, zero": block(oracles.InPlace, C, 24, 0.2, zero=True),
    "score_sde": block(oracles.ResnetBlockDDPM, SILU, C, C, EMB, given=TEMB),
    "score_sde, zero": block(oracles.ResnetBlockDDPM, SILU, C, C, EMB, given=TEMB, zero=True),
    "score_sde, wider": block(oracles.ResnetBlockDDPM, SILU, C, 24, EMB, given=TEMB),
    "score_sde, 3x3 shortcut": block(oracles.ResnetBlockDDPM, SILU, C, 24, conv_shortcut=True),
    "ddpm++": block(oracles.ResnetBlockDDPMpp, SILU, C, 24, EMB, skip_rescale=True, given=TEMB),
    "biggan": block(oracles.ResnetBlockBigGANpp, SILU, C, C, EMB, given=TEMB),
    "biggan, up": block(oracles.ResnetBlockBigGANpp, SILU, C, 24, EMB, up=True, given=TEMB, zero=True),
    "biggan, down": block(oracles.ResnetBlockBigGANpp, SILU, C, C, EMB, down=True, given=TEMB),
}


@pytest.mark.parametrize("name", CASES)
def test_drop_in(name):
    assert_drop_in(CASES[name])


FORKS = {
    "another activation": (oracles.Gelu(C, C), "does not compute"),
    "scaled": (oracles.Scaled(C, C), "does not compute"),
    "norm after convolution": (oracles.PostNorm(C, C), "its norms come after its convolutions"),
    "score_sde with another activation": (oracles.ResnetBlockDDPM(nn.ELU(), C, C), "does not compute"),
    "score_sde with FIR filters": (
        oracles.ResnetBlockBigGANpp(SILU, C, C, up=True, fir=True),
        "it resamples with a FIR filter",
    ),
    "batch norm": (oracles.ResnetBlock(C, C), "not the plain ones"),
}
FORKS["batch norm"][0].norm1 = nn.BatchNorm2d(C)


@pytest.mark.parametrize("name", FORKS)
def test_forks_are_left_alone(name):
    fork, reason = FORKS[name]
    kind = type(fork)
    (row,) = zb.accelerate(fork).left_alone
    assert reason in row.reason and type(fork) is kind


class Encoder(nn.Module):
    """An autoencoder's half: what is accelerated is a part of a model that somebody compiles, copies and restores."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, C, 3, padding=1)
        self.block = nn.ModuleList([oracles.ResnetBlock(C, C), oracles.ResnetBlock(C, 24), oracles.ResnetBlock(24, 24)])
        self.norm_out, self.conv_out = oracles.norm(24), nn.Conv2d(24, 8, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for block in self.block:
            h = block(h, None)
        return self.conv_out(oracles.swish(self.norm_out(h)))


def test_a_model_of_them():
    torch.manual_seed(0)
    plain = randomize_(Encoder())
    model = copy.deepcopy(plain)
    names, state = [n for n, _ in model.named_parameters()], set(model.state_dict())
    report = zb.accelerate(model, strict=True)
    assert report.blocks == 3 and [b.path for b in report.branches] == [f"block.{i}.conv2" for i in range(3)]
    assert names == [n for n, _ in model.named_parameters()] and state == set(model.state_dict())
    x = torch.randn(2, 3, 4, 6)
    reset_counters()
    y = model(x)
    assert counters()["ResnetBlock"] == (3, 0)
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
    assert_bitwise_equal(copy.deepcopy(model)(x), y)
    assert zb.restore(model) == 3
    assert_bitwise_equal(model(x), plain(x))


@pytest.mark.parametrize("zero", [False, True])
def test_compiled_in_one_graph(zero):
    torch.manual_seed(0)
    block = randomize_(oracles.ResnetBlock(C, 24, EMB))
    if zero:
        oracles.zeroed(block)
    zb.accelerate(block, strict=True)
    x, temb = torch.randn(2, C, 4, 4, requires_grad=True), torch.randn(2, EMB)
    y = block(x, temb)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    z = compiled(x, temb)
    (dz,) = torch.autograd.grad(z.square().sum(), x)
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(dz, dx)


def test_an_embedding_the_block_has_no_layer_for_raises_as_before():
    block = oracles.ResnetBlock(C, C)
    zb.accelerate(block, strict=True)
    with pytest.raises(AttributeError, match="temb_proj"):
        block(torch.randn(2, C, 4, 4), torch.randn(2, EMB))
