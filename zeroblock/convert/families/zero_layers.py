"""Single layers that are zero when accelerate() finds them, wherever they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import zero
from ...blocks.layers import is_plain_layer, plain_forward
from ...blocks.residual import skip_zero_layer
from ..family import Family, register
from ..report import Obstacle

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@register
class ZeroLayer(Family):
    """y = layer(x), a convolution or linear layer of torch.nn that is zero now and belongs to no other family.

    Source: `zero_module` and the zero convolutions of lllyasviel/ControlNet, output convolutions of U-Nets,
    GLIDE and PixArt projections.
    Use: zb.accelerate(model) after the weights are loaded: layers that are zero then are found.
    Inference: while the weight is zero the result is the bias; the layer is skipped.
    Training forward: the layer is skipped.
    Training backward: only the layer's own gradients are computed, x gets exact zeros.
    """

    name = "ZeroLayer"
    classes = ()
    inner = True

    def knows(self, block: Any) -> bool:
        return type(block) in _KINDS and is_plain_layer(block) and zero.is_exactly_zero(block.weight.detach())

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return None

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"": (block.weight,)}

    def example(self, block: Any, side: int) -> tuple:
        if isinstance(block, nn.Linear):
            return (torch.randn(2, side**2, block.in_features),)
        sizes = [d * (k - 1) + side for d, k in zip(block.dilation, block.kernel_size, strict=True)]
        return (torch.randn(2, block.in_channels, *sizes),)

    def on_class_created(self, kind: type[nn.Module]) -> None:
        plain_forward(kind.forward)  # the blocks around it may read its weight still

    def forward(self, block: nn.Module, input: Tensor) -> Tensor:
        y = skip_zero_layer(self.name, self.zero_skip, block, input) if is_plain_layer(block) else None
        return self.eager(block, input) if y is None else y
