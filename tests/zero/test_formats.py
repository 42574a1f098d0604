"""Memory formats: zero or dense, the result of an op is laid out as eager's, and so are its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._prims_common import suggest_memory_format

import zeroblock as zb
from zeroblock import _layout
from zeroblock.backends.select import select
from zeroblock.plan import mode
from zeroblock.steps.conv import CONV as CONV_STEP
from zeroblock.steps.conv import ConvCall, conv_layout, unit_geometry

from ..formats import LAYOUTS, SPACE, TOKENS, assert_format, formats, last, layouts, weight_layouts

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# ---- torch's own rules, as zeroblock knows them ---------------------------------------------------------------------


@pytest.mark.parametrize("flat", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 4, 5), (2, 3, 1, 5), (1, 1, 1, 4)])
def test_a_format_is_known_from_strides_as_torch_knows_it(flat):
    for size, name in itertools.product((flat, (*flat[:3], 3, flat[3])), LAYOUTS):
        x = LAYOUTS[name](torch.randn(size))
        wanted = suggest_memory_format(x)
        assert (_layout.channels_last_format(x) or torch.contiguous_format) == wanted, (size, name, x.stride())
        dense = _layout.in_layout(x, _layout.channels_last_format(x))
        assert torch.equal(dense, x) and suggest_memory_format(dense) == wanted and _layout.is_dense(dense)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_convolutions_format_is_known_before_it_runs(dims, dtype):
    for batch, channels, out, kernel in itertools.product((1, 2, 17), (1, 4, 32), (1, 8), (1, 3)):
        if dims == 3 and batch == 17 and channels == 32:
            continue
        h0, w0 = torch.randn(batch, channels, *SPACE[dims]), torch.randn(out, channels, *(kernel,) * dims)
        for name, weights in itertools.product(layouts(dims, channels), weight_layouts(dims)):
            h, w = LAYOUTS[name](h0).to(dtype), LAYOUTS[weights](w0).to(dtype)
            padding = (kernel // 2,) * dims
            y = CONV[dims](h, w, padding=padding)
            layout = conv_layout(h, w, unit_geometry(padding))
            assert_format(torch.empty_like(y, memory_format=layout or torch.contiguous_format), y, (name, weights))


# ---- the ops --------------------------------------------------------------------------------------------------------


def conv_alone(ns, x, w, b, residual):
    if ns is zb:
        return zb.conv_residual(x, w, b, residual)
    y = CONV[x.dim() - 2](x, w, b, padding=1)
    return y if residual is None else residual + y


def norm_and_conv(ns, x, w, b, residual):
    if ns is zb:
        return zb.group_norm_silu_conv_residual(x, 1, None, None, w, b, residual)
    return conv_alone(None, F.silu(F.group_norm(x, 1)), w, b, residual)


def run(call, ns, tensors):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    with torch.no_grad():
        results = [call(ns, *leaves)]
    y = call(ns, *leaves)
    x, w, *_ = leaves
    # What eager gives a norm's input and a convolution's operands; sums (of the residual) it leaves as they come.
    return [*results, y.detach(), *torch.autograd.grad(y, (x, w), torch.ones_like(y))]


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("op", [conv_alone, norm_and_conv])
def test_ops(op, dims, dtype, phase):
    for channels, out in ((4, 4), (1, 4), (4, 1)):
        x0, r0 = torch.randn(2, channels, *SPACE[dims]), torch.randn(2, out, *SPACE[dims])
        w0 = torch.randn(out, channels, *(3,) * dims) * (phase == "dense")
        for first, weights in itertools.product(layouts(dims, channels), weight_layouts(dims)):
            x, w, b = LAYOUTS[first](x0).to(dtype), LAYOUTS[weights](w0).to(dtype), torch.randn(out).to(dtype)
            for second in (None, *LAYOUTS):
                if "from an image" in (first, second) and first != second:
                    continue
                residual = None if second is None else LAYOUTS[second](r0).to(dtype)
                results = [run(op, ns, (x, w, b, residual)) for ns in (zb, None)]
                formats(results, (op.__name__, channels, out, first, weights, second), outputs=2)


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("op", [conv_alone, norm_and_conv])
def test_ops_on_one_pixel(op, phase):
    """Both formats at once: what the strides say decides about the next, larger result."""
    for spatial, padding in itertools.product(((1, 1), (1, 5), (5, 1)), ("contiguous", "channels-last")):
        x0, w0 = torch.randn(2, 4, *spatial), torch.randn(4, 4, 3, 3) * (phase == "dense")
        for first, second in itertools.product(("contiguous", "channels-last", "half of the channels"), repeat=2):
            x, w, r = LAYOUTS[first](x0), LAYOUTS[padding](w0), LAYOUTS[second](x0 * 2)
            results = [run(op, ns, (x, w, None, r)) for ns in (zb, None)]
            formats(results, (op.__name__, spatial, first, padding, second), outputs=2)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_group_norm_silu(dims, dtype):
    for channels, name in itertools.product((1, 4), LAYOUTS):
        x = LAYOUTS[name](torch.randn(2, channels, *SPACE[dims])).to(dtype)
        results = []
        for call in (zb.group_norm_silu, lambda x, n: F.silu(F.group_norm(x, n))):
            leaf = x.detach().requires_grad_()
            y = call(leaf, 1)
            results.append([y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))])
        formats(results, (channels, name), outputs=1)


@pytest.mark.parametrize("view", [False, True], ids=["flatten", "view"])
def test_flattening_works_before_and_after_the_first_step(view):
    """Or never: fp16 volumes come back contiguous where torch has no channels-last kernel for them."""
    x = torch.randn(2, 4, 3, 4, 6).half()
    w = last(torch.randn(4, 4, 3, 3, 3).half())
    found = []
    for weight in (w, torch.zeros_like(w)):
        y = zb.conv_residual(x, weight, None, None)
        try:
            found.append((y.view if view else y.reshape)(2, 4, -1).shape)
        except RuntimeError as error:
            found.append(str(error))
    assert found[0] == found[1]


@pytest.mark.parametrize("gate", [None, "row", "token"])
@pytest.mark.parametrize("layout", TOKENS)
def test_linear_gate_residual_gives_contiguous_tokens(layout, gate):
    """Of a transposed residual too, where eager goes on with transposed tokens and copies them before every norm."""
    torch.manual_seed(0)
    h, r = TOKENS[layout](torch.randn(2, 5, 8)), TOKENS[layout](torch.randn(2, 5, 6))
    g = {None: None, "row": torch.randn(2, 6), "token": torch.randn(2, 5, 6)}[gate]
    for weight in (torch.zeros(6, 8), torch.randn(6, 8)):
        for residual in (None, r):
            assert zb.linear_gate_residual(h, weight, torch.randn(6), g, residual).is_contiguous()


# ---- every way of a convolution -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(
    "channels, out, spatial", [(32, 32, (6, 8)), (32, 1, (6, 8)), (1, 32, (6, 8)), (32, 32, (1, 1))]
)
def test_every_way_gives_eagers_format(channels, out, spatial, frozen):
    """Whatever is measured to be fastest: the format is not to depend on it."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, out, 3, padding=1)
    ran = set()
    for weights, first, second in itertools.product(("contiguous", "channels-last"), LAYOUTS, (None, *LAYOUTS)):
        x, r = torch.randn(2, channels, *spatial), torch.randn(2, out, *spatial)
        if "from an image" in (first, second):
            continue
        layer.weight = nn.Parameter(LAYOUTS[weights](layer.weight.detach()).clone(memory_format=torch.preserve_format))
        if frozen:
            zb.freeze(layer)
        x, residual = LAYOUTS[first](x), None if second is None else LAYOUTS[second](r)
        with torch.no_grad(), mode.allow_reduced():
            eager = F.conv2d(x, layer.weight, layer.bias, padding=1)
            eager = eager if residual is None else residual + eager
            call = ConvCall(select("conv_residual", x), x, layer.weight, layer.bias, residual, unit_geometry((1, 1)))
            for name, way in CONV_STEP.takers(call).items():
                ran.add(name)
                got = way.run(call)
                assert_format(got, eager, (name, weights, first, second))
                torch.testing.assert_close(got, eager, rtol=1e-3, atol=1e-3)
        zb.unfreeze(layer)
    assert {"library", "other layout"} <= ran and (frozen <= ("packed" in ran)), ran
