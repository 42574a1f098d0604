"""The U-Net residual block. Source: Dhariwal & Nichol 2021, openai/guided-diffusion `unet.ResBlock`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional
from ..blocks import resblock, tiny
from ..blocks.decision import bypassable
from ..blocks.layers import DROPOUTS, GROUP_NORMS, SILUS, computes
from ..reference import channel_view
from .init import CONVS, zero_parameters


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with fp32 statistics whatever the dtype of x; the result has the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if tiny.is_tiny(x, tiny.IMAGES) and x.dim() > 2 and x.size(1) == self.num_channels:
            if weight is not None and bias is not None and x.dtype == weight.dtype == bias.dtype == torch.float32:
                return torch.group_norm(x, self.num_groups, weight, bias, self.eps)
        return functional.group_norm_silu(x, self.num_groups, weight, bias, self.eps, activation=None)


GROUP_NORMS[GroupNorm32.forward] = None


class Upsample(nn.Module):
    """Nearest-neighbour x2; of a volume only the inner two dimensions grow."""

    def __init__(self, dims: int):
        super().__init__()
        self.scale_factor = (1.0, 2.0, 2.0) if dims == 3 else 2.0

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.scale_factor, mode="nearest")


def _downsample(dims: int) -> nn.Module:
    pools = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
    return pools[dims]((1, 2, 2) if dims == 3 else 2)


def _in_turn(layers: list[nn.Module], h: Tensor) -> Tensor:
    for layer in layers:
        h = layer(h)
    return h


class ResBlock(nn.Module):
    """y = skip(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x)), emb)))), conv2 zero at the start.

    The embedding enters as norm2(h) * (1 + scale) + shift (use_scale_shift_norm) or as norm2(h + e); up and down
    resample between silu and conv1, and x alike. x [N, C, *S] in `dims` dimensions, emb [N, emb_channels].
    Constructor, attributes and state_dict are guided-diffusion's. Saves x, conv1's output and statistics for
    backward. While conv2's weight is exactly zero, y = skip(x) + bias: conv1 runs once for conv2's gradient, or not
    at all (zeroblock/zero.py).
    """

    zero_skip = "auto"

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down
        conv, width = CONVS[dims], self.out_channels

        self.in_layers = nn.Sequential(GroupNorm32(32, channels), nn.SiLU(), conv(channels, width, 3, padding=1))
        if self.updown:
            self.h_upd, self.x_upd = (Upsample(dims), Upsample(dims)) if up else (_downsample(dims), _downsample(dims))
        else:
            self.h_upd = self.x_upd = nn.Identity()
        emb_width = 2 * width if use_scale_shift_norm else width
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            GroupNorm32(32, width),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_parameters(conv(width, width, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if width != channels:
            self.skip_connection = conv(channels, width, 3, padding=1) if use_conv else conv(channels, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        # The fused forward says what is wrong with other sizes.
        if tiny.is_tiny(x, tiny.IMAGES) and x.dim() > 2 and x.size(1) == self.channels:
            if tiny.runs_as_written("ResBlock", self.zero_skip, x, self._last_weight()):
                return self._unfused(x, emb)
        layers = self._layers()
        return self._unfused(x, emb) if layers is None else resblock.forward(layers, x, emb)

    def _last_weight(self) -> Tensor | None:
        """conv2's; None where it is not a parameter."""
        out_layers: Any = self._modules["out_layers"]
        *_, conv2 = out_layers._modules.values()
        return conv2._parameters.get("weight")

    def _layers(self) -> resblock.Layers | None:
        """The parts for the fused ops; None where layers were replaced or are watched by hooks."""
        modules: dict[str, Any] = self._modules
        in_layers, out_layers, emb_layers = modules["in_layers"], modules["out_layers"], modules["emb_layers"]
        if len(in_layers._modules) != 3 or len(out_layers._modules) != 4:
            return None
        norm1, silu1, conv1 = in_layers._modules.values()
        norm2, silu2, dropout, conv2 = out_layers._modules.values()
        if type(norm1) is not GroupNorm32 or type(norm2) is not GroupNorm32:
            return None
        if not (computes(silu1, SILUS) and computes(silu2, SILUS) and type(dropout).forward in DROPOUTS):
            return None
        if not resblock.fusable(norm1, conv1, norm2, conv2) or not bypassable((in_layers, out_layers)):
            return None
        resample_h, resample_x = (modules["h_upd"], modules["x_upd"]) if self.updown else (None, None)
        return resblock.Layers(
            "ResBlock",
            self.zero_skip,
            norm1,
            conv1,
            norm2,
            conv2,
            dropout,
            self._embedding,
            (emb_layers,),
            modules["skip_connection"],
            resample_h,
            resample_x,
        )

    def _unfused(self, x: Tensor, emb: Tensor) -> Tensor:
        """The same block through its submodules, as guided-diffusion calls them, so that their hooks run: in_layers is
        called as a whole unless there is a resampling inside, out_layers unless there is a modulation."""
        if self.updown:
            *before, conv1 = self.in_layers
            h = conv1(self.h_upd(_in_turn(before, x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        scale, shift, e = self._embedding(emb, h.dtype)
        if scale is not None and shift is not None:
            norm2, *after = self.out_layers
            h = norm2(h) * (1 + channel_view(scale, h.dim())) + channel_view(shift, h.dim())
            h = _in_turn(after, h)
        else:
            h = self.out_layers(h if e is None else h + e)
        return self.skip_connection(x) + h

    def _embedding(self, emb: Tensor, dtype: torch.dtype) -> resblock.Embedding:
        e: Tensor = self.emb_layers(emb).to(dtype)
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            return scale, shift, None
        return None, None, channel_view(e, self.in_layers[-1].weight.dim())  # type: ignore[operator]
