"""The GEMM-shaped kernels in the repaired interpreter, against fp64 by the error budget."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
pytest.importorskip("ml_dtypes")

from . import interpret  # noqa: E402

interpret.install()

from zeroblock.kernels import _gemm  # noqa: E402
from zeroblock.kernels import conv_residual as conv  # noqa: E402
from zeroblock.kernels import group_norm_silu_conv_residual as folded  # noqa: E402
from zeroblock.kernels import linear_gate_residual as linear  # noqa: E402
from zeroblock.testing import assert_bitwise_equal, assert_error_budget, poison_empty  # noqa: E402
from zeroblock.testing.draw import Draw  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, Cin, H, W, Cout, kernel, padding: primes, channels that fill no tile, an image smaller than a tile, one much wider.
CONVS = ((2, 24, 7, 5, 40, (3, 3), (1, 1)), (1, 67, 3, 53, 37, (1, 1), (0, 0)), (3, 16, 11, 2, 130, (3, 1), (2, 0)))
PLANS = ("chosen", "largest", "middle", "split")
# Layouts are settled before a kernel is launched, whatever its plan.
LAYOUTS = [*(("nhwc", plan) for plan in PLANS), ("dense", "chosen"), ("strided", "chosen")]
ZERO = torch.ones(1, dtype=torch.bool)


def plan_of(name, dtype, shipped=_gemm.configs):
    configs = shipped(dtype)
    return {
        "chosen": None,
        "largest": (configs[0], 1),
        "middle": (configs[len(configs) // 2], 1),
        "split": (configs[-1], 3),
    }[name]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(_gemm, "precision", lambda dtype, setting: "ieee")


def conv_inputs(case, dtype, layout):
    N, C, H, W, O, kernel, padding = case  # noqa: E741
    draw = Draw(dtype, layout)
    x, weight = draw.tensor(N, C, H, W), draw.normal(O, C, *kernel, std=(C * kernel[0] * kernel[1]) ** -0.5)
    P, Q = H + 2 * padding[0] - kernel[0] + 1, W + 2 * padding[1] - kernel[1] + 1
    return x, weight, draw.vector(O), draw.tensor(N, O, P, Q), list(padding)


@pytest.mark.parametrize(("layout", "plan"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONVS)
def test_conv_residual(case, dtype, layout, plan):
    x, weight, bias, residual, padding = conv_inputs(case, dtype, layout)

    def eager(x, weight, bias, residual):
        return residual + F.conv2d(x, weight, bias, padding=padding)

    operands = (x, weight, bias, residual)
    with poison_empty():
        y = conv.conv_residual(*operands, padding, plan=plan_of(plan, dtype))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_error_budget(y, eager(*operands), eager(*(t.double() for t in operands)))
    with poison_empty(), interpret.program_order(3):
        again = conv.conv_residual(*operands, padding, plan=plan_of(plan, dtype))
    assert_bitwise_equal(again, y)
    with poison_empty():
        skipped = conv.conv_residual(x * float("nan"), weight, bias, residual, padding, ZERO, plan_of(plan, dtype))
        bare = conv.conv_residual(x, weight, None, None, padding, ZERO, plan_of(plan, dtype))
    assert_bitwise_equal(skipped, residual + (bias + 0.0)[:, None, None])
    assert_bitwise_equal(bare, torch.zeros_like(bare))


@pytest.mark.parametrize(("dtype", "config"), [(dtype, c) for dtype in DTYPES for c in _gemm.configs(dtype)])
@pytest.mark.parametrize("case", CONVS)
def test_conv_residual_gradients(case, dtype, config):
    x, weight, _, dy, padding = conv_inputs(case, dtype, "nhwc")

    def eager(dy, x, weight):
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
        )

    with poison_empty(), interpret.program_order(1):
        own = [conv.conv_dgrad(dy, weight, padding, plan=(config, 1))]
        if dtype != torch.float32:
            own.append(conv.conv_wgrad(dy, x, weight.shape, padding, config))
    exact = eager(dy.double(), x.double(), weight.double())
    for name, got, expected, reference in zip(("dx", "dweight"), own, eager(dy, x, weight), exact, strict=False):
        assert_error_budget(got, expected, reference, name)
    assert not conv.conv_dgrad(dy, weight, padding, ZERO).any()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("film", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONVS[:2])
def test_group_norm_silu_conv_residual(case, dtype, film, plan):
    x, weight, bias, residual, padding = conv_inputs(case, dtype, "nhwc")
    x += 3
    C = x.shape[1]
    groups = 8 if C % 8 == 0 else C
    draw = Draw(dtype, seed=1)
    norm = [draw.vector(C, mean=1.0), draw.vector(C)]
    film = draw.chunks(x.shape[0], C, 2) if film else [None, None]

    def eager(x, weight, bias, residual, norm_weight, norm_bias, scale, shift):
        z = F.group_norm(x, groups, norm_weight, norm_bias, 1e-5)
        if scale is not None:
            z = z * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return residual + F.conv2d(F.silu(z), weight, bias, padding=padding)

    operands = (x, weight, bias, residual, *norm, *film)
    double = [None if t is None else t.double() for t in operands]
    arguments = (x, groups, *norm, 1e-5, *film, weight, bias, residual, padding)
    with poison_empty():
        y, mean, rstd = folded.group_norm_silu_conv_residual(
            *arguments, plan=plan_of(plan, dtype, _gemm.folding_configs)
        )
        skipped, *zeros = folded.group_norm_silu_conv_residual(*arguments, ZERO)
    assert_error_budget(y, eager(*operands), eager(*double))
    grouped = double[0].reshape(len(x), groups, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (grouped.var(-1, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=0)
    assert_bitwise_equal(skipped, residual + (bias + 0.0)[:, None, None])
    assert not any(t.any() for t in zeros)


@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue_statistics_are_those_of_the_next_norm(dtype):
    """With an offset of 100 a sum of squares would have lost every digit of the variance."""
    x, weight, bias, residual, padding = conv_inputs(CONVS[0], dtype, "nhwc")
    config = _gemm.configs(dtype)[-1]
    residual += 100
    y, partial = conv.run(x, weight, bias, residual, padding, want_partial=True, plan=(config, 1))
    mean, rstd, _ = folded.statistics(partial, config.BM, y[0, 0].numel(), 5, None, None, 1e-5)
    grouped = y.double().reshape(len(y), 5, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (grouped.var(-1, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("layout", "plan"), [("dense", plan) for plan in PLANS] + [("strided", "chosen")])
@pytest.mark.parametrize("gate", ("bd", "btd", "d", "one", None))
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gate_residual(dtype, layout, gate, plan):
    B, T, K, D = 2, 37, 150, 70
    draw = Draw(dtype, layout)
    h, residual, weight, bias = draw.tokens(B, T, K), draw.tokens(B, T, D), draw.normal(D, K, std=0.1), draw.vector(D)
    g = None if gate is None else draw.gate(gate, B, T, D)

    def eager(h, weight, bias, g, residual):
        branch = F.linear(h, weight, bias)
        if g is not None:
            g = g[:, None] if g.dim() == 2 else g
        return residual + (branch if g is None else g * branch), branch

    operands = (h, weight, bias, g, residual)
    exact = eager(*(None if t is None else t.double() for t in operands))
    with poison_empty(), interpret.program_order(2):
        results = linear.linear_gate_residual(*operands, save_branch=True, plan=plan_of(plan, dtype))
        skipped = linear.linear_gate_residual(
            h * float("nan"), *operands[1:], ZERO, save_branch=True, plan=plan_of(plan, dtype)
        )
    for name, got, expected, reference in zip(("y", "branch"), results, eager(*operands), exact, strict=True):
        assert_error_budget(got, expected, reference, name)
    operands = (torch.zeros_like(h), torch.zeros_like(weight), *operands[2:])
    zero, exact = eager(*operands), eager(*(None if t is None else t.double() for t in operands))
    assert_error_budget(skipped[0], zero[0], exact[0])
    assert_bitwise_equal(skipped[1], zero[1])


def test_tf32_only_where_the_flag_allows_it(monkeypatch):
    monkeypatch.undo()
    for setting, precision in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")):
        assert _gemm.precision(torch.float32, setting) == precision
    assert _gemm.precision(torch.bfloat16, "tf32") == "ieee"
    x, weight = torch.randn(1, 32, 8, 8), torch.randn(16, 32, 1, 1)
    exact, errors = F.conv2d(x.double(), weight.double()), {}
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        errors[allowed] = ((conv.conv_residual(x, weight, None, None, [0, 0]) - exact).norm() / exact.norm()).item()
    assert errors[True] > 1e-5 > 1e-6 > errors[False]


def test_refusals():
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 3, 3)
    assert conv.why_not(x, weight) is None and linear.why_not(x[:, :, 0], weight[:, :4, 0, 0]) is None
    assert "2-D" in conv.why_not(x[..., 0], weight[..., 0])
    assert "groups" in conv.why_not(x, weight[:, :4])
    assert "float64" in conv.why_not(x.double(), weight.double())
    assert "9 times" in folded.why_not(x, weight) and folded.why_not(x, weight[:, :, :1, :1]) is None
    assert "dropout" in folded.why_not(x, weight[:, :, :1, :1], keep=x)
    assert "tokens" in linear.why_not(x[0, 0], weight[:, :4, 0, 0], gate=x[0, 0])
    with pytest.raises(ValueError, match="conv_wgrad: dtype must be bf16 or fp16, got torch.float32"):
        conv.conv_wgrad(x, x, weight.shape, [1, 1])
    with pytest.raises(ValueError, match=r"2\^31"):
        _gemm.check_size("conv_residual", 2**31, 8)
    with pytest.raises(ValueError, match=r"2\^24"):
        _gemm.check_size("linear_gate_residual", 8, 2**24)
