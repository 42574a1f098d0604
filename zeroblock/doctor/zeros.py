"""Predicts from the structure of zeros alone when each parameter gets its first non-zero gradient.

The taped step is executed on zero patterns (patterns.py): no value of the model but its zeros is used. A parameter
whose gradient is structurally non-zero stops being zero, and the step is executed again, until nothing changes:
whatever has not moved then never moves.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from .patterns import RANDOM, Changed, apply, simple
from .tape import ALIAS, Mask, Node, Tape, Value

MAX_STEPS = 64  # a chain of zero layers that is longer is not followed to its end
MAX_BLAME = 8  # parameters that are named for one zero


@dataclass
class State:
    """The zeros of every value in one execution, and for each zero value which leaves make it zero."""

    masks: list[Mask]
    blame: list[frozenset[str]]

    def moves(self, value: int) -> bool:
        return self.masks[value] is not False


@dataclass
class Prediction:
    """When each parameter first moves, by name."""

    first: dict[str, int | None] = field(default_factory=dict)  # the step of the first non-zero gradient; None: never
    # The parameters that kept its gradient zero, in each step before; of one that never moves, in the last step.
    waits_for: dict[str, list[frozenset[str]]] = field(default_factory=dict)
    steps: int = 0  # after so many nothing changes any more


def predict(tape: Tape, trainable: set[str]) -> Prediction:
    """The first motion of every parameter that has a gradient on the tape."""
    result = Prediction()
    cache: dict = {}
    leaves = dict(tape.leaves)
    parameters = {name: leaf for leaf, name in tape.names.items() if name in trainable}
    names = [name for name in tape.grads if name in parameters]
    waits: dict[str, list[frozenset[str]]] = {name: [] for name in names}
    for step in range(1, MAX_STEPS + 1):
        state = propagate(tape, leaves, cache)
        result.steps = step
        before = dict(leaves)
        for leaf, final in tape.finals.items():
            leaves[leaf] = union(leaves[leaf], state.masks[final])
        for name in names:
            grad = tape.grads[name]
            if state.moves(grad):
                result.first.setdefault(name, step)
                leaf = parameters[name]
                leaves[leaf] = union(leaves[leaf], state.masks[grad])
            elif name not in result.first:
                waits[name].append(state.blame[grad])
        if all(_same(leaves[leaf], mask) for leaf, mask in before.items()):
            break
    for name in names:
        if name not in result.first:
            result.first[name] = None
            waits[name] = waits[name][-1:]
    result.waits_for = waits
    return result


def droppable(tape: Tape) -> set[str]:
    """Parameters that get no gradient when every random mask is zero, as stochastic depth may draw it."""
    state = propagate(tape, tape.leaves, {}, masks_dropped=True)
    return {name for name, grad in tape.grads.items() if not state.moves(grad)}


def propagate(tape: Tape, leaves: dict[int, Mask], cache: dict, masks_dropped: bool = False) -> State:
    """Executes the tape on zero patterns.

    leaves: their zeros. cache: results of operations on patterns, kept between calls. masks_dropped: every random mask
    is zero throughout.
    """
    state = State([True] * len(tape.values), [frozenset()] * len(tape.values))
    masks, blame = state.masks, state.blame
    sizes = {name: torch.Size(tape.values[leaf].shape).numel() for leaf, name in tape.names.items()}
    for leaf, mask in leaves.items():
        masks[leaf] = mask
        if mask is False and leaf in tape.names:
            blame[leaf] = frozenset([tape.names[leaf]])
    for node in tape.nodes:
        found = apply(node, tape.values, masks, cache)
        if masks_dropped and node.func != ALIAS and node.func._overloadpacket in RANDOM:
            found = [False] * len(found)
        for k, (value, mask) in enumerate(zip(node.outputs, found, strict=True)):
            if value is None:
                continue
            masks[value] = mask
            if mask is False:
                blame[value] = _blame(node, k, tape.values, state, sizes, cache)
    return state


def _blame(node: Node, k: int, values: list[Value], state: State, sizes: dict[str, int], cache: dict) -> frozenset[str]:
    """The leaves that must become non-zero before output k can.

    Of a product: those of every zero factor. Of a sum: those of the term that needs the fewest (of equally many, the
    term with the largest parameters); a term that is zero because of no leaf never becomes anything else.
    """
    masks, blame = state.masks, state.blame
    zeros = [i for i in dict.fromkeys(node.inputs) if masks[i] is False]

    def stays_zero(changes: dict[int, Mask]) -> bool:
        return apply(node, values, Changed(masks, changes), cache)[k] is False

    if len(zeros) > 1:
        blockers = [i for i in zeros if stays_zero({j: True for j in zeros if j != i})]
        if not blockers:
            enough = [i for i in zeros if not stays_zero({i: True})]
            enough = [i for i in enough if blame[i]] or enough
            if enough:
                blockers = [min(enough, key=lambda i: (len(blame[i]), -sum(sizes[name] for name in blame[i])))]
        zeros = blockers or zeros
    ordered = itertools.chain.from_iterable(sorted(blame[i]) for i in zeros)
    return frozenset(itertools.islice(dict.fromkeys(ordered), MAX_BLAME))


def union(a: Mask, b: Mask) -> Mask:
    if a is True or b is True:
        return True
    if a is False or b is False:
        return b if a is False else a
    return simple(a | b) if a.shape == b.shape else True


def _same(a: Mask, b: Mask) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return torch.equal(a, b)
