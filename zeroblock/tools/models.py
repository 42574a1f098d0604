"""A small ADM-style U-Net and a small DiT that take their blocks as a parameter, and the DDPM objective they train on.

`blocks` is any namespace with ResBlock, DiTBlock and FinalLayer: `zeroblock.nn` (the default) or
`zeroblock.testing.eager`. Everything else, the parameter names and the order of random draws are shared, so the same
seed gives identical weights whichever blocks are used. Both models predict the noise in images [N, C, H, W], given
integer timesteps [N] and class labels [N].
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as zeroblock_nn

TIMESTEPS = 1000
# Where the cosine schedule leaves 3 % of the variance to the image. The steps beyond it decide little, and a short
# training leaves them too inaccurate to be divided by so small a signal.
SAMPLING_START = 880


def timestep_embedding(t: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    """Sinusoids of the timesteps: t [N] -> [N, dim], cosines first, frequencies from 1 down to 1 / max_period."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def _zeroed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class AttentionBlock(nn.Module):
    """Self-attention over the pixels: x + proj_out(attention(qkv(norm x))), proj_out zero at the start."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        qkv = self.qkv(self.norm(tokens)).transpose(1, 2).contiguous()  # fused attention wants the features together
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        return (tokens + self.proj_out(h)).reshape(x.shape)


class UNet(nn.Module):
    """ADM-style U-Net: ResBlocks with FiLM resample between levels, attention at the lowest resolution.

    The zero branches are every ResBlock's last conv, every attention's projection and the output conv.
    """

    def __init__(
        self,
        blocks: Any = zeroblock_nn,
        *,
        in_channels: int = 1,
        model_channels: int = 64,
        channel_mult: tuple[int, ...] = (1, 2),
        num_heads: int = 4,
        num_classes: int = 10,
    ):
        super().__init__()
        self.model_channels = model_channels
        emb_channels = 4 * model_channels
        widths = [model_channels * mult for mult in channel_mult]

        def res_block(channels: int, **options: Any) -> nn.Module:
            return blocks.ResBlock(channels, emb_channels, 0.0, use_scale_shift_norm=True, **options)

        def level_block(channels: int, level: int) -> nn.ModuleList:
            layers = [res_block(channels, out_channels=widths[level])]
            if level == len(widths) - 1:
                layers.append(AttentionBlock(widths[level], num_heads))
            return nn.ModuleList(layers)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.label_emb = nn.Embedding(num_classes, emb_channels)

        channels = widths[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, channels, 3, padding=1)])])
        skips = [channels]
        for level, width in enumerate(widths):
            if level:
                self.input_blocks.append(nn.ModuleList([res_block(channels, down=True)]))
                skips.append(channels)
            self.input_blocks.append(level_block(channels, level))
            channels = width
            skips.append(channels)

        self.middle_block = nn.ModuleList(
            [res_block(channels), AttentionBlock(channels, num_heads), res_block(channels)]
        )

        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for last in (False, True):
                self.output_blocks.append(level_block(channels + skips.pop(), level))
                channels = widths[level]
                if last and level:
                    self.output_blocks[-1].append(res_block(channels, up=True))

        self.out = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), _zeroed(nn.Conv2d(channels, in_channels, 3, padding=1))
        )
        self._res_block = blocks.ResBlock

    def _run(self, layers: Iterable[nn.Module], x: Tensor, emb: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x, emb) if isinstance(layer, self._res_block) else layer(x)
        return x

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(x.dtype)) + self.label_emb(y)
        skips = []
        for layers in self.input_blocks:
            x = self._run(layers, x, emb)
            skips.append(x)
        x = self._run(self.middle_block, x, emb)
        for layers in self.output_blocks:
            x = self._run(layers, torch.cat((x, skips.pop()), dim=1), emb)
        return self.out(x)

    def zero_tails(self) -> dict[str, tuple[Tensor, ...]]:
        """The weights that hold each branch at zero: {branch name: (tensor, ...)} in the order of execution."""
        tails: dict[str, tuple[Tensor, ...]] = {}
        for name, module in self.named_modules():
            if isinstance(module, self._res_block):
                tails[name] = tuple(module.out_layers[-1].parameters())
            elif isinstance(module, AttentionBlock):
                tails[name] = tuple(module.proj_out.parameters())
        tails["out"] = tuple(self.out[-1].parameters())
        return tails


def _sincos_position(dim: int, side: int) -> Tensor:
    """Fixed 2-D position embedding [1, side * side, dim]: half of the features for the row, half for the column."""
    axis = timestep_embedding(torch.arange(side), dim // 2)
    rows, columns = axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)
    return torch.cat((rows, columns), dim=1)[None]


class DiT(nn.Module):
    """DiT: patches, `depth` adaLN-Zero transformer blocks, adaLN output layer, initialised as in DiT.

    The zero branches are both gates of every block and the output layer.
    """

    def __init__(
        self,
        blocks: Any = zeroblock_nn,
        *,
        image_size: int = 16,
        in_channels: int = 1,
        patch_size: int = 2,
        hidden_size: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        num_classes: int = 10,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.patch_size = patch_size
        self.x_embedder = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.t_embedder = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.y_embedder = nn.Embedding(num_classes, hidden_size)
        self.register_buffer("pos_embed", _sincos_position(hidden_size, image_size // patch_size), persistent=False)
        self.blocks = nn.ModuleList(blocks.DiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = blocks.FinalLayer(hidden_size, patch_size, in_channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.bias)
        for weight in (self.y_embedder.weight, self.t_embedder[0].weight, self.t_embedder[2].weight):
            nn.init.normal_(weight, std=0.02)
        for block in self.blocks:
            _zeroed(block.adaLN_modulation[-1])
        _zeroed(self.final_layer.adaLN_modulation[-1])
        _zeroed(self.final_layer.linear)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(timestep_embedding(t, self.hidden_size).to(x.dtype)) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        patches = self.final_layer(tokens, c).transpose(1, 2)  # [N, C * P * P, T] with C slowest, as fold wants it
        return F.fold(patches, x.shape[-2:], self.patch_size, stride=self.patch_size)

    def zero_tails(self) -> dict[str, tuple[Tensor, ...]]:
        """The weights that hold each branch at zero: {branch name: (tensor, ...)} in the order of execution."""
        tails: dict[str, tuple[Tensor, ...]] = {}
        for i, block in enumerate(self.blocks):
            rows = [parameter.chunk(6) for parameter in block.adaLN_modulation[-1].parameters()]
            tails[f"blocks.{i}.attn"] = tuple(row[2] for row in rows)
            tails[f"blocks.{i}.mlp"] = tuple(row[5] for row in rows)
        tails["final_layer"] = tuple(self.final_layer.linear.parameters())
        return tails


def signal_levels() -> Tensor:
    """The cosine schedule's alpha-bar [TIMESTEPS]: the part of the variance that is image."""
    angle = (torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS + 0.008) / 1.008 * math.pi / 2
    level = angle.cos().square()
    return (level[1:] / level[0]).clamp(min=1e-5).float()


def draw_batch(
    images: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A training batch: (noisy images, timesteps, labels, the noise to predict)."""
    index = torch.randint(len(images), (size,), generator=generator)
    t = torch.randint(TIMESTEPS, (size,), generator=generator)
    noise = torch.randn(size, *images.shape[1:], generator=generator)
    level = signal_levels()[t].view(-1, 1, 1, 1)
    return level.sqrt() * images[index] + (1 - level).sqrt() * noise, t, labels[index], noise


def noise_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean squared error of the predicted noise."""
    x, t, y, noise = batch
    return F.mse_loss(model(x, t, y), noise)


@torch.no_grad()
def sample(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """DDIM (eta = 0) from the noise x [N, C, H, W] to images of the classes y [N], in `steps` evaluations."""
    times = torch.linspace(SAMPLING_START, 0, steps).long()
    levels = [*signal_levels()[times].tolist(), 1.0]
    for t, level, following in zip(times, levels, levels[1:], strict=False):
        noise = model(x, t.expand(len(x)), y)
        image = ((x - (1 - level) ** 0.5 * noise) / level**0.5).clamp(-1, 1)
        noise = (x - level**0.5 * image) / (1 - level) ** 0.5
        x = following**0.5 * image + (1 - following) ** 0.5 * noise
    return x
