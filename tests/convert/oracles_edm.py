"""EDM's and EDM2's blocks, written down from their descriptions, under their names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

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
    def __init__(
        self,
        in_channels,
        out_channels,
        emb_channels,
        up=False,
        down=False,
        num_heads=0,
        dropout=0.0,
        skip_scale=1.0,
        eps=1e-5,
        resample_proj=False,
        adaptive_scale=True,
        init_zero=0.0,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_heads, self.dropout, self.skip_scale, self.adaptive_scale = (
            num_heads,
            dropout,
            skip_scale,
            adaptive_scale,
        )
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


# ---- NVlabs/edm2 -----------------------------------------------------------------------------------------------------


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
