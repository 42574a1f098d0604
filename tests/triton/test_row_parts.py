"""Rows in two parts, interpreted, against fp64: the row norms, forward and backward, T no multiple of the rows."""

import os

import pytest
import torch

pytest.importorskip("triton")

from zeroblock.kernels import layer_norm_modulate as kernels  # noqa: E402

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter", allow_module_level=True)

ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize(
    ("D", "dtype", "rms"),
    [
        (640, torch.float32, False),
        (1152, torch.bfloat16, False),
        (1152, torch.bfloat16, True),
        (3072, torch.float16, False),
    ],
)
def test_gradients(D, dtype, rms):
    """Of a layer norm with a shift and scale per sample, and of an RMS norm with a weight."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 11, D, generator=generator).to(dtype) for _ in range(2))
    rows = torch.randn(2, 2 * D, generator=generator).to(dtype)
    weight, shift, scale = (rows[0, :D], None, None) if rms else (None, rows[:, :D], rows[:, D:])
    y, mean, rstd = kernels.forward(x, shift, scale, weight, None, 1e-6, rms)
    dx, dshift, dscale, dweight, _ = kernels.backward(dy, x, mean, rstd, shift, scale, weight, None, rms)
    exact = [None if t is None else t.double().requires_grad_() for t in (x, shift, scale, weight)]
    h = exact[0] if rms else exact[0] - exact[0].mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
    h = h * exact[3] if rms else h * (1 + exact[2][:, None]) + exact[1][:, None]
    h.backward(dy.double())
    pairs = [(y, h.detach())] + [
        (g, t.grad) for g, t in zip((dx, dshift, dscale, dweight), exact, strict=True) if t is not None
    ]
    for found, expected in pairs:
        assert (found.double() - expected).norm() <= ROUNDING[dtype] * expected.norm()
