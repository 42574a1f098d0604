"""What a parameter can be found to be, and which of these findings mean that it never learns."""

from __future__ import annotations

import math
from typing import Any

KINDS = {
    "zero tail": "zero, and learns from the first step: its input and dL/dy are both varied",
    "zero gate": "zero, multiplies a branch, and learns from the first step",
    "waits": "zero or constant, and cannot move until another parameter has moved",
    "dead": "never moves: its gradient is zero whatever the others do",
    "symmetric": "its units are identical and get identical gradients: they act as one",
    "constant": "constant but asymmetric: its units get different gradients",
    "not seen": "no gradient was seen, and no proof was found that there is none",
    "unused": "no gradient reaches it: the loss does not depend on it",
    "frozen": "zero or constant and not trained",
    "free": "neither zero nor constant",
}
# Kinds that never learn: the diagnosis is not healthy, the command's exit status is 1.
ALARMS = ("dead", "symmetric")
UNUSED = "unused"  # no alarm: models may well keep a part for another use, but no initialisation makes it learn
# A largest element below this is close to zero without being zero: reported, because no branch is skipped for it.
NEAR_ZERO = 1e-4


def finite(value: Any) -> Any:
    """A copy for JSON, which has no NaN and no infinity: they become strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
