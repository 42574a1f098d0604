"""What a few minutes on a GPU can show, most telling first: the parts of `first_gpu.py`.

A step is a module here with `units(setting)`, {name: function}, in the order in which they are worth their time. Units
run in processes of their own (`worker.py`), which the entry supervises (`pool.py`): one that hangs, or breaks its CUDA
context, costs its own result alone. Each result is a row, written when it comes (`results.py`).

In this order: machine, parts, correct (its calls in `checks.py`, CUDA graphs in `graphs.py`), headlines, compiled,
sanitizer (what it watches in `sanitized.py`), models. `summary.py`: the page at the end; `cache.py`: what is carried.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Setting(NamedTuple):
    """What every step is told."""

    device: str  # "cuda", or "cpu" for a dry run
    quick: bool  # tiny sizes


class Skip(Exception):
    """Raised by a unit that cannot run here; says why."""
