"""DiT, SiT and fast-DiT accelerated."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeroblock as zb
from zeroblock import functional
from zeroblock.testing import assert_bitwise_equal, eager

from .cases import Case, assert_drop_in

timm_vit = pytest.importorskip("timm.models.vision_transformer")


class DiTBlock(nn.Module):
    """DiT's block from its description, on timm's layers."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, **attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = timm_vit.Attention(hidden_size, num_heads=num_heads, qkv_bias=True, **attention)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = timm_vit.Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU("tanh"), drop=0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), eager.zero_module(nn.Linear(hidden_size, 6 * hidden_size)))

    def forward(self, x, c):
        vectors = [v.unsqueeze(1) for v in self.adaLN_modulation(c).chunk(6, dim=1)]
        for norm, layer, (shift, scale, gate) in (
            (self.norm1, self.attn, vectors[:3]),
            (self.norm2, self.mlp, vectors[3:]),
        ):
            x = x + gate * layer(norm(x) * (1 + scale) + shift)
        return x


class DiT(nn.Module):
    def __init__(self, block=DiTBlock, checkpointed=None, **options):
        super().__init__()
        self.blocks = nn.ModuleList(block(24, 2, **options) for _ in range(2))
        self.final_layer = eager.FinalLayer(24, 1, 6)
        self.checkpointed = checkpointed

    def forward(self, x, c):
        for block in self.blocks:
            if self.checkpointed is None:
                x = block(x, c)
            else:
                x = checkpoint(block, x, c, use_reentrant=self.checkpointed)
        return self.final_layer(x, c)


def inputs():
    return torch.randn(2, 5, 24), torch.randn(2, 24)


# Without gradients the block is skipped by its weights, before the gates are computed; in training by its gates.
ZERO = {"DiTBlock": 4, "FinalLayer": 1}
CASES = {
    "timm": Case(DiT, inputs, ZERO, 5),
    "own attention": Case(lambda: DiT(eager.DiTBlock), inputs, ZERO, 5),
    "qk norm": Case(lambda: DiT(qk_norm=True, norm_layer=nn.LayerNorm), inputs, ZERO, 5),
    "attention dropout": Case(lambda: DiT(attn_drop=0.2, proj_drop=0.1), inputs, ZERO, 5),
    "fast-DiT": Case(
        lambda: DiT(checkpointed=False), inputs, {"DiTBlock": 8, "FinalLayer": 1}, 5, skipped_inference=ZERO
    ),
    "fast-DiT, reentrant": Case(
        lambda: DiT(checkpointed=True), inputs, {"DiTBlock": 8, "FinalLayer": 1}, 5, skipped_inference=ZERO
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_drop_in(name):
    assert_drop_in(CASES[name])


@pytest.mark.parametrize("make", [DiTBlock, eager.DiTBlock], ids=["timm", "own attention"])
def test_inference_is_one_sequence(make, monkeypatch):
    """Gate, residual and the next norm are one pass over x, whoever computes the attention; bits as in zeroblock.nn."""
    torch.manual_seed(0)
    block, ours = make(24, 2), zb.nn.DiTBlock(24, 2)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.2)
    ours.load_state_dict(block.state_dict())
    zb.accelerate(block, strict=True)
    seams, op = [], functional.gate_residual_layer_norm_modulate
    monkeypatch.setattr(
        functional, "gate_residual_layer_norm_modulate", lambda *a, **kw: (seams.append(1), op(*a, **kw))[1]
    )
    with torch.no_grad():
        x, c = inputs()
        got, expected = block(x, c), ours(x, c)
        assert len(seams) == 2
        if make is DiTBlock:
            assert_bitwise_equal(got, expected)
    block(x, c), ours(x, c)
    assert len(seams) == 2, "training keeps what each op saves for backward"
