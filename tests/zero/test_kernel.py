"""The kernel under a zero branch in inference: the test of the weights and residual + bias, in one parallel region."""

import pytest
import torch

from zeroblock.backends.select import CPU as P
from zeroblock.testing import CPU_MISSING

from .cases import same

pytestmark = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("flush", [False, True], ids=["", "flush denormals"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_if_zero_is_test_and_sum(dtype, flush):
    """For sizes around every step of the kernel: eager's sum to the bit, or nothing as soon as one element is not
    zero."""
    torch.manual_seed(0)
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        for n in (1, 15, 64, 257, 40_001):
            for size in (1, 31, 127, 4099, 300_007):
                x = torch.randn(n, dtype=dtype)
                x[::3] = -0.0
                x[1::7] = float("inf")
                x[2::5] = torch.finfo(dtype).smallest_normal / 4
                weight = torch.zeros(size, dtype=dtype)
                weight[::2] = -0.0
                same(P.residual_if_zero(weight, None, 1, 1, x, None, True), x + 0.0)
                for position in {0, size // 2, size - 1}:
                    weight[position] = float("nan")
                    assert P.residual_if_zero(weight, None, 1, 1, x, None, True) is None
                    weight[position] = 0.0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_zero_looks_at_every_chunk(dtype):
    """From 1 MiB on the bytes are read in chunks of 256 KiB; the last one may have a single element, or lack one."""
    mib = (1 << 20) // dtype.itemsize
    for size in (mib, mib + 1, 2 * mib - 1):
        t = torch.zeros(size, dtype=dtype)
        assert P.is_zero(t)
        for position in (0, mib // 4 - 1, mib // 4, mib - 1, size - 1):
            t[position] = torch.finfo(dtype).smallest_normal / 4
            assert not P.is_zero(t), (size, position)
            t[position] = -0.0


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 5, 3), (2, 64, 33, 31), (1, 130, 64, 64)], ids=str)
def test_sums_with_a_bias_in_both_layouts(shape, dtype, threads):
    torch.manual_seed(0)
    weight, before = torch.zeros(5, dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(dtype).to(memory_format=layout)
            x[..., ::3] = -0.0
            for bias in (torch.randn(shape[1]), torch.zeros(shape[1]), -torch.zeros(shape[1]), None):
                bias = None if bias is None else bias.to(dtype)
                expected = x + 0.0 if bias is None else x + (bias + 0.0)[:, None, None]
                last = layout is torch.channels_last
                same(P.residual_if_zero(weight, None, 1, 1, x, bias, last), expected)
                same(P.add_bias(x, bias, 1), expected)
                same(P.add_bias_in_place(x.clone(), bias, 1), expected)
    finally:
        torch.set_num_threads(before)


def test_residual_if_zero_reads_the_parts_it_is_asked_for():
    x, weight, bias = torch.randn(3, 4), torch.zeros(12, 5), torch.zeros(12)
    call = lambda: P.residual_if_zero(weight, bias, 6, 1 << 2 | 1 << 5, x, None, True)  # noqa: E731
    for row in range(12):
        for t in (weight[row], bias[row : row + 1]):
            t[-1] = 1e-40
            assert (call() is None) == (row // 2 in (2, 5)), row
            t[-1] = 0.0
    same(call(), x)


def test_residual_if_zero_refuses_what_it_cannot_read():
    x, weight = torch.randn(3, 4), torch.zeros(12, 10)
    calls = [
        lambda: P.residual_if_zero(weight[:, ::2], None, 1, 1, x, None, True),
        lambda: P.residual_if_zero(weight, None, 5, 1, x, None, True),
        lambda: P.residual_if_zero(weight, torch.zeros(12, dtype=torch.float64), 1, 1, x, None, True),
        lambda: P.residual_if_zero(weight, None, 1, 1, x.t()[::2], None, True),
        lambda: P.residual_if_zero(weight, None, 1, 1, x, torch.zeros(5), True),
        lambda: P.residual_if_zero(weight, None, 1, 1, x.double(), None, True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="zeroblock"):
            call()
