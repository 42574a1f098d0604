"""Mistakes planted into the shipped kernels' sources: what the parity tests check finds each of them."""

import importlib.util
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
pytest.importorskip("ml_dtypes")

from . import traffic  # noqa: E402

traffic.install()

from zeroblock.kernels import gate_residual, layer_norm_modulate  # noqa: E402
from zeroblock.testing import assert_error_budget, poison_empty  # noqa: E402
from zeroblock.testing.draw import Draw  # noqa: E402

_numbers = itertools.count()


def mutant(module, folder, old: str, new: str):
    """The kernel file with the first `old` of its source replaced, as a module of its own."""
    source = inspect.getsource(module)
    assert old in source, f"{module.__name__} no longer contains {old!r}"
    path = folder / f"mutant_{next(_numbers)}.py"
    path.write_text(source.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.{path.stem}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def judge(kernels, D: int = 307) -> None:
    """Forward and every gradient of a modulated norm against fp64, out-of-bounds accesses and races."""
    B, T = 2, 21
    draw = Draw(torch.float32, "dense")
    x, dy, weight, bias = draw.tokens(B, T, D), draw.tokens(B, T, D), draw.vector(D, mean=1.0), draw.vector(D)
    shift, scale = draw.chunks(B, D, 2)

    def eager(dy, *operands):
        operands = [t.detach().clone().requires_grad_() for t in operands]
        x, shift, scale, weight, bias = operands
        y = F.layer_norm(x, (D,), weight, bias, 1e-6) * (1 + scale[:, None]) + shift[:, None]
        return y.detach(), *torch.autograd.grad(y, operands, dy)

    operands = (dy, x, shift, scale, weight, bias)
    with poison_empty(), traffic.record() as recorded:
        y, mean, rstd = kernels.forward(x, shift, scale, weight, bias, 1e-6, False)
        got = y, *kernels.backward(dy, x, mean, rstd, shift, scale, weight, bias, False)
    assert not recorded.problems, recorded.problems[0]
    for mine, theirs, exact in zip(got, eager(*operands), eager(*(t.double() for t in operands)), strict=True):
        assert_error_budget(mine, theirs, exact)


def test_shipped_kernels_pass():
    judge(layer_norm_modulate)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("tl.load(x + at, mask=mask, other=0.0)", "tl.load(x + at)", id="missing mask"),
        pytest.param("tl.load(x + at, mask=mask, other=0.0)", "tl.load(x + at, mask=mask)", id="missing other"),
        pytest.param("b, shift_b, d, D, SHIFT)", "b, D, d, D, SHIFT)", id="wrong stride"),
        pytest.param("value *= tl.load(weight", "_ = tl.load(weight", id="dropped gamma"),
        pytest.param("at = (b * tl.num_programs(0) + tl.program_id(0)) * D", "at = b * D", id="race"),
        pytest.param("sum_dy += g", "sum_dy = g", id="dropped partial sum"),
    ],
)
def test_planted_bug_is_caught(old, new, tmp_path):
    with pytest.raises(AssertionError):
        judge(mutant(layer_norm_modulate, tmp_path, old, new))


PARTED = 700  # 512 columns and 188 of 256


@pytest.mark.parametrize(
    "new",
    (
        pytest.param("part_columns(i, BLOCK_D, TAIL)", id="shipped"),
        pytest.param("part_columns(i, BLOCK_D, TAIL) % BLOCK_D", id="the first part's operands"),
    ),
)
def test_rows_in_two_parts(new, tmp_path):
    old = "part_columns(i, BLOCK_D, TAIL)"
    kernels = mutant(layer_norm_modulate, tmp_path, f"d = {old}", f"d = {new}")
    if new == old:
        return judge(kernels, PARTED)
    judge(kernels)  # rows in one part do not notice
    with pytest.raises(AssertionError):
        judge(kernels, PARTED)


@pytest.mark.parametrize("planted", (False, True))
def test_planted_int32_offset_is_caught(planted, tmp_path):
    """Gates 2^30 elements apart: the third is beyond int32. Pages that are never touched cost no memory."""
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    gate = storage.as_strided((3, 37), (2**30 + 4, 1))
    gate.copy_(torch.randn(3, 37))
    x = torch.randn(3, 1, 37).half()
    if not planted:
        y = gate_residual.forward(x, gate, x, x.dtype)
        assert_error_budget(y, x + gate[:, None] * x, x.double() + gate[:, None].double() * x.double())
        return
    kernels = mutant(gate_residual, tmp_path, "b = tl.program_id(2).to(tl.int64)", "b = tl.program_id(2)")
    with pytest.raises(triton.runtime.errors.InterpreterError, match="overflow"):
        kernels.forward(x, gate, x, x.dtype)
