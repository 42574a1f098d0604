"""U-Net blocks of repositories that are on no package index, written down from their descriptions.

Class, attribute and parameter names are theirs, since blocks are found by them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zeroblock.testing import eager
from zeroblock.testing.eager import CONVS, GroupNorm32, zero_module

# ---- openai/guided-diffusion, improved-diffusion ---------------------------------------------------------------------


class QKVAttentionLegacy(nn.Module):
    """Softmax attention of [N, heads * 3 * C, T] without a fused kernel; the softmax in at least fp32."""

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def split(self, qkv):
        """q, k, v [N * heads, C, T]"""
        N, width, T = qkv.shape
        return qkv.reshape(N * self.n_heads, width // self.n_heads, T).chunk(3, dim=1)

    def forward(self, qkv):
        q, k, v = self.split(qkv)
        scale = q.shape[1] ** -0.25
        logits = (q * scale).transpose(1, 2) @ (k * scale)
        weight = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).to(logits.dtype)
        return (v @ weight.transpose(1, 2)).reshape(qkv.shape[0], -1, qkv.shape[2])


class QKVAttention(QKVAttentionLegacy):
    """The same for [N, 3 * heads * C, T]."""

    def split(self, qkv):
        N, width, T = qkv.shape
        return [t.reshape(N * self.n_heads, -1, T) for t in qkv.chunk(3, dim=1)]


class OneHead(QKVAttentionLegacy):
    """improved-diffusion's: the caller has made one sample of every head."""

    def __init__(self):
        nn.Module.__init__(self)

    def split(self, qkv):
        return qkv.chunk(3, dim=1)


OneHead.__name__ = "QKVAttention"


class AttentionBlock(nn.Module):
    """x + proj_out(attention(qkv(norm x))), always checkpointed; `order` "legacy", "new" or "improved"."""

    def __init__(self, channels, num_heads=1, order="legacy"):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm32(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        kinds = {"legacy": QKVAttentionLegacy, "new": QKVAttention}
        self.attention = OneHead() if order == "improved" else kinds[order](num_heads)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        return checkpoint(self._forward, x, use_reentrant=False)

    def _forward(self, x):
        tokens = x.flatten(2)
        qkv = self.qkv(self.norm(tokens))
        if isinstance(self.attention, OneHead):
            h = self.attention(qkv.reshape(qkv.shape[0] * self.num_heads, -1, qkv.shape[2])).reshape(tokens.shape)
        else:
            h = self.attention(qkv)
        return (tokens + self.proj_out(h)).reshape(x.shape)


def convert_module_to_f16(module):
    """use_fp16 of both repositories: convolutions become half, norms and linears stay."""
    for m in module.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            for p in m.parameters(recurse=False):
                p.data = p.data.half()
    return module


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class ImprovedResBlock(eager.ResBlock):
    """improved-diffusion's: the activation is a module of its own, x * sigmoid(x)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.in_layers[1] = self.emb_layers[0] = self.out_layers[1] = Swish()


# ---- Stability-AI/generative-models ----------------------------------------------------------------------------------


class SgmResBlock(eager.ResBlock):
    """With a kernel size for each dimension, an embedding for each frame, or none."""

    def __init__(
        self,
        channels,
        emb_channels,
        dropout=0.0,
        dims=2,
        kernel_size=3,
        exchange_temb_dims=False,
        skip_t_emb=False,
        **options,
    ):
        super().__init__(channels, emb_channels, dropout, dims=dims, **options)
        padding = [k // 2 for k in kernel_size] if isinstance(kernel_size, (tuple, list)) else kernel_size // 2
        width = self.out_channels
        self.in_layers[2] = CONVS[dims](channels, width, kernel_size, padding=padding)
        self.out_layers[3] = zero_module(CONVS[dims](width, width, kernel_size, padding=padding))
        self.exchange_temb_dims = exchange_temb_dims
        self.skip_t_emb = skip_t_emb
        if skip_t_emb:
            self.emb_layers = None

    def _forward(self, x, emb):
        if not (self.skip_t_emb or self.exchange_temb_dims):
            return super()._forward(x, emb)
        h = self.in_layers(x)
        if self.exchange_temb_dims:
            e = self.emb_layers(emb).to(h.dtype)  # [N, T, C]
            h = h + e.transpose(1, 2)[:, :, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


SgmResBlock.__name__ = "ResBlock"


class VideoResBlock(SgmResBlock):
    """The block of the image model, then one along the frames, blended: a * spatial + (1 - a) * temporal."""

    def __init__(self, channels, emb_channels, **options):
        super().__init__(channels, emb_channels, **options)
        self.time_stack = SgmResBlock(
            self.out_channels, emb_channels, dims=3, kernel_size=[3, 1, 1], exchange_temb_dims=True
        )
        self.mix_factor = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x, emb, num_video_frames):
        x = super().forward(x, emb)
        video = x.unflatten(0, (-1, num_video_frames)).transpose(1, 2)
        moved = self.time_stack(video, emb.unflatten(0, (-1, num_video_frames)))
        a = self.mix_factor.sigmoid()
        return (a * video + (1 - a) * moved).transpose(1, 2).flatten(0, 1)
