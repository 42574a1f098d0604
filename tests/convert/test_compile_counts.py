"""What torch.compile takes for accelerated models: the stored tables, and today's counts against them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from . import compile_times
from .test_compile import _NOT_EXPORTED, CASES, MODELS, fresh_compiler  # noqa: F401


def _stored(file: str) -> dict[tuple[str, str], dict[str, str]]:
    rows = csv.DictReader(Path(__file__).with_name(file).read_text().splitlines())
    return {(row["name"], row["mode"]): row for row in rows}


STORED, SECONDS = _stored("compile.csv"), _stored("compile_seconds.csv")
TORCH = {row["torch"] for row in STORED.values()}
SLACK = 1.05
EVERY = {(name, mode) for name in {**CASES, **MODELS} for mode in compile_times.MODES}


@pytest.mark.parametrize("table", (STORED, SECONDS), ids=("compile", "compile_seconds"))
def test_no_model_costs_a_compiler_more_than_it_may(table):
    """Time at most LIMIT of the untouched model's, no more graphs or recompiles, exported where that is. Both files are
    renewed as compile_times.py says."""
    assert table.keys() >= EVERY
    for row in table.values():
        assert not compile_times.above_limit(row), row


def test_the_tables_hold_what_they_are_asked_for():
    for (name, mode), row in STORED.items():
        assert compile_times.above_limit(row | {"graphs_accelerated": "2", "graphs": "1"})
        if mode == "inference":
            assert row["exports"] == str(int(name not in _NOT_EXPORTED))
            assert compile_times.above_limit(row | {"exports": "1", "exports_accelerated": "0"})
            assert compile_times.above_limit(row | {"recompiles": "1", "recompiles_accelerated": "2"})
    for row in SECONDS.values():
        ratio = float(row["seconds_accelerated"]) / float(row["seconds"])
        assert abs(ratio - float(row["ratio"])) < 0.02 and row["machine"]
        assert compile_times.above_limit(row | {"ratio": str(compile_times.LIMIT + 0.01)})


# None of which needs another package: their counts are theirs too.
@pytest.mark.skipif({torch.__version__.split("+")[0]} != TORCH, reason="each torch traces in its own way")
@pytest.mark.parametrize("name", ["film", "attention", "rezero"])
def test_no_more_is_traced_than_was(name):
    for row in compile_times.counts(name, CASES[name]):
        stored = STORED[name, row["mode"]]
        for count in ("functions_accelerated", "guards_accelerated"):
            assert row[count] <= SLACK * int(stored[count]), (row, stored)
