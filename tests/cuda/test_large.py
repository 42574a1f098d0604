"""Tensors of more than 2^31 elements, emulated: of a launch the last blocks alone run, where offsets are the largest.

Memory that nothing touches costs none.
"""

import pytest
import torch
import torch.nn.functional as F

from zeroblock.backends.cuda import CUDA
from zeroblock.backends.residual_norm import Branch, Needed, Norm, Rows
from zeroblock.testing import assert_bitwise_equal, assert_error_budget
from zeroblock.testing.draw import Draw

from .simt import emulated

MISSING = "on a GPU every block runs" if torch.cuda.is_available() else emulated.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
MORE = 2**31


@pytest.fixture(autouse=True)
def cuda():
    with emulated.emulated(), emulated.last_blocks(1):
        yield


def _norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("kernel", (1, 3))
def test_conv_residual(kernel):
    """The last tile of 8 x 16 pixels, with what lies around it."""
    C, W, draw = 8, 2**14, Draw(torch.bfloat16, "nhwc")
    H = MORE // (C * W) + 8
    large = [torch.empty(1, H, W, C, dtype=torch.bfloat16).permute(0, 3, 1, 2) for _ in range(2)]
    corner = [t[:, :, -9:, -17:] for t in large]
    for t in corner:
        t.copy_(draw.tensor(*t.shape))
    weight, bias = draw.normal(C, C, kernel, kernel).to(memory_format=torch.channels_last), draw.vector(C)
    y, _ = CUDA.conv_and_statistics(large[0], weight, bias, large[1])
    assert y.numel() > MORE
    with emulated.last_blocks(0):
        small, _ = CUDA.conv_and_statistics(corner[0], weight, bias, corner[1])
    assert_bitwise_equal(y[:, :, -8:, -16:], small[:, :, -8:, -16:])
    exact = corner[1].double() + F.conv2d(corner[0].double(), weight.double(), bias.double(), padding=kernel // 2)
    eager = corner[1] + F.conv2d(corner[0], weight, bias, padding=kernel // 2)
    assert_error_budget(*(t[:, :, -8:, -16:] for t in (y, eager, exact)), "y")


@pytest.mark.parametrize("op", ("layer_norm_modulate", "gate_residual"))
def test_rows(op):
    D, draw = 2048, Draw(torch.bfloat16)
    x, branch = (torch.empty(1, MORE // D + 3, D, dtype=torch.bfloat16) for _ in range(2))
    ends = [t[:, -2:].copy_(draw.tokens(1, 2, D, mean=0.5)) for t in (x, branch)]
    shift, scale = draw.chunks(1, D, 2)
    if op == "gate_residual":
        y, inputs, function = CUDA.gate_residual(x, scale, branch), (*ends, scale), lambda r, b, g: r + g[:, None] * b
    else:
        y, inputs, function = (
            CUDA.layer_norm_modulate(x, shift, scale, None, None, 1e-6, False)[0],
            (ends[0], shift, scale),
            _norm,
        )
    assert y.numel() > MORE
    assert_error_budget(y[:, -2:], function(*inputs), function(*(t.double() for t in inputs)), op)


def _residual_norm(x, branch, dx, dy, shift, scale):
    v = Rows(scale), Rows(shift)
    norm = Norm(False, None, None, v[1], v[0], 1e-6, x.dtype)
    gated = Branch(branch, v[0], False, True, None, 1e-6, x.dtype)
    x_new, y, stats = CUDA.residual_norm_modulate(x, gated, norm, None)
    needed = Needed(True, True, *[False] * 9)
    grads = CUDA.residual_norm_modulate_bwd(dx, dy, x_new, stats, gated, norm, None, x.dtype, needed)
    return x_new, y, grads.residual, grads.branch


def test_residual_norm_modulate():
    """The same numbers in the last rows of large tensors and in small ones."""
    D, draw = 2048, Draw(torch.bfloat16)
    large = [torch.empty(1, MORE // D + 3, D, dtype=torch.bfloat16) for _ in range(4)]
    ends = [t[:, -2:].copy_(draw.tokens(1, 2, D, mean=0.5)) for t in large]
    rows = draw.chunks(1, D, 2)
    got = _residual_norm(*large, *rows)
    with emulated.last_blocks(0):
        expected = _residual_norm(*ends, *rows)
    for a, b in zip(got, expected, strict=True):
        assert a.numel() > MORE
        # Only the last forward block ran: of the last row backward has what it reads.
        assert_bitwise_equal(a[:, -1:], b[:, -1:])


@pytest.mark.parametrize("layout", ("dense", "nhwc"))
def test_channel_rms_norm_silu(layout):
    C, W, draw = 8, 2**12, Draw(torch.bfloat16, layout)
    size = 1, C, MORE // (C * W) + 1, W
    x, dy = (torch.empty(size, dtype=torch.bfloat16) for _ in range(2))
    if layout == "nhwc":
        x, dy = (t.view(1, size[2], W, C).permute(0, 3, 1, 2) for t in (x, dy))
    ends = [t[:, :, -1:, -64:].copy_(draw.tensor(1, C, 1, 64)) for t in (x, dy)]
    weight = draw.vector(C, 1.0)

    def run(x, dy):
        y, rstd = CUDA.channel_rms_norm_silu(x, weight, None, 1e-6, False, None, None, True)
        return y, CUDA.channel_rms_norm_silu_bwd(dy, x, rstd, weight, None, None, None, True)[0]

    got = run(x, dy)
    with emulated.last_blocks(0):
        expected = run(*(t.clone() for t in ends))
    for a, b in zip(got, expected, strict=True):
        assert a.numel() > MORE
        assert_bitwise_equal(a[:, :, -1:, -64:], b)
