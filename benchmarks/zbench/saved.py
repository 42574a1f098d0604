"""Group saved: bytes that autograd keeps between forward and backward, counted exactly: no clock is involved.

A storage counts once, however many tensors view it; inputs and parameters, which the caller owns anyway, do not count.
"""

from collections.abc import Iterator

from zeroblock.testing import saved_activation_bytes

from .blocks import block_builds
from .case import DTYPES, Case, Side


def saved_bytes(side: Side) -> int:
    """Of one forward."""
    return saved_activation_bytes(lambda: side.function(*side.inputs), exclude=side.wrt)


def block_cases(quick: bool) -> Iterator[Case]:
    """The blocks; models.py and whole.py add theirs."""
    for state, zero in (("", False), ("_zero", True)):
        for op, shape, layouts, build in block_builds(quick, zero):
            for layout in layouts:
                for dtype in DTYPES:
                    yield Case("saved", op + state, shape, layout, dtype, "training", build)
