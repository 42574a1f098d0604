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


# What a zero block starts: the kernels with a flag, where one was seen zero, and the test that finds it so.
HEADLINES = """
from gpurun import cache
from zbench import headlines
zero = [case for case in headlines.cases(True) if case.group == "zero" and case.mode == "training"]
with cache.meta_goes_as_a_gpu():
    for case in zero:
        found = list(cache.of_headlines([case]))
        looks = [one for one in found if "zero_flag" in one.kernel.__module__]
        print(case.op, len(looks), sum(one.arguments.get("flag") is not None for one in found), len(found))
"""


def recorded(script: str) -> list[list[str]]:
    """The words that a script prints, which records launches in a process of its own: it changes what meta tensors
    are."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("index", (0, 1, 10))
def test_launches_are_recorded_without_a_gpu(index):
    """A measured plan starts more than one way."""
    counts = dict(recorded(RECORD.format(index=index)))
    assert 1 <= int(counts["triton"]) < int(counts["measured"])


def test_both_plans_of_a_zero_block_are_recorded():
    """The dense one, which looks at the weight, and the flagged one, which follows where that was zero."""
    lines = recorded(HEADLINES)
    assert {name for name, *_ in lines} == {"resblock", "dit_block"}
    for name, looks, flagged, every in lines:
        assert 0 < int(looks) < int(every) and 0 < int(flagged) < int(every), name


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


@pytest.mark.parametrize(
    ("tree", "carried", "found"),
    [
        ("sm_80 sm_90", None, "of the tree"),
        ("sm_80 sm_90", "sm_90", "of the tree"),
        ("sm_80", "sm_90", "carried"),
        (None, "sm_90", "carried"),
        (None, "sm_80", "built here"),
        ("sm_80", None, "built here"),
    ],
)
def test_the_extension_is_the_one_that_has_the_architecture(tree, carried, found, tmp_path, monkeypatch):
    """Of an sm_90: files stand for extensions, and hold what they were built for."""
    from gpurun import Setting, parts

    places = {"BUILT": tree, "CARRIED": carried}
    for name, archs in places.items():
        path = tmp_path / name
        monkeypatch.setattr(parts, name, path)
        if archs is not None:
            path.write_text(archs)
    told = lambda: (None, parts.BUILT.read_text()) if parts.BUILT.exists() else ("it was not built", "")  # noqa: E731
    monkeypatch.setattr(parts, "told", told)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def build(command, env, **options):
        assert "build_ext" in command and env["TORCH_CUDA_ARCH_LIST"] == "9.0"
        parts.BUILT.write_text("sm_90")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(parts.subprocess, "run", build)
    assert parts.extension(Setting("cuda", False))["extension"] == found
    assert "sm_90" in parts.BUILT.read_text()
