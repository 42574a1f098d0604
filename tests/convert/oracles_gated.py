"""Gated transformer blocks of several repositories, written down from their descriptions.

Class, attribute and parameter names are theirs, since blocks are found by them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

D, HEADS = 16, 2


def layer_norm(affine=False):
    return nn.LayerNorm(D, elementwise_affine=affine, eps=1e-6)


def modulated(h, shift, scale):
    return h * (1 + scale) + shift


class Attention(nn.Module):
    """Of one sequence, with a bias on its logits: a given one, or one for each two places, some of them left out."""

    def __init__(self, tokens=None):
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        if tokens is not None:
            self.rel_pos_bias = nn.Module()
            self.rel_pos_bias.window_size = (2, tokens // 2)
            self.rel_pos_bias.table = nn.Parameter(torch.randn(tokens, tokens))

    def forward(self, x, attn_bias=None, ids_keep=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if attn_bias is None and hasattr(self, "rel_pos_bias"):
            ids = torch.arange(x.shape[1]).expand(x.shape[:2]) if ids_keep is None else ids_keep
            attn_bias = self.rel_pos_bias.table[ids[:, :, None], ids[:, None]][:, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias).transpose(1, 2).flatten(2))


class RotaryAttention(nn.Module):
    """SWivid/F5-TTS: a mask of tokens, and queries and keys turned by their place."""

    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(D, D), nn.Dropout(0.0)])

    def forward(self, x, mask=None, rope=None):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        if rope is not None:
            angles, scale = rope
            q, k = (turned(t, angles) * s for t, s in ((q, scale), (k, 1 / scale)))
        bias = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -1e4).to(x.dtype)[:, None, None]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        h = self.to_out[1](self.to_out[0](h))
        return h if mask is None else h.masked_fill(~mask[..., None], 0.0)


def turned(t, angles):
    even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
    return t * angles.cos() + torch.stack([-odd, even], dim=-1).flatten(-2) * angles.sin()


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, 3 * D), nn.GELU(approximate="tanh"), nn.Linear(3 * D, D)
        self.drop, self.fused_mlp_func = nn.Identity(), None

    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


class Mlp(FFN):
    pass


class StochasticDepth(nn.Module):
    def forward(self, x):
        return x * torch.bernoulli(torch.full((len(x), 1, 1), 0.5)) if self.training else x


class AdaLNSelfAttn(nn.Module):
    """FoundationVision/VAR: one norm without parameters for both branches; gates first."""

    def __init__(self, shared_aln=False, drop_path=False):
        super().__init__()
        self.C = self.D = D
        self.shared_aln, self.attn, self.ffn, self.ln_wo_grad = shared_aln, Attention(), FFN(), layer_norm()
        self.drop_path = StochasticDepth() if drop_path else nn.Identity()
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, D) / D**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, cond_BD, attn_bias):
        rows = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, D)
        gates, scales, shifts = (rows.unbind(2)[i : i + 2] for i in (0, 2, 4))
        h = self.attn(modulated(self.ln_wo_grad(x), shifts[0], scales[0]), attn_bias=attn_bias)
        x = x + self.drop_path(h * gates[0])
        return x + self.drop_path(self.ffn(modulated(self.ln_wo_grad(x), shifts[1], scales[1])) * gates[1])


class AdaLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.silu, self.linear, self.norm = nn.SiLU(), nn.Linear(D, 6 * D), layer_norm()

    def forward(self, x, emb):
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return modulated(self.norm(x), shift[:, None], scale[:, None]), *rest


class DiTBlock(nn.Module):
    """SWivid/F5-TTS: a norm that gives the gate and the rows of the second branch too."""

    def __init__(self):
        super().__init__()
        self.attn_norm, self.attn, self.ff_norm, self.ff = AdaLayerNorm(), RotaryAttention(), layer_norm(), FFN()

    def forward(self, x, t, mask=None, rope=None):
        h, gate, shift, scale, gate_mlp = (v if v.dim() == 3 else v[:, None] for v in self.attn_norm(x, emb=t))
        x = x + gate * self.attn(x=h, mask=mask, rope=rope)
        return x + gate_mlp * self.ff(modulated(self.ff_norm(x), shift, scale))


class MDTBlock(nn.Module):
    """sail-sg/MDT: DiT's, of a long skip connection's two inputs."""

    def __init__(self, skip=False, tokens=4):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = layer_norm(), Attention(tokens), layer_norm(), Mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.skip_linear = nn.Linear(2 * D, D) if skip else None

    def forward(self, x, c, skip=None, ids_keep=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        rows = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + rows[2] * self.attn(modulated(self.norm1(x), *rows[:2]), ids_keep=ids_keep)
        return x + rows[5] * self.mlp(modulated(self.norm2(x), *rows[3:5]))


class ResBlock(nn.Module):
    """LTH14/mar: rows [N, D], a modulation for each, a norm with parameters."""

    def __init__(self):
        super().__init__()
        self.in_ln, self.mlp = layer_norm(True), nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulated(self.in_ln(x), shift, scale))


class Fork(nn.Module):
    """Somebody's own: a cross-attention without norm or gate, a norm with parameters, gates that come last."""

    def __init__(self):
        super().__init__()
        self.dim = D
        self.before, self.attend, self.cross, self.after, self.mlp = (
            layer_norm(True),
            Attention(),
            Cross(),
            layer_norm(),
            Mlp(),
        )
        self.table, self.embed = nn.Parameter(torch.randn(5, D) / 4), nn.Linear(D, 5 * D)

    def rows(self, c):
        return (self.table + self.embed(c).unflatten(-1, (5, D))).unbind(1)

    def forward(self, x, context, c):
        scale, shift, scale_mlp, gate, gate_mlp = (v[:, None] for v in self.rows(c))
        x = x + gate * self.attend(modulated(self.before(x), shift, scale))
        x = x + self.cross(x, context)
        return x + gate_mlp * self.mlp(self.after(x) * (1 + scale_mlp))


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(D, D), nn.Linear(D, 2 * D)

    def forward(self, x, context):
        return F.scaled_dot_product_attention(self.q(x), *self.kv(context).chunk(2, dim=-1))
