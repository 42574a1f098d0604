"""Step correct: every op on every backend against eager in fp64, on poisoned memory; CUDA graphs; torch.compile.

Most telling first: one case of each op, then graphs, shapes that take other paths, torch.compile, the other cases, what
users get (measured plans), every way that a plan may choose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from zeroblock.plan import planned
from zeroblock.testing.parity import assert_parity

from . import Setting, Skip, checks, graphs
from .checks import MEASURED, WAY, Check


def judge(check: Check, device: str) -> dict:
    with checks.chosen(check, device) as took:
        if check.chosen.startswith(WAY):
            checks.call(check, device)
            if not took:
                raise Skip("no step of this call has that way")
        assert_parity(check.case, check.dtype, check.layout, device, poison=check.chosen != MEASURED)
        if check.chosen == MEASURED:
            return {"plans": {key: entry.choice for key, entry in planned.own_choices().items()}}
    return {"took": sorted(took)} if took else {}


def judge_compiled(check: Check, device: str, backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(check.case.run, fullgraph=True, dynamic=False, backend=backend)
    assert_parity(check.case, check.dtype, check.layout, device, run=run)


def compiled(setting: Setting) -> Iterator[tuple[str, Callable[[], None]]]:
    backend = "aot_eager" if setting.quick else "inductor"
    for case, layout in checks.firsts()[:2] if setting.quick else checks.firsts():
        check = Check(case, layout, torch.bfloat16, "compile")
        yield check.name, functools.partial(judge_compiled, check, setting.device, backend)


def units(setting: Setting) -> dict[str, Callable[[], dict | None]]:
    device, quick = setting
    first = list(checks.parity(device, True))
    groups = (
        first,
        graphs.graphs(device, quick),
        checks.large(device, quick),
        compiled(setting),
        () if quick else checks.parity(device, False),
        checks.measured(),
        checks.ways(device),
    )
    found: dict[str, Callable[[], dict | None]] = {}
    for group in groups:
        for each in group:
            name, run = (each.name, functools.partial(judge, each, device)) if isinstance(each, Check) else each
            found.setdefault(name, run)
    return found
