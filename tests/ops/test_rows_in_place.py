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
    """Neither of them goes the way of operands of every form; where all are rows of samples, one op has both."""
    x, rows = torch.randn(2, 6, 40), torch.randn(4, 2, 40).unbind()
    monkeypatch.setattr("zeroblock.functional.tokens.residual_norm", lambda *args: pytest.fail("the general form"))
    calls, op = [], zb.ops.norm_modulate_two
    monkeypatch.setattr(zb.ops, "norm_modulate_two", lambda *args: calls.append(args) or op(*args))
    for function in (zb.layer_norm_modulate, zb.rms_norm_modulate):
        y, y2 = function(x, *rows[:2], second=rows[2:])
        assert_bitwise_equal(y, function(x, *rows[:2]))
        assert_bitwise_equal(y2, function(x, *rows[2:]))
    assert len(calls) == 2
    zb.layer_norm_modulate(x, *rows[:2], second=(None, torch.randn(2, 6, 40)))
    assert len(calls) == 2


def _two(function, x, rows, dy, dy2):
    """Results and gradients of both modulations, in one call and in two."""
    y, y2 = function(x, *rows[:2], second=tuple(rows[2:]))
    apart = function(x, *rows[:2]), function(x, *rows[2:])
    leaves = [t for t in (x, *rows) if t is not None]
    grads = [torch.autograd.grad(results, leaves, (dy, dy2)) for results in ((y, y2), apart)]
    return (y, y2), apart, *grads


@pytest.mark.parametrize("function", [zb.layer_norm_modulate, zb.rms_norm_modulate])
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [(2, 70, 40), (1, 9, 131), (2, 5, 1100)])
def test_two_modulations_at_once_are_those_of_two_calls(tokens, dtype, function):
    """Bit for bit, but for the gradient of x, which is rounded once instead of three times."""
    generator = torch.Generator().manual_seed(0)
    B, _, D = tokens
    x, rows = _drawn(generator, tokens, dtype), [_drawn(generator, (B, D), dtype) for _ in range(4)]
    grads = [torch.randn(tokens, generator=generator).to(dtype) for _ in range(2)]
    if D == 131:
        rows[0] = rows[3] = None
    results, apart, mine, expected = _two(function, x, rows, *grads)
    for a, b in zip((*results, *mine[1:]), (*apart, *expected[1:]), strict=True):
        assert_bitwise_equal(a, b)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, *rows, *grads)]
    exact = _two(function, wide[0], wide[1:5], *wide[5:])[2][0]
    error, allowed = ((g.double() - exact).abs().max() for g in (mine[0], expected[0]))
    assert error <= allowed * (1.01 if dtype.itemsize == 2 else 2) + 1e-14


@pytest.mark.parametrize("function", [zb.layer_norm_modulate, zb.rms_norm_modulate])
def test_one_of_two_modulations_alone_has_a_gradient(function):
    generator = torch.Generator().manual_seed(0)
    x, rows = _drawn(generator, (2, 6, 40), FP32), [_drawn(generator, (2, 40), FP32) for _ in range(4)]
    for k in range(2):
        results = function(x, *rows[:2], second=tuple(rows[2:]))
        mine = torch.autograd.grad(results[k].square().sum(), (x, *rows), allow_unused=True)
        pair = rows[2 * k : 2 * k + 2]
        expected = torch.autograd.grad(function(x, *pair).square().sum(), (x, *pair))
        assert all(g is None for g in mine[3 - 2 * k : 5 - 2 * k])
        for a, b in zip((mine[0], *mine[1 + 2 * k : 3 + 2 * k]), expected, strict=True):
            assert_bitwise_equal(a, b)


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
