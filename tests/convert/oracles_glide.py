"""U-Net blocks of glide-text2im and consistency_models, written down from their descriptions.

Class, attribute and parameter names are theirs, since blocks are found by them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from zeroblock.testing import eager
from zeroblock.testing.eager import CONVS, GroupNorm32, zero_module

from .oracles import QKVAttention, QKVAttentionLegacy

# ---- openai/glide-text2im --------------------------------------------------------------------------------------------


class GlideNorm(GroupNorm32):
    """A norm that may hold its activation: swish 1 for SiLU, 0 for none."""

    def __init__(self, channels, swish):
        super().__init__(32, channels)
        self.swish = swish

    def forward(self, x):
        y = super().forward(x)
        return F.silu(y) if self.swish == 1.0 else y


class GlideResBlock(nn.Module):
    """Entered by forward alone; the activations belong to the norms, with FiLM only the first one."""

    def __init__(
        self, channels, emb_channels, dropout=0.0, out_channels=None, use_scale_shift_norm=False, dims=2, **updown
    ):
        super().__init__()
        twin = eager.ResBlock(
            channels,
            emb_channels,
            dropout,
            out_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            dims=dims,
            **updown,
        )
        self.use_scale_shift_norm, self.updown = use_scale_shift_norm, twin.updown
        self.in_layers, self.emb_layers, self.out_layers = twin.in_layers, twin.emb_layers, twin.out_layers
        self.h_upd, self.x_upd, self.skip_connection = twin.h_upd, twin.x_upd, twin.skip_connection
        self.in_layers[0], self.in_layers[1] = GlideNorm(channels, 1.0), nn.Identity()
        self.out_layers[0] = GlideNorm(twin.out_channels, 0.0 if use_scale_shift_norm else 1.0)
        if not use_scale_shift_norm:
            self.out_layers[1] = nn.Identity()

    def forward(self, x, emb):
        return eager.ResBlock._forward(self, x, emb)


GlideResBlock.__name__ = "ResBlock"


class EncodedAttention(QKVAttentionLegacy):
    """Keys and values of an encoder before those of the pixels."""

    def forward(self, qkv, encoder_kv=None):
        if encoder_kv is None:
            return super().forward(qkv)
        q, k, v = self.split(qkv)
        ek, ev = self.split_pair(encoder_kv)
        k, v = torch.cat([ek, k], dim=-1), torch.cat([ev, v], dim=-1)
        scale = q.shape[1] ** -0.25
        logits = (q * scale).transpose(1, 2) @ (k * scale)
        weight = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).to(logits.dtype)
        return (v @ weight.transpose(1, 2)).reshape(qkv.shape[0], -1, qkv.shape[2])

    def split_pair(self, kv):
        return kv.reshape(kv.shape[0] * self.n_heads, kv.shape[1] // self.n_heads, -1).chunk(2, dim=1)


class EncodedAttentionNew(EncodedAttention):
    """consistency_models': the heads inside q, k and v."""

    split = QKVAttention.split

    def split_pair(self, kv):
        return [t.reshape(kv.shape[0] * self.n_heads, -1, kv.shape[2]) for t in kv.chunk(2, dim=1)]


# As both repositories call it.
EncodedAttention.__name__ = EncodedAttentionNew.__name__ = "QKVAttention"


class GlideAttentionBlock(nn.Module):
    """x + proj_out(attention(qkv(norm x), encoder_kv(encoder_out))), without a checkpoint; pixels as [N, C, T]."""

    def __init__(self, channels, num_heads=1, encoder_channels=None):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GlideNorm(channels, 0.0)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = EncodedAttention(num_heads)
        if encoder_channels is not None:
            self.encoder_kv = nn.Conv1d(encoder_channels, 2 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x, encoder_out=None):
        qkv = self.qkv(self.norm(x).flatten(2))
        h = self.attention(qkv) if encoder_out is None else self.attention(qkv, self.encoder_kv(encoder_out))
        return x + self.proj_out(h).reshape(x.shape)


GlideAttentionBlock.__name__ = "AttentionBlock"


# ---- openai/consistency_models ---------------------------------------------------------------------------------------


class QKVFlashAttention(nn.Module):
    """[N, (qkv, heads, features), T] by a kernel of the user's that takes 16-bit numbers alone."""

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, qkv):
        if qkv.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return attention_of(self.num_heads, qkv)


def attention_of(heads, qkv):
    q, k, v = qkv.unflatten(1, (3, heads, -1)).transpose(-1, -2).unbind(1)
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)


class ConsistencyAttentionBlock(nn.Module):
    """Entered by _forward; convolutions of as many dimensions as the image has."""

    def __init__(self, channels, num_heads=1, attention=None, encoder_channels=None, dims=2, use_checkpoint=False):
        super().__init__()
        self.num_heads, self.use_checkpoint = num_heads, use_checkpoint
        self.norm = GroupNorm32(32, channels)
        self.qkv = CONVS[dims](channels, 3 * channels, 1)
        self.attention = attention or QKVFlashAttention(channels, num_heads)
        if encoder_channels is not None:
            self.encoder_kv = nn.Conv1d(encoder_channels, 2 * channels, 1)
        self.proj_out = zero_module(CONVS[dims](channels, channels, 1))

    def forward(self, x, encoder_out=None):
        inputs = (x,) if encoder_out is None else (x, encoder_out)
        return (
            checkpoint(self._forward, *inputs, use_reentrant=False) if self.use_checkpoint else self._forward(*inputs)
        )

    def _forward(self, x, encoder_out=None):
        qkv = self.qkv(self.norm(x)).flatten(2)
        h = self.attention(qkv) if encoder_out is None else self.attention(qkv, self.encoder_kv(encoder_out))
        return x + self.proj_out(h.reshape(x.shape))


ConsistencyAttentionBlock.__name__ = "AttentionBlock"
