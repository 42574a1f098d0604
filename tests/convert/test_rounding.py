"""accelerate(rounding="eager"): a block's own bits in bfloat16, while branches are zero and while they are not."""

from __future__ import annotations

import copy
import fnmatch

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.convert import Reason, proof
from zeroblock.convert.families import streams
from zeroblock.testing import assert_bitwise_equal, counters, eager, reset_counters

from . import oracles_flux, oracles_gated, oracles_tokens
from .cases import guided_block, randomize_
from .model_cases import outputs
from .oracles_gated import D

T = 5


def tokens(*widths):
    return lambda: (torch.randn(2, T, D), *(torch.randn(2, w) for w in widths))


def flux(double):
    D, text = oracles_flux.D, oracles_flux.TEXT
    sizes = ((2, T, D), (2, text, D), (2, D)) if double else ((2, T, D), (2, D))
    return lambda: (*map(torch.randn, sizes), oracles_flux.rotations(T + text if double else T))


# The block, its inputs, and what holds all of its branches at zero: parameters, and which of how many rows.
BLOCKS = {
    "dit": (lambda: eager.DiTBlock(D, 2), tokens(D), ("adaLN_modulation.1", (2, 5), 6)),
    "final layer": (lambda: eager.FinalLayer(D, 1, 6), tokens(D), ("linear", (0,), 1)),
    "flux, two streams": (oracles_flux.DoubleStreamBlock, flux(True), ("*_mod.lin", (2, 5), 6)),
    "flux, one stream": (oracles_flux.SingleStreamBlock, flux(False), ("modulation.lin", (2,), 3)),
    "described": (oracles_gated.DiTBlock, tokens(D), ("attn_norm.linear", (2, 5), 6)),
    "rezero": (
        lambda: oracles_tokens.RZTXEncoderLayer(16, 2, 32, 0.0),
        lambda: (torch.randn(T, 2, 16),),
        ("resweight", (0,), 1),
    ),
    "fixup": (
        lambda: eager.FixupBasicBlock(8, 8, 1, None),
        lambda: (torch.randn(2, 8, 6, 6),),
        ("scale", (0,), 1),
    ),
}


def zero_(block, pattern, rows, of):
    for name, p in block.named_parameters():
        if fnmatch.fnmatch(name, f"{pattern}*"):
            for row in rows:
                p.detach().chunk(of)[row].zero_()


@pytest.mark.parametrize("name", BLOCKS)
def test_bits_are_the_blocks_own(name):
    make, inputs, zero = BLOCKS[name]
    torch.manual_seed(0)
    plain = randomize_(make()).bfloat16().eval()
    ours, once = copy.deepcopy(plain), copy.deepcopy(plain)
    zb.accelerate(ours, strict=True, rounding="eager"), zb.accelerate(once, rounding="once")
    args = [t.bfloat16().requires_grad_() for t in inputs()]
    with torch.no_grad():
        assert_same_bits(ours(*args), plain(*args))
        if name not in ("rezero", "fixup"):  # one product and one sum, which may well round alike
            assert not all(map(torch.equal, outputs(once(*args)), outputs(plain(*args))))
    assert_same_bits(grads(ours, args), grads(plain, args))
    for block in (plain, ours):
        zero_(block, *zero)
    reset_counters()
    with torch.no_grad():
        got, expected = outputs(ours(*args)), outputs(plain(*args))
    assert all(map(torch.equal, got, expected))  # the sign of a zero aside
    assert sum(skips for _, skips in counters().values()) > 0


def assert_same_bits(got, expected):
    for a, b in zip(outputs(got), outputs(expected), strict=True):
        assert_bitwise_equal(a, b)


def grads(block, args):
    """Of the inputs and parameters."""
    ys = outputs(block(*args))
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys]
    return torch.autograd.grad(ys, [*args, *block.parameters()], dys)


def test_a_bias_behind_a_gate_is_rounded_with_it():
    """While the projection's weight is zero what is left is gate * bias, which eager rounds before it is added."""
    torch.manual_seed(0)
    plain = randomize_(oracles_flux.SingleStreamBlock()).bfloat16().eval()
    nn.init.zeros_(plain.linear2.weight)
    ours = copy.deepcopy(plain)
    zb.accelerate(ours, rounding="eager")
    args = [t.bfloat16() for t in flux(False)()]
    reset_counters()
    with torch.no_grad():
        assert_bitwise_equal(ours(*args), plain(*args))
    assert counters()["SingleStreamBlock"] == (0, 1)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "Lumina2Transformer2DModel"])
def test_models_of_diffusers(name):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from . import coverage
    from .model_cases import cast

    model, inputs = coverage.build(name)
    plain, inputs = model.bfloat16().eval(), cast(inputs, torch.bfloat16)
    ours, once = copy.deepcopy(plain), copy.deepcopy(plain)
    assert zb.accelerate(ours, rounding="eager").blocks == zb.accelerate(once).blocks
    with torch.no_grad():
        expected = plain(**inputs)
        assert_same_bits(ours(**inputs), expected)
        if name != "WanTransformer3DModel":  # which computes in float32, and rounds once itself
            assert not all(map(torch.equal, outputs(once(**inputs)), outputs(expected)))


def test_what_rounds_once_is_left_alone():
    """The block of a U-Net; its zero convolution is skipped all the same."""
    torch.manual_seed(0)
    block = guided_block().eval()
    report = zb.accelerate(block, rounding="eager")
    assert [b.kind for b in report.left_alone] == [Reason.ROUNDING] and "rounding: with" in str(report)
    assert [(b.family, b.zero) for b in report.branches] == [("ZeroLayer", True)]


def test_another_rounding_is_found_out(monkeypatch):
    """A family that says it rounds as eager, and does not."""
    monkeypatch.setattr(streams, "rounds_as_eager", lambda: False)
    monkeypatch.setattr(proof, "_proved", {})
    block = oracles_gated.MDTBlock()
    (row,) = zb.accelerate(block, rounding="eager").left_alone
    assert row.kind is Reason.ROUNDING and "in bfloat16" in row.reason
    assert zb.accelerate(block, rounding="once").blocks


def test_compiled_it_is_the_original():
    block = randomize_(oracles_gated.DiTBlock())
    zb.accelerate(block, rounding="eager")
    reset_counters()
    torch.compile(block, backend="eager", fullgraph=True)(*tokens(D)())
    assert not counters()


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="accelerate: rounding must be one of"):
        zb.accelerate(nn.Linear(2, 2), rounding="twice")
