"""Which way calls of a planned step take, for one who makes the call himself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import planned
from .mode import FIXED, mode


def _key(step: planned.PlannedOp[..., Any], *args: Any) -> tuple | None:
    """As `PlannedOp.__call__` remembers it; None under the fixed rule."""
    bits = mode.bits
    if bits & FIXED:
        return None
    bits = ~bits if planned._deterministic() else bits
    return step.signature(*args), bits, planned._threads(), planned._precision()


def chosen(step: planned.PlannedOp[..., Any], *args: Any, measurable: Callable[..., bool]) -> Callable[..., Any] | None:
    """The way's function; None where it is not known and `measurable(*args)` says not to try."""
    key = _key(step, *args)
    if key is None:
        return step._fixed(*args).run
    run = step._memory.get(key)
    if run is None:
        if not measurable(*args):
            return None
        run = step._resolve(key, *args)
    return run
