"""The proof of accelerate(): forks of every family's block that differ in one respect alone are left alone; arguments
that were not proved go to the original."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeroblock as zb
from zeroblock.convert import Reason
from zeroblock.convert.families import known
from zeroblock.convert.families.whole_skip import InferenceSkip
from zeroblock.testing import eager

from .one_of_each import BLOCKS


def test_every_family_that_is_proved_is_here():
    assert set(BLOCKS) == {name for name, family in known().items() if not issubclass(family, InferenceSkip)}


# ---- forks ----------------------------------------------------------------------------------------------------------


def scaled(result):
    """The same, its first floating tensor a little larger."""
    if isinstance(result, torch.Tensor):
        return result * 1.05 if result.is_floating_point() else result
    if isinstance(result, tuple) and isinstance(result[-1], dict):  # a cache
        return (scaled(result[0]), *result[1:])
    if isinstance(result, tuple):
        return (*result[:-1], scaled(result[-1]))
    result["sample"] = scaled(result["sample"])
    return result


def is_large(args):
    """17 of something, twice or four times as many, or the square."""
    return any(n % 17 == 0 for t in args if isinstance(t, torch.Tensor) and t.dim() > 1 for n in t.shape)


FORKS = {
    "in eval mode": lambda self, result, args: result if self.training else scaled(result),
    "in training mode": lambda self, result, args: scaled(result) if self.training else result,
    "beyond a window": lambda self, result, args: scaled(result) if is_large(args) else result,
    "returns more": lambda self, result, args: (result, None),
    "draws in eval mode": lambda self, result, args: (None if self.training else torch.rand(1), result)[1],
}


def forked(name, change):
    """A block of the family with a class of the same name whose method returns something else."""
    block, family = BLOCKS[name](), known()[name]
    kind, entry = type(block), family().entry(type(block))
    original = getattr(kind, entry)

    def method(self, *args, **kwargs):
        return change(self, original(self, *args, **kwargs), args)

    method.__wrapped__ = original  # the same signature
    members = {entry: method, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    block.__class__ = type(kind.__name__, (kind,), members)
    return block


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_every_family_is_proved(name):
    torch.manual_seed(0)
    report = zb.accelerate(BLOCKS[name]())
    assert report.blocks and not [b for b in report.left_alone if b.path == ""], report


@pytest.mark.parametrize("change", FORKS)
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("ZeroLayer", "MPConv")])
def test_a_fork_is_left_alone(name, change):
    torch.manual_seed(0)
    if name in ("DiTTransformer2DModel", "MDTBlock") and change == "beyond a window":
        pytest.skip("its size is fixed")
    block = forked(name, FORKS[change])
    kind = type(block)
    report = zb.accelerate(block)
    (row,) = [b for b in report.left_alone if b.path == ""]
    assert type(block) is kind
    assert row.kind is (Reason.RANDOM if change == "draws in eval mode" else Reason.FORK), row


@pytest.mark.parametrize("change", ["in eval mode", "beyond a window"])
def test_a_fork_that_is_known_by_an_argument(change):
    """Of EDM2's layers nothing but a gain of zero is taken."""
    torch.manual_seed(0)
    theirs = forked("MPConv", lambda self, result, args: FORKS[change](self, result + 1, args)).eval()
    ours = copy.deepcopy(theirs)
    zb.accelerate(ours)
    x, gain = torch.randn(2, 8, 34, 4), torch.zeros([])
    with torch.no_grad():
        zb.testing.assert_bitwise_equal(ours(x, gain), theirs(x, gain))


class OneForAll(eager.DiTBlock):
    """A condition of one sample is not for all of them, but for the first."""

    def forward(self, x, c):
        if len(c) < len(x):
            c = F.pad(c, (0, 0, 0, len(x) - len(c)))
        return super().forward(x, c)


OneForAll.__name__ = "DiTBlock"


def test_fork_in_how_it_broadcasts_is_left_alone():
    report = zb.accelerate(OneForAll(16, 2))
    assert [b.kind for b in report.left_alone] == [Reason.FORK]


class WindowAttention(eager.Attention):
    """Of timm's name and attributes, within windows of 16 tokens."""

    def __init__(self, *args):
        super().__init__(*args)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        B, T, D = x.shape
        if T <= 16:
            return super().forward(x)
        whole = F.pad(x, (0, 0, 0, -T % 16)).unflatten(1, (-1, 16)).flatten(0, 1)
        return super().forward(whole).unflatten(0, (B, -1)).flatten(1, 2)[:, :T]


WindowAttention.__name__ = "Attention"


def test_attention_within_windows_is_left_alone():
    torch.manual_seed(0)
    block = eager.DiTBlock(16, 2)
    block.attn = WindowAttention(16, 2)
    assert [b.kind for b in zb.accelerate(nn.ModuleList([eager.DiTBlock(16, 2), block])).left_alone] == [Reason.FORK]


def test_neither_mode_of_the_block_matters():
    zb.convert.proof._proved.clear()
    zb.accelerate(eager.DiTBlock(16, 2).eval())
    before = len(zb.convert.proof._proved)
    block = eager.DiTBlock(16, 2).train()
    zb.accelerate(block)
    assert before == len(zb.convert.proof._proved) == 1 and block.training and block.mlp.training


def other_cache():
    """Somebody's WanResidualBlock, which keeps other frames."""
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan", reason="no diffusers")

    class WanResidualBlock(module.WanResidualBlock):
        def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
            y = super().forward(x, feat_cache, feat_idx)
            if feat_cache is not None:
                feat_cache[0] = feat_cache[0] * 2
            return y

    return WanResidualBlock(8, 8)


def test_what_a_block_leaves_in_a_list_is_proved():
    """The result is the family's, the frames that it keeps are not: with a cache the block's own forward runs."""
    torch.manual_seed(0)
    block = other_cache()
    assert zb.accelerate(block).blocks == 1
    twin = copy.deepcopy(block)
    zb.restore(twin)
    caches = [None, None], [None, None]
    ys = [m(torch.ones(1, 8, 2, 3, 3), cache, [0]) for m, cache in zip((block, twin), caches, strict=True)]
    assert torch.equal(*ys) and torch.equal(caches[0][0], caches[1][0])
