"""Step models: whole models from end to end."""

from __future__ import annotations

from collections.abc import Callable

from zbench import whole

from . import Setting
from .headlines import all_of


def units(setting: Setting) -> dict[str, Callable[[], dict]]:
    return all_of(whole.cases(setting.quick), setting, "eager")
