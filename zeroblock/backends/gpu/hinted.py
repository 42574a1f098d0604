"""A step in two plans, between which a hint chooses (steps/hint.py)."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from ...plan.planned import PlannedOp, bits_are_free
from ...steps.flag import is_executed
from ...steps.hint import plan_of, seen_zero
from ..base import Backend, Step

R = TypeVar("R", bound=tuple[Tensor, ...])


class FlaggedCall(Protocol):
    """A call of a step that tests its weight on the device."""

    @property
    def backend(self) -> Backend: ...

    @property
    def weight(self) -> Tensor: ...

    @property
    def zero_skip(self) -> int: ...

    def tested(self) -> list[Tensor]:
        """The tensors of which one that is zero makes the branch zero."""

    def unflagged(self) -> Any:
        """The same call without a test."""


class HintedStep(Generic[R]):
    """The last of a result is what was reported of the weight: in the flagged plan the flag."""

    def __init__(self, dense: PlannedOp[..., R], flagged: PlannedOp[..., R]):
        self.dense, self.flagged = dense, flagged

    def __call__(self, call: FlaggedCall) -> R:
        is_flagged, hint = plan_of(call.weight)
        if is_flagged:
            result = self.flagged(call)
            if hint is not None and not is_executed(result[-1]):
                hint.look(result[-1])
            return result
        if hint is not None:
            if self.has_zero_path(call):
                hint.look(call.backend.zero_flag(call.tested()))
            else:
                hint.rest()
        return self.dense(call.unflagged())

    def has_zero_path(self, call: FlaggedCall) -> bool:
        """Whether a kernel of ours takes the call."""
        return len(self.flagged.takers(call)) > 1

    def step(self, call: FlaggedCall) -> Step:
        """What would run now, for `explain`."""
        if seen_zero(call.weight) and bits_are_free() and self.has_zero_path(call):
            return self.flagged, (call,)
        return self.dense, (call.unflagged(),)
