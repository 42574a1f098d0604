"""What is prepared for a GPU machine: launches are recorded without a GPU, and compiled kernels are found elsewhere."""

import os
import subprocess
import sys

import pytest
import torch

from ..support import BENCHMARKS

pytestmark = [pytest.mark.one_worker, pytest.mark.usefixtures("benchmark_path")]


@pytest.mark.parametrize("offset", (0, 1, 4, 7))
def test_meta_tensors_lie_as_the_tensors_do(offset):
    from gpurun.checks import as_meta

    t = torch.empty(64, dtype=torch.bfloat16)[offset:].as_strided((3, 4), (13, 2), offset)
    meta = as_meta(t)
    assert meta.shape == t.shape and meta.stride() == t.stride() and meta.data_ptr() % 16 == t.data_ptr() % 16


RECORD = """
from gpurun import cache, checks
from zeroblock.kernels import _launch
import torch
case, layout = checks.firsts()[{index}]
with cache.meta_goes_as_a_gpu():
    for chosen in ("triton", checks.MEASURED):
        check = checks.Check(case, layout, torch.bfloat16, chosen)
        with checks.chosen(check, "meta"), _launch.recording(run=False) as launches:
            checks.call(check, "meta")
        print(chosen, len(cache.distinct(iter(launches))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("index", (0, 1, 8))
def test_launches_are_recorded_without_a_gpu(index):
    """In a process of its own, which changes what meta tensors are; a measured plan starts more than one way."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)])
    done = subprocess.run(
        [sys.executable, "-c", RECORD.format(index=index)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert 1 <= int(counts["triton"]) < int(counts["measured"])


@pytest.mark.slow
def test_an_archive_of_kernels_is_found_elsewhere(tmp_path):
    """Unpacked to another folder, Triton's JIT finds what it would compile."""
    pytest.importorskip("triton")
    from gpurun.parts import kernels, unpack

    archive, again = tmp_path / "kernels.tar.gz", tmp_path / "again.tar.gz"
    path = os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)])
    make = [sys.executable, "-m", "gpurun.cache", "--kernels-only", "--most", "2", "--jobs", "1"]

    def run(folder, target):
        arguments = ["--folder", str(folder), "--archive", str(target)]
        done = subprocess.run(
            [*make, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(tmp_path / "here", archive)
    unpack(archive, tmp_path / "there")
    assert kernels(tmp_path / "there") == 2
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "there").rglob("*"))
    assert "2 kernels, 0 new" in run(tmp_path / "there", again)
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "there").rglob("*")) == before
