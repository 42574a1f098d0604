"""Bytes that autograd keeps between forward and backward, counted exactly: no clock is involved.

A storage counts once, however many tensors view it; inputs and parameters, which the caller owns anyway, do not count.
"""

from collections.abc import Iterator

from blocks import block_builds
from cases import DTYPES, Case, Side

from zeroblock.testing import saved_activation_bytes


def saved_bytes(side: Side) -> int:
    return saved_activation_bytes(lambda: side.function(*side.inputs), exclude=side.wrt)


def cases(quick: bool) -> Iterator[Case]:
    for state, zero in (("", False), ("_zero", True)):
        for op, shape, layouts, build in block_builds(quick, zero):
            for layout in layouts:
                for dtype in DTYPES:
                    yield Case("saved", op + state, shape, layout, dtype, "training", build)
