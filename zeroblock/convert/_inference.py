"""Blocks that are skipped as a whole in inference and otherwise left as they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import zero
from ..nn import _common
from ._core import Family


class InferenceSkip(Family):
    """A block that is skipped while nobody wants gradients and all that holds it at zero is zero.

    What it returns then is foretold. The first time, for every kind of input, the original runs and must confirm the
    prophecy bit for bit (`confirmed`); a block that does something else is never skipped.
    """

    def __init__(self, *options: str):
        super().__init__(*options)
        self.confirmed: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def example(self, block: Any) -> None:
        return None

    def zero_layers(self, block: Any) -> list[Any]:
        """The plain layers whose weights hold the block at zero."""
        raise NotImplementedError

    def holders(self, block: Any) -> tuple[Tensor, ...] | None:
        """The tensors that hold the block at zero; None when that cannot be relied on now."""
        layers = self.zero_layers(block)
        return tuple(layer.weight for layer in layers) if all(map(is_plain_layer, layers)) else None

    def claims(self, block: Any) -> Iterable[nn.Module]:
        return (block,)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"": self.holders(block) or ()}

    def skips(self, block: Any) -> bool:
        """Whether the block may be skipped at this call and is zero."""
        if torch.is_grad_enabled():
            return False
        tensors = self.holders(block)
        if not tensors or not zero.may_skip_branch(self.name, self.zero_skip, tensors[0]):
            return False
        if _common.may_draw(block) or not zero.bypassable(block.children()):
            return False
        found = all(map(zero.is_exactly_zero, tensors))
        zero.count(self.name, found)
        return found


def is_plain_layer(layer: nn.Module) -> bool:
    return _common.is_plain_conv(layer) or _common.is_plain_linear(layer)
