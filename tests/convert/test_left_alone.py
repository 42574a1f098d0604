"""Every residual block that runs as before, or of which zeroblock runs parts alone, is a row of the report, with a
reason of the list; nothing else is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeroblock as zb
from zeroblock.convert import Reason
from zeroblock.convert.residual import blocks_beside
from zeroblock.testing import eager

from .cases import guided_block

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers.models.attention import Attention, FeedForward  # noqa: E402

# ---- residual blocks that no family knows ---------------------------------------------------------------------------


class Convs(nn.Module):
    """Norm, swish, conv, twice; a layer around where the channels change."""

    def __init__(self, channels, out_channels=None):
        super().__init__()
        out = out_channels or channels
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if out != channels else None

    def forward(self, x, temb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return x + h


class Renormed(nn.Module):
    """The sum of a norm's result and of what a layer makes of it."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x):
        h = self.norm(x)
        h += self.mlp(h)
        return h


class Gated(nn.Module):
    """In steps, through a method, with a gate of the condition's."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.modulation = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 24)

    def forward(self, x, c):
        return torch.utils.checkpoint.checkpoint(self._forward, x, c, use_reentrant=False)

    def _forward(self, x, c):
        shift, scale, gate = self.modulation(F.silu(c)).chunk(3, dim=-1)
        residual = x
        for layer in (self.norm, self.attn):
            x = layer(x) * (1 + scale) + shift
        return residual.add(gate * x)


def weighted_sum(a, b, t):
    return a.lerp(b, t)


class Lerped(nn.Module):
    """By a function that adds."""

    def __init__(self):
        super().__init__()
        self.skip, self.conv = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x):
        return weighted_sum(self.skip(x), self.conv(x), 0.3)


RESIDUAL = {
    "norm, conv": lambda: Convs(8),
    "another width": lambda: Convs(8, 16),
    "after a norm": Renormed,
    "gated": Gated,
    "weighted": Lerped,
    "torch.nn": lambda: nn.TransformerEncoderLayer(8, 2, 8),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_unknown_block_is_a_row(name):
    model = nn.Sequential(nn.Linear(2, 2), RESIDUAL[name]())
    report = zb.accelerate(model)
    (row,) = report.left_alone
    assert (row.path, row.kind) == ("1", Reason.UNKNOWN) and " 1 left alone\n" in str(report)
    with pytest.raises(RuntimeError, match=r"strict.*\n  1 "):
        zb.accelerate(nn.Sequential(guided_block(), RESIDUAL[name]()), strict=True)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, size=None):
        size = x.shape[-1] if size is None else size
        return self.fc2(F.gelu(self.fc1(x))) + size


class AdaNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 16)

    def forward(self, x, emb):
        emb = self.linear(F.silu(emb)).to(x.dtype)
        shift, scale = emb.chunk(2, dim=-1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None]


class Quantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 8)

    def forward(self, x):
        nearest = self.embedding(torch.cdist(x, self.embedding.weight).argmin(-1))
        return x + (nearest - x).detach()


class Embeddings(nn.Module):
    """The sum of two conditions."""

    def __init__(self):
        super().__init__()
        self.time, self.label = nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, t, y):
        return self.time(t) + self.label(y).to(t.dtype)


class Stack(nn.Module):
    """A model around blocks, itself residual."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([guided_block(), guided_block()])
        self.out = nn.Conv2d(32, 32, 1)

    def forward(self, x, emb):
        h = x
        for block in self.blocks:
            h = block(h, emb)
        return x + self.out(h)


def embeddings_of_diffusers():
    from diffusers.models import embeddings

    return nn.ModuleList(
        [
            embeddings.PatchEmbed(8, 8, 2, 4, 16),
            embeddings.TimestepEmbedding(8, 16, cond_proj_dim=4),
            embeddings.CombinedTimestepTextProjEmbeddings(16, 8),
            embeddings.CogVideoXPatchEmbed(embed_dim=16, text_embed_dim=8, in_channels=4),
        ]
    )


NONE = {
    "layers": lambda: nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 3), nn.LayerNorm(2)),
    "mlp": Mlp,
    "adaptive norm": AdaNorm,
    "quantizer": Quantizer,
    "embeddings": Embeddings,
    "stack": Stack,
    "accelerated": lambda: nn.ModuleList([guided_block(), eager.DiTBlock(16, 2), eager.FinalLayer(16, 1, 4)]),
    "zeroblock's own": lambda: nn.ModuleList([zb.nn.ResBlock(32, 16, 0.0), zb.nn.DiTBlock(16, 2)]),
    "diffusers' embeddings": embeddings_of_diffusers,
    "vae": lambda: diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **VAE),
    "vq": lambda: diffusers.VQModel(block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=8, **VAE),
}
VAE = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.mark.parametrize("name", NONE)
def test_nothing_else_is_a_row(name):
    report = zb.accelerate(NONE[name]())
    assert not report.left_alone, report


def test_a_block_without_source_is_no_row():
    """Nothing can be told about it, and accelerate works on."""
    scope = {"nn": nn}
    exec("class Block(nn.Linear):\n    def forward(self, x):\n        return x + super().forward(x)", scope)
    assert blocks_beside(scope["Block"](2, 2), set(), set()) == []


# ---- parts ----------------------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """A block that no family knows, of layers that they know."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn, self.ff = Attention(8, heads=2, dim_head=4), FeedForward(8)

    def forward(self, x):
        x = x + self.attn(self.norm1(x)).roll(1, 1)
        return x + self.ff(self.norm2(x)).sin()


IN_PARTS = {"two": (lambda: nn.Sequential(Halves(), Halves()), "Halves", 2)}


@pytest.mark.parametrize("name", IN_PARTS)
def test_block_of_which_parts_are_taken(name):
    make, block, count = IN_PARTS[name]
    model = make()
    report = zb.accelerate(model)
    assert [(b.block, b.kind) for b in report.left_alone] == [(block, Reason.PARTS)] * count
    assert all("FeedForward" in b.reason for b in report.left_alone) and report.blocks
    assert f"only parts: {Reason.PARTS.advice}" in str(report)
    with pytest.raises(RuntimeError, match=f"strict.*\n.*{block}"):
        zb.accelerate(make(), strict=True)
