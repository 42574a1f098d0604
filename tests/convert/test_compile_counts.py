"""What torch.compile traces of accelerated models, without a clock: compile.csv, and today's counts against it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from . import compile_times
from .test_compile import CASES, MODELS, fresh_compiler  # noqa: F401

STORED = {
    (row["name"], row["mode"]): row
    for row in csv.DictReader(Path(__file__).with_name("compile.csv").read_text().splitlines())
}
TORCH = {row["torch"] for row in STORED.values()}
SLACK = 1.05


def test_every_model_is_stored_and_breaks_no_more_often():
    """compile.csv is renewed by `python -m tests.convert.compile_times --counts --csv tests/convert/compile.csv`."""
    assert {(name, mode) for name in {**CASES, **MODELS} for mode in compile_times.MODES} <= STORED.keys()
    for row in STORED.values():
        assert int(row["graphs_accelerated"]) <= int(row["graphs"]), row


# None of which needs another package: their counts are theirs too.
@pytest.mark.skipif({torch.__version__.split("+")[0]} != TORCH, reason="each torch traces in its own way")
@pytest.mark.parametrize("name", ["film", "attention", "rezero"])
def test_no_more_is_traced_than_was(name):
    for row in compile_times.counts(name, CASES[name]):
        stored = STORED[name, row["mode"]]
        for count in ("functions_accelerated", "guards_accelerated"):
            assert row[count] <= SLACK * int(stored[count]), (row, stored)
