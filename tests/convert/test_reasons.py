"""The reasons for which a block is left alone, and what their rows say."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import zeroblock as zb
from zeroblock.convert import Reason
from zeroblock.testing import eager

from . import oracles_glide
from .cases import guided_block

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")


class RowFinalLayer(eager.FinalLayer):
    """MAR's: rows instead of tokens."""

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class ScaledFinalLayer(eager.FinalLayer):
    """Lumina's: a scale without a shift."""

    def __init__(self, width):
        super().__init__(width, 1, 4)
        self.adaLN_modulation[1] = nn.Linear(width, width)

    def forward(self, x, c):
        return self.linear(self.norm_final(x) * (1 + self.adaLN_modulation(c)[:, None]))


for kind in (RowFinalLayer, ScaledFinalLayer):
    kind.__name__ = "FinalLayer"


class BasicTransformerBlock(nn.Module):
    """latent-diffusion's."""

    def __init__(self, width=8):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x, context=None):
        return self.attn1(self.norm1(x)) + x


def in_float8():
    block = importlib.import_module("diffusers.models.resnet").ResnetBlock2D(in_channels=16, groups=4, temb_channels=16)
    diffusers.hooks.apply_layerwise_casting(block, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return block


def weight_normed():
    block = guided_block()
    parametrizations.weight_norm(block.in_layers[2])
    return block


def hooked():
    block = eager.DiTBlock(16, 2)
    block.norm1.register_forward_hook(lambda m, i, y: y * 2)
    return block


def padded():
    block = guided_block()
    block.out_layers[3].padding_mode = "circular"
    return block


def with_noise():
    class ResBlock(eager.ResBlock):
        def _forward(self, x, emb):
            return super()._forward(x, emb) + 0 * torch.randn_like(x)

    return ResBlock(32, 16, 0.0)


REASONS = {
    "rows": (lambda: RowFinalLayer(16, 1, 4), Reason.NAMESAKE, "its own forward fails on the example of FinalLayer"),
    "no shift": (lambda: ScaledFinalLayer(16), None, ""),
    "namesake": (BasicTransformerBlock, Reason.NAMESAKE, "it has no norm_type"),
    "float8": (in_float8, Reason.STORAGE, "stored as torch.float8_e4m3fn"),
    "parametrised": (weight_normed, Reason.LAYERS, "its in_layers.2 is parametrised"),
    "padding": (padded, Reason.LAYERS, "not the plain ones"),
    "hooks": (hooked, Reason.WATCHED, "its norm1 has hooks"),
    "noise": (with_noise, Reason.RANDOM, "draws other random numbers than ResBlock"),
    "one head": (lambda: nn.MultiheadAttention(8, 1), None, ""),
}


@pytest.mark.parametrize("name", REASONS)
def test_reason(name):
    make, kind, found = REASONS[name]
    report = zb.accelerate(nn.ModuleList([make()]))
    rows = [(b.path, b.kind) for b in report.left_alone]
    assert rows == ([] if kind is None else [("0", kind)]), report
    if kind is not None:
        assert found in report.left_alone[0].reason
        assert f"{kind.title}: {kind.advice}" in str(report)


def test_every_reason_says_what_can_be_done():
    assert len({r.title for r in Reason}) == len(Reason)
    for reason in Reason:
        assert len(reason.advice) > 40, reason


def test_attention_that_only_a_graphics_card_runs_is_no_obstacle():
    block = oracles_glide.ConsistencyAttentionBlock(32, 2)
    assert not zb.accelerate(block).left_alone
