"""channel_rms_norm_silu: where eps stands, pixels that it decides, shapes of the parameters, what is saved."""

import pytest
import torch
import torch.nn.functional as F

import zeroblock as zb
from zeroblock.testing import assert_error_budget
from zeroblock.testing.cases import Case
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import assert_parity

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _wan(x, weight, eps):
    """WanRMS_norm of diffusers, with a SiLU."""
    return F.silu(F.normalize(x, dim=1, eps=eps) * x.shape[1] ** 0.5 * weight)


def _with_gradient(run, x, weight, dy, dtype, *rest):
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
    y = run(x, weight, *rest)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(dtype))


@pytest.mark.parametrize("layout", ("dense", "nhwc"))
def test_the_divisor_of_pixels_below_eps_is_a_constant(backend, device, layout):
    """Of pixels of all sizes a third lies below eps, and some are zero: their gradient does not go through the norm."""
    found, eps = {}, 0.5
    for seed in range(4):  # of few numbers eager may have the best by luck
        draw = Draw(torch.float32, layout, seed, device)
        x = draw.tensor(2, 40, 9, 11)
        x *= torch.logspace(-3, 3, 11, device=device)
        x[:, :, 4] = 0
        weight, dy = draw.normal(40, 1, 1), draw.normal(*x.shape)
        below = x.norm(dim=1) <= eps
        assert 0.2 < below.float().mean() < 0.8
        got = _with_gradient(lambda x, w: zb.channel_rms_norm_silu(x, w, eps=eps), x, weight, dy, torch.float32)
        eager, exact = (_with_gradient(_wan, x, weight, dy, dtype, eps) for dtype in (torch.float32, torch.float64))
        for which, pixels in (("below", below), ("above", ~below)):
            for name, i in (("y", 0), ("dx", 1)):
                parts = [r[i].movedim(1, -1)[pixels].flatten() for r in (got, eager, exact)]
                found.setdefault(f"{name} {which}", []).append(parts)
        found.setdefault("dweight", []).append([r[2].flatten() for r in (got, eager, exact)])
        assert got[2].shape == weight.shape
    for name, triples in found.items():
        assert_error_budget(*(torch.cat(column) for column in zip(*triples, strict=True)), name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=lambda d: str(d)[6:])
def test_zero_pixels_are_zero_with_a_finite_gradient(backend, device, dtype):
    x = torch.zeros(1, 24, 3, 5, device=device, dtype=dtype).requires_grad_()
    y = zb.channel_rms_norm_silu(x, eps=1e-2, activation=None)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (y == 0).all()
    torch.testing.assert_close(dx, torch.full_like(dx, 24**0.5 / 1e-2))
    assert zb.channel_rms_norm_silu(x).eq(0).all()  # by the default eps, far below what fp16 has
    assert zb.channel_rms_norm_silu(x, eps=0.0, activation=None).isnan().all()  # as in eager


@pytest.mark.parametrize("ones", (0, 1, 2, 3))
def test_parameters_keep_their_shape(backend, device, ones):
    x = torch.randn(2, 24, 3, 4, 5, device=device)
    weight, bias = (torch.randn(24, *[1] * ones, device=device, requires_grad=True) for _ in "wb")
    y = zb.channel_rms_norm_silu(x, weight, bias)
    expected = zb.channel_rms_norm_silu(x, weight.flatten(), bias.flatten())
    assert torch.equal(y, expected)
    dweight, dbias = torch.autograd.grad(y.sum(), (weight, bias))
    assert dweight.shape == dbias.shape == weight.shape


@pytest.mark.parametrize("size", ((2, 24, 6, 5), (2, 24, 3, 4, 5)), ids=len)
def test_result_and_gradient_have_the_format_of_x(backend, device, size):
    for layout in (torch.contiguous_format, FORMATS[len(size)]):
        x = torch.randn(size, device=device).to(memory_format=layout).requires_grad_()
        y = zb.channel_rms_norm_silu(x)
        (dx,) = torch.autograd.grad(y, x, torch.randn(size, device=device))
        for t in (y, dx):
            assert t.stride() == x.stride()


def test_saves_x_and_one_number_per_pixel(backend, device):
    x = torch.randn(2, 24, 6, 5, device=device, requires_grad=True)
    weight = torch.ones(24, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        zb.channel_rms_norm_silu(x, weight)
    sizes = sorted(t.numel() for t in saved if t is not None and t is not x and t is not weight)
    others = [n for n in sizes if n not in (x.numel(), weight.numel())]
    assert others == [2 * 6 * 5] and sum(sizes) <= x.numel() + weight.numel() + others[0]


@pytest.mark.parametrize("value", (float("inf"), -float("inf"), float("nan"), 1e30), ids=str)
def test_infinity_and_nan_show_where_eager_shows_them(backend, device, value):
    x = torch.randn(2, 24, 6, 5, device=device)
    x[1, 3, 2, 4] = value
    for layout in FORMATS[4], torch.contiguous_format:
        x = x.contiguous(memory_format=layout)
        got, eager = zb.channel_rms_norm_silu(x), _wan(x, 1.0, 1e-12)
        assert torch.equal(got.isfinite(), eager.isfinite())


@pytest.mark.parametrize("layout", ("dense", "nhwc"))
@pytest.mark.parametrize(("C", "S"), ((1500, (3, 7)), (5, (40, 41)), (700, (9, 9))))
def test_wide_pixels_and_many_tiles(backend, device, C, S, layout):
    """1500 channels are more than the CPU's tiles keep; 1640 pixels are several of its tiles."""
    for dtype in (torch.float32, torch.bfloat16):
        assert_parity(Case("channel_rms_norm_silu", "tiles", {"N": 1, "C": C, "S": S}), dtype, layout, device)
