"""What a parameter is to the step (tail, gate, bias), and the two factors of its gradient with their ranks.

dL/dW of a matmul or convolution is dL/dy^T h: it needs a varied input h and a varied dL/dy, and not W itself. Of both,
evenly spaced rows and columns are looked at, at most SAMPLE of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .tape import ALIAS, Node, Ref, Tape, is_view, through_views

aten = torch.ops.aten
SAMPLE = 96

MATMULS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution, aten.linear, aten.addbmm}
NORMS = {
    aten.native_batch_norm,
    aten.native_group_norm,
    aten.native_layer_norm,
    aten._native_batch_norm_legit,
    aten._batch_norm_with_update,
    aten.cudnn_batch_norm,
}
PRODUCTS = {aten.mul, aten.mul_}
_ADDS = {aten.add, aten.add_, aten.sub}
# Functions that may stand between a gate and its multiplication, such as GLIGEN's tanh.
_SQUASHES = {aten.tanh, aten.sigmoid, aten.relu, aten.neg}
# Where the two factors of a gradient are among the arguments of the operation that multiplies them.
_FACTORS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.convolution_backward: (0, 1),
    aten.mul: (0, 1),
    aten.native_batch_norm_backward: (0, 1),
    aten.native_group_norm_backward: (0, 1),
    aten.native_layer_norm_backward: (0, 1),
    aten.cudnn_batch_norm_backward: (1, 0),
}


@dataclass(frozen=True)
class Ranks:
    """Ranks of a gradient and its two factors, each as (rank, largest possible in the sample).

    None for the factors where the gradient is not one product.
    """

    h: tuple[int, int] | None = None  # what the parameter is multiplied with
    dy: tuple[int, int] | None = None  # the gradient of the product
    grad: tuple[int, int] | None = None  # the gradient of the parameter
    unit_differences: tuple[int, int] | None = None  # between the units after the steps, where they began identical


def roles(tape: Tape) -> dict[str, str]:
    """{parameter: "gate" | "tail" | "bias" | "norm" | "other"} by the first operation that uses it."""
    users: dict[int, list[Node]] = defaultdict(list)
    for node in tape.nodes[: tape.backward_start]:
        for value in set(node.inputs):
            users[value].append(node)
    found = {}
    for leaf, name in tape.names.items():
        found[name] = _role(tape, users, leaf)
    return found


def _uses(users: dict[int, list[Node]], value: int) -> list[tuple[Node, int]]:
    """(operation, what it reads) for every operation that reads a value, or a view or cast of it."""
    result, todo = [], [value]
    while todo:
        v = todo.pop()
        for node in users.get(v, []):
            moved = node.func != ALIAS and (is_view(node) or node.func._overloadpacket in _SQUASHES)
            if moved:
                todo += [o for o in node.outputs if o is not None]
            elif node.func != ALIAS:
                result.append((node, v))
    return result


def _role(tape: Tape, users: dict[int, list[Node]], leaf: int) -> str:
    for node, value in _uses(users, leaf):
        packet = node.func._overloadpacket
        if packet in MATMULS:
            added = node.inputs[0] if packet in (aten.addmm, aten.baddbmm) else None
            if packet in (aten.convolution, aten.linear) and len(node.inputs) > 2:
                added = node.inputs[2]
            if value == added:
                return "bias"
            gates = [_gates(tape, *use) for out in node.outputs[:1] if out is not None for use in _uses(users, out)]
            return "gate" if any(gates) else "tail"
        if packet in NORMS:
            named = zip(node.func._schema.arguments, node.args, strict=False)
            return next(("bias" for a, ref in named if ref == Ref(value) and a.name == "bias"), "norm")
        if packet in PRODUCTS and len(node.inputs) == 2:
            return "gate"
        if packet in _ADDS:
            return "bias"
    return "other"


def _gates(tape: Tape, node: Node, value: int) -> bool:
    """A multiplication that broadcasts the value over a larger tensor."""
    if node.func._overloadpacket not in PRODUCTS or len(node.inputs) < 2 or node.outputs[0] is None:
        return False
    size = torch.Size(tape.values[value].shape).numel()
    return size < torch.Size(tape.values[node.outputs[0]].shape).numel()


@dataclass(frozen=True)
class Site:
    """Where the two factors of a gradient are multiplied."""

    node: int  # the operation's number on the tape
    arguments: tuple[int, int]  # the factors' positions among its arguments
    dy_first: bool  # the first of them is dL/dy, the other h


def sites(tape: Tape, names: set[str]) -> dict[str, Site]:
    """Where the factors of these parameters' gradients meet, for the gradients that are one product."""
    producers, found = tape.producers(), {}
    for name in names & tape.grads.keys():
        i = through_views(tape, tape.grads[name], producers, also={aten.sum})
        if i is None or tape.nodes[i].func == ALIAS:
            continue
        node = tape.nodes[i]
        where = _FACTORS.get(node.func._overloadpacket)
        if where is None or not all(a < len(node.args) and isinstance(node.args[a], Ref) for a in where):
            continue
        late = []
        for a in where:
            source = through_views(tape, node.args[a].value, producers)
            late.append(source is not None and source >= tape.backward_start)
        if late[0] != late[1]:
            found[name] = Site(i, where, late[0])
    return found


class Watcher(TorchDispatchMode):
    """Samples the factors at the given sites while a step runs that executes the operations of the tape again."""

    def __init__(self, tape: Tape, where: dict[str, Site]):
        super().__init__()
        self.count = 0
        self.functions = [node.func for node in tape.nodes if node.func != ALIAS]
        index: dict[int, int] = {}
        for i, node in enumerate(tape.nodes):
            if node.func != ALIAS:
                index[i] = len(index)
        self.wanted: dict[int, list[tuple[str, Site]]] = defaultdict(list)
        for name, site in where.items():
            self.wanted[index[site.node]].append((name, site))
        self.samples: dict[str, tuple[Tensor, Tensor]] = {}  # h, dy

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        here = self.wanted.get(self.count, [])
        if here and self.functions[self.count] is func:  # else this step took another way through the model
            for name, site in here:
                a, b = (_matrix(func._overloadpacket, args[k], k == site.arguments[0]) for k in site.arguments)
                self.samples[name] = (b, a) if site.dy_first else (a, b)
        self.count += 1
        return func(*args, **(kwargs or {}))


def _matrix(packet: Callable, t: Tensor, first: bool) -> Tensor:
    """A factor as [samples, features], a few of each, on the CPU."""
    t = t.detach()
    if packet in (aten.mm, aten.addmm):
        t = t.t() if first else t
    elif packet is aten.bmm:
        t = t.mT.flatten(0, 1) if first else t.flatten(0, 1)
    elif packet is aten.convolution_backward or (t.dim() > 3):
        t = t.movedim(1, -1).flatten(0, -2) if t.dim() > 2 else t
    elif t.dim() != 2:
        t = t.reshape(-1, t.shape[-1]) if t.dim() > 2 else t.reshape(-1, 1)
    return sample(t)


def sample(t: Tensor) -> Tensor:
    """At most SAMPLE evenly spaced rows and columns of a matrix."""
    for dim in (0, 1):
        if t.shape[dim] > SAMPLE:
            t = t.index_select(dim, torch.linspace(0, t.shape[dim] - 1, SAMPLE, device=t.device).long())
    return t.cpu()


def rank(t: Tensor) -> tuple[int, int]:
    """(rank, the smaller side) of a matrix, with the rounding of its own dtype as tolerance."""
    limit = min(t.shape) if t.dim() == 2 else 0
    if not limit or not bool(t.isfinite().all()):
        return 0, limit
    singular = torch.linalg.svdvals(t.double())
    tolerance = max(t.shape) * torch.finfo(t.dtype).eps * float(singular[0])
    return int((singular > tolerance).sum()), limit


def units(t: Tensor) -> Tensor:
    """A parameter as [units, numbers of each]; a unit is an output (first dimension), or an element of a vector."""
    return t.reshape(t.shape[0], -1) if t.dim() else t.reshape(1, 1)
