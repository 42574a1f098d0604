"""Where an operation's results are zero, found by executing it on random numbers with zeros in the same places.

Beside PyTorch's tags the code knows of single operations only which make zeros by themselves, and which are driven by
integers, whose values are not kept on the tape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from .tape import ALIAS, Mask, Node, Ref, Value

aten = torch.ops.aten
MAX_MASK = 1 << 22  # elements; of larger tensors only "all zero" or "not" is kept, to bound memory
PROBES = 64  # random numbers per entry of a truth table; a result counts as zero if it is for all of them

_ZERO = {aten.zeros_like, aten.new_zeros, aten.zero_, aten.zero}
_EMPTY = {aten.empty_like, aten.new_empty, aten.new_empty_strided}
SHAPE_ONLY = _ZERO | _EMPTY | {aten.empty_like, aten.ones_like, aten.full_like, aten.new_full, aten.new_ones}
_POINTWISE = {aten.fill_, aten.fill, aten.full_like, aten.copy_, aten._to_copy, aten.copy}
_FIRST = {aten.native_dropout, aten.detach, aten.alias}  # zero where their first argument is
RANDOM = {aten.bernoulli_, aten.bernoulli}
# Operations driven by integers, which are not kept: zero where all their floating arguments are.
_INDEXED = {
    aten.embedding, aten.embedding_dense_backward, aten.index, aten.index_select, aten.gather, aten.scatter_add,
    aten.scatter, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index, aten.index_add,
    aten._unsafe_index_put, aten.max_pool2d_with_indices_backward, aten.max_pool3d_with_indices_backward,
    aten.nll_loss_backward, aten.nll_loss2d_backward, aten.native_dropout_backward, aten.embedding_renorm_,
    aten.index_copy, aten.slice_scatter, aten.select_scatter, aten.value_selecting_reduction_backward,
}  # fmt: skip
# Operations that make zeros from arguments without zeros.
_STRUCTURE = {aten.slice_backward, aten.select_backward, aten.constant_pad_nd, aten.tril, aten.triu}


class Masks(Protocol):
    """The zeros of every value, by its number."""

    def __getitem__(self, i: int, /) -> Mask: ...


class Changed:
    """masks with a few entries replaced."""

    def __init__(self, masks: list[Mask], changes: dict[int, Mask]):
        self.masks, self.changes = masks, changes

    def __getitem__(self, i: int) -> Mask:
        return self.changes.get(i, self.masks[i])


def simple(mask: Tensor) -> Mask:
    if bool(mask.all()):
        return True
    return mask if bool(mask.any()) else False


def apply(node: Node, values: list[Value], masks: Masks, cache: dict) -> list[Mask]:
    """The zero pattern of each output."""
    count = len(node.outputs)
    result: list[Mask]
    if node.func == ALIAS:
        old, new = (masks[i] for i in node.inputs)
        return [True if new is not False else old]
    if node.constant is not None:
        result = [not zero for zero in node.constant]
        return result + [True] * (count - len(result))
    packet = node.func._overloadpacket
    if packet in _ZERO:
        return [False] * count
    if packet in _EMPTY:
        return [True] * count
    inputs = [masks[i] for i in node.inputs]
    if packet in _FIRST:
        return [inputs[0]] + [True] * (count - 1)
    if packet in _INDEXED:
        floating = [m for i, m in zip(node.inputs, inputs, strict=True) if _is_number(values[i].dtype)]
        result = [any(m is not False for m in floating)] * count
        return result
    if packet in _POINTWISE or torch.Tag.pointwise in node.func.tags:
        return _pointwise(node, values, inputs, cache)
    if packet not in _STRUCTURE and all(m is True for m in inputs):
        return [True] * count
    return _probe(node, values, inputs, cache)


def _is_number(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _key(node: Node, shapes: list, pattern: list) -> Any:
    plain = tree_map_only(Ref, lambda r: None, (node.args, node.kwargs))
    return node.func, repr(plain), tuple(shapes), tuple(pattern), len(node.outputs)


def _execute(node: Node, make: Callable[[int], Tensor]) -> list[Tensor | None]:
    """The outputs of the operation on other tensors: make(position among the inputs)."""
    positions, made = itertools.count(), []

    def place(_: Ref) -> Tensor:
        made.append(make(next(positions)))
        return made[-1]

    args, kwargs = tree_map_only(Ref, place, (node.args, node.kwargs))
    out = tree_flatten(node.func(*args, **kwargs))[0]
    outputs = [t if isinstance(t, Tensor) else None for t in out]
    if len(outputs) < len(node.outputs):  # operations that return nothing and write to their arguments
        outputs += [None] * (len(node.outputs) - len(outputs))
    return outputs


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, device=device) < 0.5
    if not _is_number(dtype):
        return torch.randint(1, 4, shape, device=device).to(dtype)
    wide = dtype if dtype.itemsize >= 2 else torch.float32
    return torch.randn(shape, dtype=wide, device=device).to(dtype)


def _pointwise(node: Node, values: list[Value], inputs: list[Mask], cache: dict) -> list[Mask]:
    """A truth table over the arguments that are partly zero, each entry found on a few random numbers."""
    mixed = [i for i, m in enumerate(inputs) if not isinstance(m, bool)]
    shape = values[node.outputs[0]].shape if node.outputs and node.outputs[0] is not None else ()
    table = {}
    for bits in itertools.product((False, True), repeat=len(mixed)):
        pattern = list(inputs)
        for i, bit in zip(mixed, bits, strict=True):
            pattern[i] = bit
        key = _key(node, ["pointwise", *(values[i].dtype for i in node.inputs)], pattern)
        if key not in cache:

            def make(position: int, pattern: list = pattern) -> Tensor:
                v = values[node.inputs[position]]
                if not pattern[position]:
                    return torch.zeros(PROBES, dtype=v.dtype)
                return _random((PROBES,), v.dtype, torch.device("cpu"))

            cache[key] = _nonzero(node, make, elementwise=False)
        table[bits] = cache[key]
    if not mixed:
        return list(table[()])
    result: list[Mask] = []
    for k in range(len(node.outputs)):
        if torch.Size(shape).numel() > MAX_MASK:
            result.append(any(entry[k] for entry in table.values()))
            continue
        mask = torch.zeros(shape, dtype=torch.bool)
        for bits, entry in table.items():
            if entry[k]:
                here = torch.ones(shape, dtype=torch.bool)
                for i, bit in zip(mixed, bits, strict=True):
                    here &= inputs[i] if bit else ~inputs[i]  # type: ignore[operator]
                mask |= here
        result.append(simple(mask))
    return result


def _probe(node: Node, values: list[Value], inputs: list[Mask], cache: dict) -> list[Mask]:
    """The operation itself on random numbers of its own shapes, with zeros where the arguments have them."""
    uniform = all(isinstance(m, bool) for m in inputs)
    key = None
    if uniform:
        key = _key(node, [(values[i].shape, values[i].dtype) for i in node.inputs], inputs)
        if key in cache:
            return list(cache[key])

    def make(position: int) -> Tensor:
        v, mask = values[node.inputs[position]], inputs[position]
        if mask is False:
            return torch.zeros(v.shape, dtype=v.dtype, device=v.device)
        t = _random(v.shape, v.dtype, v.device)
        return t if mask is True else t * mask.to(v.device)

    found = _nonzero(node, make, elementwise=True)
    if key is not None:
        cache[key] = found
    return list(found)


def _nonzero(node: Node, make: Callable[[int], Tensor], elementwise: bool) -> list[Mask]:
    try:
        outputs = _execute(node, make)
    except Exception:  # an operation that refuses random arguments: nothing is claimed to be zero
        return [True] * len(node.outputs)
    found: list[Mask] = []
    for t in outputs[: len(node.outputs)]:
        if t is None or t.is_meta:
            found.append(True)
        elif elementwise and 0 < t.numel() <= MAX_MASK:
            found.append(simple(t.ne(0).cpu()))
        else:
            found.append(bool(t.ne(0).any()) if t.numel() else True)
    return found
