"""What the tests of plans share: a timer that is told the seconds, and a planned op whose ways leave a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from zeroblock.plan import planned as _plan
from zeroblock.plan.describe import bucket
from zeroblock.plan.planned import PlannedOp


class FakeTimer:
    """Seconds by name; counts its calls. Runs what it times, as a timer does."""

    def __init__(self, **seconds: float):
        self.seconds = {name.replace("_", " "): s for name, s in seconds.items()}
        self.calls: list[str] = []

    def __call__(self, name, run, device):
        self.calls.append(name)
        run()
        return self.seconds.get(name, 1.0)


def never(name, run, device):
    """A timer for where nothing may be measured."""
    raise AssertionError("nothing may be measured here")


@contextlib.contextmanager
def double() -> Iterator[PlannedOp]:
    """A planned op of its own: y = 2x in three ways that leave a trace, work as large as asked."""
    ran: list[str] = []

    def way(name):
        return lambda x, work: (ran.append(name), x * 2)[1]

    planned = PlannedOp(
        "double",
        way("library"),
        signature=lambda x, work: (x.shape, x.dtype, x.stride(), work),
        describe=lambda x, work: f"{x.dtype}{[bucket(n) for n in x.shape]}{x.is_contiguous()}",
        work=lambda x, work: work,
    )
    planned.add("fast", way("fast"))
    planned.add("picky", way("picky"), lambda x, work: None if x.shape[0] % 2 == 0 else "odd")
    planned.add("coarse", way("coarse"), reduced=lambda *args: True)
    planned.ran = ran
    try:
        yield planned
    finally:
        del _plan.STEPS["double"]


BIG = _plan.WORTH_MEASURING
x3, x4 = torch.ones(3), torch.ones(4)


def chosen(op, x, work=BIG) -> str:
    """The way this call takes, measured or not."""
    op(x, work)
    return op.ran[-1]
