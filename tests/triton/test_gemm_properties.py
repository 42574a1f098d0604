"""Drawn shapes, dtypes, layouts and plans for the GEMM-shaped kernels and their gradients, against fp64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
pytest.importorskip("ml_dtypes")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from . import interpret  # noqa: E402

interpret.install()

from zeroblock.kernels import _gemm  # noqa: E402
from zeroblock.kernels import conv_residual as conv  # noqa: E402
from zeroblock.kernels import group_norm_silu_conv_residual as folded  # noqa: E402
from zeroblock.kernels import linear_gate_residual as linear  # noqa: E402
from zeroblock.testing import assert_bitwise_equal, assert_error_budget, poison_empty  # noqa: E402
from zeroblock.testing.draw import Draw  # noqa: E402

drawn = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
layouts = st.sampled_from(("dense", "nhwc", "strided"))


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(_gemm, "precision", lambda dtype, setting: "ieee")


@st.composite
def plans(draw, dtype, shipped=_gemm.configs):
    """Any shipped configuration, the reduction in any number of parts; None: the kernel's own choice."""
    config = draw(st.sampled_from((None, *shipped(dtype))))
    return None if config is None else (config, draw(st.integers(1, 5)))


@st.composite
def convolutions(draw, most_taps=3):
    """(N, C, H, W, O, kernel, padding): the image is at least as large as the kernel."""
    kernel = draw(st.integers(1, most_taps)), draw(st.integers(1, most_taps))
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    H, W = (draw(st.integers(max(1, k - 2 * p), 13)) for k, p in zip(kernel, padding, strict=True))
    return draw(st.integers(1, 3)), draw(st.integers(1, 80)), H, W, draw(st.integers(1, 140)), kernel, padding


def operands(case, dtype, layout):
    N, C, H, W, O, kernel, padding = case  # noqa: E741
    draw = Draw(dtype, layout)
    weight = draw.normal(O, C, *kernel, std=(C * kernel[0] * kernel[1]) ** -0.5)
    P, Q = H + 2 * padding[0] - kernel[0] + 1, W + 2 * padding[1] - kernel[1] + 1
    return draw.tensor(N, C, H, W), weight, draw.vector(O), draw.tensor(N, O, P, Q), list(padding)


def budget(got, eager, *tensors):
    """`got` and eager's results on the tensors, both against eager's in fp64."""
    exact = eager(*(None if t is None else t.double() for t in tensors))
    for mine, theirs, reference in zip(got, eager(*tensors), exact, strict=False):
        assert_error_budget(mine, theirs, reference)


@drawn
@given(st.data())
def test_conv_residual(data):
    dtype = data.draw(dtypes)
    x, weight, bias, residual, padding = operands(data.draw(convolutions()), dtype, data.draw(layouts))
    bias = data.draw(st.sampled_from((bias, None)))
    residual = data.draw(st.sampled_from((residual, None)))
    plan = data.draw(plans(dtype))
    with poison_empty(), interpret.program_order(data.draw(st.integers(0, 9))):
        y = conv.conv_residual(x, weight, bias, residual, padding, plan=plan)

    def eager(x, weight, bias, residual):
        y = F.conv2d(x, weight, bias, padding=padding)
        return (y if residual is None else residual + y,)

    budget([y], eager, x, weight, bias, residual)


@drawn
@given(st.data())
def test_conv_residual_gradients(data):
    dtype = data.draw(dtypes)
    x, weight, _, dy, padding = operands(data.draw(convolutions()), dtype, data.draw(layouts))
    with poison_empty(), interpret.program_order(data.draw(st.integers(0, 9))):
        own = [conv.conv_dgrad(dy, weight, padding)]
        if dtype != torch.float32:
            own.append(conv.conv_wgrad(dy, x, weight.shape, padding))

    def eager(dy, x, weight):
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
        )

    budget(own, eager, dy, x, weight)


@drawn
@given(st.data())
def test_group_norm_silu_conv_residual(data):
    dtype = data.draw(dtypes)
    groups, per_group = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    N, _, H, W, *rest = data.draw(convolutions(2))
    # A group of few numbers may have so small a variance that the norm magnifies the rounding of its inputs.
    case = (N, groups * per_group, H + 4, W + 4, *rest)
    x, weight, bias, residual, padding = operands(case, dtype, data.draw(layouts))
    draw = Draw(dtype, seed=1)
    norm = [draw.vector(x.shape[1], mean=1.0), draw.vector(x.shape[1])]
    plan = data.draw(plans(dtype, _gemm.folding_configs))
    with poison_empty(), interpret.program_order(data.draw(st.integers(0, 9))):
        y, *_ = folded.group_norm_silu_conv_residual(
            x, groups, *norm, 1e-5, None, None, weight, bias, residual, padding, plan=plan
        )

    def eager(x, weight, bias, residual, norm_weight, norm_bias):
        h = F.silu(F.group_norm(x, groups, norm_weight, norm_bias, 1e-5))
        return (residual + F.conv2d(h, weight, bias, padding=padding),)

    budget([y], eager, x, weight, bias, residual, *norm)


@drawn
@given(st.data())
def test_linear_gate_residual(data):
    dtype = data.draw(dtypes)
    B, T, K, D = (data.draw(st.integers(1, most)) for most in (3, 40, 200, 140))
    draw = Draw(dtype, data.draw(st.sampled_from(("dense", "strided"))))
    h, residual, weight, bias = draw.tokens(B, T, K), draw.tokens(B, T, D), draw.normal(D, K, std=0.1), draw.vector(D)
    kind = data.draw(st.sampled_from(("bd", "btd", "d", "one", None)))
    gate = None if kind is None else draw.gate(kind, B, T, D)
    bias, residual = (data.draw(st.sampled_from((t, None))) for t in (bias, residual))
    plan = data.draw(plans(dtype))
    with poison_empty(), interpret.program_order(data.draw(st.integers(0, 9))):
        results = linear.linear_gate_residual(h, weight, bias, gate, residual, save_branch=True, plan=plan)

    def eager(h, weight, bias, gate, residual):
        branch = F.linear(h, weight, bias)
        y = branch if gate is None else (gate[:, None] if gate.dim() == 2 else gate) * branch
        return y if residual is None else residual + y, branch

    budget(results, eager, h, weight, bias, gate, residual)


@drawn
@given(st.data())
def test_zero_path(data):
    """Nothing of the branch is read: residual + bias, bit by bit, whatever the shape and the plan."""
    dtype = data.draw(dtypes)
    x, weight, bias, residual, padding = operands(data.draw(convolutions()), dtype, "nhwc")
    flag, plan = torch.ones(1, dtype=torch.int32), data.draw(plans(dtype))
    with poison_empty():
        y = conv.conv_residual(x * float("nan"), weight, bias, residual, padding, flag, plan)
    assert_bitwise_equal(y, residual + (bias + 0.0)[:, None, None])
