"""Transformer and control blocks of repositories that are on no package index, written down from their descriptions.

Class, attribute and parameter names are theirs, since blocks are found by them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zeroblock.testing import eager
from zeroblock.testing.eager import zero_module

# ---- majumderb/rezero ------------------------------------------------------------------------------------------------


class RZTXEncoderLayer(nn.Module):
    """Post-attention and post-mlp sums weighted by one scalar, dropout after the multiplication."""

    def __init__(self, d_model, nhead, dim_feedforward, dropout=0.1):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(d_model, dim_feedforward), nn.Linear(dim_feedforward, d_model)
        self.dropout, self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout), nn.Dropout(dropout)
        self.resweight = nn.Parameter(torch.zeros(1))
        self.activation = F.relu

    def forward(self, src, src_mask=None, src_key_padding_mask=None):
        h = self.self_attn(src, src, src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)[0]
        src = src + self.dropout1(h * self.resweight)
        h = self.linear2(self.dropout(self.activation(self.linear1(src))))
        return src + self.dropout2(h * self.resweight)


# ---- PixArt-alpha ----------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Queries of x, keys and values of the text y, one head."""

    def __init__(self, dim):
        super().__init__()
        self.q_linear, self.kv_linear = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = zero_module(nn.Linear(dim, dim))

    def forward(self, x, y, mask=None):
        k, v = self.kv_linear(y).chunk(2, dim=-1)
        return self.proj(F.scaled_dot_product_attention(self.q_linear(x), k, v, attn_mask=mask))


class PixArtBlock(nn.Module):
    """The six vectors of a block are a table of its own plus a projection of t shared by all blocks."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = eager.Attention(dim, num_heads)
        self.cross_attn = CrossAttention(dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = eager.Mlp(dim, 2 * dim)
        self.drop_path = nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x, y, t, mask=None):
        vectors = (self.scale_shift_table[None] + t.reshape(len(x), 6, -1)).chunk(6, dim=1)
        shift, scale, gate = vectors[:3]
        x = x + self.drop_path(gate * self.attn(self.norm1(x) * (1 + scale) + shift))
        x = x + self.cross_attn(x, y, mask)
        shift, scale, gate = vectors[3:]
        return x + self.drop_path(gate * self.mlp(self.norm2(x) * (1 + scale) + shift))


class T2IFinalLayer(nn.Module):
    def __init__(self, dim, out_features):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = zero_module(nn.Linear(dim, out_features))
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x, t):
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


# ---- CompVis/latent-diffusion, lllyasviel/ControlNet -----------------------------------------------------------------


class SpatialTransformer(nn.Module):
    """x + proj_out(transformer(proj_in(norm x), context)), pixels as tokens."""

    def __init__(self, channels, context_dim):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([nn.Linear(context_dim, channels)])
        self.proj_out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x, context=None):
        h = self.proj_in(self.norm(x))
        keys = self.transformer_blocks[0](context)
        tokens = F.scaled_dot_product_attention(h.flatten(2).transpose(1, 2), keys, keys)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(x.shape))


class Layers(nn.Sequential):
    """Gives each layer the arguments of its kind."""

    def forward(self, x, emb, context=None):
        for layer in self:
            kind = type(layer).__mro__
            if eager.ResBlock in kind:
                x = layer(x, emb)
            else:
                x = layer(x, context) if SpatialTransformer in kind else layer(x)
        return x


class ControlNet(nn.Module):
    """A copied encoder whose feature maps leave through zero convolutions; the hint enters through one."""

    def __init__(self, channels=32, context_dim=8):
        super().__init__()

        def zero_conv():
            return Layers(zero_module(nn.Conv2d(channels, channels, 1)))

        self.time_embed = nn.Linear(1, 16)
        self.input_hint_block = Layers(
            nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.SiLU(), zero_module(nn.Conv2d(8, channels, 3, padding=1))
        )
        self.input_blocks = nn.ModuleList(
            [
                Layers(nn.Conv2d(4, channels, 3, padding=1)),
                Layers(eager.ResBlock(channels, 16, 0.0), SpatialTransformer(channels, context_dim)),
                Layers(nn.Conv2d(channels, channels, 3, padding=1, stride=2)),
            ]
        )
        self.zero_convs = nn.ModuleList([zero_conv() for _ in self.input_blocks])
        self.middle_block = Layers(eager.ResBlock(channels, 16, 0.0))
        self.middle_block_out = zero_conv()

    def forward(self, x, hint, timesteps, context):
        emb = self.time_embed(timesteps[:, None])
        guided = self.input_hint_block(hint, emb)
        outs = []
        h = x
        for block, zero_conv in zip(self.input_blocks, self.zero_convs, strict=True):
            h = block(h, emb, context)
            if guided is not None:
                h += guided
                guided = None
            outs.append(zero_conv(h, emb))
        return [*outs, self.middle_block_out(self.middle_block(h, emb, context), emb)]
