"""What a block by description is called with: for its branches, and as the parameters of its family's forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .description import GatedBlock, Given


def simple(d: GatedBlock, block: Any, x: Any, *args: Any, **kwargs: Any) -> Given:
    """`Given` of a block with one stream, its first argument; what else it was called with is for all its calls."""
    return Given((x if d.first is None else d.first(block, x, *args, **kwargs),), layers={"": (args, kwargs)})


def with_arguments(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A call(block, h, *args, **kwargs) as one of the `layers` that `_simple` gives."""

    def called(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
        args, kwargs = layers[""]
        return call(block, h, *args, **kwargs)

    return called


def forward_like(forward: Callable[..., Any], function: Callable[..., Any], streams: int) -> Callable[..., Any]:
    """forward(family, block, ...) with the parameters of `function`, after `streams` named x: by these it is known what
    may be passed."""

    @functools.wraps(forward)
    def same(self: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, block, *args, **kwargs)

    ours = list(inspect.signature(forward).parameters.values())[:2]
    x = [inspect.Parameter("x", inspect.Parameter.POSITIONAL_OR_KEYWORD)] * streams
    theirs = list(inspect.signature(function).parameters.values())[1:]
    same.__signature__ = inspect.Signature([*ours, *x, *theirs])  # type: ignore[attr-defined]
    return same
