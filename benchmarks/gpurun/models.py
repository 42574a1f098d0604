"""Step models: whole models from end to end."""

from __future__ import annotations

from collections.abc import Callable

from zbench import whole

from . import Setting, Skip
from .headlines import all_of


def missing() -> dict:
    raise Skip("diffusers is not installed: its models are left out")


def units(setting: Setting) -> dict[str, Callable[[], dict]]:
    left_out = {} if whole.diffusers else {"diffusers": missing}
    return {**all_of(whole.cases(setting.quick), setting, "eager"), **left_out}
