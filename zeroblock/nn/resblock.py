"""The U-Net residual block. Source: Dhariwal & Nichol 2021, openai/guided-diffusion `unet.ResBlock`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional, zero
from .._autocast import autocast_dtype
from .._branch import Branch, Tail, bare_branch, skipped_branch
from .._layout import channels_last_format
from ..reference import channel_view, dropout_keep
from . import _common


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with fp32 statistics whatever the dtype of x; the result has the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, activation=None)


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
        conv, width = _common.CONVS[dims], self.out_channels

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
            _common.zero_parameters(conv(width, width, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if width != channels:
            self.skip_connection = conv(channels, width, 3, padding=1) if use_conv else conv(channels, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not self._fusable():
            return self._unfused(x, emb)
        norm, _, dropout, conv2 = self.out_layers
        if zero.may_skip_branch("ResBlock", self.zero_skip, conv2.weight) and zero.bypassable(
            (self.emb_layers, self.h_upd)
        ):
            tail = Tail(conv2)
            if _common.decide("ResBlock", tail):
                return self._skipped(x, emb, tail, norm, dropout)
            tail_skip = "never"  # judged already
        else:
            tail_skip = self.zero_skip
        keep = self._draw_keep(x, dropout)
        h, *film = self._body(x, emb)
        scale, shift = film or (None, None)
        return functional.group_norm_silu_conv_residual(
            h,
            norm.num_groups,
            norm.weight,
            norm.bias,
            conv2.weight,
            conv2.bias,
            self.skip_connection(self.x_upd(x)),
            eps=norm.eps,
            scale=scale,
            shift=shift,
            padding=conv2.padding,
            dropout_p=dropout.p,
            keep=keep,
            zero_skip=tail_skip,
        )

    def _fusable(self) -> bool:
        """The layers are the ones this class made, and nothing watches or replaces their calls."""
        norm1, _, conv1 = self.in_layers
        norm2, _, _, conv2 = self.out_layers
        return (
            type(norm1) is GroupNorm32
            and type(norm2) is GroupNorm32
            and _common.fits_fused(conv1)
            and _common.fits_fused(conv2)
            and zero.bypassable((self.in_layers, self.out_layers))
        )

    def _unfused(self, x: Tensor, emb: Tensor) -> Tensor:
        """The same block through its submodules, so that their hooks run."""
        norm1, silu1, conv1 = self.in_layers
        norm2, silu2, dropout, conv2 = self.out_layers
        h = conv1(self.h_upd(silu1(norm1(x))))
        scale, shift, e = self._embedding(emb, h.dtype, h.dim() - 2)
        h = norm2(h if e is None else h + e)
        if scale is not None:
            h = h * (1 + channel_view(scale, h.dim())) + channel_view(shift, h.dim())
        return self.skip_connection(self.x_upd(x)) + conv2(dropout(silu2(h)))

    def _embedding(
        self, emb: Tensor, dtype: torch.dtype, dims: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(scale, shift, None) for FiLM, (None, None, e [N, C, 1...]) to be added to conv1's output."""
        e = self.emb_layers(emb).to(dtype)
        if self.use_scale_shift_norm:
            return *e.chunk(2, dim=1), None
        return None, None, e[(..., *[None] * dims)]

    def _body(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """What norm2 sees: (h,), or (h, scale, shift). An embedding that is added enters as conv1's residual."""
        norm, _, conv = self.in_layers
        size, dtype = self._hidden_meta(x)
        scale, shift, e = self._embedding(emb, dtype, len(size) - 2)
        e = None if e is None else e.expand(size)
        if self.updown:
            h = self.h_upd(functional.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
            h = functional.conv_residual(h, conv.weight, conv.bias, e, padding=conv.padding, zero_skip="never")
        else:
            h = functional.group_norm_silu_conv_residual(
                x, norm.num_groups, norm.weight, norm.bias, conv.weight, conv.bias, e, eps=norm.eps,
                padding=conv.padding, zero_skip="never",
            )  # fmt: skip
        return (h,) if scale is None else (h, scale, shift)

    def _hidden_meta(self, x: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of conv1's output."""
        conv = self.in_layers[2]
        spatial = tuple(x.shape[2:])
        if self.updown:
            up = isinstance(self.h_upd, Upsample)
            kept = 1 if len(spatial) == 3 else 0  # a volume's outer dimension is not resampled
            spatial = spatial[:kept] + tuple(n * 2 if up else n // 2 for n in spatial[kept:])
        return (x.shape[0], self.out_channels, *spatial), autocast_dtype(conv.weight) or conv.weight.dtype

    def _draw_keep(self, x: Tensor, dropout: nn.Dropout) -> Tensor | None:
        """Dropout's mask, drawn for a tensor of the shape, dtype and memory format of conv1's output."""
        if not dropout.training or dropout.p == 0.0:
            return None
        conv = self.in_layers[2]
        size, dtype = self._hidden_meta(x)
        layout = channels_last_format(x) or channels_last_format(conv.weight) or torch.contiguous_format
        h = torch.empty(size, dtype=dtype, device=x.device, memory_format=layout)
        return functional.draw_keep(h, dropout.p, True)

    def _skipped(self, x: Tensor, emb: Tensor, tail: Tail, norm: GroupNorm32, dropout: nn.Dropout) -> Tensor:
        keep = self._draw_keep(x, dropout)
        residual = self.skip_connection(self.x_upd(x))
        if not torch.is_grad_enabled():
            return bare_branch(tail, residual, residual)

        def hidden(h: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
            a = functional.group_norm_silu(
                h, norm.num_groups, norm.weight, norm.bias, norm.eps, scale=scale, shift=shift
            )
            return dropout_keep(a, keep, dropout.p)

        parameters = _common.parameters_of(self.in_layers, self.emb_layers, norm)
        recomputed = (norm.weight, norm.bias)
        branch = Branch(tail, (x, emb), parameters, self._body, hidden, residual, carried=True, recomputed=recomputed)
        return skipped_branch(branch, residual)
