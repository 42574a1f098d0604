"""The GPU benchmark runs (here on the CPU, at tiny shapes) and counts right; the roofline page is that of the table."""

import csv
import math
import os
import subprocess
import sys

import pytest
import torch

from zeroblock.backends.cuda import CUDA

from ..cuda.simt import emulated
from ..support import BENCHMARKS, HANG

pytestmark = [pytest.mark.slow, pytest.mark.one_worker]


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu

        yield gpu
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def roofline(gpu):
    import roofline

    return roofline


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    options = ["--quick", "--device", "cpu", "--baselines", "eager", "--rounds", "3", "--out", str(out)]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, cwd=out, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*/gpu.csv")
    return list(csv.DictReader(path.open(newline="")))


def test_tokens_of_a_gpus_size(gpu):
    """FLUX's and a video's, for every form of a modulation."""
    from zbench import ops

    found = {case.id for case in gpu.make_cases(quick=False)}
    assert {f"memory_bound/{op}-1x27280x3072-bf16-{mode}" for op in ops.TOKEN_OPS for mode in ops.MODES} <= found
    assert len(ops.TOKEN_OPS) >= 12


def test_every_case_is_measured(rows, gpu):
    assert [row["case"] for row in rows] == [case.id for case in gpu.make_cases(quick=True)]
    for row in rows:
        assert tuple(row) == gpu.COLUMNS
        for name in ("eager", "zeroblock", "ratio", "lo", "hi", "copy_gb_s", "matmul_tflop_s"):
            assert math.isfinite(float(row[name])) and float(row[name]) > 0, (row["case"], name)
        assert int(row["sets"]) >= 2 and row["timer"] == "wall"
        memory = row["group"] == "memory_bound"
        assert bool(row["bytes"]) == bool(row["copy_percent"]) == memory
        assert bool(row["flops"]) != memory and bool(row["matmul_percent"]) == (row["group"] == "dense")


def test_rates_follow_from_bytes_and_flops(rows):
    """gate_residual at 2x4x64 in fp32: three activations of 512 numbers; a training step of a block: three times its
    forward's products, less what is not differentiated."""
    by_case = {row["case"]: row for row in rows}
    gate = by_case["memory_bound/gate_residual-2x4x64-fp32-inference"]
    assert float(gate["bytes"]) == 3 * 2 * 4 * 64 * 4
    rate = float(gate["bytes"]) / float(gate["zeroblock"]) / 1e3
    assert float(gate["gb_s"]) == pytest.approx(rate, rel=1e-4)
    assert float(gate["copy_percent"]) == pytest.approx(100 * rate / float(gate["copy_gb_s"]), rel=1e-4)
    block = "dense/dit_block-2x4x64-fp32-"
    forward, training = (float(by_case[block + mode]["flops"]) for mode in ("inference", "training"))
    assert 2.9 * forward <= training <= 3.001 * forward


def test_samples_are_per_call(gpu, monkeypatch):
    clock = iter((10.0, 10.006))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    calls = []
    assert gpu.Replay([lambda: calls.append(1), lambda: calls.append(2)], "cpu").sample() == pytest.approx(3000)
    assert calls == [1, 2]


def test_options(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    for arguments, message in ((["--quick"], "need --out"), (["--out", "x"], "no GPU")):
        with pytest.raises(SystemExit):
            gpu.parse(arguments)
        assert message in capsys.readouterr().err


def test_roofline_page_is_current(roofline):
    pytest.importorskip("triton")
    page = roofline.PAGE.read_text()
    assert page == roofline.render(), "run python benchmarks/roofline.py"
    assert "**Model, not measured.**" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[1:2] in (["Triton"], ["CUDA"])]
    found = {row[0] for row in rows if row[1] == "Triton"}
    assert found == {f"{gpu.name} ({gpu.target})" for gpu in roofline.GPUS}
    assert {gpu.target for gpu in roofline.GPUS} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    for row in rows:
        assert row[4] == "0" and (row[8:] == ["", "", "the products bind"] or all(row[8:])), row


def test_launches_of_the_cuda_kernels_are_those_of_the_page(roofline):
    """The table of the page says them; the emulator counts them, for the norms of rows and gates."""
    if (reason := emulated.missing()) is not None:
        pytest.skip(reason)
    x, v, stats = torch.empty(4, 256, 1152).bfloat16(), torch.empty(4, 1152).bfloat16(), torch.empty(4, 256)
    calls = {
        "layer_norm_modulate": lambda: CUDA.layer_norm_modulate(x, v, v, None, None, 1e-6, False),
        "layer_norm_modulate backward": lambda: CUDA.layer_norm_modulate_bwd(
            x, x, stats, stats, v, v, None, None, False
        ),
        "gate_residual": lambda: CUDA.gate_residual(x, v, x),
        "gate_residual backward": lambda: CUDA.gate_residual_bwd(x, v, x, True, True),
        "zero_flag of a zero weight": lambda: CUDA.are_zero([x]),
    }
    kernels = {kernel.op: kernel for kernel in roofline.KERNELS}
    with emulated.emulated(), emulated.gpu(*emulated.GPUS["sm_90"]):
        found = {op: len(emulated.recorded(call)) for op, call in calls.items()}
    assert found == {op: kernels[op].cuda.launches for op in calls}


def test_what_a_kernel_can_use(roofline):
    """By hand: 25.5 KB of an H200's multiprocessor, of which a kernel that reads half needs 12.7."""
    h200 = next(gpu for gpu in roofline.GPUS if gpu.name == "H200 SXM")
    assert h200.needed(1.0) == pytest.approx(4800 * 700 / 132 / 1000)
    full = roofline.Use(block_kb=4, ahead=True, blocks=4, programs=4 * 132, reads=0.5, moved=1, partials=0, sectors=1)
    assert full.in_flight(h200) == 16 and full.expected(h200) == (0.92, "what a copy loses")
    share, loss = full._replace(ahead=False).expected(h200)
    assert loss == "few bytes in flight" and share == pytest.approx(0.92 * 8 / h200.needed(0.5))
    for change, loss, factor in (
        ({"moved": 1.5}, "a second read", 1 / 1.5),
        ({"partials": 0.25}, "partial sums", 0.8),
        ({"sectors": 2.0}, "cut sectors", 0.5),
        ({"programs": 66, "block_kb": 100}, "idle multiprocessors", 0.5),
    ):
        assert full._replace(**change).expected(h200) == (pytest.approx(0.92 * factor), loss), change


def test_bounds(roofline):
    kernels = {kernel.op: kernel for kernel in roofline.KERNELS}
    gate, conv, zero = (kernels[op] for op in ("gate_residual", "conv_residual 3x3", "conv_residual 3x3, weight zero"))
    h100 = next(gpu for gpu in roofline.GPUS if gpu.name == "H100 SXM")
    size, flops = roofline.work(gate, (32, 256, 1152))
    assert (size, flops) == (2 * 3 * 32 * 256 * 1152, 0)
    time, by = roofline.bound(size, flops, h100)
    assert by == "memory" and time == pytest.approx(size / 3350e9 * 1e6)
    shape = (8, 640, 32, 32)
    size, flops = roofline.work(conv, shape)
    assert flops == 2 * 9 * 640 * 640 * 8 * 32 * 32
    assert roofline.bound(size, flops, h100) == (pytest.approx(flops / 989e12 * 1e6), "products")
    assert roofline.work(zero, shape) == (2 * 2 * 8 * 640 * 32 * 32, 0)
