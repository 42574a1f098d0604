"""What the fast path leaves out of this model now: which branches, how many FLOPs, how many bytes kept for backward.

Counted on the tape, dtype and shapes as they ran. In inference a branch that is zero and is added to something else is
not computed at all, back to the last point that anything else reads; a zero layer that is added to nothing is itself
left out. In training its forward runs once without its last layer, and its backward reduces to the gradient of that
layer. FLOPs are those of matmuls, convolutions and attention.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from .patterns import SHAPE_ONLY
from .tape import ALIAS, Node, Tape, is_view
from .zeros import State, propagate

aten = torch.ops.aten
# The roles of parameters that make a branch zero.
HOLDERS = ("tail", "gate", "norm", "bias")
_JOINS = {aten.add, aten.add_}


@dataclass
class BranchReport:
    """A branch that is zero by `parameters`, in the forwards of steps 1 to `steps` (None: as long as it is frozen)."""

    parameters: list[str]
    by: str
    flops: int
    steps: int | None


@dataclass
class Savings:
    """FLOPs and bytes of one call with the example batch, as they are and what the fast path leaves out of them."""

    branches: list[BranchReport] = field(default_factory=list)
    inference_flops: int = 0
    inference_saved: int = 0
    training_flops: int = 0
    training_saved: int = 0
    activation_bytes: int = 0
    activation_saved: int = 0


def savings(
    tape: Tape,
    roles: dict[str, str],
    zero: dict[str, bool],
    first: dict[str, int | None],
    trainable: set[str],
) -> Savings:
    """What the fast path leaves out of the taped step.

    roles, zero, first: of every parameter by name, its role (factors.py), whether it is zero now, and the step of its
    first gradient. trainable: those that are trained.
    """
    forward = tape.nodes[: tape.backward_start]
    result = Savings(inference_flops=_flops(forward), training_flops=_flops(tape.nodes))
    holders = {n for n, is_zero in zero.items() if is_zero and roles.get(n) in HOLDERS}
    state = propagate(tape, tape.leaves, {})
    joined, unread = _unread(tape, state, holders)
    in_branches = set().union(*joined)
    result.branches = _branches(tape, state, holders, roles, joined, unread, first, trainable)
    skipped = {i for i in range(len(forward)) if i in unread or _is_zero(forward[i], state, holders)}
    result.inference_saved = _flops([forward[i] for i in skipped])

    # In training: as if all but the branches were trained already, so that no dL/dy is zero because of another layer.
    owners = {name.rpartition(".")[0] for name in in_branches}
    kept_zero = {v for v, name in tape.names.items() if name in in_branches or name.rpartition(".")[0] in owners}
    leaves = {v: m if v in kept_zero or v not in tape.names else True for v, m in tape.leaves.items()}
    state = propagate(tape, leaves, {})
    frozen = {i for i, names in unread.items() if not names & trainable}
    kept: set[int] = set()  # memory that a backward operation reads which is executed
    spared: set[int] = set()  # memory that one reads which is left out
    for i, node in enumerate(tape.nodes):
        left_out = i in frozen or (node.func != ALIAS and _all_zero(node, state))
        if left_out:
            result.training_saved += node.flops
        elif node.func != ALIAS and node.func._overloadpacket is aten.convolution_backward:
            dx = node.outputs[0]
            if dx is not None and state.masks[dx] is False:
                result.training_saved += node.flops // 2
        if i >= tape.backward_start:
            read = {tape.values[v].storage for v in _reads(node)}
            if left_out:
                spared |= read
            else:
                kept |= read
    made = _made_in_forward(tape)
    result.activation_bytes = sum(made[s] for s in (kept | spared) & made.keys())
    result.activation_saved = sum(made[s] for s in (spared - kept) & made.keys())
    return result


def _flops(nodes: list[Node]) -> int:
    return sum(node.flops for node in nodes)


def _all_zero(node: Node, state: State) -> bool:
    outputs = [v for v in node.outputs if v is not None]
    return bool(outputs) and all(state.masks[v] is False for v in outputs)


def _is_zero(node: Node, state: State, holders: set[str]) -> bool:
    """Zero because of a tail or gate (and not because zeros were asked for)."""
    return _all_zero(node, state) and any(state.blame[v] & holders for v in node.outputs if v is not None)


def _unread(tape: Tape, state: State, holders: set[str]) -> tuple[dict[frozenset[str], int], dict[int, frozenset[str]]]:
    """({zero parameters: the join where their branch ends}, {forward node that only such branches read: which})."""
    forward = tape.nodes[: tape.backward_start]
    joined: dict[frozenset[str], int] = {}
    readers: dict[int, list[int]] = defaultdict(list)  # value: nodes that need it
    pruned: dict[int, frozenset[str]] = {}
    for i, node in enumerate(forward):
        if node.func != ALIAS and node.func._overloadpacket in SHAPE_ONLY:
            continue
        for v in node.inputs:
            join = node.func != ALIAS and node.func._overloadpacket in _JOINS and len(node.inputs) == 2
            others = [u for u in node.inputs if u != v]
            if join and state.masks[v] is False and others and state.masks[others[0]] is not False:
                why = state.blame[v] & holders
                if why:
                    joined.setdefault(why, i)
                    pruned[v] = why
                    continue
            readers[v].append(i)
    unread: dict[int, frozenset[str]] = {}
    for i in range(len(forward) - 1, -1, -1):
        node = forward[i]
        outputs = [v for v in node.outputs if v is not None]
        after = [r for v in outputs for r in readers[v] if not _is_saved_copy(forward[r], readers)]
        reasons = [pruned[v] for v in outputs if v in pruned] + [unread[r] for r in after if r in unread]
        if reasons and all(r in unread for r in after):
            unread[i] = reasons[0]
    return joined, unread


def _is_saved_copy(node: Node, readers: dict[int, list[int]]) -> bool:
    """What autograd takes to keep a tensor for backward: a view that the forward never reads."""
    return node.func != ALIAS and is_view(node) and not any(readers[v] for v in node.outputs if v is not None)


def _branches(
    tape: Tape,
    state: State,
    holders: set[str],
    roles: dict[str, str],
    joined: dict[frozenset[str], int],
    unread: dict[int, frozenset[str]],
    first: dict[str, int | None],
    trainable: set[str],
) -> list[BranchReport]:
    flops: dict[frozenset[str], int] = defaultdict(int)
    for i, why in unread.items():
        flops[why] += tape.nodes[i].flops
    for node in tape.nodes[: tape.backward_start]:
        for v in node.outputs[:1]:
            if v is not None and node.flops and state.masks[v] is False:
                why = frozenset(state.blame[v] & holders)
                tails = {n for n in why if roles[n] != "bias"}
                if tails and not any(why & known for known in joined):
                    joined[why] = -1
                    flops[why] += node.flops
    found = []
    for why in joined:
        if not flops[why]:
            continue
        names = sorted(why)
        moves = [first.get(n) for n in names if n in trainable]
        steps = max((step for step in moves if step is not None), default=None)
        by = "weight" if all(roles[n] in ("tail", "bias") for n in names) else "gate"
        found.append(BranchReport(names, by, flops[why], steps))
    return found


def _reads(node: Node) -> list[int]:
    """The values that a backward operation needs; a view needs none, whoever reads the view does."""
    if node.func != ALIAS and is_view(node):
        return []
    return node.inputs


def _made_in_forward(tape: Tape) -> dict[int, int]:
    """{memory: bytes} of what the forward computed; parameters, buffers and the batch are the caller's."""
    owned = {tape.values[v].storage for v in tape.leaves}
    made: dict[int, int] = {}
    for node in tape.nodes[: tape.backward_start]:
        for v in node.outputs:
            if v is not None and tape.values[v].storage not in owned:
                s = tape.values[v].storage
                made[s] = max(made.get(s, 0), tape.values[v].nbytes)
    return made
