"""Optional arguments that were not proved go to the original."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

import zeroblock as zb
from zeroblock.convert.families import known
from zeroblock.testing import eager

from . import oracles_tokens
from .cases import randomize_
from .one_of_each import BLOCKS


class Masked(eager.DiTBlock):
    """An argument that the family does not know."""

    def forward(self, x, c, mask=None):
        y = super().forward(x, c)
        return y if mask is None else y * mask[..., None]


class OtherMask(oracles_tokens.PixArtBlock):
    """An argument of the family's name with another meaning."""

    def forward(self, x, y, t, mask=None):
        if mask is not None and isinstance(mask, torch.Tensor):
            y = y * mask.float().mean(-1).view(-1, 1, 1)
        return super().forward(x, y, t)


class Swapped(eager.DiTBlock):
    """The family's names in other places."""

    def forward(self, c, x):
        return super().forward(c, x)


for kind in (Masked, Swapped):
    kind.__name__ = "DiTBlock"


def pair(make):
    torch.manual_seed(0)
    theirs = randomize_(make())
    ours = copy.deepcopy(theirs)
    assert zb.accelerate(ours).blocks
    return ours, theirs


def test_optional_argument_of_a_fork():
    ours, theirs = pair(lambda: Masked(16, 2))
    x, c, mask = torch.randn(2, 5, 16), torch.randn(2, 16), torch.rand(2, 5)
    assert torch.equal(ours(x, c, mask), theirs(x, c, mask))
    assert torch.equal(ours(x, c, mask=mask), theirs(x, c, mask=mask))
    torch.testing.assert_close(ours(x, c), theirs(x, c))


def test_names_in_other_places():
    ours, theirs = pair(lambda: Swapped(16, 2))
    x, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    torch.testing.assert_close(ours(x, c), theirs(x, c))
    torch.testing.assert_close(ours(c=x, x=c), theirs(c=x, x=c))


@pytest.mark.parametrize("given", ["positionally", "by keyword"])
def test_known_argument_with_another_meaning(given):
    """The rest of the block is accelerated."""
    ours, theirs = pair(lambda: OtherMask(24, 2))
    x, y, t, mask = torch.randn(2, 5, 24), torch.randn(2, 3, 24), torch.randn(2, 144), torch.rand(2, 1, 3) < 0.5
    args, kwargs = ((mask,), {}) if given == "positionally" else ((), {"mask": mask})
    assert torch.equal(ours(x, y, t, *args, **kwargs), theirs(x, y, t, *args, **kwargs))
    torch.testing.assert_close(ours(x, y, t), theirs(x, y, t))
    torch.testing.assert_close(ours(x, y, t, mask=None), theirs(x, y, t, mask=None))


# {family: its optional arguments that are taken}; what stays out goes to the original, as does a control of the rest.
TAKEN = {
    "PixArtBlock": {"mask"},
    "RZTXEncoderLayer": {"src_mask", "src_key_padding_mask"},
    "AttentionBlock": {"encoder_out"},
    "BasicTransformerBlock": {"attention_mask", "encoder_attention_mask", "cross_attention_kwargs"},
    "JointTransformerBlock": {"joint_attention_kwargs"},
    "FluxTransformerBlock": {"image_rotary_emb", "joint_attention_kwargs"},
    "FluxSingleTransformerBlock": {"image_rotary_emb", "joint_attention_kwargs"},
}


@pytest.mark.parametrize("name", TAKEN)
def test_optional_arguments_of_the_known_blocks_are_proved(name):
    torch.manual_seed(0)
    block = BLOCKS[name]()
    family = known()[name]()
    verdict = zb.convert.proof.verdict(block, family)
    assert set(family.options(block)) == TAKEN[name] <= verdict.options


@pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="diffusers is not installed")
def test_what_was_not_proved_runs_the_original():
    torch.manual_seed(0)
    block = BLOCKS["BasicTransformerBlock"]()
    zb.accelerate(block)
    known = type(block)._zeroblock
    seen = []
    known.family.eager = lambda *a, **k: pytest.fail("the family was called")
    x, context, t = torch.randn(2, 4, 16), torch.randn(2, 3, 12), torch.randn(2, 96)
    del known.family.eager
    original = copy.deepcopy(block)
    zb.restore(original)
    extra = {"added_cond_kwargs": {"unknown": x}}
    y = block(x, None, context, None, t, **extra)
    assert torch.equal(y, original(x, None, context, None, t, **extra)) and not seen
