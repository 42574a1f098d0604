"""Blocks of repositories that are on no package index, written down from their descriptions, for accelerate() to meet.

Class, attribute and parameter names are theirs, since blocks are found by them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


class GroupNormSwish(GroupNorm32):
    """glide-text2im's norm with the activation in it."""

    def forward(self, x):
        return F.silu(super().forward(x))


class GlideResBlock(eager.ResBlock):
    """glide-text2im's: the activations belong to the norms (with FiLM only the first one)."""

    def __init__(self, channels, *args, **kwargs):
        super().__init__(channels, *args, **kwargs)
        self.in_layers[0], self.in_layers[1] = GroupNormSwish(32, channels), nn.Identity()
        if not self.use_scale_shift_norm:
            self.out_layers[0], self.out_layers[1] = GroupNormSwish(32, self.out_channels), nn.Identity()


# ---- Stability-AI/generative-models ----------------------------------------------------------------------------------


class SgmResBlock(eager.ResBlock):
    """With a kernel size for each dimension, an embedding for each frame, or none."""

    def __init__(self, channels, emb_channels, dropout=0.0, dims=2, kernel_size=3, exchange_temb_dims=False,
                 skip_t_emb=False, **options):  # fmt: skip
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


# ---- NVlabs/edm ------------------------------------------------------------------------------------------------------


class EDMLinear(nn.Module):
    """Weights as torch has them, cast to the dtype of x at each call."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return x @ self.weight.to(x.dtype).t() + self.bias.to(x.dtype)


class EDMConv2d(nn.Module):
    """Doubles or halves the image by a box filter, then convolves (kernel 0: does not), then adds the bias."""

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False, init_weight=1.0):
        super().__init__()
        self.up, self.down, self.fused_resample = up, down, False
        shape = (out_channels, in_channels, kernel, kernel)
        scale = init_weight * (in_channels * kernel**2) ** -0.5 if kernel else 0
        self.weight = nn.Parameter(torch.randn(shape) * scale) if kernel else None  # zero times a negative is -0
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if up or down else None)

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.down:
            x = F.avg_pool2d(x, 2)
        if self.weight is None:
            return x
        x = F.conv2d(x, self.weight.to(x.dtype), padding=self.weight.shape[-1] // 2)
        return x + self.bias.to(x.dtype)[:, None, None]


class EDMGroupNorm(nn.Module):
    def __init__(self, num_channels, eps):
        super().__init__()
        self.num_groups, self.eps = min(32, num_channels // 4), eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, emb_channels, up=False, down=False, num_heads=0, dropout=0.0,
                 skip_scale=1.0, eps=1e-5, resample_proj=False, adaptive_scale=True, init_zero=0.0):  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_heads, self.dropout, self.skip_scale, self.adaptive_scale = (
            num_heads, dropout, skip_scale, adaptive_scale
        )  # fmt: skip
        self.norm0 = EDMGroupNorm(in_channels, eps)
        self.conv0 = EDMConv2d(in_channels, out_channels, 3, up, down)
        self.affine = EDMLinear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = EDMGroupNorm(out_channels, eps)
        self.conv1 = EDMConv2d(out_channels, out_channels, 3, init_weight=init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = EDMConv2d(in_channels, out_channels, kernel, up, down)
        if num_heads:
            self.norm2 = EDMGroupNorm(out_channels, eps)
            self.qkv = EDMConv2d(out_channels, 3 * out_channels, 1)
            self.proj = EDMConv2d(out_channels, out_channels, 1, init_weight=init_zero)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = e.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + e))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            N, C, H, W = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(N * self.num_heads, C // self.num_heads, 3, H * W).unbind(2)
            weight = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
            x = (self.proj((v @ weight.transpose(1, 2)).reshape(x.shape)) + x) * self.skip_scale
        return x


# ---- NVlabs/edm2 ------------------------------------------------------------------------------------------------------


class MPConv(nn.Module):
    """Every filter at unit length, in the stored weight too after a training forward, then times the gain."""

    def __init__(self, in_channels, out_channels, *kernel):
        super().__init__()
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def unit(self):
        w = self.weight.flatten(1)
        return (w / (1e-4 + w.norm(dim=1, keepdim=True) / w.shape[1] ** 0.5)).view(self.weight.shape)

    def forward(self, x, gain=1):
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self.unit())
        w = self.unit() * (gain / self.weight[0].numel() ** 0.5)
        return x @ w.t() if w.dim() == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class EDM2Block(nn.Module):
    def __init__(self, channels, emb_channels):
        super().__init__()
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0, self.conv_res1 = MPConv(channels, channels, 3, 3), MPConv(channels, channels, 3, 3)
        self.emb_linear = MPConv(emb_channels, channels)

    def forward(self, x, emb):
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = self.conv_res1(F.silu(self.conv_res0(F.silu(x)) * c[:, :, None, None]))
        return x.lerp(y, 0.3)


class UNet(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.enc = nn.ModuleDict({"8x8_conv": MPConv(3, channels, 3, 3), "8x8_block0": EDM2Block(channels, 6)})
        self.dec = nn.ModuleDict({"8x8_in0": EDM2Block(channels, 6)})
        self.out_conv = MPConv(channels, 3, 3, 3)

    def forward(self, x, emb):
        x = self.enc["8x8_block0"](self.enc["8x8_conv"](x), emb)
        return self.out_conv(self.dec["8x8_in0"](x, emb), gain=self.out_gain)


# ---- majumderb/rezero -------------------------------------------------------------------------------------------------


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


# ---- PixArt-alpha -----------------------------------------------------------------------------------------------------


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


# ---- CompVis/latent-diffusion, lllyasviel/ControlNet ------------------------------------------------------------------


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
        self.input_blocks = nn.ModuleList([
            Layers(nn.Conv2d(4, channels, 3, padding=1)),
            Layers(eager.ResBlock(channels, 16, 0.0), SpatialTransformer(channels, context_dim)),
            Layers(nn.Conv2d(channels, channels, 3, padding=1, stride=2)),
        ])  # fmt: skip
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
