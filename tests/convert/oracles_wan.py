"""Wan's residual block, written from its description: a cache of frames in a list, convolutions that take it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class CausalConv3d(nn.Conv3d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        t, h, w = self.padding
        self._padding = (w, w, h, h, 2 * t, 0)
        self.padding = (0, 0, 0)

    def forward(self, x, cache_x=None):
        widths = list(self._padding)
        if cache_x is not None and widths[4] > 0:
            x = torch.cat([cache_x, x], dim=2)
            widths[4] -= cache_x.shape[2]
        return super().forward(F.pad(x, widths))


class RMS_norm(nn.Module):  # noqa: N801
    def __init__(self, dim, channel_first=True, images=True, bias=False):
        super().__init__()
        shape = (dim, 1, 1) if images else (dim, 1, 1, 1)
        self.channel_first, self.scale = channel_first, dim**0.5
        self.gamma = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else 0.0

    def forward(self, x):
        return F.normalize(x, dim=1 if self.channel_first else -1) * self.scale * self.gamma + self.bias


class ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim, dropout=0.0):
        super().__init__()
        self.residual = nn.Sequential(
            RMS_norm(in_dim, images=False),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, 3, padding=1),
            RMS_norm(out_dim, images=False),
            nn.SiLU(),
            nn.Dropout(dropout),
            CausalConv3d(out_dim, out_dim, 3, padding=1),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        h = self.shortcut(x)
        for layer in self.residual:
            if isinstance(layer, CausalConv3d) and feat_cache is not None:
                i = feat_idx[0]
                kept = x[:, :, -2:].clone()
                if kept.shape[2] < 2 and feat_cache[i] is not None:
                    kept = torch.cat([feat_cache[i][:, :, -1:], kept], dim=2)
                x = layer(x, feat_cache[i])
                feat_cache[i] = kept
                feat_idx[0] += 1
            else:
                x = layer(x)
        return x + h
