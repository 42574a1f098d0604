"""What the sanitizer watches: forward and backward of each op on the CUDA kernels, nothing judged."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import Setting, checks
from .checks import Check


def watched(device: str) -> dict[str, Check]:
    """By op: its first case in bf16, which the convolution takes too; group_norm_silu in both layouts."""
    chosen = checks.backends(device)[-1]
    found: dict[str, Check] = {}
    for case, layout in checks.firsts():
        found.setdefault(case.op, Check(case, layout, torch.bfloat16, chosen))
    norm = found["group_norm_silu"]
    return {**found, "group_norm_silu-nhwc": norm._replace(layout="nhwc")}


def run(check: Check, device: str) -> None:
    with checks.chosen(check, device):
        checks.call(check, device)


def units(setting: Setting) -> dict[str, Callable[[], None]]:
    found = watched(setting.device)
    return {name: functools.partial(run, check, setting.device) for name, check in found.items()}
