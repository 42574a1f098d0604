"""The committed facts of the nvcc build (simt/static.csv): complete, without faults, of these sources."""

import subprocess
import sys

import pytest

from ..support import ROOT
from .simt import emulated, static

pytestmark = [pytest.mark.slow, pytest.mark.one_worker]

ROWS = static.read()
NEEDED = None
if static.nvcc() is None or static.disassembler() is None:
    NEEDED = "nvcc and cuobjdump are not installed"
elif emulated.missing() is not None:
    NEEDED = emulated.missing()


def test_every_kernel_stays_in_registers_and_loads_wide():
    assert {row["target"] for row in ROWS} == set(static.TARGETS)
    assert [text for row in ROWS for text in static.problems(row)] == []


def test_shipped_shapes_fit_with_their_shared_memory():
    placed = [row for row in ROWS if row["threads"]]
    assert len({row["kernel"] for row in placed}) >= 20
    assert all(int(row["blocks"]) >= 1 for row in placed)


def test_two_blocks_of_the_convolution_are_resident():
    """At no more than 128 registers, with the shared memory of a U-Net's stages."""
    rows = [row for row in ROWS if row["kernel"].startswith("conv_residual_kernel")]
    assert len(rows) == 8 * len(static.TARGETS) and max(int(row["registers"]) for row in rows) <= 128
    placed = [row for row in rows if row["threads"]]
    assert len(placed) == 4 * len(static.TARGETS)
    assert {row["blocks"] for row in placed if row["target"] != "sm_120"} == {"2"}  # which has 100 KB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": "8"}, "8 bytes of stack"),
        ({"blocks": "0"}, "not one block fits"),
        ({"LDG.128": "0", "LDGSTS": "0"}, "no 16-byte loads"),
        ({"HMMA": "0"}, "no tensor-core instructions"),
        ({"UCGABAR": "0"}, "no barrier of the cluster"),
    ],
)
def test_the_judgement_can_fail(change, message):
    kernels = {"LDG.128": "gate_residual_fwd_kernel<bf16,8", "UCGABAR": "group_norm_silu_fwd_kernel<bf16,8,true,3"}
    kernel = kernels.get(next(iter(change)), "conv_residual_kernel<bf16")
    row = next(row for row in ROWS if row["kernel"].startswith(kernel))
    found = static.problems({**row, **change})
    assert len(found) == 1 and message in found[0]


def test_clusters_are_compiled_for_sm_90_and_later_alone():
    clustered = [row for row in ROWS if static.is_clustered(row)]
    assert {row["target"] for row in clustered} == {"sm_90", "sm_100", "sm_120"}
    launched = [int(row["cluster"]) for row in clustered if row["threads"]]
    assert len(launched) == 11 and min(launched) > 1


ROW_NORM_BWD = {"false": (2, 2), "true": (4, 1)}  # gate: tensors read, rows ahead (csrc/cuda/row_norm_bwd.cu)


def test_backward_of_row_norms_takes_few_registers():
    rows = [row for row in ROWS if row["kernel"].startswith("row_norm_bwd_kernel")]
    assert len(rows) == 12 * len(static.TARGETS) and max(int(row["registers"]) for row in rows) <= 84


@pytest.mark.skipif(NEEDED is not None, reason=str(NEEDED))
@pytest.mark.parametrize("gate", ROW_NORM_BWD)
@pytest.mark.parametrize("D", (1152, 3072))
def test_backward_of_row_norms_has_25_kb_in_flight(D, gate):
    """Per multiprocessor, while a block reduces: resident blocks, or those of a launch, x rows ahead x bytes of a row;
    what an A100 needs (2039 GB/s / 108 x 600 ns) is half of it. A model, not measured."""
    import torch

    from zeroblock.backends.cuda import CUDA

    x, v, stats = torch.empty(8, 1024, D).bfloat16(), torch.empty(8, D).bfloat16(), torch.empty(8, 1024)
    call = {
        "false": lambda: CUDA.layer_norm_modulate_bwd(x, x, stats, stats, v, v, None, None, False),
        "true": lambda: CUDA.gate_residual_layer_norm_modulate_bwd(x, x, x, stats, stats, v, x, v, v),
    }[gate]
    tensors, ahead = ROW_NORM_BWD[gate]
    for target, processors in (("sm_80", 108), ("sm_90", 132), ("sm_100", 148), ("sm_120", 170)):
        with emulated.emulated(), emulated.gpu(*emulated.GPUS[target]):
            threads, shared, _ = emulated.recorded(call)[0]
        assert threads >= D // 8 and shared >= threads * 16 * tensors * (ahead + 1)
        wanted = f"row_norm_bwd_kernel<bf16,8,{gate}>", target
        (row,) = (row for row in ROWS if (row["kernel"], row["target"]) == wanted)
        resident = static.resident(target, threads, int(row["registers"]), shared + int(row["static_shared"]))
        blocks = min(resident, 448 / processors)  # kRowNormBlocks
        needed = {"sm_80": 12_000, "sm_120": 6_300}.get(target, 25_000)  # 1792 GB/s / 170 x 600 ns
        assert blocks * ahead * tensors * 2 * D >= needed, (target, threads, shared, resident)


@pytest.mark.skipif(NEEDED is not None, reason=str(NEEDED))
def test_the_table_is_of_these_sources():
    command = [sys.executable, "-m", "tests.cuda.simt.static", "--check", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
