"""Residual blocks without norms: Fixup (hongyi-zhang/Fixup) and ReZero (majumderb/rezero)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...blocks import fixup
from ...blocks.broadcast import add_gated
from ...blocks.layers import is_plain_conv
from ...blocks.residual import residual_branch
from ..family import SMALL, Family, lacks, register
from ..report import Obstacle, Reason


@register
class FixupBlock(Family):
    """y = relu(shortcut(x) + scale * last_conv(body(x)) + last_bias), last_conv zero at the start.

    Source: hongyi-zhang/Fixup, cifar and imagenet, `FixupBasicBlock` and `FixupBottleneck`.
    Use: zb.accelerate(model); parameter names stay, so the optimizer's groups by name do.
    Inference: while the last convolution is zero only the shortcut and the last bias run.
    Training forward: the last convolution is skipped; the others run once without a graph.
    Training backward: only the last convolution's and bias' gradients are computed, the others are exact zeros.
    """

    name = "FixupBlock"
    eager_rounding = True
    classes = ("FixupBasicBlock", "FixupBottleneck")

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        last = ("conv3", "bias3a", "bias3b") if hasattr(block, "conv3") else ("bias2b",)
        missing = lacks(block, "conv1", "conv2", "bias1a", "bias1b", "bias2a", "scale", "relu", *last)
        if missing is None and not hasattr(block, "downsample"):
            return Obstacle(Reason.NAMESAKE, "it has no downsample")
        return missing or (
            None if self._fits(block) else Obstacle(Reason.LAYERS, "its convolutions are not plain ones")
        )

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        name = "conv3" if hasattr(block, "conv3") else "conv2"
        return {name: (getattr(block, name).weight,)}

    def example(self, block: Any, side: int) -> tuple:
        return (torch.randn(2, block.conv1.in_channels, 2 * side, 4),)

    def _fits(self, block: Any) -> bool:
        convs = [m for m in block.children() if isinstance(m, nn.Conv2d)]
        return len(convs) >= 2 and all(map(is_plain_conv, convs))

    def forward(self, block: Any, x: Tensor) -> Tensor:
        return fixup.forward(self.name, self.zero_skip, block, x) if self._fits(block) else self.eager(block, x)


@register
class RZTXEncoderLayer(Family):
    """x = x + resweight * dropout1(self_attn x), then x = x + resweight * dropout2(mlp x); one resweight, zero at the
    start.

    Source: majumderb/rezero `RZTXEncoderLayer`.
    Use: zb.accelerate(model).
    Inference: while resweight is zero the result is a copy of x.
    Training forward: attention and mlp run once without a graph, for the gradient of resweight.
    Training backward: only resweight's gradient is computed, the others are exact zeros.
    """

    name = "RZTXEncoderLayer"
    eager_rounding = True
    classes = ("RZTXEncoderLayer",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, "self_attn", "linear1", "dropout", "linear2", "dropout1", "dropout2", "resweight")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"self_attn": (block.resweight,), "linear2": (block.resweight,)}

    def example(self, block: Any, side: int) -> tuple:
        return (torch.randn(side**2, 2, block.self_attn.embed_dim),)

    def options(self, block: Any) -> dict[str, tuple]:
        T = SMALL**2
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        return {"src_mask": (later,), "src_key_padding_mask": (later[2:],)}

    def forward(self, block: Any, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None) -> Tensor:
        if type(block.resweight) is not nn.Parameter or block.resweight.numel() != 1:
            return self.eager(block, src, src_mask, src_key_padding_mask)

        def attention(x: Tensor) -> Tensor:
            h = block.self_attn(x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)
            return block.dropout1(h[0])

        def mlp(x: Tensor) -> Tensor:
            return block.dropout2(block.linear2(block.dropout(block.activation(block.linear1(x)))))

        src = self._half(block, src, attention, (block.self_attn, block.dropout1))
        return self._half(block, src, mlp, (block.linear1, block.dropout, block.linear2, block.dropout2))

    def _half(self, block: Any, x: Tensor, body: Any, modules: tuple[nn.Module, ...]) -> Tensor:
        gate = block.resweight
        _, y = residual_branch(self.name, self.zero_skip, x, body, None, gate, (x,), modules=modules)
        return add_gated(x, gate, body(x)) if y is None else y
