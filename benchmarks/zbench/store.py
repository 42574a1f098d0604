"""The results on disk: one CSV per machine and group, one row per case, thread count and allocator setting.

A new measurement of a case replaces its row and leaves all others, so that a run can be interrupted or filtered.
"""

import csv
import datetime
import math
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import zeroblock
from zeroblock.plan.measure import cpu_model

BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results"
GROUPS = ("memory_bound", "zero", "dense", "frozen", "overhead", "saved", "models", "whole", "peak")

COLUMNS = (
    "group", "case", "op", "shape", "layout", "dtype", "mode", "threads", "allocator", "unit",
    "eager", "compile", "max_autotune", "freezing", "max_autotune_freezing",  # medians, in `unit`
    "other_layout",  # the fastest of these with images and weights in the other layout
    "zeroblock", "zeroblock_compile", "floor",
    "best", "ratio", "lo", "hi", "p20", "p80",  # zeroblock against the better of eager and compile
    "best_all", "ratio_all", "lo_all",  # against the best of all baselines
    "ratio_compile", "lo_compile",  # zeroblock under torch.compile against torch.compile alone
    "floor_percent",  # 100 * floor / zeroblock: the percentage of the copy bandwidth that is reached
    "rounds", "dropped",
    "machine", "torch", "zeroblock_version", "backend", "commit", "date",
)  # fmt: skip
KEY = ("case", "threads", "allocator")
_FIGURES = COLUMNS[COLUMNS.index("eager") : COLUMNS.index("machine")]
NUMBERS = tuple(name for name in _FIGURES if name not in ("best", "best_all"))

# "pinned": freed memory stays with the process, so that page faults do not decide the comparison.
ALLOCATORS = {
    "pinned": {
        "MALLOC_MMAP_THRESHOLD_": str(2 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        "MALLOC_TOP_PAD_": str(256 << 20),
    },
    "default": {},
}


def allocator() -> str:
    """The setting this process runs under, by its environment."""
    pinned = ALLOCATORS["pinned"]
    return "pinned" if all(os.environ.get(name) == value for name, value in pinned.items()) else "default"


def machine_slug() -> str:
    """A folder name for this machine: its CPU and the number of cores, "amd-epyc-family-25-model-17-2-cores"."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {os.cpu_count()} cores".lower()).strip("-")


def commit() -> str:
    """The revision of the code that is measured, "-dirty" if it was changed since, "none" outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(BENCHMARKS), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    revision = git("rev-parse", "--short", "HEAD")
    if not revision:
        return "none"
    code = ("..", ":(exclude)results")  # results that this run stores do not change what it measures
    return revision + ("-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", *code) else "")


def provenance() -> dict[str, str]:
    """What every row of this run has in common."""
    return {
        "allocator": allocator(),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "zeroblock_version": zeroblock.__version__,
        "backend": zeroblock.explain("is_zero", torch.zeros(1)).backend,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def read(path: Path) -> list[dict]:
    """Rows of one CSV; numbers as floats, NaN where there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    blank = dict.fromkeys(COLUMNS, "")  # for columns that an older file does not have
    return [{**blank, **row, **{name: _number(row.get(name, "")) for name in NUMBERS}} for row in rows]


def read_all(folder: Path, groups: Sequence[str] = GROUPS) -> list[dict]:
    return [row for group in groups for row in read(folder / f"{group}.csv")]


def text(value: object) -> str:
    """As it stands in a CSV: six digits of a number, nothing for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def write(path: Path, rows: list[dict]) -> None:
    """Add `rows`, each in place of the row with its key, and keep the file whole if the process dies midway."""
    merged = {tuple(str(row[name]) for name in KEY): row for row in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: text(row[name]) for name in COLUMNS} for row in merged.values())
    draft.replace(path)
