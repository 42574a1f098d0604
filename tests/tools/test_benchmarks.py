"""The benchmarks run and count right. Nothing here looks at how fast anything is."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..support import BENCHMARKS, HANG

pytestmark = [pytest.mark.slow, pytest.mark.one_worker]

CASES = {
    "memory_bound": 72,
    "zero": 16,
    "dense": 22,
    "frozen": 11,
    "overhead": 46,
    "saved": 32,
    "models": 24,
    "whole": 12,
    "peak": 1,
}


@pytest.fixture
def timing(benchmark_path):
    from zeroblock.testing import timing

    return timing


@pytest.fixture
def store(benchmark_path):
    from zbench import store

    return store


@pytest.fixture
def report(benchmark_path):
    from zbench import report

    return report


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """One quick run of all groups: (its output, group -> rows)."""
    out = tmp_path_factory.mktemp("benchmarks")
    options = ["--quick", "--threads", "1", "--sample-ms", "0.1", "--compile-seconds", str(HANG), "--out", str(out)]
    command = [sys.executable, str(BENCHMARKS / "run.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, cwd=out, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = {path.stem: list(csv.DictReader(path.open(newline=""))) for path in out.glob("*/*.csv")}
    return done.stdout, tables


@pytest.mark.parametrize("group", CASES)
def test_quick_run_stores_every_case(quick_run, store, group):
    _, tables = quick_run
    rows = tables[group]
    assert len(rows) == CASES[group]
    assert len({row["case"] for row in rows}) == len(rows)
    for row in rows:
        assert tuple(row) == store.COLUMNS
        for name in ("eager", "zeroblock", "ratio", "lo", "hi", "p20", "p80"):
            assert math.isfinite(float(row[name])) and float(row[name]) > 0, (row["case"], name)
        assert float(row["lo"]) <= float(row["ratio"]) <= float(row["hi"])
        for name in ("unit", "machine", "torch", "zeroblock_version", "backend", "commit", "date", "best"):
            assert row[name], (row["case"], name)
        assert row["allocator"] == "pinned"


def test_quick_run_measures_floor_and_compiler(quick_run):
    _, tables = quick_run
    assert all(float(row["floor"]) > 0 for row in tables["memory_bound"])
    assert all(bool(row["floor"]) == (row["mode"] == "inference") for row in tables["zero"])
    assert [row["case"] for row in tables["memory_bound"] if row["compile"]] == [
        "memory_bound/gate_residual-2x4x64-fp32-inference"
    ]


def test_quick_run_prints_targets(quick_run):
    output, _ = quick_run
    for line in (
        "group_norm_silu, inference: geometric mean",
        "training step, identity skips",
        "zero check of a dense",
    ):
        assert line in output
    assert ">= 2.2x" in output and "<= 0.25x" in output


def test_quick_run_refuses_the_results_folder(benchmark_path, capsys):
    import run

    with pytest.raises(SystemExit):
        run.parse(["--quick"])
    assert "--quick needs --out" in capsys.readouterr().err
    assert run.parse(["--quick", "--out", "elsewhere"]).out == Path("elsewhere")


def test_percentile_interpolates(timing):
    assert timing.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.percentile([1.0, 2.0], 0.25) == 1.25
    assert timing.percentile([7.0], 0.8) == 7.0


def test_paired_ratio_cancels_a_slow_spell(timing):
    # The second half of the rounds is ten times slower for both: no effect on the paired ratio.
    base, own = [4.0] * 5 + [40.0] * 5, [2.0] * 5 + [20.0] * 5
    ratio = timing.paired_ratio(base, own)
    assert (ratio.median, ratio.lo, ratio.hi, ratio.p20, ratio.p80, ratio.rounds) == (2.0, 2.0, 2.0, 2.0, 2.0, 10)


def test_paired_ratio_needs_pairs(timing):
    with pytest.raises(ValueError):
        timing.paired_ratio([1.0, 2.0], [1.0])


def test_bootstrap_interval_holds_the_median_and_narrows(timing):
    few = [1.0 + 0.1 * (i % 5) for i in range(10)]
    many = few * 20
    lo, hi = timing.bootstrap_interval(few)
    assert lo <= 1.2 <= hi and hi - lo > 0
    narrow_lo, narrow_hi = timing.bootstrap_interval(many)
    assert narrow_hi - narrow_lo < hi - lo
    assert timing.bootstrap_interval(few) == (lo, hi)  # no run-to-run change of the same samples
    assert timing.bootstrap_interval([3.0]) == (3.0, 3.0)


def test_geometric_mean(timing):
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(timing.geometric_mean([]))


def test_preempted_rounds_are_dropped_only_when_enough_remain(timing):
    times = {"eager": [2.0] * 6 + [50.0], "zeroblock": [1.0] * 7}
    clean = {"eager": [True] * 6 + [False], "zeroblock": [True] * 7}
    kept = timing.Timing(times, clean)
    assert kept.ratio("eager", "zeroblock").rounds == 6 and kept.dropped("eager", "zeroblock") == 1
    disturbed = timing.Timing(times, {"eager": [False] * 7, "zeroblock": [True] * 7})
    assert disturbed.ratio("eager", "zeroblock").rounds == 7 and disturbed.dropped("eager", "zeroblock") == 0
    assert disturbed.median("eager") == 2.0


def test_measure_times_every_candidate_in_every_round(timing):
    calls = {"a": 0, "b": 0}

    def candidate(name):
        calls[name] += 1

    result = timing.measure({name: lambda n=name: candidate(n) for name in calls}, seconds=0.0, min_rounds=4)
    assert {name: len(times) for name, times in result.times.items()} == {"a": 4, "b": 4}
    assert all(value > 0 for times in result.times.values() for value in times)
    assert all(count >= 4 for count in calls.values())


def _row(store, **values):
    row = {name: float("nan") if name in store.NUMBERS else "" for name in store.COLUMNS}
    return row | {"threads": "1", "allocator": "pinned", "date": "2026-01-01T00:00Z"} | values


def test_store_replaces_a_case_and_keeps_the_others(store, tmp_path):
    path = tmp_path / "dense.csv"
    store.write(path, [_row(store, case="a", ratio=1.0), _row(store, case="b", ratio=2.0)])
    store.write(path, [_row(store, case="a", ratio=3.0), _row(store, case="a", threads="2", ratio=4.0)])
    rows = store.read(path)
    assert [(row["case"], row["threads"], row["ratio"]) for row in rows] == [
        ("a", "1", 3.0),
        ("b", "1", 2.0),
        ("a", "2", 4.0),
    ]
    assert math.isnan(rows[0]["compile"])


def test_a_file_of_before_a_column_was_added_is_read(store, report, tmp_path):
    path = tmp_path / "dense.csv"
    row = _row(
        store, case="dense/a", op="resblock", mode="inference", shape="1x8x4x4", ratio=1.2, lo=1.1, ratio_all=1.2
    )
    store.write(path, [row])
    lines = [line.split(",") for line in path.read_text().splitlines()]
    gone = lines[0].index("lo_all")
    path.write_text("".join(",".join(line[:gone] + line[gone + 1 :]) + "\n" for line in lines))
    assert math.isnan(store.read(path)[0]["lo_all"])
    assert "[1.100]" in report.dense_checks(store.read(path))[-1].value


def test_report_says_which_targets_are_met(store, report):
    def dense(case, ratio, lo, **values):
        values = {"op": "resblock", "mode": "training", "dtype": "fp32", "shape": "1x8x32x32"} | values
        return _row(store, group="dense", case=f"dense/{case}", ratio_all=ratio, lo_all=lo, **values)

    def frozen(ratio_all, dtype="fp32"):
        values = {"op": "resblock", "dtype": dtype, "ratio": 9.0, "ratio_all": ratio_all}
        return _row(store, group="frozen", case="frozen/case", **values)

    assert [c.met for c in report.frozen_checks([frozen(1.5), frozen(1.2)])] == [False, None]
    assert [c.met for c in report.frozen_checks([frozen(1.5), frozen(1.4)])] == [True, None]
    assert [c.met for c in report.frozen_checks([frozen(1.5), frozen(1.9, "fp32_high")])] == [True, None, False, None]
    checks = report.dense_checks([dense("good", 1.2, 1.1), dense("bad", 0.9, 0.89, shape="1x8x16x16to8")])
    assert (checks[0].value, checks[0].met) == ("1.039x", True)
    assert checks[-1].met is False and "bad" in checks[-1].what
    large = [check for check in checks if "at 32x32 and more" in check.what]
    assert [(check.value, check.met) for check in large] == [("1.200x", True)], "the small map does not count"
    high = report.dense_checks([dense("high", 1.4, 1.3, dtype="fp32_high")])
    assert [check.met for check in high if "at 32x32" in check.what] == [False]
    dit = dense("dit", 1.0, 0.96, op="dit_block", shape="2x4x64", eager=103.0, zeroblock=100.0)
    assert [check.met for check in report.dense_checks([dit]) if "against eager" in check.what] == [False]

    def op(case, ratio, percent):
        values = {"op": "gate_residual", "mode": "inference", "ratio": ratio, "floor_percent": percent}
        return _row(store, group="memory_bound", case=f"memory_bound/{case}", **values)

    at_the_floor = report.memory_bound_checks([op("a", 3.0, 50.0), op("b", 1.05, 90.0)])
    assert at_the_floor[-1].met is True  # below 1.1x, but at 90 % of the copy bandwidth
    too_slow = report.memory_bound_checks([op("a", 3.0, 50.0), op("b", 1.05, 60.0)])
    assert too_slow[-1].met is False and any("below: b" in check.what for check in too_slow)


def test_plots_are_drawn_from_the_rows(quick_run, store, tmp_path, benchmark_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from zbench import plot

    _, tables = quick_run
    for group, rows in tables.items():
        store.write(tmp_path / f"{group}.csv", rows)
    assert {path.name for path in plot.draw(tmp_path)} == {f"{group}-t1.png" for group in CASES}
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))
