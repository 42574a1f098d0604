"""What a launch of the CUDA kernels asks the runtime for, each question a microsecond of the host's: the device alone,
once the answers are known."""

import os
import subprocess
from pathlib import Path

import pytest

from ..support import HANG, ROOT
from .simt import static

SOURCES = [str(Path(__file__).with_name(name)) for name in ("host_calls.cu", "host_runtime.cpp")]
DEVICE = ["cudaGetDevice"] * 3  # for the limit of shared memory, of clusters, and for what the kernel may take
pytestmark = [pytest.mark.slow, pytest.mark.skipif(static.nvcc() is None, reason="nvcc is not installed")]


def test_a_launch_asks_for_nothing_that_it_knows(tmp_path):
    nvcc, program = Path(str(static.nvcc())).resolve(), tmp_path / "calls"
    include = ROOT / "csrc/cuda"
    static.run(str(nvcc), "-std=c++17", "-cudart=shared", f"-I{include}", *SOURCES, "-o", str(program))
    env = {**os.environ, "LD_LIBRARY_PATH": str(nvcc.parent.parent / "lib64")}
    done = subprocess.run([program], capture_output=True, text=True, timeout=HANG, env=env, check=True)
    first, second, third, other, less, more = (line.split() for line in done.stdout.splitlines())
    asked = {"cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaFuncSetAttribute"}
    assert set(first) == set(other) == asked | {"cudaGetDevice"} and len(first) == len(other) == 7
    assert second == third == less == DEVICE
    assert more == [*DEVICE, "cudaFuncSetAttribute"]
