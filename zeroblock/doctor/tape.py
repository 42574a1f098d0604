"""Records the ATen operations of one training step: what the prediction (zeros.py) and the savings are computed from.

Each tensor is a number: a value. An operation in place gives its tensor, and every other tensor on the same memory, a
new value. Tensors that no recorded operation made (parameters, buffers, the batch, constants) are leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

# Which elements may differ from zero: True (all), False (none), or a bool tensor on the CPU.
Mask = bool | Tensor

# "The tensor `old` after another one on its memory was written with `new`."
ALIAS = "alias"


@dataclass(frozen=True)
class Ref:
    """A tensor argument of a recorded operation."""

    value: int


@dataclass(slots=True)
class Value:
    """A tensor at one time, between two writes to it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    storage: int  # a number of its own for each piece of memory

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class Node:
    """One operation; values are given by number."""

    func: Any  # an OpOverload, or ALIAS
    args: tuple  # with a Ref in place of each tensor
    kwargs: dict
    inputs: list[int]
    outputs: list[int | None]  # None: no tensor
    flops: int = 0
    constant: list[bool] | None = None  # of operations that take no tensor: whether each output was zero


@dataclass
class Tape:
    """A training step: its operations in order, and the tensors by number."""

    nodes: list[Node] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    leaves: dict[int, Mask] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # of leaves
    finals: dict[int, int] = field(default_factory=dict)  # leaf: its value after the step
    grads: dict[str, int] = field(default_factory=dict)  # parameter: its gradient
    backward_start: int = 0  # the first node of the backward pass

    def producers(self) -> dict[int, int]:
        return {v: i for i, node in enumerate(self.nodes) for v in node.outputs if v is not None}


def mask_of(t: Tensor) -> Mask:
    """The zeros of a tensor as it is now."""
    if t.numel() == 0 or t.is_meta:
        return True
    nonzero = t.detach().ne(0)
    if bool(nonzero.all()):
        return True
    return nonzero.cpu() if bool(nonzero.any()) else False


class Recorder(TorchDispatchMode):
    """Records the step that runs in `with Recorder(named, data) as recorder:`; `recorder.finish` returns the tape.

    named: {name: parameter or buffer}, whose zeros count as structure.
    data: {name: tensor of the batch}, whose zeros count as chance.
    """

    def __init__(self, named: dict[str, Tensor], data: dict[str, Tensor]):
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # it imports Triton, which `import zeroblock` must not

        self._formulas = flop_registry
        self.tape = Tape()
        self._data = set(data)
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for name, t in {**named, **data}.items():
            self._names[t] = name
        self._current: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._storages: dict[int, tuple[int, list[TensorWeakRef]]] = {}
        self._leaves: list[tuple[TensorWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        inputs = [self._value(t) for t in flat if isinstance(t, Tensor)]
        refs, kwrefs = tree_map_only(Tensor, lambda t: Ref(self._current[t]), (args, kwargs))
        out = func(*args, **kwargs)
        outputs = [t if isinstance(t, Tensor) else None for t in tree_flatten(out)[0]]
        written = _written(func, args, kwargs)
        node = Node(func, refs, kwrefs, inputs, [])
        self.tape.nodes.append(node)
        for t in outputs:
            node.outputs.append(None if t is None else self._new(t))
        missing = [t for t in written if not any(t is o for o in outputs)]
        node.outputs += [self._new(t) for t in missing]
        for t in written:
            self._update_aliases(t)
        if not inputs:
            uninitialised = "empty" in func.name() or torch.Tag.nondeterministic_seeded in func.tags
            node.constant = [t is not None and not uninitialised and mask_of(t) is False for t in outputs]
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            node.flops = int(formula(*args, **kwargs, out_val=out))
        elif "flash_attention_for_cpu" in func.name():
            node.flops = _attention_flops(func.name(), args)
        return out

    def mark_backward(self) -> None:
        self.tape.backward_start = len(self.tape.nodes)

    def finish(self, grads: dict[str, Tensor | None]) -> Tape:
        tape = self.tape
        for name, g in grads.items():
            if g is not None and g in self._current and self._current[g] not in tape.leaves:
                tape.grads[name] = self._current[g]
        for ref, value in self._leaves:
            t = ref()
            if t is not None:
                tape.finals[value] = self._current[t]
        return tape

    def follow(self, t: Tensor, mask: Mask) -> None:
        """Make t a leaf with these zeros."""
        value = self._new(t)
        self.tape.leaves[value] = mask
        self._leaves.append((TensorWeakRef(t), value))
        if t in self._names:
            self.tape.names[value] = self._names[t]

    def _value(self, t: Tensor) -> int:
        if t not in self._current:
            mask = mask_of(t)
            # Zeros among the data are chance; among parameters and constants they are structure.
            name = self._names.get(t)
            chance = name is None and not isinstance(mask, bool) or name in self._data
            self.follow(t, True if chance else mask)
        return self._current[t]

    def _new(self, t: Tensor) -> int:
        tape, key = self.tape, _storage_key(t)
        serial, tensors = self._storages.get(key, (-1, []))
        tensors = [r for r in tensors if r() is not None]
        if not tensors:
            serial = len(tape.values)
        if not any(r() is t for r in tensors):
            tensors.append(TensorWeakRef(t))
        self._storages[key] = serial, tensors
        self._current[t] = len(tape.values)
        tape.values.append(Value(tuple(t.shape), t.dtype, t.device, serial))
        return self._current[t]

    def _update_aliases(self, t: Tensor) -> None:
        new = self._current[t]
        for r in self._storages[_storage_key(t)][1]:
            other = r()
            if other is None or other is t:
                continue
            if _geometry(other) == _geometry(t):
                self._current[other] = new
            else:
                old = self._current[other]
                node = Node(ALIAS, (Ref(old), Ref(new)), {}, [old, new], [])
                self.tape.nodes.append(node)
                node.outputs.append(self._new(other))


def _geometry(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.storage_offset(), t.dtype


def _storage_key(t: Tensor) -> int:
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and wrapper tensors have none
        return -1 - id(t)


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensor arguments that func writes to."""
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
        found += [t for t in (given if isinstance(given, (list, tuple)) else (given,)) if isinstance(t, Tensor)]
    return found


def _attention_flops(name: str, args: tuple) -> int:
    """Two products forward, five backward, of [B, H, T, D] with [B, H, S, D]."""
    backward = "backward" in name
    q, k = args[1:3] if backward else args[:2]
    return (10 if backward else 4) * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]


def is_view(node: Node) -> bool:
    """An operation that moves or casts elements and computes nothing."""
    if node.func == ALIAS:
        return False
    return node.func.is_view or node.func._overloadpacket in _MOVES


_MOVES = {
    torch.ops.aten.detach,
    torch.ops.aten._to_copy,
    torch.ops.aten.clone,
    torch.ops.aten._unsafe_view,
    torch.ops.aten.alias,
    torch.ops.aten.copy_,
}


def through_views(tape: Tape, value: int, producers: dict[int, int], also: Iterable[Any] = ()) -> int | None:
    """The node that computed a value, past views, casts and copies (and the operations in `also`)."""
    also = set(also)
    while value in producers:
        node = tape.nodes[producers[value]]
        if not is_view(node) and (node.func == ALIAS or node.func._overloadpacket not in also):
            return producers[value]
        if not node.inputs:
            return None
        value = node.inputs[-1 if node.func != ALIAS and node.func._overloadpacket is torch.ops.aten.copy_ else 0]
    return None
