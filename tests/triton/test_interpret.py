"""The repaired interpreter computes what a GPU would, and fails where it should: every planted bug shows."""

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("ml_dtypes")

import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

from zeroblock.testing import assert_bitwise_equal, assert_error_budget  # noqa: E402

from . import interpret  # noqa: E402

interpret.install()
HALF = (torch.bfloat16, torch.float16)
FP8 = (torch.float8_e5m2, torch.float8_e4m3fn)


@triton.jit
def _cast(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@pytest.mark.parametrize("dtype", HALF + FP8)
def test_casts_round_to_nearest_even(dtype):
    """Random bit patterns: subnormals, infinities, NaN and ties are all among them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator)
    x = bits.to(torch.int32).view(torch.float32)
    if dtype in FP8:  # beyond the largest value hardware saturates by choice of the kernel
        x = torch.randn(4096, generator=generator)
    x[:256] = torch.randn(256, generator=generator).to(torch.bfloat16).float() + 2.0**-9  # near ties
    y, back = torch.empty(4096, dtype=dtype), torch.empty(4096)
    _cast[(1,)](x, y, BLOCK=4096)
    _cast[(1,)](y, back, BLOCK=4096)
    expected = x.to(dtype).float()
    assert torch.equal(y.float().nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(back.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(back.isnan(), x.isnan())


@triton.jit
def _arithmetic(x, y, total, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(y + i, v * v + tl.abs(v))
    tl.store(total, tl.sum(v, 0))


@pytest.mark.parametrize("dtype", HALF)
def test_half_arithmetic_rounds_after_every_operation(dtype):
    x = torch.randn(256, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, total = torch.empty_like(x), torch.empty(1, dtype=dtype)
    _arithmetic[(1,)](x, y, total, BLOCK=256)
    assert_bitwise_equal(y, x * x + x.abs())
    assert abs(float(total) - float(x.double().sum())) <= float(x.float().abs().sum()) * torch.finfo(dtype).eps


@triton.jit
def _dot(a, b, c, M: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    tl.store(c + i * M + j, tl.dot(tl.load(a + i * M + j), tl.load(b + i * M + j), input_precision=PRECISION))


@pytest.mark.parametrize("dtype", (*HALF, torch.float32))
def test_dot(dtype):
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    c = torch.empty(32, 32)
    _dot[(1,)](a, b, c, M=32, PRECISION="ieee")
    assert_error_budget(c, a.float() @ b.float(), a.double() @ b.double(), factor=4)


def test_tf32_dot_loses_precision_as_on_a_gpu():
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
    c = torch.empty(32, 32)
    _dot[(1,)](a, b, c, M=32, PRECISION="tf32")
    error = ((c - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()).item()
    assert 1e-5 < error < 1e-3


@triton.jit
def _welford(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    n = n_a + n_b
    delta = mean_b - mean_a
    return mean_a + delta * n_b / n, m2_a + m2_b + delta * delta * n_a * n_b / n, n


@triton.jit
def _moments(x, mean, m2, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, N))
    a, b, _ = tl.reduce((v, tl.zeros_like(v), tl.full((N,), 1.0, tl.float32)), 0, _welford)
    tl.store(mean, a)
    tl.store(m2, b)


def test_reduce_with_a_combine_function():
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)) + 100
    mean, m2 = torch.empty(1), torch.empty(1)
    _moments[(1,)](x, mean, m2, N=1024)
    torch.testing.assert_close(mean[0].double(), x.double().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2[0].double(), x.double().var(correction=0) * 1024, rtol=1e-4, atol=0)


@triton.jit
def _special(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(y + i, libdevice.tanh(v) + libdevice.erf(v) + tl.sigmoid(v) + tl.erf(v))


def test_libdevice():
    x = torch.linspace(-3, 3, 64)
    y = torch.empty(64)
    _special[(1,)](x, y, N=64)
    torch.testing.assert_close(y, x.tanh() + 2 * x.erf() + x.sigmoid())


@triton.jit
def _log_order(counter, position):
    tl.store(position + tl.program_id(0), tl.atomic_add(counter, 1))


def test_program_order():
    def order(seed):
        counter, position = torch.zeros(1, dtype=torch.int32), torch.zeros(17, dtype=torch.int32)
        with interpret.program_order(seed):
            _log_order[(17,)](counter, position)
        return position.tolist()

    assert order(None) == list(range(17))
    assert sorted(order(1)) == list(range(17)) and order(1) == order(1)
    assert len({tuple(order(seed)) for seed in (None, 1, 2, 3)}) == 4


def test_language_is_left_as_it_was():
    before = {name: getattr(module, name) for module in (tl, tl.core) for name in ("range", "load", "static_range")}
    x = torch.linspace(-3, 3, 64)
    _special[(1,)](x, torch.empty(64), N=64)
    assert before == {name: getattr(module, name) for module in (tl, tl.core) for name in before}


# ---- planted bugs ---------------------------------------------------------------------------------------------------


@triton.jit
def _affine_norm(x, weight, y, rows, D, stride, eps, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """Rows of x[:, :D] divided by their root mean square, times weight; BUG plants one mistake."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < D
    step = D if BUG == "wrong stride" else stride
    at = row * step if BUG == "int32 offset" else row.to(tl.int64) * step
    if BUG == "missing other":
        v = tl.load(x + at + i, mask=mask)
    elif BUG == "missing mask":
        v = tl.load(x + at + i)
    else:
        v = tl.load(x + at + i, mask=mask, other=0.0)
    v = v.to(tl.float32)
    z = v * tl.rsqrt(tl.sum(v * v, 0) / D + eps)
    if BUG != "dropped gamma":
        z *= tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    out = y if BUG == "race" else y + row.to(tl.int64) * D
    tl.store(out + i, z.to(y.dtype.element_ty), mask=mask)


def _run(bug, dtype, seed=None):
    generator = torch.Generator().manual_seed(0)
    larger = torch.randn(5, 50, generator=generator).to(dtype)  # what lies beside a row is never 0
    x, weight = larger[:, 3:40], torch.randn(37, generator=generator).to(dtype)
    y = torch.full((5, 37), float("nan"), dtype=dtype)
    with interpret.program_order(seed):
        _affine_norm[(5,)](x, weight, y, 5, 37, x.stride(0), 1e-6, BLOCK=64, BUG=bug)

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    return y, norm(x, weight), norm(x.double(), weight.double())


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
def test_correct_kernel_passes(dtype):
    assert_error_budget(*_run("none", dtype))
    assert_bitwise_equal(*(_run("none", dtype, seed)[0] for seed in (None, 5)))


@pytest.mark.parametrize("bug", ["missing mask", "missing other", "wrong stride", "dropped gamma", "race"])
def test_planted_bug_is_caught(bug):
    with pytest.raises(AssertionError):
        assert_error_budget(*_run(bug, torch.bfloat16))


def test_planted_race_shows_in_another_order():
    assert not torch.equal(*(_run("race", torch.float32, seed)[0][0] for seed in (None, 5)))


def test_planted_int32_overflow_is_caught():
    """Rows 2^30 elements apart: the third is beyond int32. Pages that are never touched cost no memory."""
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    x = storage.as_strided((3, 37), (2**30 + 4, 1))
    x.copy_(torch.randn(3, 37))
    weight, y = torch.ones(37, dtype=torch.float16), torch.empty(3, 37, dtype=torch.float16)
    arguments = (x, weight, y, 3, 37, x.stride(0), 1e-6)
    _affine_norm[(3,)](*arguments, BLOCK=64, BUG="none")
    torch.testing.assert_close(y.float().square().mean(-1), torch.ones(3), rtol=1e-2, atol=0)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="overflow"):
        _affine_norm[(3,)](*arguments, BLOCK=64, BUG="int32 offset")
