"""The run on a GPU, walked through on the CPU: every step, cut off in the middle, taken up again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ..support import BENCHMARKS, HANG

pytestmark = [pytest.mark.one_worker, pytest.mark.usefixtures("benchmark_path")]

ENTRY = (sys.executable, str(BENCHMARKS / "first_gpu.py"), "--dry-run", "--jobs", "1")
STEPS = ("machine", "parts", "correct", "headlines", "compiled", "sanitizer", "models")
# What a dry run may leave out, by a word of the reason.
SKIPPED = ("a dry run", "was not carried", "no step of this call has that way", "diffusers is not installed")


def command(*arguments):
    return [*ENTRY, "--minutes", str(HANG / 60), *map(str, arguments)]


def rows_of(folder):
    from gpurun.results import read

    return read(folder)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(folder, what was printed) of all steps."""
    folder = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(command("--out", folder), capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "log.txt").read_text()[-3000:]
    return folder, done.stdout


@pytest.mark.slow
def test_a_dry_run_walks_every_step(dry_run):
    folder, printed = dry_run
    rows = rows_of(folder)
    assert {row["step"] for row in rows} == set(STEPS)
    for row in rows:
        assert row["status"] == "ok" or any(reason in row["error"] for reason in SKIPPED), row
    assert len({(row["step"], row["unit"]) for row in rows}) == len(rows)
    units = {row["unit"] for row in rows if row["step"] == "correct" and row["status"] == "ok"}
    for op in ("group_norm_silu", "linear_gate_residual", "conv_residual"):
        for dtype in ("float32", "bfloat16", "float16"):
            assert any(unit.startswith("cpu/" + op) and unit.endswith(dtype) for unit in units)
    for kind in ("graph/cpu/", "measured/", "compile/", "way "):
        assert any(unit.startswith(kind) for unit in units), kind
    assert {path.name for path in folder.iterdir()} == {"results.jsonl", "units.json", "log.txt", "summary.txt"}
    assert (folder / "summary.txt").read_text() in printed and "0 failed" in printed
    assert "headlines " in printed and "memory_bound/gate_residual-2x4x64-bf16-training" in printed


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_do(dry_run):
    """But the machine and the parts, which may be others now."""
    folder, _ = dry_run
    before = rows_of(folder)
    done = subprocess.run(command("--resume", folder), capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["step"] for row in rows_of(folder)[len(before) :]} == {"machine", "parts"}


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path):
    """Nothing that was found is lost or done twice, and no process is left."""
    options = ("--steps", "sanitizer,models")
    with subprocess.Popen(command("--out", tmp_path, *options), stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + HANG
        while len(rows_of(tmp_path)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
    before = (tmp_path / "results.jsonl").read_bytes()
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"step": "models", "unit": "cut o')  # as a machine that stops leaves it
    assert len(rows_of(tmp_path)) >= 2 and workers
    while any(map(runs, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    done = subprocess.run(command("--resume", tmp_path, *options), capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    units = [(row["step"], row["unit"]) for row in rows_of(tmp_path)]
    assert len(set(units)) == len(units) and {step for step, _ in units} == {"sanitizer", "models"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends(tmp_path):
    entry = (sys.executable, str(BENCHMARKS / "first_gpu.py"), "--minutes", str(HANG / 60), "--out", str(tmp_path))
    done = subprocess.run(entry, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 1 and "no GPU that torch can use, nothing else is tried" in done.stdout, done.stderr
    found = {(row["step"], row["unit"]): row["status"] for row in rows_of(tmp_path)}
    assert {step for step, _ in found} == {"machine"} and found["machine", "versions"] == "ok"


def children(pid):
    """The processes that a process started, by Linux's account."""
    path = f"/proc/{pid}/task/{pid}/children"
    if not os.path.exists(path):
        pytest.skip("the system lists no children of a process")
    with open(path) as file:
        return [int(word) for word in file.read().split()]


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- processes ------------------------------------------------------------------------------------------------------

UNITS = """
import os, time
from gpurun import Skip

def fails():
    raise ValueError("as it may")

def skips():
    raise Skip("not here")

def units(setting):
    print("printed by a unit's module")
    hang = lambda: time.sleep(1000)
    die = lambda: os._exit(3)
    found = {"first": lambda: {"found": 1}, "die": die, "fails": fails, "hang": hang, "skips": skips}
    return {**found, "last": lambda: None}
"""


def pool_of(tmp_path, jobs, source=UNITS, limit=3.0, done=lambda unit: False):
    from gpurun import Setting
    from gpurun.pool import Pool, Step
    from gpurun.results import Results

    (tmp_path / "some_units.py").write_text(source)
    path = os.pathsep.join([str(BENCHMARKS), str(tmp_path)])
    step = Step("some", jobs, limit, 1.0, module="some_units")
    results = Results(tmp_path / "out")
    return Pool(step, Setting("cpu", True), results, {**os.environ, "PYTHONPATH": path}, done), results


@pytest.mark.parametrize("jobs", (1, 3))
def test_one_that_hangs_or_dies_costs_its_own_result_alone(tmp_path, jobs):
    pool, results = pool_of(tmp_path, jobs)
    now = time.monotonic()
    assert pool.run(now + HANG, now + HANG) == 0
    found = {row["unit"]: row for row in results.rows}
    assert found["first"]["status"] == "ok" and found["first"]["found"] == 1 and found["last"]["status"] == "ok"
    assert found["skips"]["status"] == "skipped" and found["skips"]["error"] == "not here"
    assert found["fails"]["error"] == "ValueError: as it may" and "some_units.py:6" in found["fails"]["at"]
    assert found["hang"]["status"] == "failed" and "not done after 3 s" in found["hang"]["error"]
    assert found["die"]["status"] == "failed" and "ended with 3" in found["die"]["error"]
    assert len(results.rows) == 6


def test_what_processes_say_does_not_grow_for_ever(tmp_path, monkeypatch):
    """Within a step, too: a compiler may say much."""
    from gpurun import pool as gpurun_pool

    monkeypatch.setattr(gpurun_pool, "MOST_LOG", 10_000)
    chatty = 'found = {"first": lambda: print("word " * 4000), "more": lambda: print("word " * 4000), "die": die}\n'
    pool, results = pool_of(tmp_path, 1, UNITS.partition("    found = ")[0] + f"    {chatty}    return found\n")
    now = time.monotonic()
    pool.run(now + HANG, now + HANG)
    assert [row["status"] for row in results.rows] == ["ok", "ok", "failed"]
    assert (tmp_path / "out/log.txt").stat().st_size <= 10_000
    assert "ended with 3" in results.rows[-1]["error"]


def test_when_the_time_is_up_what_runs_has_no_row(tmp_path):
    pool, results = pool_of(tmp_path, 1, UNITS.replace('"first": lambda: {"found": 1}, ', '"first": hang, '), HANG)
    now = time.monotonic()
    left = pool.run(now + HANG, now + 3)
    assert time.monotonic() - now < HANG / 2
    assert results.rows == [] and left == 5


def test_a_step_whose_share_is_over_starts_nothing_more(tmp_path):
    pool, results = pool_of(tmp_path, 1)
    now = time.monotonic()
    assert pool.run(now, now + HANG) > 0
    assert results.rows == []


def test_a_step_of_which_nothing_is_left_does_not_start(tmp_path):
    """Its processes take seconds until they have their units."""
    from gpurun import Setting
    from gpurun.pool import Pool
    from gpurun.results import UNITS, Results, units_in

    pool, results = pool_of(tmp_path, 1, "units = lambda setting: {'one': lambda: None}")
    end = time.monotonic() + HANG
    assert pool.run(end, end) == 0
    again = Results(results.folder, results.folder)
    second = Pool(pool.step, Setting("cpu", True), again, {}, lambda unit: again.is_done("some", unit))
    second.start = lambda: pytest.fail("a process was started")
    assert second.run(end, end) == 0
    second.done = lambda unit: False
    with pytest.raises(pytest.fail.Exception):
        second.run(end, end)
    for text in ('{"source": "older", "units": {"some": ["one"]}}', '{"sour'):
        (results.folder / UNITS).write_text(text)
        assert units_in(results.folder) == {}


def test_a_step_that_does_not_start_says_why(tmp_path):
    pool, results = pool_of(tmp_path, 2, "raise ImportError('no such thing')")
    now = time.monotonic()
    pool.run(now + HANG, now + HANG)
    assert 1 <= len(results.rows) <= 3
    for row in results.rows:
        assert row["unit"] == "(start)" and row["status"] == "failed" and "no such thing" in row["error"]


# ---- rows -----------------------------------------------------------------------------------------------------------


def row(unit, status="ok", **values):
    return {"step": "some", "unit": unit, "status": status, **values}


def test_rows_are_read_again_by_the_next_run(tmp_path):
    from gpurun.results import FILE, Results

    first = Results(tmp_path)
    first.add(row("a"))
    first.add(row("b", "failed"))
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"step": "some", "un')
    second = Results(tmp_path / "elsewhere", tmp_path)
    second.add(row("c", "skipped"))
    assert [r["unit"] for r in rows_of(tmp_path / "elsewhere")] == ["a", "b", "c"]
    assert all(second.is_done("some", unit) for unit in "abc") and not second.is_done("some", "d")


def test_what_failed_is_tried_again_once_the_sources_have_changed(tmp_path):
    from gpurun.results import FILE, Results

    rows = [row("passed", source="older"), row("failed", "failed", source="older")]
    (tmp_path / FILE).write_text("".join(json.dumps(r) + "\n" for r in rows))
    results = Results(tmp_path, tmp_path)
    assert results.is_done("some", "passed") and not results.is_done("some", "failed")
    results.add(row("failed", "failed"))
    assert results.is_done("some", "failed")


def test_options(tmp_path, capsys):
    import first_gpu

    (tmp_path / "results.jsonl").touch()
    for arguments, message in (
        ([], "must name a folder"),
        (["--out", str(tmp_path)], "has the results of a run"),
        (["--resume", str(tmp_path / "none")], "has no results.jsonl"),
        (["--out", "x", "--steps", "models,other"], "got other"),
    ):
        with pytest.raises(SystemExit):
            first_gpu.parse(arguments)
        assert message in capsys.readouterr().err
    assert first_gpu.parse(["--resume", str(tmp_path)]).out == tmp_path
