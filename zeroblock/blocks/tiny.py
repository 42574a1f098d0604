"""Blocks so small that their calls cost more than their arithmetic: while no branch of theirs is zero, they run as they
were written, by torch's own layers. Neither time nor memory is to be won there.

Sizes alone say what is tiny, so that results do not depend on a measurement; the zero contract stays (zero.py): the
weights and gates are looked at before each such call, and a branch that is zero is skipped as at any other size.
"""

from __future__ import annotations

from torch import Tensor
from torch._C import _get_tracing_state
from torch.compiler import is_compiling

from .. import zero
from ..backends import available
from ..plan.mode import EAGER, mode
from ..steps import packed
from ..steps.flag import PLAIN_TYPES, is_seen_nonzero
from .decision import runs_eagerly

# Elements of the first operand up to which the fused forwards do not pay (benchmarks/run.py --group overhead): of
# images they do from some 40 pixels of 32 channels on, of tokens from some 64 tokens of 384 channels.
IMAGES = 1 << 10
TOKENS = 1 << 14


def is_tiny(x: Tensor, limit: int) -> bool:
    """Whether x has few elements: on a CPU, with no backend asked for, and with nobody recording the call."""
    if is_compiling() or _get_tracing_state() is not None:
        return False
    return 0 < x.numel() <= limit and x.is_cpu and available._forced == "auto"


def runs_as_written(name: str, policy: str, x: Tensor, *holders: Tensor | None, branches: int = 1) -> bool:
    """Whether the tiny block `name` runs as it was written; it is then counted once for each of its branches.

    holders: every tensor that holds a branch at zero while it is zero (None: it is not known). All of them have to show
    in their first element that they are not, else the block is looked at as one of any other size.
    """
    if type(x) not in PLAIN_TYPES or policy not in zero.POLICIES:
        return False
    for t in holders:
        if not is_seen_nonzero(t) or packed.copies and packed.is_frozen(t):  # type: ignore[arg-type]
            return False
    if mode.bits & EAGER or not runs_eagerly():  # the fused forwards see to both
        return False
    if policy != "never":
        zero.count(name, False, branches)
    return True
