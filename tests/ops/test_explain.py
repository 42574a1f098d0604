"""Which backend runs: what explain says is what ran; how the environment forces one; without the extension."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zeroblock as zb
from zeroblock import testing
from zeroblock.backends.reference import REFERENCE
from zeroblock.backends.select import CPU

from ..support import ROOT
from .op_calls import BF16, F16, F32, F64, forward_calls, maker, public_call

FORWARD = tuple(op for op in forward_calls(maker(F32, "contiguous")) if hasattr(zb, op))  # under names of their own


NATIVE = pytest.mark.skipif(testing.CPU_MISSING is not None, reason=f"the native kernels: {testing.CPU_MISSING}")


@NATIVE
@pytest.mark.parametrize("op", FORWARD)
def test_explain_names_the_backend_that_runs(op, monkeypatch):
    calls = []
    for primitives in (CPU, REFERENCE):
        for name in (
            "group_norm_silu",
            "layer_norm_modulate",
            "gate_residual",
            "gate_residual_layer_norm_modulate",
            "residual_norm_modulate",
            "activation",
            "is_zero",
        ):
            original = getattr(primitives, name)
            record = lambda *a, p=primitives, f=original: (calls.append(p.name), f(*a))[1]  # noqa: E731
            monkeypatch.setattr(primitives, name, record)
    for dtype, forced, expected, reason in (
        (F32, "auto", "cpu", None),
        (BF16, "auto", "cpu", None),
        (F16, "cpu", "cpu", None),
        (F64, "auto", "reference", "float64"),
        (F64, "cpu", "reference", "float64"),
        (F32, "reference", "reference", "forced"),
    ):
        args, kwargs = public_call(op, dtype)
        with testing.use_backend(forced):
            explanation = zb.explain(op, *args, **kwargs)
            calls.clear()
            getattr(zb, op)(*args, **kwargs)
        ran = {c for c in calls}
        # A weight of an op with a zero path is read by the native scan whatever its dtype.
        assert ran - ({"cpu"} if dtype == F64 and forced != "reference" else set()) <= {expected}
        assert explanation.backend == expected and explanation.op == op
        assert reason is None or reason in explanation.not_used["cpu"]
        assert {"triton", "cuda"} <= set(explanation.not_used) and expected in str(explanation)
        assert (explanation.zero_path is not None) == (op.endswith("_residual") and op != "gate_residual")


def test_explain_rejects_what_it_cannot_explain():
    for name in ("nothing", "_autocast", "Tensor"):
        with pytest.raises(ValueError, match="explain: op_name"):
            zb.explain(name)
    with pytest.raises(TypeError):
        zb.explain("gate_residual", torch.zeros(1))


def _python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_bad_backend_variable_raises(tmp_path):
    result = _python("import zeroblock", tmp_path, ZEROBLOCK_BACKEND="fast")
    assert result.returncode != 0
    assert (
        "ValueError: ZEROBLOCK_BACKEND must be one of auto, reference, cpu, triton, cuda, got 'fast'" in result.stderr
    )


def test_backend_variable_forces_the_reference(tmp_path):
    code = "import torch, zeroblock as z; print(z.explain('group_norm_silu', torch.zeros(1, 4, 4), 2).backend)"
    assert _python(code, tmp_path, ZEROBLOCK_BACKEND="reference").stdout.strip() == "reference"


def test_without_the_extension_the_reference_runs(tmp_path):
    for folder in ("zeroblock", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import torch, zeroblock as z; from zeroblock import testing\n"
        "x = torch.randn(2, 4, 6, requires_grad=True)\n"
        "y = z.group_norm_silu(x, 2); y.sum().backward()\n"
        "e = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2))\n"
        "assert torch.allclose(y, e, atol=1e-6) and x.grad is not None\n"
        "b = z.nn.ResBlock(32, 8, 0.0); b(torch.randn(1, 32, 4, 4), torch.randn(1, 8))\n"
        "assert testing.counters()['ResBlock'] == (0, 1)\n"
        "why = z.explain('group_norm_silu', x, 2)\n"
        "assert why.backend == 'reference' and 'zeroblock._C' in why.not_used['cpu'], why\n"
        "assert 'zeroblock._C' in z.info() and 'zeroblock._C' in testing.CPU_MISSING\n"
        "try: testing.use_backend('cpu').__enter__()\n"
        "except RuntimeError as error: assert 'extension zeroblock._C' in str(error)\n"
        "else: raise AssertionError('cpu backend forced without its extension')\n"
        "print(z.__file__)\n"
    )
    result = _python(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(tmp_path)
