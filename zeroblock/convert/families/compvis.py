"""DDPM's residual block as PyTorch code has it: CompVis' `ResnetBlock` and its copies in autoencoders and U-Nets, and
the blocks of yang-song/score_sde_pytorch, which are the same under other names.

CompVis' activation is a function that no attribute shows: the proof tells whether it is SiLU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks import resblock
from ...blocks.decision import bypassable
from ...blocks.layers import DROPOUTS, SILUS, computes
from ...reference import channel_view
from ..family import Family, lacks, register
from ..report import Obstacle, Reason
from .adaln import zeroing_tensors

_NOT_PLAIN = Obstacle(Reason.LAYERS, "its norms, convolutions or dropout are not the plain ones the fused ops take")

Resample = Callable[[Tensor], Tensor]


class _Names(NamedTuple):
    """Of a block's attributes. Dropout, the embedding's projection and shortcuts (the first of them) may be missing."""

    norm1: str
    conv1: str
    norm2: str
    conv2: str
    dropout: str
    projection: str
    shortcuts: tuple[str, ...]


@register
class ResnetBlock(Family):
    """y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x)) + temb_proj(silu temb))))), with or without temb

    Source: `ResnetBlock` of CompVis/latent-diffusion and taming-transformers, Stability-AI/generative-models,
    black-forest-labs/flux and pytorch/torchtitan (autoencoder), FoundationVision/VAR and LlamaGen (tokenizer),
    pesser/pytorch_diffusion. Not that of denoising-diffusion-pytorch, which normalises what its convolutions give.
    Use: zb.accelerate(model), before torch.compile.
    Inference: while conv2's weight is zero everything but the shortcut is skipped.
    Training forward: conv2 is skipped; norm, activation and dropout are recomputed for its gradient.
    Training backward: only conv2's and the shortcut's gradients are computed, the others are exact zeros.
    """

    name = "ResnetBlock"
    classes: ClassVar[tuple[str, ...]] = ("ResnetBlock",)
    names: ClassVar[_Names] = _Names(
        "norm1", "conv1", "norm2", "conv2", "dropout", "temb_proj", ("conv_shortcut", "nin_shortcut")
    )

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        if hasattr(block, "block1") and hasattr(block, "res_conv"):
            return Obstacle(Reason.VARIANT, "its norms come after its convolutions")
        return lacks(block, *self.names[:4]) or (None if self._fits(block) else _NOT_PLAIN)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        name = self.names.conv2
        conv2 = getattr(block, name)
        return {name: zeroing_tensors(conv2, conv2.weight)}

    def example(self, block: Any, side: int) -> tuple:
        conv1, projection = getattr(block, self.names.conv1), getattr(block, self.names.projection, None)
        if getattr(block, "down", False):
            side += side % 2  # to be halved
        x = torch.randn(2, conv1.in_channels, *[side] * len(conv1.kernel_size))
        _, *others = inspect.signature(type(block).forward).parameters.values()
        if projection is not None and len(others) > 1:
            return x, torch.randn(2, projection.in_features)
        return (x, None) if len(others) > 1 and others[1].default is inspect.Parameter.empty else (x,)

    def forward(self, block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # temb, which not every copy takes; a fork's own arguments.
        temb = args[0] if args else kwargs.get("temb")
        known = len(args) + len(kwargs) <= 1 and (not kwargs or "temb" in kwargs)
        if not known or not self._takes(block, x, temb):
            return self.eager(block, x, *args, **kwargs)
        return self._scaled(block, resblock.forward(self._layers(block, temb), x, temb))

    def _takes(self, block: Any, x: Tensor, temb: Any) -> bool:
        if temb is not None and (not isinstance(temb, Tensor) or temb.dim() != 2):
            return False
        as_proved = (temb is None) == (getattr(block, self.names.projection, None) is None)
        return as_proved and self._fits(block) and x.dim() == getattr(block, self.names.conv1).weight.dim()

    def _fits(self, block: Any) -> bool:
        parts = [getattr(block, name) for name in self.names[:4]]
        dropout = getattr(block, self.names.dropout, None)
        plain = dropout is None or type(dropout).forward in DROPOUTS or isinstance(dropout, nn.Identity)
        return plain and resblock.fusable(*parts) and bypassable((*parts, dropout))

    def _layers(self, block: Any, temb: Tensor | None) -> resblock.Layers:
        norm1, conv1, norm2, conv2 = (getattr(block, name) for name in self.names[:4])
        dropout = getattr(block, self.names.dropout, None)
        projection = None if temb is None else getattr(block, self.names.projection)
        shortcuts = (getattr(block, name, None) for name in self.names.shortcuts)
        resample = self._resample(block)

        def embed(temb: Tensor | None, dtype: torch.dtype) -> resblock.Embedding:
            if temb is None or projection is None:
                return None, None, None
            return None, None, channel_view(projection(F.silu(temb)), conv1.weight.dim())

        return resblock.Layers(
            self.name,
            self.zero_skip,
            norm1,
            conv1,
            norm2,
            conv2,
            None if isinstance(dropout, nn.Identity) else dropout,
            embed,
            embedders=() if projection is None else (projection,),
            shortcut=next((m for m in shortcuts if m is not None), resblock.same),
            resample_h=resample,
            resample_x=resample,
        )

    def _resample(self, block: Any) -> Resample | None:
        return None

    def _scaled(self, block: Any, y: Tensor) -> Tensor:
        return y


@register
class ResnetBlockDDPM(ResnetBlock):
    """y = s * (shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x)) + dense(silu temb)))))), s = 1 or 1/sqrt(2)

    Source: yang-song/score_sde_pytorch, `ResnetBlockDDPM`, `ResnetBlockDDPMpp`, `ResnetBlockBigGANpp` (which doubles or
    halves images between silu and conv1, and before the shortcut; FIR filters are left alone). What starts there at
    1e-10 instead of zero is not skipped.
    Use: zb.accelerate(model), before torch.compile.
    Inference: while conv2's weight is zero everything but the shortcut is skipped.
    Training forward: conv2 is skipped; norm, activation and dropout are recomputed for its gradient.
    Training backward: only conv2's and the shortcut's gradients are computed, the others are exact zeros.
    """

    name = "ResnetBlockDDPM"
    classes = ("ResnetBlockDDPM", "ResnetBlockDDPMpp", "ResnetBlockBigGANpp")
    names = _Names("GroupNorm_0", "Conv_0", "GroupNorm_1", "Conv_1", "Dropout_0", "Dense_0", ("Conv_2", "NIN_0"))

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "act") or super().match(block, path, root)
        if missing is None and getattr(block, "fir", False) and (block.up or block.down):
            return Obstacle(Reason.VARIANT, "it resamples with a FIR filter")
        return missing

    def _fits(self, block: Any) -> bool:
        return computes(block.act, SILUS) and bypassable((block.act,)) and super()._fits(block)

    def _resample(self, block: Any) -> Resample | None:
        if getattr(block, "up", False):
            return functools.partial(F.interpolate, scale_factor=2.0, mode="nearest")
        return functools.partial(F.avg_pool2d, kernel_size=2) if getattr(block, "down", False) else None

    def _scaled(self, block: Any, y: Tensor) -> Tensor:
        return y / 2**0.5 if getattr(block, "skip_rescale", False) else y
