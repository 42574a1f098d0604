"""The residual block of the autoencoder of Wan-Video/Wan2.1 and Wan2.2 (`wan/modules/vae.py`), also in DiffSynth-Studio
and ComfyUI."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...blocks.decision import bypassable
from ..family import lacks, register
from ..report import Obstacle
from .diffusers_streamed import WanResidualBlock
from .video_layers import NOT_PLAIN, Members


@register
class ResidualBlock(WanResidualBlock):
    """y = shortcut(x) + conv2(dropout(silu(rms2(conv1(silu(rms1 x)))))), zeros in front in time, or feat_cache's frames

    Source: `ResidualBlock` of Wan-Video/Wan2.1 and Wan2.2, an nn.Sequential `residual` of seven layers.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while the last convolution is zero: nothing but shortcut and bias is computed; with a feat_cache it is not
    executed.
    Training forward while zero: the last convolution is not executed.
    Training backward while zero: exact zeros upstream of it.
    """

    name = "ResidualBlock"
    classes = ("ResidualBlock",)
    tail = "residual.6"

    def members(self, block: Any) -> Members:
        norm1, silu1, conv1, norm2, silu2, dropout, conv2 = block.residual
        return Members((norm1, norm2), (conv1, conv2), (silu1, silu2), dropout)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "residual.6", "shortcut", *(f"residual.{i}.gamma" for i in (0, 3)))
        if missing is not None:
            return missing
        return None if self.halves(block) else NOT_PLAIN

    def halves(self, block: Any) -> Any:
        whole = type(block.residual) is nn.Sequential and len(block.residual) == 7
        # Its own forward takes the layers one by one.
        return super().halves(block) if whole and bypassable(tuple(block.residual)) else None

    def shortcut(self, block: Any, x: Tensor) -> Tensor:
        return block.shortcut(x)
