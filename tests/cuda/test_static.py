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
    assert {row["target"] for row in clustered} == {"sm_90", "sm_100"}
    launched = [int(row["cluster"]) for row in clustered if row["threads"]]
    assert len(launched) == 8 and min(launched) > 1


@pytest.mark.skipif(NEEDED is not None, reason=str(NEEDED))
def test_the_table_is_of_these_sources():
    command = [sys.executable, "-m", "tests.cuda.simt.static", "--check", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
