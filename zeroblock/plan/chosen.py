"""Which way calls of a planned step take, for one who makes the call himself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import planned
from .mode import mode


def _key(step: planned.PlannedOp[..., Any], *args: Any) -> tuple:
    """As `PlannedOp.__call__` remembers it."""
    bits = ~mode.bits if planned._deterministic() else mode.bits
    return step.signature(*args), bits, planned._threads(), planned._precision()


def chosen(step: planned.PlannedOp[..., Any], *args: Any, measurable: Callable[..., bool]) -> Callable[..., Any] | None:
    """The way's function; None where it is not known and `measurable(*args)` says not to try."""
    key = _key(step, *args)
    run = step._memory.get(key)
    if run is None:
        if not measurable(*args):
            return None
        run = step._resolve(key, *args)
    return run
