"""timm's normalizer-free residual blocks (`models/nfnet.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.decision import SKIPS, decide
from ...blocks.residual import residual_branch
from ..family import Family, lacks, register
from ..report import Obstacle, Reason

# The modules of the branch, of which a block may lack some.
_BRANCH = "conv1 act2 conv2 act2b conv2b attn act3 conv3 attn_last drop_path".split()


@register
class NormFreeBlock(Family):
    """y = shortcut(x) + alpha * skipinit_gain * attn(conv3(act(conv2(act(conv1(act(x) * beta))))))

    The scalar skipinit_gain (SkipInit, De & Smith 2020), or conv3's gain, is zero at the start. Source: timm
    models/nfnet.py.
    Use: zb.accelerate(model).
    Inference while it is zero: nothing of the branch is run (but for conv3's bias where its gain is the zero one).
    Training forward while skipinit_gain is zero: the branch runs once, without a graph; with a zero
    gain of conv3 it is unchanged.
    Training backward while skipinit_gain is zero: its gradient alone; the rest are zeros.
    """

    name = "NormFreeBlock"
    classes = ("NormFreeBlock",)
    only_skips = True

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        if not hasattr(block, "skipinit_gain"):
            return Obstacle(Reason.NAMESAKE, "it has no skipinit_gain")
        return lacks(block, "act1", "conv1", "act2", "conv2", "act3", "conv3", "alpha", "beta", "drop_path")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        if block.skipinit_gain is not None:
            return {"skipinit_gain": (block.skipinit_gain,)}
        gain = getattr(block.conv3, "gain", None)
        return {} if gain is None else {"conv3": (gain,)}

    def inner_modules(self, block: Any) -> tuple[nn.Module, ...]:
        return (block,)

    def example(self, block: Any, side: int) -> tuple:
        return (torch.randn(2, block.conv1.in_channels, 4 * side, 8),)

    def forward(self, block: Any, x: Tensor) -> Tensor:
        present = tuple(m for m in [getattr(block, name) for name in _BRANCH] if m is not None)
        gain = block.skipinit_gain
        if gain is None:
            bias = self._constant(block, present)
            if bias is not None:
                shortcut = x if block.downsample is None else block.downsample(block.act1(x) * block.beta)
                return shortcut + bias
        start = block.act1(x) * block.beta
        shortcut = x if block.downsample is None else block.downsample(start)
        if gain is None:
            return self._branch(block, start) * block.alpha + shortcut

        def body(start: Tensor) -> Tensor:
            return self._branch(block, start)

        gate = (gain * block.alpha).view(1)
        _, y = residual_branch(self.name, self.zero_skip, shortcut, body, None, gate, (start,), modules=present)
        return self._branch(block, start).mul_(gain) * block.alpha + shortcut if y is None else y

    def _branch(self, block: Any, out: Tensor) -> Tensor:
        out = block.conv2(block.act2(block.conv1(out)))
        if block.conv2b is not None:
            out = block.conv2b(block.act2b(out))
        if block.attn is not None:
            out = block.attn_gain * block.attn(out)
        out = block.conv3(block.act3(out))
        if block.attn_last is not None:
            out = block.attn_gain * block.attn_last(out)
        return block.drop_path(out)

    def _constant(self, block: Any, modules: tuple[nn.Module, ...]) -> Tensor | None:
        """What the branch adds without gradients while conv3's gain is zero: its bias times alpha."""
        gain, bias = getattr(block.conv3, "gain", None), block.conv3.bias
        if torch.is_grad_enabled() or gain is None or bias is None or block.attn_last is not None:
            return None
        if block.drop_path.training and not isinstance(block.drop_path, nn.Identity):
            return None
        answer = decide(self.name, self.zero_skip, (gain,), bypassed=modules)
        return bias[:, None, None] * block.alpha if answer in SKIPS else None
