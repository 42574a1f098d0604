"""The tensor-core convolution, emulated: against eager in fp64 by the error budget, statistics, zero flag."""

import pytest
import torch
import torch.nn.functional as F

from zeroblock.backends.base import GroupNorm
from zeroblock.backends.cuda import CUDA
from zeroblock.backends.cuda_convs import MOST_NORMED, conv_takes
from zeroblock.testing import assert_bitwise_equal, assert_error_budget, poison_empty
from zeroblock.testing.draw import Draw

from .simt import emulated

MISSING = None if torch.cuda.is_available() else emulated.missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
DTYPES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=lambda d: str(d)[6:])
# N, C, K, H, W, kernel: one tile; ragged in pixels and channels, several tiles; wide tiles of 128 channels; 1x1.
SHAPES = {
    "one-tile": (1, 32, 64, 8, 16, 3),
    "ragged": (2, 40, 72, 9, 19, 3),
    "wide": (1, 48, 128, 5, 7, 3),
    "1x1": (2, 72, 40, 11, 17, 1),
    "1x1-one-pixel": (1, 8, 8, 1, 1, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def cuda():
    if torch.cuda.is_available():
        yield "cuda"
    else:
        with emulated.emulated(seed=3):
            yield "cpu"


def _inputs(shape, dtype, device, seed=0):
    N, C, K, H, W, kernel = shape
    draw = Draw(dtype, "nhwc", seed, device)
    weight = draw.normal(K, C, kernel, kernel, std=(C * kernel**2) ** -0.5).to(memory_format=torch.channels_last)
    return draw.tensor(N, C, H, W, mean=0.5, std=2.0), weight, draw.vector(K), draw.tensor(N, K, H, W)


def _eager(h, weight, bias, residual):
    y = F.conv2d(h, weight, bias, padding=weight.shape[2] // 2)
    return y if residual is None else residual + y


def _norm(x, groups, weight, bias, scale, shift):
    normed = F.group_norm(x, groups, weight, bias) * (1 + scale[..., None, None]) + shift[..., None, None]
    return F.silu(normed)


@DTYPES
@shapes
def test_conv_residual(cuda, shape, dtype):
    stacks = []
    for seed in range(3):
        inputs = _inputs(shape, dtype, cuda, seed)
        with poison_empty():
            y, _ = CUDA.conv_and_statistics(*inputs)
        assert y.is_contiguous(memory_format=torch.channels_last)
        stacks.append([y, _eager(*inputs), _eager(*(t.double() for t in inputs))])
    assert_error_budget(*(torch.stack(column) for column in zip(*stacks, strict=True)), "y", draws=True)


@DTYPES
@shapes
def test_group_norm_silu_conv_residual(cuda, shape, dtype):
    stacks = []
    for seed in range(3):
        x, weight, bias, residual = _inputs(shape, dtype, cuda, seed)
        C, groups = x.shape[1], x.shape[1] // 4
        draw = Draw(dtype, seed=seed + 100, device=cuda)
        norm = [draw.vector(C, 1.0), draw.vector(C), *draw.chunks(x.shape[0], C, 2)]
        with poison_empty():
            _, mean, rstd = CUDA.group_norm_silu(x, groups, *norm[:2], 1e-5, *norm[2:], True)
            whole = GroupNorm(groups, *norm[:2], 1e-5, *norm[2:], None, 0.0)
            y = CUDA.norm_conv(x, mean, rstd, whole, weight, bias, residual)

        def eager(x, weight, bias, residual, *norm, groups=groups):
            return _eager(_norm(x, groups, *norm), weight, bias, residual)

        inputs = (x, weight, bias, residual, *norm)
        stacks.append([y, eager(*inputs), eager(*(t.double() for t in inputs))])
    assert_error_budget(*(torch.stack(column) for column in zip(*stacks, strict=True)), "y", draws=True)


@shapes
def test_statistics_of_the_output(cuda, shape):
    stacks = {"mean": [], "rstd": []}
    for seed in range(3):
        x, weight, bias, residual = _inputs(shape, torch.bfloat16, cuda, seed)
        residual = residual + 30  # a mean far above the deviation
        with poison_empty():
            y, partial = CUDA.conv_and_statistics(x, weight, bias, residual, statistics=True)
            mean, rstd = CUDA.moments(y, partial, weight.shape[0] // 4, 1e-5)
        exact, eager = (y.to(dtype).reshape(*mean.shape, -1) for dtype in (torch.float64, torch.float32))
        stacks["mean"].append([mean, eager.mean(2), exact.mean(2)])
        stacks["rstd"].append([rstd, *((t.var(2, correction=0) + 1e-5).rsqrt() for t in (eager, exact))])
    for name, triples in stacks.items():
        assert_error_budget(*(torch.stack(column) for column in zip(*triples, strict=True)), name, draws=True)


@DTYPES
@shapes
def test_a_zero_branch_is_not_computed(cuda, shape, dtype):
    """With the flag set the input and the weight are not even read: NaN in both changes nothing."""
    x, weight, bias, residual = _inputs(shape, dtype, cuda)
    nan = torch.full_like(x, float("nan"))
    zero = CUDA.are_zero([torch.zeros_like(weight)])
    with poison_empty():
        y, partial = CUDA.conv_and_statistics(nan, weight * float("nan"), bias, residual, statistics=True, flag=zero)
    expected = (residual.float() + bias.float()[:, None, None]).to(dtype)
    assert_bitwise_equal(y, expected)
    mean, _ = CUDA.moments(y, partial, 1, 1e-5)
    assert torch.allclose(mean, y.float().mean((1, 2, 3))[:, None], atol=1e-5)
    y, _ = CUDA.conv_and_statistics(x, weight, bias, residual, flag=CUDA.are_zero([weight]))
    assert_bitwise_equal(y, CUDA.conv_and_statistics(x, weight, bias, residual)[0])


@pytest.mark.parametrize("residual", (False, True), ids=("", "residual"))
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
def test_bias_and_residual_alone(cuda, bias, residual):
    x, weight, b, r = _inputs(SHAPES["ragged"], torch.bfloat16, cuda)
    inputs = x, weight, b if bias else None, r if residual else None
    with poison_empty():
        y, _ = CUDA.conv_and_statistics(*inputs)
    exact = _eager(*(None if t is None else t.double() for t in inputs))
    assert_error_budget(y, _eager(*inputs), exact, "y")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=lambda d: str(d)[6:])
def test_operands_may_start_anywhere(cuda, dtype):
    """Slices of a flat buffer, as sharded and fused optimizers make them: none starts at 16 bytes."""

    def slice_of_flat(t):
        flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=cuda)[1:]
        return flat.as_strided(t.shape, t.stride()).copy_(t)

    x, weight, bias, residual = _inputs(SHAPES["ragged"], torch.bfloat16, cuda)
    aligned = x, weight, bias.to(dtype), residual
    moved = [slice_of_flat(t) for t in aligned]
    assert all(t.data_ptr() % 16 for t in moved)
    assert CUDA.why_not_own("conv_residual", moved[0], moved[1], None, moved[3], [1, 1]) is None
    assert_bitwise_equal(CUDA.conv_and_statistics(*moved)[0], CUDA.conv_and_statistics(*aligned)[0])


@pytest.mark.parametrize("kernel", (1, 3))
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's shared memory is as large as it is")
def test_the_widest_norm_in_front_fits_the_smallest_gpu(kernel, cuda):
    """99 KB for a block: sm_86, sm_89, sm_120."""
    x, weight, bias, residual = _inputs((1, MOST_NORMED, 128, 1, 1, kernel), torch.bfloat16, cuda)
    stat, norm = torch.zeros(1, 32), GroupNorm(32, None, None, 1e-5, None, None, None, 0.0)
    call = lambda: CUDA.norm_conv(x, stat, stat, norm, weight, bias, residual)  # noqa: E731
    with emulated.gpu(99 * 1024, 1):
        ((_, shared, _),) = emulated.recorded(call)
    assert 80 * 1024 < shared <= 99 * 1024 or kernel == 3
    assert CUDA.why_not_norm_conv(x) is None
    wider = torch.empty(1, MOST_NORMED + 8, 1, 1, device=cuda)
    assert "4104 channels are more than the 4096" in CUDA.why_not_norm_conv(wider)


def test_the_same_bits_in_any_order_of_threads_and_blocks(cuda):
    if cuda == "cuda":
        pytest.skip("needs the emulator's orders")
    inputs, results = _inputs(SHAPES["ragged"], torch.bfloat16, cuda), []
    for seed in (0, 1, 2):
        with emulated.emulated(seed):
            results.append(CUDA.conv_and_statistics(*inputs, statistics=True))
    for y, partial in results[1:]:
        assert_bitwise_equal(y, results[0][0])
        assert_bitwise_equal(partial, results[0][1])


def test_what_the_convolution_does_not_take_is_refused(cuda):
    x, weight, bias, residual = _inputs(SHAPES["one-tile"], torch.bfloat16, cuda)
    assert conv_takes(x, weight, [1, 1])
    assert not conv_takes(x, weight, [0, 0]) and not conv_takes(x.float(), weight.float(), [1, 1])
    for bad in (x.float(), x[:, :28]):
        with pytest.raises(RuntimeError, match="conv_residual: the CUDA kernel takes bfloat16 or float16"):
            CUDA.conv_and_statistics(bad, weight[:, : bad.shape[1]].to(bad.dtype), bias, residual)
