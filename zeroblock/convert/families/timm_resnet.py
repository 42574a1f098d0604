"""ResNet blocks whose last norm starts at zero: torchvision (`models/resnet.py`), timm (`models/resnet.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._autocast import autocast_dtype
from ..._layout import in_layout, layout_after
from ...blocks.decision import SKIPS, decide
from ...blocks.layers import is_plain_conv
from ...ops.residual_alone import residual_alone
from ..family import Family, lacks, register
from ..report import Obstacle, Reason

# What each of the two packages calls in turn; names that a block lacks, or has as None, are passed over.
_TIMM = (
    "conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path".split(),
    "conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path".split(),
)
_TORCHVISION = ("conv1 bn1 relu conv2 bn2".split(), "conv1 bn1 relu conv2 bn2 relu conv3 bn3".split())


@register
class ResNetBlock(Family):
    """y = relu(bn(conv(... x)) + shortcut(x)): BasicBlock and Bottleneck of torchvision and timm

    The last norm's weight is zero at the start (zero_init_residual, zero_init_last). Source: torchvision and timm
    models/resnet.py.
    Use: zb.accelerate(model), then model.eval() for inference.
    Inference (eval mode, no gradients) while that weight is zero: nothing but its bias is added to the shortcut.
    Training forward: unchanged; batch norms learn their statistics from every batch.
    Training backward: unchanged.
    """

    name = "ResNetBlock"
    classes = ("BasicBlock", "Bottleneck")
    only_skips = True

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "conv1", "bn1", "conv2", "bn2")
        if missing is not None:
            return missing
        if not hasattr(block, "relu") and not hasattr(block, "act2"):
            return Obstacle(Reason.NAMESAKE, "it is neither torchvision's nor timm's")
        if getattr(block, "se", None) is not None:
            return Obstacle(Reason.VARIANT, "attention follows its last norm")
        if type(self._last_norm(block)).forward is not nn.BatchNorm2d.forward or self._last_norm(block).weight is None:
            return Obstacle(Reason.LAYERS, "its last norm is not a BatchNorm2d with a weight")
        return None

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"bn3" if hasattr(block, "conv3") else "bn2": (self._last_norm(block).weight,)}

    def inner_modules(self, block: Any) -> tuple[nn.Module, ...]:
        return (block,)

    def example(self, block: Any, side: int) -> tuple:
        return (torch.randn(2, block.conv1.in_channels, 4 * side, 8),)

    def _last_norm(self, block: Any) -> Any:
        return block.bn3 if hasattr(block, "conv3") else block.bn2

    def forward(self, block: Any, x: Tensor) -> Tensor:
        deep = hasattr(block, "conv3")
        names = (_TORCHVISION if hasattr(block, "relu") else _TIMM)[deep]
        layers = [layer for layer in [getattr(block, name, None) for name in names] if layer is not None]
        conv, norm = (block.conv3, block.bn3) if deep else (block.conv2, block.bn2)
        act = block.relu if hasattr(block, "relu") else block.act3 if deep else block.act2
        if self._is_zero(conv, norm, layers):
            shortcut = x if block.downsample is None else block.downsample(x)
            dtype = autocast_dtype(conv.weight) or conv.weight.dtype
            bias = None if norm.bias is None else norm.bias.to(dtype)
            y = residual_alone(shortcut, bias, None, 1, dtype, None)
            # Eager adds into what the last norm returned.
            return act(in_layout(y, layout_after(x, *(m.weight for m in layers if isinstance(m, nn.Conv2d)))))
        y = x
        for layer in layers:
            y = layer(y)
        y += x if block.downsample is None else block.downsample(x)
        return act(y)

    def _is_zero(self, conv: nn.Module, norm: Any, layers: list[nn.Module]) -> bool:
        if torch.is_grad_enabled() or not is_plain_conv(conv):
            return False
        return decide(self.name, self.zero_skip, (norm.weight,), bypassed=layers) in SKIPS
