"""The build matrix: with nvcc, without, with a CPU-only torch. Each wheel imports and `zb.info` tells the truth."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from zeroblock.backends.cuda import CUDA

from ..support import ROOT
from .simt import emulated, static

pytestmark = pytest.mark.one_worker

NEEDED = None
if torch.version.cuda is None:
    NEEDED = "this torch was built without CUDA"
elif static.nvcc() is None:
    NEEDED = "nvcc is not installed"
needs_nvcc = pytest.mark.skipif(NEEDED is not None, reason=str(NEEDED))


def _source(target):
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources. Builds one after another keep the objects that they have in common."""
    return _source(tmp_path_factory.mktemp("source"))


def _wheel(source, tmp_path, **env):
    """What the build printed, and where its wheel is unpacked. What is built matters here, not how fast it runs."""
    site = tmp_path / "site"
    env = {"CXXFLAGS": "-O1", "NVCC_APPEND_FLAGS": "-Xcicc -O1 -Xptxas -O1", **env}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--verbose",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
        ".",
    ]
    done = subprocess.run(command, cwd=source, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    return done.stdout + done.stderr, site


def _ask(site, code):
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=site, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


TELL = (
    "import torch, zeroblock as zb; print(zb.info());"
    "print(zb.explain('group_norm_silu', torch.randn(2, 64, 5, 5), 32));"
    "print(zb.group_norm_silu(torch.randn(2, 64, 5, 5), 32).isfinite().all().item())"
)


@pytest.mark.slow
@needs_nvcc
def test_with_nvcc_the_wheel_holds_the_kernels(source, tmp_path):
    _, site = _wheel(source, tmp_path, ZEROBLOCK_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0")
    told = _ask(site, TELL)
    library = next((site / "zeroblock").glob("_C*.so"))
    listed = subprocess.run([static.disassembler(), "-lelf", library], capture_output=True, text=True).stdout
    assert "sm_80.cubin" in listed and "sm_90" not in listed
    assert "libcudart" not in subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    assert "cuda kernels: built for sm_80" in told and told.endswith("True\n")
    if not torch.cuda.is_available():
        assert "no GPU is visible" in told and "cuda is not used: the tensor is on cpu" in told


@pytest.mark.slow
def test_without_nvcc_the_wheel_says_so(source, tmp_path):
    printed, site = _wheel(source, tmp_path, ZEROBLOCK_BUILD_CUDA="auto", CUDA_HOME=str(tmp_path))
    assert "no CUDA kernels are built, because" in printed and "nvcc was not found" in printed
    told = _ask(site, TELL)
    assert "cuda kernels: the extension was built without CUDA kernels" in told and told.endswith("True\n")
    assert "cuda is not used: the extension was built without CUDA kernels" in told


def test_asking_without_nvcc_names_what_is_missing(source, tmp_path):
    env = {**os.environ, "ZEROBLOCK_BUILD_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext"],
        cwd=source,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "ZEROBLOCK_BUILD_CUDA=1, but" in done.stderr and "nvcc was not found" in done.stderr
    assert ("torch was built without CUDA" in done.stderr) == (torch.version.cuda is None)


@needs_nvcc
@pytest.mark.parametrize(("archs", "message"), [("7.5", "8.0 or later"), ("hopper", "such as 8.0")])
def test_an_architecture_that_cannot_be_is_refused(source, archs, message):
    env = {**os.environ, "ZEROBLOCK_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": archs}
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext"],
        cwd=source,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
@pytest.mark.parametrize(
    "op", ("zero_flag", "group_norm_silu", "layer_norm_modulate", "gate_residual", "conv_residual")
)
def test_a_launch_error_is_an_exception_with_the_name_of_the_op(op):
    x, image = torch.randn(2, 3, 16), torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)
    calls = {
        "zero_flag": lambda: CUDA.are_zero([x]),
        "group_norm_silu": lambda: CUDA.group_norm_silu(x, 3, None, None, 1e-5, None, None, True),
        "layer_norm_modulate": lambda: CUDA.layer_norm_modulate(x, None, None, None, None, 1e-6, False),
        "gate_residual": lambda: CUDA.gate_residual(x, x[0, 0], x),
        "conv_residual": lambda: CUDA.conv_and_statistics(image, image.new_zeros(8, 8, 1, 1), None, None),
    }
    with emulated.emulated(), emulated.refusing(), pytest.raises(RuntimeError, match=f"{op}: the CUDA kernel was not"):
        calls[op]()
