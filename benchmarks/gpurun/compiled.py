"""Step compiled: the headlines again, with torch.compile among what they are compared with."""

from __future__ import annotations

from collections.abc import Callable

from zbench import headlines as cases

from . import Setting
from .headlines import all_of


def units(setting: Setting) -> dict[str, Callable[[], dict]]:
    selected = list(cases.cases(setting.quick))
    return all_of(selected[:1] if setting.quick else selected, setting, "compile")
