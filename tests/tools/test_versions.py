"""Which torch and triton the package runs on, and what it says of others."""

import subprocess
import sys

import pytest

from zeroblock.kernels._torch import OLDEST, OLDEST_NATIVE, VERSION

from ..support import ROOT


def run(code, cwd):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("version", ("2.6.1+cu124", "1.13.0"))
def test_a_torch_that_is_too_old_is_named(version, tmp_path):
    code = f"import torch; torch.__version__ = {version!r}; import zeroblock"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f"zeroblock needs torch 2.7 or newer, and this is torch {version}" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("ImportError")


def test_setup_and_package_agree_on_the_oldest_torch():
    text = (ROOT / "setup.py").read_text()
    (first, minor), encoded = OLDEST_NATIVE, f"0x{OLDEST_NATIVE[0]:02x}{OLDEST_NATIVE[1]:02x}000000000000"
    assert f'OLDEST_TORCH, TORCH_TARGET_VERSION = ({first}, {minor}), "{encoded}"' in text
    assert f'dependencies = ["torch>={OLDEST[0]}.{OLDEST[1]}"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(VERSION < OLDEST_NATIVE, reason="this torch is: all tests run without it")
def test_a_torch_too_old_for_the_extension_runs_without_it(tmp_path):
    code = (
        "import torch; torch.__version__ = '2.9.1'; import zeroblock as zb; print(zb.info());"
        "print(zb.group_norm_silu(torch.randn(2, 64, 5, 5), 32).isfinite().all().item())"
    )
    printed = run(code, tmp_path)
    assert printed.count("the extension zeroblock._C needs torch 2.10 or newer") == 2 and printed.endswith("True\n")


def test_a_triton_that_is_too_old_is_named(tmp_path):
    """info() and explain() say so, and the calls run."""
    pytest.importorskip("triton")
    code = (
        "import triton; triton.__version__ = '3.2.0'; import zeroblock as zb, torch; print(zb.info());"
        "print(zb.explain('group_norm_silu', torch.randn(2, 64, 5, 5), 32))"
    )
    assert run(code, tmp_path).count("the kernels need triton 3.3 or newer") == 2
