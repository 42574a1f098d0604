"""Blocks that are skipped as a whole in inference and otherwise left as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ... import zero
from ..._autocast import autocast_dtype
from ..._layout import channels_last_format
from ...blocks.decision import NOT_ALLOWED, SKIP_BY_GATE, SKIPS, allowed, conclude, decide
from ...blocks.layers import is_plain_layer
from ..family import Family
from .adaln import zeroing_tensors


class InferenceSkip(Family):
    """A block that is skipped, without gradients, while all the tensors that hold it at zero are zero.

    What it returns then is predicted. For every kind of input the first call runs the original too, whose result must
    match bit for bit and which must draw no random numbers (`confirmed`); a block that does something else is never
    skipped.
    """

    dense_backend = "eager"

    def __init__(self, *options: str):
        super().__init__(*options)
        self.confirmed: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def example(self, block: Any, side: int) -> None:
        return None

    def zero_layers(self, block: Any) -> list[Any]:
        """The plain layers whose weights hold the block at zero."""
        raise NotImplementedError

    def judged_tensors(self, block: Any) -> tuple[Tensor, ...] | None:
        """The tensors that hold the block at zero; None when that cannot be relied on now."""
        layers = self.zero_layers(block)
        return tuple([layer.weight for layer in layers]) if all(map(is_plain_layer, layers)) else None

    def inner_modules(self, block: Any) -> Iterable[nn.Module]:
        return (block,)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"": tuple(t for layer in self.zero_layers(block) for t in zeroing_tensors(layer, layer.weight))}

    def skips(self, block: Any, scaled_away: bool = False) -> bool:
        """Whether the block may be skipped at this call and is zero, or multiplied by zero."""
        if torch.is_grad_enabled() or block.training:
            return False
        tensors = self.judged_tensors(block)
        if not tensors or not all(map(zero.may_test, tensors)):
            return False
        if not scaled_away:
            answer = decide(self.name, self.zero_skip, tensors, bypassed=block.children(), may_draw=False)
        elif allowed(self.name, self.zero_skip, tensors[0]):
            answer = conclude(self.name, SKIP_BY_GATE, block.children(), may_draw=False)
        else:
            answer = NOT_ALLOWED
        return answer in SKIPS

    def predicted(self, block: Any, key: Any, y: Tensor, eager: Callable[[], Any], wrap: Callable = lambda y: y) -> Any:
        """wrap(y), once eager() returned the same for inputs of this kind."""
        seen, expected = self.confirmed.setdefault(block, {}), wrap(y)
        if key not in seen:
            before = _streams(y)
            theirs = eager()
            same = type(theirs) is type(expected) and _same(_pytree.tree_leaves(theirs), [y])
            seen[key] = same and _equal(before, _streams(y))
            return theirs
        return expected if seen[key] else eager()


class ControlBranch(InferenceSkip):
    """A copied encoder each of whose feature maps leaves through a zero layer: the results, in the order of
    `zero_layers`, are those layers' biases, times a scale."""

    def scales(self, block: Any, given: dict[str, Any]) -> list[Any]:
        """What each result is multiplied by, for the arguments of this call."""
        return [1.0] * len(self.zero_layers(block))

    def call(self, block: Any, given: dict[str, Any], scaled_away: bool, eager: Callable[[], Any]) -> Any:
        """What the block returns for the arguments `given`, by name, with which eager() calls the original."""
        if not self.skips(block, scaled_away):
            return eager()
        layers = self.zero_layers(block)
        zeros = not scaled_away or all(zero.is_exactly_zero(layer.weight) for layer in layers)
        seen, key = self.confirmed.setdefault(block, {}), (zeros, self._kind(block, given))
        if seen.get(key):
            leaves, spec = seen[key]
            results = iter(self._results(layers, leaves, self.scales(block, given)))
            return _pytree.tree_unflatten([next(results) if isinstance(t, Tensor) else t for t in leaves], spec)
        before = () if key in seen else _streams(layers[0].weight)
        theirs = eager()
        if key not in seen:
            leaves, spec = _pytree.tree_flatten(theirs)
            metas = [torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t for t in leaves]
            found = [t for t in leaves if isinstance(t, Tensor)]
            equal = len(found) == len(layers) and _same(found, self._results(layers, metas, self.scales(block, given)))
            seen[key] = (metas, spec) if equal and _equal(before, _streams(layers[0].weight)) else None
        return theirs

    def _kind(self, block: Any, given: dict[str, Any]) -> tuple:
        """What the shapes, dtypes and strides of the results may depend on. Numbers, as time steps, do not count."""
        leaves, spec = _pytree.tree_flatten(given)
        kinds = tuple(map(_kind_of, leaves))
        first = self.zero_layers(block)[0].weight
        layout = tuple(p.stride() for p in block.parameters() if p.dim() > 3)
        return str(spec), kinds, first.dtype, autocast_dtype(first), hash(layout)

    def _results(self, layers: list[Any], leaves: list[Any], scales: list[Any]) -> list[Tensor]:
        """Fresh tensors like the meta tensors among leaves: each layer's bias, times its scale."""
        maps = []
        metas = (t for t in leaves if isinstance(t, Tensor))
        for layer, meta, scale in zip(layers, metas, scales, strict=True):
            y = torch.empty_like(meta, device=layer.weight.device).zero_()
            if layer.bias is not None:
                y += layer.bias.to(y.dtype).view(-1, *([1] * (layer.weight.dim() - 2)))
                y *= scale
            maps.append(y)
        return maps


def batches(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """For the key of `predicted`: which other arguments there are, and whose batch is another than that of x."""
    for name, value in (*enumerate(args), *sorted(kwargs.items())):
        yield name
        yield isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] != x.shape[0]


def _streams(t: Tensor) -> tuple[Tensor, ...]:
    """The random streams of the host and of the tensor's device."""
    host = torch.get_rng_state()
    return (host, torch.cuda.get_rng_state(t.device)) if t.is_cuda else (host,)


def _equal(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, before, after))


def _same(theirs: list[Any], ours: list[Tensor]) -> bool:
    """Equal in value, dtype and strides."""
    return len(theirs) == len(ours) and all(
        isinstance(a, Tensor) and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        for a, b in zip(theirs, ours, strict=True)
    )


def _kind_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, channels_last_format(leaf)
    return leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf)
