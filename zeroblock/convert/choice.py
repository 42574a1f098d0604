"""Which forward an accelerated block takes: zeroblock's, or its own where that is measured faster (`plan/`).

A choice between two forwards that are both exact, by the size of the first operand, remembered like that of any other
step. It is made on a CPU: in inference; in training where `prefer="speed"`, since zeroblock's forward keeps less for
backward. Both run a few times for it, with lists and dicts of their own, so it is left out where running a block leaves
a trace: hooks, layers that draw random numbers, code that is neither torch's nor diffusers', objects that it is given.
A block with a branch that is zero runs zeroblock's. One that is tiny (blocks/tiny.py) runs its own, unmeasured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import zero
from ..blocks import tiny
from ..blocks.decision import bypassable, runs_eagerly
from ..blocks.layers import may_draw
from ..plan.chosen import chosen
from ..plan.describe import Explanation, describe_rows
from ..plan.mode import training
from ..plan.planned import PlannedOp, measures
from . import seam
from .family import NEVER_ZERO

PREFERENCES = ("memory", "speed")
FUSED = "fused"  # of a family that is being proved: no choice, the fused forward is what the proof is about
_TRUSTED = ("torch.nn.", "diffusers.models.", "zeroblock.")


class BlockCall(NamedTuple):
    """fused(block, *args, **kwargs), or original(...), which gives the same."""

    block: nn.Module
    x: Tensor  # the first operand
    kind: str
    fused: Callable[..., Any]
    original: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trained: bool

    @property
    def device(self) -> torch.device:
        return self.x.device

    def signature(self) -> tuple:
        x = self.x
        return self.kind, x.shape, x.dtype, self.trained, torch.is_autocast_enabled("cpu")

    def describe(self) -> str:
        autocast = ", autocast" if torch.is_autocast_enabled("cpu") else ""
        return f"{self.kind}: {describe_rows(self.x)}{autocast}"

    def run(self, forward: Callable[..., Any]) -> Any:
        """One run for a measurement, which nothing counts; for training with a backward, of which nothing is kept."""
        counts = [(table, dict(table)) for table in (zero.executed, zero.skipped)]
        args, kwargs = _copied(self.args), _copied(self.kwargs)
        try:
            with seam.paused():
                return self._step(forward, args, kwargs) if self.trained else forward(self.block, *args, **kwargs)
        finally:
            for table, before in counts:
                table.clear()
                table.update(before)

    def _step(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.enable_grad():
            args, kwargs = _leaves(args), dict(zip(kwargs, _leaves(tuple(kwargs.values())), strict=True))
            results = forward(self.block, *args, **kwargs)
            results = results if isinstance(results, (tuple, list)) else (results,)
            wanted = [t for t in (*args, *kwargs.values(), *self.block.parameters()) if _learns(t)]
            outputs = [t for t in results if _learns(t)]
            return torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _leaves(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.detach().requires_grad_() if _learns(v) else v for v in values)


def _copied(value: Any) -> Any:
    """The same tensors, in lists and dicts of its own: a block may leave something there (caches of frames)."""
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    return {k: _copied(v) for k, v in value.items()} if type(value) is dict else value


# What a block cannot leave anything in.
_VALUES = frozenset((*zero.PLAIN_TYPES, type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size))


def _can_be_copied(value: Any) -> bool:
    kind = type(value)
    if kind in (tuple, list, dict):
        return all(map(_can_be_copied, value.values() if kind is dict else value))
    return kind in _VALUES or isinstance(value, Tensor)


def _learns(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


# "library": what the block did before accelerate, and takes every call.
BLOCK: PlannedOp[[BlockCall], Any] = PlannedOp(
    "block",
    lambda call: call.run(call.original),
    signature=BlockCall.signature,
    describe=BlockCall.describe,
    work=lambda call: 1,
    rule=lambda call: "fused",
    worth=0,
)
BLOCK.add("fused", lambda call: call.run(call.fused))


class _Part(NamedTuple):
    """What holds a branch at zero: so many elements of a parameter, from `first` on."""

    owner: weakref.ref[nn.Module]
    name: str
    first: int
    elements: int

    def held(self) -> Tensor | None:
        owner = self.owner()
        return None if owner is None else owner._parameters.get(self.name)

    def is_seen_nonzero(self) -> bool:
        return zero.is_seen_nonzero(self.held(), self.first)

    def may_be_zero(self) -> bool:
        t = self.held()
        if t is None or not t.is_contiguous() or t.numel() < self.first + self.elements:
            return True
        return zero.is_exactly_zero(t.detach().view(-1).narrow(0, self.first, self.elements))


class _Known(NamedTuple):
    """What was found out about a block: its kind in words, whether it may be run twice, and a part of what holds each
    branch at zero; None: this cannot be told from outside."""

    kind: str
    training: bool
    repeatable: bool
    parts: tuple[_Part, ...] | None


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


class Choice:
    """The choice for the blocks of one accelerated class."""

    def __init__(self, name: str, branches: Callable[[Any], dict[str, tuple[Tensor, ...]]], prefer: str):
        self.name, self.branches, self.in_training = name, branches, prefer == "speed"

    def prefers_original(
        self, block: nn.Module, fused: Callable[..., Any], original: Callable[..., Any], args: Any, kwargs: Any
    ) -> bool:
        if self._is_tiny(block, args, kwargs):
            return True
        call = self._call(block, fused, original, args, kwargs) if measures() else None
        if call is None:
            return False
        if call.trained:
            with training():
                run = chosen(BLOCK, call, measurable=_may_be_measured)
        else:
            run = chosen(BLOCK, call, measurable=_may_be_measured)
        return run is BLOCK.library.run and not _is_zero(block)

    def explain(self, block: nn.Module, *call: Any) -> Explanation | None:
        """What prefers_original would say and why; None where there is no choice."""
        if self._is_tiny(block, *call[2:]):
            return Explanation(BLOCK.name, BLOCK.library.name, "tiny: calls are what it costs", {}, {})
        found = self._call(block, *call)
        if found is None:
            return None
        with training(found.trained):
            return BLOCK.explain(found)

    def _call(
        self, block: nn.Module, fused: Callable[..., Any], original: Callable[..., Any], args: Any, kwargs: Any
    ) -> BlockCall | None:
        """The call as a planned step; None where there is no choice."""
        trained = torch.is_grad_enabled()
        if trained and not self.in_training:
            return None
        x = _first_operand(args, kwargs)
        if type(x) not in zero.PLAIN_TYPES or not x.is_cpu or not runs_eagerly():
            return None
        known = self._look_at(block)
        if known.parts is None or not known.repeatable:
            return None
        if not all(map(_can_be_copied, (*args, *kwargs.values()))):
            return None
        return BlockCall(block, x, known.kind, fused, original, args, kwargs, trained)

    def _is_tiny(self, block: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether the call is so small, and no branch zero."""
        x = _first_operand(args, kwargs)
        if type(x) not in zero.PLAIN_TYPES or not tiny.is_tiny(x, tiny.TOKENS if x.dim() == 3 else tiny.IMAGES):
            return False
        parts = self._look_at(block).parts
        return parts is not None and all(part.is_seen_nonzero() for part in parts) and runs_eagerly()

    def _look_at(self, block: nn.Module) -> _Known:
        known = _known.get(block)
        if known is None or known.training != block.training:
            count = sum(p.numel() for p in block.parameters())
            kind = f"{self.name}, {count} parameters"
            known = _known[block] = _Known(kind, block.training, leaves_no_trace(block), self._parts(block))
        return known

    def _parts(self, block: nn.Module) -> tuple[_Part, ...] | None:
        owners = {
            p.untyped_storage().data_ptr(): (m, name)
            for m in block.modules()
            for name, p in m._parameters.items()
            if p is not None
            and type(p) in zero.PLAIN_TYPES
            and p.dim() > 0
            and p.is_contiguous()
            and p.storage_offset() == 0
        }
        parts = []
        for first, *_ in self.branches(block).values():
            if first is NEVER_ZERO:
                continue
            if first.is_meta or not first.is_contiguous() or first.untyped_storage().data_ptr() not in owners:
                return None
            owner, name = owners[first.untyped_storage().data_ptr()]
            parts.append(_Part(weakref.ref(owner), name, int(first.storage_offset()), first.numel()))
        return tuple(parts) or None  # of a norm alone there is nothing to choose


def _first_operand(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _is_zero(block: nn.Module) -> bool:
    """Whether a branch may be zero now: its weights decide, at each call."""
    parts = _known[block].parts
    return parts is None or any(part.may_be_zero() for part in parts)


def _may_be_measured(call: BlockCall) -> bool:
    block = call.block
    if _is_zero(block):
        return False  # it will not stay so
    if leaves_no_trace(block):
        return True
    _known[block] = _known[block]._replace(repeatable=False)  # hooked since: not asked again
    return False


def leaves_no_trace(block: nn.Module) -> bool:
    """Whether the block may be run more often than it is called."""
    if not bypassable(block.children()) or may_draw(block, "diffusers.models."):
        return False
    for m in block.modules():
        known = getattr(type(m), "_zeroblock", None)
        home = (type(m) if known is None else known.original).__module__
        processor = getattr(m, "processor", None)
        if (
            not home.startswith(_TRUSTED)
            or processor is not None
            and not type(processor).__module__.startswith(_TRUSTED)
        ):
            return False
    return True


def choice_of(family: Any, keeps_state: bool) -> Choice | None:
    """None for a family whose forward always runs: a backend or precision was asked for, or it runs the original."""
    free = family.backend == "auto" and family.precision == "strict" and not family.only_skips and not keeps_state
    return Choice(family.name, family.branches, family.prefer) if free and family.prefer != FUSED else None
