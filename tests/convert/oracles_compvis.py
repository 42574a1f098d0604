"""DDPM's residual and attention blocks as several repositories have them, written down from their descriptions.

Class, attribute and parameter names are theirs, since blocks are found by them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zeroblock.testing.eager import zero_module

GROUPS = 4


def swish(x):
    return x * torch.sigmoid(x)


def norm(channels):
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def conv(channels, out_channels, kernel_size=3, dims=2):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return kind(channels, out_channels, kernel_size, padding=kernel_size // 2)


# ---- CompVis: latent-diffusion, taming-transformers, sgm, pytorch_diffusion, LlamaGen --------------------------------


class ResnetBlock(nn.Module):
    """U-Nets give an embedding, autoencoders None; a shortcut only where the width changes."""

    activation = staticmethod(swish)

    def __init__(self, channels, out_channels, temb_channels=0, dropout=0.0, conv_shortcut=False, dims=2):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), conv(channels, out_channels, dims=dims)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2, self.dropout = norm(out_channels), nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, dims=dims)
        if channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = conv(channels, out_channels, dims=dims)
            else:
                self.nin_shortcut = conv(channels, out_channels, 1, dims)

    def branch(self, x, temb):
        h = self.conv1(self.activation(self.norm1(x)))
        if temb is not None:
            e = self.temb_proj(self.activation(temb))
            h = h + e.reshape(*e.shape, *[1] * (h.dim() - 2))
        return self.conv2(self.dropout(self.activation(self.norm2(h))))

    def shortcut(self, x):
        for name in ("conv_shortcut", "nin_shortcut"):
            x = getattr(self, name, nn.Identity())(x)
        return x

    def forward(self, x, temb):
        return self.shortcut(x) + self.branch(x, temb)


class OptionalEmbedding(ResnetBlock):
    def forward(self, x, temb=None):
        return super().forward(x, temb)


class NoEmbedding(ResnetBlock):
    """black-forest-labs/flux has no dropout either."""

    def __init__(self, channels, out_channels):
        super().__init__(channels, out_channels)
        del self.dropout

    def branch(self, x, temb):
        h = self.conv1(swish(self.norm1(x)))
        return self.conv2(swish(self.norm2(h)))

    def forward(self, x):
        return self.shortcut(x) + self.branch(x, None)


class InPlace(ResnetBlock):
    """FoundationVision/VAR: activations in place, identities for what is absent."""

    def __init__(self, channels, out_channels, dropout=0.0):
        super().__init__(channels, out_channels, dropout=dropout)
        if dropout == 0:
            self.dropout = nn.Identity()
        if channels == out_channels:
            self.nin_shortcut = nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(self.dropout(F.silu(self.norm2(h), inplace=True)))
        return self.nin_shortcut(x) + h


# ---- yang-song/score_sde_pytorch -------------------------------------------------------------------------------------


class NIN(nn.Module):
    """A 1x1 convolution whose weight is stored [in, out]."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.W = nn.Parameter(torch.randn(channels, out_channels) / channels**0.5)
        self.b = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        return torch.einsum("nchw,cd->ndhw", x, self.W) + self.b[:, None, None]


class ResnetBlockDDPM(nn.Module):
    """Of score_sde's three blocks the first; `skip_rescale` is the second's."""

    def __init__(self, act, in_ch, out_ch, temb_dim=None, conv_shortcut=False, dropout=0.1, skip_rescale=False):
        super().__init__()
        self.act, self.skip_rescale = act, skip_rescale
        self.GroupNorm_0, self.Conv_0 = norm(in_ch), conv(in_ch, out_ch)
        if temb_dim is not None:
            self.Dense_0 = nn.Linear(temb_dim, out_ch)
        self.GroupNorm_1, self.Dropout_0, self.Conv_1 = norm(out_ch), nn.Dropout(dropout), conv(out_ch, out_ch)
        if in_ch != out_ch:
            if conv_shortcut:
                self.Conv_2 = conv(in_ch, out_ch)
            else:
                self.NIN_0 = NIN(in_ch, out_ch)

    def resample(self, x):
        return x

    def forward(self, x, temb=None):
        h = self.Conv_0(self.resample(self.act(self.GroupNorm_0(x))))
        if temb is not None:
            h += self.Dense_0(self.act(temb))[:, :, None, None]
        h = self.Conv_1(self.Dropout_0(self.act(self.GroupNorm_1(h))))
        x = self.resample(x)
        for name in ("Conv_2", "NIN_0"):
            x = getattr(self, name, nn.Identity())(x)
        return (x + h) / 2**0.5 if self.skip_rescale else x + h


class ResnetBlockDDPMpp(ResnetBlockDDPM):
    pass


class ResnetBlockBigGANpp(ResnetBlockDDPM):
    """Resamples by repeating or averaging pixels, unless `fir`; always with a 1x1 shortcut then."""

    def __init__(self, act, in_ch, out_ch, temb_dim=None, up=False, down=False, dropout=0.1, fir=False):
        super().__init__(act, in_ch, out_ch, temb_dim, dropout=dropout, skip_rescale=True)
        self.up, self.down, self.fir = up, down, fir
        self.__dict__["_modules"].pop("NIN_0", None)
        if in_ch != out_ch or up or down:
            self.Conv_2 = conv(in_ch, out_ch, 1)

    def resample(self, x):
        N, C, H, W = x.shape
        if self.up:
            return x.reshape(N, C, H, 1, W, 1).expand(N, C, H, 2, W, 2).reshape(N, C, 2 * H, 2 * W)
        return x.reshape(N, C, H // 2, 2, W // 2, 2).mean((3, 5)) if self.down else x


# ---- forks that compute something else -------------------------------------------------------------------------------


class Gelu(ResnetBlock):
    activation = staticmethod(F.gelu)


class Scaled(ResnetBlock):
    def forward(self, x, temb):
        return super().forward(x, temb) * 0.9


class PostNorm(nn.Module):
    """lucidrains/denoising-diffusion-pytorch: convolution, norm, SiLU, twice."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.block1 = nn.Sequential(conv(dim, dim_out), norm(dim_out), nn.SiLU())
        self.block2 = nn.Sequential(conv(dim_out, dim_out), norm(dim_out), nn.SiLU())
        self.res_conv = nn.Identity()

    def forward(self, x, time_emb=None):
        return self.block2(self.block1(x)) + self.res_conv(x)


def named(name, *kinds):
    """The name that all these copies have in their repositories."""
    for kind in kinds:
        kind.__name__ = name


named("ResnetBlock", OptionalEmbedding, NoEmbedding, InPlace, Gelu, Scaled, PostNorm)


def zeroed(block):
    """As somebody starts it who wants a residual block to begin as its shortcut."""
    zero_module(block.Conv_1 if hasattr(block, "Conv_1") else block.conv2)
    return block


# ---- attention over pixels -------------------------------------------------------------------------------------------


class AttnBlock(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def projected(self, h):
        return self.q(h), self.k(h), self.v(h)

    def forward(self, x):
        q, k, v = (t.flatten(2) for t in self.projected(self.norm(x)))
        w = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(dim=-1)
        return x + self.proj_out((v @ w.transpose(1, 2)).view(x.shape))


class TogetherAttnBlock(AttnBlock):
    def __init__(self, channels=16):
        super().__init__(channels)
        del self.q, self.k, self.v
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)

    def projected(self, h):
        return self.qkv(h).chunk(3, dim=1)


TogetherAttnBlock.__name__ = "AttnBlock"
