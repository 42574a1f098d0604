"""The ways there are of a convolution and a linear layer on the CPU, each compared with fp64."""

from __future__ import annotations

import pytest
import torch

import zeroblock as zb
from zeroblock import testing
from zeroblock.backends.select import select
from zeroblock.plan import planned as _plan
from zeroblock.plan.mode import allow_reduced
from zeroblock.steps.conv import CONV, ConvCall, unit_geometry
from zeroblock.steps.conv_bwd import CONV_BWD, ConvGradsCall, conv_grads
from zeroblock.steps.linear import LINEAR, LinearCall
from zeroblock.steps.packed import ONEDNN

from .cases import FakeTimer

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def backend():
    return select("conv_residual", torch.zeros(1))


def conv_arguments(layout, weight_layout, dtype, with_residual):
    g = torch.Generator().manual_seed(5)
    draw = lambda *s, scale=1.0: (torch.randn(*s, generator=g) * scale).to(DTYPES[dtype])  # noqa: E731
    h = draw(2, 17, 7, 11).to(memory_format=LAYOUTS[layout])
    weight = draw(13, 17, 3, 3, scale=0.1).to(memory_format=LAYOUTS[weight_layout])
    out = LAYOUTS["nhwc" if "nhwc" in (layout, weight_layout) else "nchw"]
    residual = draw(2, 13, 7, 11).to(memory_format=out) if with_residual else None
    return h, weight, draw(26)[::2], residual


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_a_convolution_is_right(layout, weight_layout, dtype, with_residual):
    h, weight, bias, residual = conv_arguments(layout, weight_layout, dtype, with_residual)
    kept = None if residual is None else residual.clone()
    call = ConvCall(backend(), h, weight, bias, residual, unit_geometry([1, 1]))
    eager = torch.conv2d(h, weight, bias, padding=1)
    exact = torch.conv2d(h.double(), weight.double(), bias.double(), padding=1)
    eager, exact = (eager, exact) if residual is None else (residual + eager, residual.double() + exact)
    takers = CONV.takers(call)
    expected = {"library", "other layout"}
    if layout == "nhwc" and with_residual and ONEDNN:
        expected.add("oneDNN residual")
    if backend().name == "cpu":
        expected.add("winograd 2x2" if dtype == "fp32" else "winograd 4x4")
    assert set(takers) == expected
    for name, candidate in takers.items():
        got = candidate.run(call)
        testing.assert_error_budget(got, eager, exact, name)
        assert got.stride() == eager.stride(), name
    if residual is not None:
        testing.assert_bitwise_equal(residual, kept, "residual")


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, False], [False, False, True]])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_a_convolutions_backward_is_right(layout, weight_layout, dtype, mask):
    h, weight, _, dy = conv_arguments(layout, weight_layout, dtype, True)
    call = ConvGradsCall(backend(), dy, h, weight, True, (1, 1), mask)
    eager = conv_grads(*call[1:])
    exact = conv_grads(dy.double(), h.double(), weight.double(), True, [1, 1], mask)
    takers = CONV_BWD.takers(call)
    worse = mask[0] if layout == "nchw" else mask[1]
    assert ("other layout" in takers) == (dtype == "bf16" or not worse)
    for name, candidate in takers.items():
        results = zip(("dh", "dweight", "dbias"), mask, candidate.run(call), eager, exact, strict=True)
        for what, asked, got, e, x in results:
            if asked:
                testing.assert_error_budget(got, e, x, f"{name} {what}")
                # A parameter's gradient may also be laid out as the parameter.
                assert got.stride() == e.stride() or (what == "dweight" and got.stride() == weight.stride()), name


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu", "silu"])
@pytest.mark.parametrize("features", [96, 1536])
def test_every_way_of_a_linear_layer_is_right(features, activation):
    from zeroblock.reference import apply_activation

    g = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((3, 41, features), (67, features), (67,)))
    weight /= features**0.5
    call = LinearCall(backend(), x, weight, bias, activation)
    eager = apply_activation(torch.nn.functional.linear(x, weight, bias), activation)
    exact = apply_activation(torch.nn.functional.linear(x.double(), weight.double(), bias.double()), activation)
    takers = LINEAR.takers(call)
    assert set(takers) == ({"library", "oneDNN"} if ONEDNN else {"library"})
    for name, candidate in takers.items():
        testing.assert_error_budget(candidate.run(call), eager, exact, name)


def test_float32_stays_with_the_more_exact_layout():
    """oneDNN's channels-last kernels add long float32 chains up with more error; the user may allow it."""
    h, w = torch.randn(1, 64, 8, 8), torch.randn(64, 64, 3, 3)
    geometry = unit_geometry([1, 1])
    there = lambda h, w: "other layout" in CONV.takers(ConvCall(backend(), h, w, None, None, geometry))  # noqa: E731
    assert not there(h, w)
    assert there(h.to(memory_format=torch.channels_last), w) and there(h.bfloat16(), w.bfloat16())
    assert there(h, w[:, :16]), "a short chain"
    with allow_reduced():
        assert there(h, w)


@pytest.mark.parametrize("dtype, layout", [("fp32", "nhwc"), ("bf16", "nchw")])
def test_measured_plans_of_a_whole_step_are_right(dtype, layout):
    """A ResBlock's half at a size that is measured: every step plans for itself, results and gradients as eager's."""
    g = torch.Generator().manual_seed(7)
    shapes = ((1, 64, 32, 32), (64,), (64,), (64, 64, 3, 3), (64,), (1, 64, 32, 32))
    draws = [torch.randn(*s, generator=g) * (0.05 if len(s) == 4 and s[2] == 3 else 1) for s in shapes]

    rounded = [t.to(DTYPES[dtype]) for t in draws]

    def grads(function, dtype):
        tensors = [t.to(dtype) for t in rounded]
        tensors = [t.to(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t for t in tensors]
        tensors = [t.detach().requires_grad_() for t in tensors]
        x, nw, nb, w, b, r = tensors
        y = function(x, 32, nw, nb, w, b, r)
        return [y.detach(), *torch.autograd.grad(y, tensors, torch.ones_like(y) / 64)]

    timer = FakeTimer(other_layout=0.1, library=0.5)
    with _plan.use(timer=timer):
        got = grads(zb.group_norm_silu_conv_residual, DTYPES[dtype])
        entries = dict(_plan.open_store().entries)
    from zeroblock import reference

    eager = grads(reference.group_norm_silu_conv_residual, DTYPES[dtype])
    exact = grads(reference.group_norm_silu_conv_residual, torch.float64)
    choices = {key.split()[0]: e.choice for key, e in entries.items()}
    expected = {"conv": "other layout", "conv_bwd": "other layout"}
    if backend().name == "cpu":
        expected |= {"norm_conv": "library", "norm_conv_bwd": "library"}
        expected["conv_bwd"] = "library" if dtype == "fp32" else "other layout"
    elif (dtype, layout) == ("fp32", "nhwc"):
        del expected["conv_bwd"]  # one way, nothing to choose
    assert choices == expected and any("training" in key for key in entries)
    names = ("y", "dx", "dnorm_weight", "dnorm_bias", "dweight", "dbias", "dresidual")
    for name, a, e, x in zip(names, got, eager, exact, strict=True):
        testing.assert_error_budget(a, e, x, name)


def test_explain_shows_candidates_and_times():
    h, w = torch.randn(1, 64, 32, 32).to(memory_format=torch.channels_last), torch.randn(64, 64, 3, 3)
    with _plan.use(timer=FakeTimer(library=0.002, other_layout=0.001)):
        before = zb.explain("conv_residual", h, w, None, h)
        assert "the first call will measure" in str(before)
        zb.conv_residual(h, w, None, h)
        after = zb.explain("conv_residual", h, w, None, h)
    assert after.plans[0].choice == "other layout" and after.plans[0].milliseconds["library"] == 2.0
    assert "plan conv: other layout (the fastest as measured)" in str(after) and "other layout: 1 ms" in str(after)
    assert "packed does not take it: the weight is not frozen, or not packed" in str(after)
    fused = zb.explain("group_norm_silu_conv_residual", h, 32, None, None, w)
    assert [p.step for p in fused.plans] == ["norm_conv", "conv"]
