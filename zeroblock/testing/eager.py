"""Plain PyTorch versions of every block that zeroblock replaces: the tests' oracle, the benchmarks' baseline.

Nothing here imports the rest of zeroblock, so that an error in it cannot hide itself. Each block is what its users
run today: the same constructor, attribute names and state_dict keys, the same eager calls in the same order. All of
them work in fp64, fp32, bf16 and fp16 and under torch.compile, as far as PyTorch itself does: on a CPU it has no half
precision average pooling of volumes (ResBlock with dims=3, down=True).

Sources: guided-diffusion (ResBlock), DiT and timm (DiTBlock, FinalLayer), Fixup (FixupBasicBlock, FixupBottleneck),
ReZero (ReZero).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .eager_residual import FixupBasicBlock as FixupBasicBlock
from .eager_residual import FixupBottleneck as FixupBottleneck
from .eager_residual import ResidualBranch as ResidualBranch
from .eager_residual import ReZero as ReZero
from .eager_residual import zero_module as zero_module

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm32(nn.GroupNorm):
    """GroupNorm computed in at least fp32 and cast back to x.dtype, whatever dtype the parameters have."""

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = F.group_norm(x.to(dtype), self.num_groups, self.weight.to(dtype), self.bias.to(dtype), self.eps)
        return y.to(x.dtype)


class Upsample(nn.Module):
    """Nearest-neighbour x2; of a volume only the inner two dimensions grow."""

    def __init__(self, dims):
        super().__init__()
        self.scale_factor = (1.0, 2.0, 2.0) if dims == 3 else 2.0

    def forward(self, x):
        return F.interpolate(x, scale_factor=self.scale_factor, mode="nearest")


def downsample(dims):
    """Average over 2 in each dimension; of a volume only the inner two dimensions shrink."""
    return AVG_POOLS[dims]((1, 2, 2) if dims == 3 else 2)


def in_turn(layers, h):
    for layer in layers:
        h = layer(h)
    return h


class ResBlock(nn.Module):
    """guided-diffusion's residual block: y = skip(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x)), emb)))).

    The embedding enters by norm2(h) * (1 + scale) + shift (`use_scale_shift_norm`) or by norm2(h + e). `up` and `down`
    resample between silu and conv1, and x alike. The last conv starts at zero. x [N, C, *S], emb [N, emb_channels]
    -> [N, out_channels, *S].
    """

    def __init__(
        self,
        channels,
        emb_channels,
        dropout,
        out_channels=None,
        use_conv=False,
        use_scale_shift_norm=False,
        dims=2,
        use_checkpoint=False,
        up=False,
        down=False,
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
        if up:
            self.h_upd, self.x_upd = Upsample(dims), Upsample(dims)
        elif down:
            self.h_upd, self.x_upd = downsample(dims), downsample(dims)
        else:
            self.h_upd = self.x_upd = nn.Identity()
        emb_width = 2 * width if use_scale_shift_norm else width
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            GroupNorm32(32, width), nn.SiLU(), nn.Dropout(dropout), zero_module(conv(width, width, 3, padding=1))
        )
        if width == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv(channels, width, 3, padding=1)
        else:
            self.skip_connection = conv(channels, width, 1)

    def forward(self, x, emb):
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x, emb):
        if self.updown:
            *before, conv1 = self.in_layers
            h = conv1(self.h_upd(in_turn(before, x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        e = self.emb_layers(emb).to(h.dtype)
        e = e.reshape(e.shape + (1,) * (h.dim() - 2))
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            norm2, *after = self.out_layers
            h = in_turn(after, norm2(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Multi-head self-attention of [B, T, D] as in timm: one qkv projection, fused attention, output projection."""

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Attention: dim must be divisible by num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh form of GELU."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def modulate(x, shift, scale):
    """x * (1 + scale) + shift with one shift and scale [B, D] for all tokens of a sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """DiT's block with adaLN-Zero: x + gate * attn(modulate(norm x)), then the same with the mlp.

    All six vectors are Linear(silu(c)), zero at the start. x [B, T, D], c [B, D] -> [B, T, D].
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_module(nn.Linear(hidden_size, 6 * hidden_size)))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """DiT's output layer: linear(modulate(norm x)), all of it zero at the start.

    x [B, T, D], c [B, D] -> [B, T, patch_size^2 * out_channels].
    """

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = zero_module(nn.Linear(hidden_size, patch_size * patch_size * out_channels))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_module(nn.Linear(hidden_size, 2 * hidden_size)))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
