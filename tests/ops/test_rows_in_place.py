"""Operands that each token has of its own: read where they are, with the numbers that staging them gives, and gradients
that are another gradient are that tensor."""

import pytest
import torch

import zeroblock as zb
from zeroblock.testing import CPU_MISSING, assert_bitwise_equal

BF16, FP32 = torch.bfloat16, torch.float32
NATIVE = pytest.mark.skipif(CPU_MISSING is not None, reason=f"the native kernels: {CPU_MISSING}")


def _drawn(generator, size, dtype):
    return torch.randn(size, generator=generator).to(dtype).requires_grad_()


def _results(tokens, dtype, rows_dtype, scaled, norm, branch_norm):
    """Outputs and gradients of one seam. `scaled`: weights of ones are multiplied in, so that operands are staged."""
    B, T, D = tokens
    generator = torch.Generator().manual_seed(0)
    x, h = (_drawn(generator, tokens, dtype) for _ in range(2))
    rows = _drawn(generator, (B, T, 3 * D), rows_dtype)
    table = _drawn(generator, (3, D), FP32)
    gate, shift, scale = rows.chunk(3, dim=2)
    ones = torch.ones(D) if scaled else None
    results = zb.residual_norm_modulate(
        x, h, gate=gate, gate_table=table[0], branch_norm=branch_norm, branch_weight=ones, norm=norm, weight=ones,
        shift=shift, scale=scale, shift_table=table[1], scale_table=table[2],
    )  # fmt: skip
    grads = [torch.randn(tokens, generator=generator).to(r.dtype) for r in results]
    return *results, *torch.autograd.grad(results, (x, h, rows, table), grads)


@NATIVE
@pytest.mark.parametrize("branch_norm", [None, "rms"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("dtype", "rows_dtype"), [(FP32, FP32), (BF16, BF16), (BF16, FP32), (torch.float16, FP32)])
@pytest.mark.parametrize("tokens", [(2, 70, 40), (1, 9, 131)])
def test_rows_in_place_give_the_bits_of_staged_ones(tokens, dtype, rows_dtype, norm, branch_norm):
    if dtype == BF16 and tokens[2] == 131:
        tokens = (1, 9, 7)  # less than a step
    in_place = _results(tokens, dtype, rows_dtype, False, norm, branch_norm)
    staged = _results(tokens, dtype, rows_dtype, True, norm, branch_norm)
    for mine, expected in zip(in_place, staged, strict=True):
        assert_bitwise_equal(mine, expected)


@NATIVE
def test_signed_zeros_of_a_row_without_a_table():
    """-0 stays -0: an absent table adds nothing."""
    D = 40
    x, h, gate = torch.full((1, 3, D), -0.0), torch.ones(1, 3, D), torch.full((1, 3, D), -0.0)
    shift = torch.zeros(1, 3, D)
    x_new, _ = zb.residual_norm_modulate(x, h, gate=gate, shift=shift, shift_table=torch.zeros(D))
    assert_bitwise_equal(x_new, x + gate * h)


def test_gradients_that_are_one_are_one_tensor():
    """A branch that is only added has the residual's gradient, a shift of each token has y's: as in eager."""
    B, T, D = 2, 6, 40
    generator = torch.Generator().manual_seed(0)
    x, h, shift, scale = (_drawn(generator, (B, T, D), FP32) for _ in range(4))
    table = _drawn(generator, (D,), FP32)
    results = zb.residual_norm_modulate(x, h, shift=shift, scale=scale, scale_table=table)
    dx_new, dy = torch.randn(B, T, D, generator=generator), torch.randn(B, T, D, generator=generator)
    dx, dh, dshift = torch.autograd.grad(results, (x, h, shift), (dx_new, dy), retain_graph=True)
    assert dx.data_ptr() == dh.data_ptr() and dshift.data_ptr() == dy.data_ptr()
    (alone,) = torch.autograd.grad(results, (h,), (dx_new, dy), retain_graph=True)
    assert_bitwise_equal(alone, dh)
    x.grad = h.grad = None
    torch.autograd.backward(results, (dx_new, dy))
    assert x.grad.data_ptr() != h.grad.data_ptr()  # what an optimizer writes to is each one's own
    assert_bitwise_equal(x.grad, h.grad)


def test_a_second_modulation_is_a_plain_one(monkeypatch):
    """Neither of them goes the way of operands of every form."""
    x, rows = torch.randn(2, 6, 40), torch.randn(4, 2, 40).unbind()
    monkeypatch.setattr("zeroblock.functional.tokens.residual_norm", lambda *args: pytest.fail("the general form"))
    for function in (zb.layer_norm_modulate, zb.rms_norm_modulate):
        y, y2 = function(x, *rows[:2], second=rows[2:])
        assert_bitwise_equal(y, function(x, *rows[:2]))
        assert_bitwise_equal(y2, function(x, *rows[2:]))


@pytest.mark.parametrize("norm", [None, "layer"])
def test_a_branch_with_a_weight_alone_is_read_in_backward(norm):
    generator = torch.Generator().manual_seed(0)
    x, h = (_drawn(generator, (2, 6, 40), FP32) for _ in range(2))
    weight = _drawn(generator, (40,), FP32)
    if norm is None:
        y = zb.gate_residual(x, None, h, branch_weight=weight)
        expected = x + h * weight
    else:
        y = zb.residual_norm_modulate(x, h, branch_weight=weight)[1]
        expected = torch.nn.functional.layer_norm(x + h * weight, (40,), eps=1e-6)
    dy = torch.randn(y.shape, generator=generator)
    mine = torch.autograd.grad(y, (x, h, weight), dy)
    for grad, right in zip(mine, torch.autograd.grad(expected, (x, h, weight), dy), strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5)
