"""What happens to an accelerated block after the proof: patched classes and layers, a fork's own arguments, attention
processors whose settings change. What the proof did not see runs the original."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import counters, eager, reset_counters

from . import oracles_edm, oracles_tokens


def randomized(block):
    torch.manual_seed(0)
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    return block


# ---- forks with an argument of their own -----------------------------------------------------------------------------


class Masked(eager.DiTBlock):
    """A fork: the attention's result is masked where a mask is given."""

    def forward(self, x, c, mask=None, strength=1.0):
        y = super().forward(x, c)
        return y if mask is None else y * mask[..., None] * strength


Masked.__name__ = "DiTBlock"


class Late(eager.ResBlock):
    """A fork whose inner forward has an argument more."""

    def _forward(self, x, emb, extra=None):
        y = super()._forward(x, emb)
        return y if extra is None else y + extra

    def forward(self, x, emb, *rest, **named):
        return self._forward(x, emb, *rest, **named)


Late.__name__ = "ResBlock"


class Swapped(oracles_tokens.PixArtBlock):
    """A fork that has another argument where PixArt has the mask."""

    def forward(self, x, y, t, strength=None, mask=None):
        z = super().forward(x, y, t, mask)
        return z if strength is None else z * strength


Swapped.__name__ = "PixArtBlock"


class WithSize(oracles_tokens.PixArtBlock):
    """PixArt-sigma's, whose model passes the size of the image as well, positionally."""

    def forward(self, x, y, t, mask=None, HW=None, **kwargs):
        z = super().forward(x, y, t, mask)
        return z if HW is None else z * HW[0]


WithSize.__name__ = "PixArtMSBlock"


def _calls():
    torch.manual_seed(1)
    x, c, mask = torch.randn(2, 5, 32), torch.randn(2, 32), torch.rand(2, 5)
    context, t = torch.randn(2, 3, 32), torch.randn(2, 192)
    image, emb, extra = torch.randn(2, 64, 4, 4), torch.randn(2, 16), torch.randn(2, 64, 4, 4)
    return {
        "dit positional": (lambda: Masked(32, 4), (x, c, mask), {}),
        "dit two positional": (lambda: Masked(32, 4), (x, c, mask, 0.5), {}),
        "dit keyword": (lambda: Masked(32, 4), (x, c), {"mask": mask}),
        "pixart another order": (lambda: Swapped(32, 4), (x, context, t, 0.5), {}),
        "pixart-sigma": (lambda: WithSize(32, 4), (x, context, t, None, (4, 4)), {}),
        "resblock positional": (lambda: Late(64, 16, 0.0), (image, emb, extra), {}),
        "resblock keyword": (lambda: Late(64, 16, 0.0), (image, emb), {"extra": extra}),
    }


@pytest.mark.parametrize("name", _calls())
def test_a_forks_own_argument_runs_the_original(name):
    make, args, kwargs = _calls()[name]
    theirs = randomized(make())
    ours = copy.deepcopy(theirs)
    assert zb.accelerate(ours).blocks == 1
    with torch.no_grad():
        known = args[: 3 if "pixart" in name else 2]
        plain = theirs(*known)
        torch.testing.assert_close(ours(*known), plain, rtol=1e-4, atol=1e-4)
        expected = theirs(*args, **kwargs)
        assert (expected - plain).abs().max() > 1e-2
        assert torch.equal(ours(*args, **kwargs), expected)


# ---- classes that are patched, layers that are replaced --------------------------------------------------------------


def _doubled(original):
    return lambda self, *args, **kwargs: 2 * original(self, *args, **kwargs)


def _patched():
    image, emb, tokens, c = torch.randn(2, 64, 4, 4), torch.randn(2, 16), torch.randn(2, 5, 32), torch.randn(2, 32)
    return {
        "the block": (lambda: eager.DiTBlock(32, 4), eager.DiTBlock, "forward", (tokens, c)),
        "its inner forward": (lambda: eager.ResBlock(64, 16, 0.0), eager.ResBlock, "_forward", (image, emb)),
        "timm's attention": (lambda: eager.DiTBlock(32, 4), eager.Attention, "forward", (tokens, c)),
        "timm's mlp": (lambda: eager.DiTBlock(32, 4), eager.Mlp, "forward", (tokens, c)),
        "a foreign group norm": (lambda: eager.ResBlock(64, 16, 0.0), eager.GroupNorm32, "forward", (image, emb)),
    }


@pytest.mark.parametrize("name", _patched())
def test_a_class_that_is_patched_later(name, monkeypatch):
    make, kind, method, inputs = _patched()[name]
    theirs = randomized(make())
    ours = copy.deepcopy(theirs)
    assert zb.accelerate(ours).blocks == 1
    with torch.no_grad():
        plain = theirs(*inputs)
        torch.testing.assert_close(ours(*inputs), plain, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(kind, method, _doubled(getattr(kind, method)))
        expected = theirs(*inputs)
        assert (expected - plain).abs().max() > 1e-2
        torch.testing.assert_close(ours(*inputs), expected, rtol=1e-4, atol=1e-4)


def test_edms_own_layers_patched_later(monkeypatch):
    from .test_edm import CASES

    case = CASES["attention"]
    torch.manual_seed(0)
    theirs = randomized(case.make())
    ours = copy.deepcopy(theirs)
    zb.accelerate(ours)
    inputs = case.inputs()
    with torch.no_grad():
        for kind in (oracles_edm.EDMGroupNorm, oracles_edm.EDMConv2d):
            plain = theirs(*inputs)
            monkeypatch.setattr(kind, "forward", _doubled(kind.forward))
            expected = theirs(*inputs)
            assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(ours(*inputs), expected, rtol=1e-3, atol=1e-3)


def test_a_norm_of_an_unproved_class_is_not_taken_for_granted():
    """The classes that a proof saw are remembered, and only those."""

    class Scaled(nn.GroupNorm):
        def forward(self, x):
            return 3 * super().forward(x)

    block = randomized(eager.ResBlock(64, 16, 0.0))
    block.in_layers[0] = Scaled(32, 64)
    report = zb.accelerate(block)
    assert report.blocks == 0 and "does not compute" in report.left_alone[0].reason
    other = randomized(eager.ResBlock(64, 16, 0.0))
    theirs = copy.deepcopy(other)
    zb.accelerate(other)
    other.in_layers[0], theirs.in_layers[0] = Scaled(32, 64), Scaled(32, 64)
    inputs = torch.randn(2, 64, 4, 4), torch.randn(2, 16)
    assert torch.equal(other(*inputs), theirs(*inputs))


# ---- attention processors --------------------------------------------------------------------------------------------


def _attention():
    attention = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    attn = attention.Attention(32, heads=4, dim_head=8).eval()
    nn.init.zeros_(attn.to_out[0].weight)

    class Adding(attention.AttnProcessor):
        def __init__(self):
            super().__init__()
            self.strength = [0.0]

        def __call__(self, attn, hidden_states, *args, **kwargs):
            return super().__call__(attn, hidden_states, *args, **kwargs) + self.strength[0] * hidden_states

    return attn, attention, Adding()


def test_a_processor_whose_strength_changes():
    theirs, _, processor = _attention()
    ours = copy.deepcopy(theirs)
    zb.accelerate(ours)
    ours.set_processor(processor), theirs.set_processor(processor)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        for strength in (0.0, 0.3, 0.0):
            processor.strength[0] = strength
            for _ in range(2):
                assert torch.equal(ours(x), theirs(x))


def test_diffusers_own_processors_are_still_skipped():
    ours, attention, _ = _attention()
    zb.accelerate(ours)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        for processor in (attention.AttnProcessor(), attention.AttnProcessor2_0(), attention.SlicedAttnProcessor(2)):
            ours.set_processor(processor)
            expected = ours(x)
            reset_counters()
            assert torch.equal(ours(x), expected)
            assert counters()["Attention"] == (0, 1)


def test_a_cross_attention_of_pixart_with_a_processor_of_its_own():
    """The processor adds to the result of an output layer that is zero."""
    transformers = pytest.importorskip("diffusers.models.attention")
    _, _, processor = _attention()
    torch.manual_seed(0)
    theirs = transformers.BasicTransformerBlock(
        32, 4, 8, cross_attention_dim=32, norm_type="ada_norm_single", norm_elementwise_affine=False
    ).eval()
    nn.init.zeros_(theirs.attn2.to_out[0].weight)
    ours = copy.deepcopy(theirs)
    assert zb.accelerate(ours).blocks == 1
    x, context, t = torch.randn(2, 5, 32), torch.randn(2, 3, 32), torch.randn(2, 192)
    with torch.no_grad():
        for strength in (0.0, 0.3):
            processor.strength[0] = strength
            ours.attn2.set_processor(processor), theirs.attn2.set_processor(processor)
            got, expected = (m(x, None, context, None, t) for m in (ours, theirs))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("batches", [(1, 3), (3, 1)])
def test_diffusers_blocks_broadcast(batches, phase):
    transformers = pytest.importorskip("diffusers.models.attention")
    torch.manual_seed(0)
    theirs = transformers.BasicTransformerBlock(
        32, 4, 8, num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False
    ).eval()
    if phase == "zero":
        nn.init.zeros_(theirs.norm1.linear.weight), nn.init.zeros_(theirs.norm1.linear.bias)
    ours = copy.deepcopy(theirs)
    assert zb.accelerate(ours).blocks
    x, index = torch.randn(batches[0], 5, 32), torch.arange(batches[1])
    for grad in (False, True):
        found = []
        for m in (ours, theirs):
            leaf = x.clone().requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                y = m(leaf, None, None, None, index, None, index)
            leaves = [leaf, *m.parameters()] if grad else []
            found.append((y, *(torch.autograd.grad(y.square().sum(), leaves) if grad else ())))
        assert found[0][0].shape == found[1][0].shape == (3, 5, 32)
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


# ---- the interpreter -------------------------------------------------------------------------------------------------


def test_imports_without_docstrings():
    code = "import zeroblock as zb; assert zb.nn.ResBlock.__doc__ is None; print(len(zb.convert.families()))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(zb.convert.families())
