"""Step headlines: how fast, the most important first, against eager (`compiled.py`: and torch.compile)."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterable

import gpu
from zbench import headlines as cases
from zbench.case import Case

from zeroblock.plan import planned

from . import Setting

ROUNDS, QUICK_ROUNDS = 21, 2


def _rounds(setting: Setting) -> int:
    return QUICK_ROUNDS if setting.quick else ROUNDS


@functools.cache
def ceilings(setting: Setting) -> tuple[float, float]:
    """GB/s of a copy and TFLOP/s of a bf16 product, once for each process."""
    return gpu.ceilings(setting.device, setting.quick, _rounds(setting))


def measure(case: Case, setting: Setting, baselines: str) -> dict:
    """gpu.py's row of the case, and what the plans of its steps became: {situation: [choice, {way: microseconds}]}."""
    before = set(planned.own_choices())
    options = argparse.Namespace(device=setting.device, rounds=_rounds(setting), baselines=baselines)
    row = gpu.measured_row(case, options, *ceilings(setting))
    plans = {
        key: [entry.choice, {name: None if t is None else round(t * 1e6, 2) for name, t in entry.times.items()}]
        for key, entry in planned.own_choices().items()
        if key not in before
    }
    numbers = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if v == v and not _infinite(v)}
    return {**numbers, "plans": plans}


def _infinite(value: object) -> bool:
    return isinstance(value, float) and math.isinf(value)


def all_of(selected: Iterable[Case], setting: Setting, baselines: str) -> dict[str, Callable[[], dict]]:
    return {case.id: functools.partial(measure, case, setting, baselines) for case in selected}


def units(setting: Setting) -> dict[str, Callable[[], dict]]:
    return all_of(cases.cases(setting.quick), setting, "eager")
