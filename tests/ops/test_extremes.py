"""Rows and groups at the edges of the arithmetic: constant, tiny, long, far from zero, overflowing, infinite."""

import pytest
import torch
import torch.nn.functional as F

import zeroblock as zb
from zeroblock.backends.select import select
from zeroblock.testing import assert_error_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
LAYOUTS = {"dense": torch.contiguous_format, "nhwc": torch.channels_last}
NORMS = (zb.layer_norm_modulate, zb.rms_norm_modulate)


def _eager(norm, x, eps=1e-6):
    return (F.layer_norm if norm is zb.layer_norm_modulate else F.rms_norm)(x, x.shape[-1:], eps=eps)


def _gated(x):
    """x as x_new of gate_residual_layer_norm_modulate, and the norm of it."""
    zeros = x.new_zeros(x.shape[0], x.shape[2])
    return zb.gate_residual_layer_norm_modulate(x, x.new_ones(x.shape[2]), torch.zeros_like(x), zeros, zeros)[1]


# ---- constant rows and groups ---------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("value", (1.1, 100.7, -1e4, 3e-5), ids=str)
@pytest.mark.parametrize("D", (1, 2, 3, 37, 768, 1152, 2047, 4096, 8192, 10007))
def test_a_constant_row_has_no_norm(backend, device, D, value, dtype):
    x = torch.full((2, 3, D), value, device=device).to(dtype)
    shift = torch.full((2, 3, D), 0.25, device=device).to(dtype)
    assert (zb.layer_norm_modulate(x, None, None) == 0).all()
    assert (zb.layer_norm_modulate(x, shift, None) == shift).all()  # the loops with an operand per token
    assert (_gated(x) == 0).all()


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("C", "G", "S"), ((6, 2, (1, 1)), (12, 4, (5, 7)), (64, 2, (31, 33)), (320, 32, (32, 32))))
def test_a_constant_group_has_no_norm(backend, device, layout, C, G, S, dtype):
    for value in (1.1, 100.7, -1e4):
        x = torch.full((2, C, *S), value, device=device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        assert (zb.group_norm_silu(x, G) == 0).all()


# ---- long rows, and rows far from zero ------------------------------------------------------------------------------


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("D", (1024, 8192, 8193, 16384, 65537, 262144))
@pytest.mark.parametrize("mean", (0.0, 1e6))
@pytest.mark.parametrize("norm", NORMS, ids=lambda f: f.__name__)
def test_long_rows_far_from_zero(backend, device, norm, D, mean):
    x = torch.randn(3, 2, D, generator=torch.Generator().manual_seed(D)) + mean
    dy = torch.randn(3, 2, D, generator=torch.Generator().manual_seed(1)) + 1
    results = []
    for run, dtype, where in ((norm, x.dtype, device), (_eager, x.dtype, "cpu"), (_eager, torch.float64, "cpu")):
        leaf = x.to(where, dtype).requires_grad_()
        y = run(leaf, None, None) if run is norm else run(norm, leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy.to(where, dtype))
        results.append((y.detach().cpu(), dx.cpu()))
    for name, (got, eager, exact) in zip(("y", "dx"), zip(*results, strict=True), strict=True):
        assert_error_budget(got, eager, exact, name)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("D", (16384, 262144))
def test_long_rows_of_the_combined_kernel(backend, device, D):
    x = torch.randn(2, 2, D, generator=torch.Generator().manual_seed(0)) + 1e6
    exact = _eager(zb.layer_norm_modulate, x.double())
    assert_error_budget(_gated(x.to(device)).cpu(), _eager(zb.layer_norm_modulate, x), exact)


# ---- rows and groups of one or two elements -------------------------------------------------------------------------


def _row_gradient(norm, x, dy):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(norm(leaf), leaf, dy)[0]


@dtypes
def test_a_row_of_one_has_no_gradient(backend, device, dtype):
    """Its layer norm is 0 whatever it is: the gradient is exactly 0, also behind weights and scales."""
    x, dy = (torch.randn(3, 50, 1, device=device).to(dtype) for _ in range(2))
    weight, scale = torch.full((1,), 1.7, device=device), torch.randn(3, 1, device=device)
    per_token = torch.randn(3, 50, 1, device=device).to(dtype)
    for operands in ((None, None), (scale, None), (scale, weight), (per_token, weight)):
        dx = _row_gradient(lambda t, o=operands: zb.layer_norm_modulate(t, None, o[0], weight=o[1]), x, dy)
        assert (dx == 0).all()
    assert (_row_gradient(_gated, x, dy) == 0).all()


@dtypes
def test_rows_of_two(backend, device, dtype):
    """Gradients that are equal take nothing but the mean: exactly 0. Where the norm is exactly +-1 nothing is left
    but roundings of the gradient's difference."""
    x = torch.tensor([3.0, 5.0], device=device).to(dtype).expand(2, 3, 2) * 64
    equal = torch.randn(2, 3, 1, device=device).to(dtype).expand(2, 3, 2)
    assert (_row_gradient(lambda t: zb.layer_norm_modulate(t, None, None, eps=1e-12), x, equal) == 0).all()
    dy = torch.randn(2, 3, 2, device=device).to(dtype)
    dx = _row_gradient(lambda t: zb.layer_norm_modulate(t, None, None, eps=1e-12), x, dy)
    rstd = 1 / 64
    assert dx.abs().max() <= 2 * torch.finfo(torch.float32).eps * rstd * dy.abs().max()


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ("silu", None))
def test_a_group_of_one_has_no_gradient(backend, device, layout, activation, dtype):
    x, dy = (torch.randn(3, 8, 1, 1, device=device).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in "xy")
    weight, bias = torch.randn(8, device=device).to(dtype), torch.randn(8, device=device).to(dtype)
    run = lambda t: zb.group_norm_silu(t, 8, weight, bias, activation=activation)  # noqa: E731
    assert (_row_gradient(run, x, dy) == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("C", "S"), ((8, (1, 1)), (4, (2, 1))), ids=("channels", "pixels"))
def test_a_group_of_two(backend, device, layout, C, S):
    """Equal gradients: exactly 0. Others: nothing but roundings."""
    sign = torch.tensor([1.0, -1.0] * 4 * 3, device=device).view(3, C, *S)
    x = (7 + 64 * sign).contiguous(memory_format=LAYOUTS[layout])
    run = lambda t: zb.group_norm_silu(t, 4, activation=None, eps=1e-12)  # noqa: E731
    assert (_row_gradient(run, x, torch.full_like(x, 0.3)) == 0).all()
    dy = torch.randn_like(x)
    assert _row_gradient(run, x, dy).abs().max() <= 2 * torch.finfo(torch.float32).eps / 64 * dy.abs().max()


# ---- beyond the range of fp32 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("D", (2, 3, 16, 37, 128, 768, 4096, 20000))
def test_a_variance_that_overflows_shows(backend, device, D, dtype):
    """Eager gives NaN or 0 by the luck of its vectors; 0 would hide what has happened. The rms norm is 0 in eager."""
    x = (torch.randn(2, 3, D, device=device, generator=torch.Generator(device).manual_seed(0)) * 1e20).to(dtype)
    x[..., 0], x[..., 1] = 2e20, -2e20
    token = torch.zeros_like(x)
    for y in (zb.layer_norm_modulate(x, None, None), zb.layer_norm_modulate(x, token, token), _gated(x)):
        assert y.isnan().all()
    assert (zb.rms_norm_modulate(x, None, None) == 0).all()
    leaf = x.clone().requires_grad_()
    zb.layer_norm_modulate(leaf, None, None).sum().backward()
    assert leaf.grad.isnan().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("C", "G", "S"), ((8, 4, (1, 1)), (8, 4, (4, 4)), (64, 2, (33, 31))))
def test_a_group_whose_variance_overflows_shows(backend, device, layout, C, G, S, dtype):
    x = torch.randn(2, C, *S, device=device, generator=torch.Generator(device).manual_seed(0)) * 1e20
    x[:, :: C // G], x[:, 1 :: C // G] = 2e20, -2e20
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    assert zb.group_norm_silu(x, G).isnan().all()


@dtypes
@pytest.mark.parametrize(
    "op", (zb.layer_norm_modulate, zb.rms_norm_modulate, zb.group_norm_silu), ids=lambda f: f.__name__
)
@pytest.mark.parametrize("value", (float("inf"), -float("inf"), float("nan")), ids=str)
def test_one_infinity_or_nan_shows_where_eager_shows_it(backend, device, op, value, dtype):
    x = torch.randn(2, 8, 40, device=device).to(dtype)
    x[1, 3, 5] = value
    got = zb.group_norm_silu(x, 4) if op is zb.group_norm_silu else op(x, None, None)
    eager = F.silu(F.group_norm(x.float(), 4)) if op is zb.group_norm_silu else _eager(op, x.float())
    assert torch.equal(got.isfinite(), eager.isfinite())
    assert got[0].isfinite().all()


@dtypes
@pytest.mark.parametrize("name", ("silu", "gelu", "gelu_tanh"))
def test_activations_of_extreme_values(backend, device, name, dtype):
    """-inf gives NaN as in eager, inf and NaN themselves, and far below zero nothing is left."""
    most = torch.finfo(dtype).max / 4
    x = torch.tensor([-float("inf"), float("inf"), float("nan"), -most, most, -6e4, -1e3, -88, -87, -20, 88, 1e3])
    x = x.to(device, dtype).repeat(9)[:101]
    activations = select("activation", x)
    y = activations.activation(x, name)

    def eager(t):
        return F.silu(t) if name == "silu" else F.gelu(t, approximate="tanh" if name == "gelu_tanh" else "none")

    plus, finite = x == float("inf"), x.isfinite()
    assert torch.equal(y.isnan() & ~plus, eager(x).isnan() & ~plus)
    assert not y[plus].isfinite().any()  # inf, or the NaN that some vectors of eager's erf make of it
    exact = eager(x[finite].double())
    least = max(1e-35, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    assert ((y[finite].double() - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs() + least).all()
    dx, again = activations.activation_bwd(torch.ones_like(x), x, name, True)
    assert torch.equal(again.nan_to_num(7.0), y.nan_to_num(7.0))
    assert dx[finite & (x.abs() < 1e4)].isfinite().all()
