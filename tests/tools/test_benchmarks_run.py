"""What the benchmarks compare with and count: baselines in both layouts, limits of scaling, memory of processes."""

import csv
import ctypes
import signal
import subprocess
import sys
import time

import pytest
import torch

from ..support import BENCHMARKS, HANG

pytestmark = pytest.mark.slow

LONG = 60.0  # seconds of a compilation that is given up: longer than a busy machine takes to do so


@pytest.fixture
def run(benchmark_path):
    import run

    return run


def test_a_compilation_that_takes_too_long_is_left_out(run, benchmark_path, capsys):
    from zbench.candidates import compiled_candidates
    from zbench.case import Side

    class Slow(Side):
        def compiled(self, **options):
            if "mode" in options:
                time.sleep(HANG)
            return self

    case = next(run.make_cases("dense", True))
    found = compiled_candidates(case, Slow(lambda: None, (), ()), ("compile", "max_autotune"), 2)
    assert [candidate.name for candidate in found] == ["compile"]
    assert "max_autotune failed: not done after 2 s" in capsys.readouterr().out
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_all_baselines_are_tried_in_both_layouts(run, benchmark_path, monkeypatch):
    from zbench.candidates import BASELINES, COMPILED, Candidate, baseline_candidates
    from zbench.case import Side
    from zbench.rows import time_columns

    seen = []

    def compiled(side, **options):
        seen.append((side.inputs[0].is_contiguous(), next(side.function.parameters()).shape, options))
        return side

    monkeypatch.setattr(Side, "compiled", compiled)
    case = next(run.make_cases("frozen", True))
    work = case.work()
    with torch.no_grad():
        found = baseline_candidates(case, work.eager, BASELINES["all"], HANG)
        results = [candidate.step() for candidate in found]
    names = ["eager", *COMPILED]
    assert [(c.name, c.other_layout) for c in found] == [(n, other) for other in (False, True) for n in names]
    assert [contiguous for contiguous, _, _ in seen] == [True] * 4 + [False] * 4
    assert [options for _, _, options in seen] == [*COMPILED.values()] * 2
    for y in results[5:]:
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, results[0])
    times = {candidate.label: [4.0] * 5 for candidate in found}
    assert len(times) == 10
    times |= {"freezing other layout": [2.0] * 5, "zeroblock": [1.0] * 5}
    row = time_columns(timing_of(times), [*found, Candidate("zeroblock", results.copy)])
    assert (row["ratio"], row["best_all"], row["ratio_all"], row["lo_all"]) == (4.0, "freezing other layout", 2.0, 2.0)
    assert row["other_layout"] == 2.0 and not any(name.endswith(" other layout") for name in row)


def timing_of(times):
    from zeroblock.testing.timing import Timing

    return Timing(times, {name: [True] * len(values) for name, values in times.items()})


def test_reduced_precision_lasts_as_long_as_its_case(run):
    from zbench.case import HIGH

    high = next(case for case in run.make_cases("dense", True) if case.dtype == HIGH)
    before = torch.get_float32_matmul_precision()
    with run.precision(high):
        assert torch.get_float32_matmul_precision() == "high" and high.torch_dtype is torch.float32
    assert torch.get_float32_matmul_precision() == before


def test_the_most_memory_is_that_of_memory_given_back_too():
    code = (
        "import torch; from zbench.peak import most_resident; before = most_resident();"
        "torch.ones(1 << 26); print(most_resident() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    assert 0.9 * (1 << 28) < int(done.stdout) < 1.5 * (1 << 28)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this libc does not tell what malloc gave out")
def test_the_holders_of_memory_are_named():
    command = [sys.executable, "-m", "zbench.holders", "dit_s2", "zeroblock", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    sizes = {line.split("  ")[-1]: float(line.split()[0]) for line in done.stdout.splitlines()}
    tensors = sizes["tensors at the peak"]
    assert 0 < tensors and 0 < sizes["the parameters' gradients, all of them"] < tensors + 1
    assert abs(sum(size for what, size in sizes.items() if " < " in what) - tensors) < 0.3 * tensors + 0.2


def test_the_scaling_run_writes_every_point(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--quick", "--threads", "1,2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/scaling.csv")
    rows = list(csv.DictReader(path.open(newline="")))
    assert len(rows) == 2 * 2 * 4 * 2  # blocks, modes, axes, values
    for row in rows:
        assert all(float(row[name]) > 0 for name in ("eager", "zeroblock", "flop_limit", "bandwidth_limit")), row
    assert all(p.stat().st_size > 5000 for p in path.parent.glob("scaling-*.png"))
    assert len(list(path.parent.glob("scaling-*.png"))) == 2


def test_two_installations_are_compared_call_by_call(benchmark_path):
    import overhead

    command = [sys.executable, overhead.__file__, "--against", sys.executable, "--rounds", "1", "--seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows, last = done.stdout.splitlines()
    assert header.startswith("us per call") and last.startswith("more than 2% slower: ")
    names = [
        f"{name}, {mode}" for name in {**overhead.ops(), **overhead.blocks()} for mode in ("inference", "training")
    ]
    names += [f"{name}, inference" for name in overhead.frozen()]
    assert len(rows) == len(names) == 30
    for row, name in zip(rows, names, strict=True):
        there, here = row.removeprefix(name).split()[:2]
        assert row.startswith(name) and float(there) > 0 and float(here) > 0


def test_the_limits_count_the_work_by_hand(benchmark_path):
    import scaling

    point = scaling.Point("resblock", 2, 32, 4, 1)
    pixels, width, emb = 2 * 16, 32, 512
    convs, film = 2 * 2 * pixels * 9 * width * width, 2 * 2 * emb * 2 * width
    activations = 4 * pixels * width
    weights = 4 * (2 * (9 * width * width + width) + 4 * width + (emb + 1) * 2 * width)
    flops, moved = scaling.count(point.work("inference").eager, "inference")
    assert (flops, moved) == (convs + film, 2 * activations + 4 * 2 * emb + weights)
    flops, moved = scaling.count(point.work("training").eager, "training")
    assert (flops, moved) == (3 * (convs + film), 5 * activations + 3 * (4 * 2 * emb + weights))
