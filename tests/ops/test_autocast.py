"""Under autocast: eager's dtypes; values and gradients as close to fp64 as eager's; gradients in their own dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import zeroblock as zb
from zeroblock import testing

from ..blocks.cases import CASES, PHASES, pair
from ..twins import assert_within_budget, redrawn, results

BLOCKS = [n for n, c in CASES.items() if c.half and "checkpoint-dropout" not in n]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _film(scale, shift):
    return 1 + scale[:, :, None, None], shift[:, :, None, None]


def _eager_group_norm_silu(x, w, b, scale, shift):
    scale, shift = _film(scale, shift)
    return F.silu(F.group_norm(x, 4, w, b) * scale + shift)


def _eager_modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _eager_rms(x, shift, scale):
    x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return x * (1 + scale[:, None]) + shift[:, None]


def _eager_gate_norm(residual, gate, branch, shift, scale):
    x = residual + gate[:, None] * branch
    return x, _eager_modulate(x, shift, scale)


def _eager_channel_rms(x, w, b, scale, shift):
    scale, shift = _film(scale, shift)
    x = F.normalize(x.float(), dim=1).to(x.dtype) * x.shape[1] ** 0.5
    return F.silu((x * w[:, None, None] + b[:, None, None]) * scale + shift)


_X, _C, _NC, _T, _BD = (2, 8, 6, 5), (8,), (2, 8), (2, 7, 8), (2, 8)
# (shapes, ours, eager's); parameters and modulation are fp32, as in a model trained under autocast.
FUNCTIONS: dict[str, tuple[tuple[tuple[int, ...], ...], Callable, Callable]] = {
    "group_norm_silu": (
        (_X, _C, _C, _NC, _NC),
        lambda x, w, b, scale, shift: zb.group_norm_silu(x, 4, w, b, scale=scale, shift=shift),
        _eager_group_norm_silu,
    ),
    "group_norm_silu_conv_residual": (
        (_X, _C, _C, (6, 8, 3, 3), (6,), (2, 6, 6, 5)),
        lambda x, nw, nb, w, b, r: zb.group_norm_silu_conv_residual(x, 4, nw, nb, w, b, r),
        lambda x, nw, nb, w, b, r: r + F.conv2d(F.silu(F.group_norm(x, 4, nw, nb)), w, b, padding=1),
    ),
    "group_norm_silu_conv_residual-none": (
        (_X, _C, _C, (6, 8, 3, 3), (6,)),
        lambda x, nw, nb, w, b: zb.group_norm_silu_conv_residual(x, 4, nw, nb, w, b),
        lambda x, nw, nb, w, b: F.conv2d(F.silu(F.group_norm(x, 4, nw, nb)), w, b, padding=1),
    ),
    "conv_residual": (
        (_X, (6, 8, 3, 3), (6,), (2, 6, 6, 5)),
        zb.conv_residual,
        lambda h, w, b, r: r + F.conv2d(h, w, b, padding=1),
    ),
    "conv_residual-none": (
        (_X, (6, 8, 3, 3)),
        lambda h, w: zb.conv_residual(h, w, None, None),
        lambda h, w: F.conv2d(h, w, padding=1),
    ),
    "channel_rms_norm_silu": (
        (_X, _C, _C, _NC, _NC),
        lambda x, w, b, scale, shift: zb.channel_rms_norm_silu(x, w, b, scale=scale, shift=shift),
        _eager_channel_rms,
    ),
    "layer_norm_modulate": ((_T, _BD, _BD), zb.layer_norm_modulate, _eager_modulate),
    "rms_norm_modulate": ((_T, _BD, _BD), zb.rms_norm_modulate, _eager_rms),
    "gate_residual": ((_T, _BD, _T), zb.gate_residual, lambda r, g, f: r + g[:, None] * f),
    "gate_residual_layer_norm_modulate": (
        (_T, _BD, _T, _BD, _BD),
        zb.gate_residual_layer_norm_modulate,
        _eager_gate_norm,
    ),
    "layer_norm_modulate_linear": (
        (_T, _BD, _BD, (6, 8), (6,)),
        zb.layer_norm_modulate_linear,
        lambda x, shift, scale, w, b: F.linear(_eager_modulate(x, shift, scale), w, b),
    ),
    "linear_gate_residual": (
        (_T, (6, 8), (6,), (2, 6), (2, 7, 6)),
        lambda h, w, b, g, r: zb.linear_gate_residual(h, w, b, g, r, activation="gelu_tanh"),
        lambda h, w, b, g, r: r + g[:, None] * F.linear(F.gelu(h, approximate="tanh"), w, b),
    ),
    "linear_gate_residual-no-gate": (
        (_T, (6, 8), (6,), (2, 7, 6)),
        lambda h, w, b, r: zb.linear_gate_residual(h, w, b, None, r, activation="silu"),
        lambda h, w, b, r: r + F.linear(F.silu(h), w, b),
    ),
}


def _tensors(name: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator) for s in FUNCTIONS[name][0]]


def _outputs(out) -> list[torch.Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def _run(function: Callable, tensors: list[torch.Tensor], autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of every input, taken outside autocast as training loops do."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        outputs = _outputs(function(*leaves))
    generator = torch.Generator().manual_seed(5)
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, leaves, dys)
    return {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {f"d{i}": g for i, g in enumerate(grads)}


# Eager's fp32 scale would promote a low-precision norm; these functions round once, to the dtype of x.
KEEP_DTYPE_OF_X = ("group_norm_silu", "channel_rms_norm_silu", "layer_norm_modulate", "rms_norm_modulate")


@pytest.mark.parametrize("low", [False, True], ids=["x-fp32", "x-low"])
@pytest.mark.parametrize("autocast", AUTOCAST)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_matches_eager(name, autocast, low):
    """The leading tensor (x, h, residual) comes in fp32 or, as from a convolution before it, in the autocast dtype."""
    _, ours, eagers = FUNCTIONS[name]
    dtype = AUTOCAST[autocast]
    tensors = _tensors(name)
    if low:
        tensors[0] = tensors[0].to(dtype)
    keep = name in KEEP_DTYPE_OF_X
    plainly = (lambda x, *rest: eagers(x, *rest).to(x.dtype)) if keep else eagers

    def sample(seed):
        drawn = redrawn(tensors, seed)
        exact = _run(eagers, [t.double() for t in drawn], None)
        return _run(ours, drawn, dtype), _run(plainly, drawn, dtype), exact

    assert_within_budget(sample)


class UnderAutocast(torch.nn.Module):
    """module, its forward under autocast."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *inputs):
        with torch.autocast("cpu", dtype=self.dtype):
            return self.module(*inputs)


@pytest.mark.parametrize("low", [False, True], ids=["x-fp32", "x-low"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("autocast", AUTOCAST)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_matches_eager(name, autocast, phase, low):
    """The dtypes of output and gradients are part of the comparison; parameters stay fp32."""
    dtype = AUTOCAST[autocast]
    block, oracle, inputs = pair(name, phase)
    if low:
        inputs[0] = inputs[0].to(dtype)
    ours, eagers = UnderAutocast(block, dtype), UnderAutocast(oracle, dtype)
    exact = torch.nn.ModuleDict({"module": copy.deepcopy(oracle).double()})
    exact.forward = exact["module"].forward

    def sample(seed):
        tensors = redrawn(inputs, seed)
        return results(ours, tensors), results(eagers, tensors), results(exact, [t.double() for t in tensors])

    assert_within_budget(sample)


@pytest.mark.parametrize("name", ["conv_residual", "linear_gate_residual", "group_norm_silu_conv_residual"])
def test_a_weight_that_underflows_in_the_autocast_dtype_is_skipped(name):
    """The values that are multiplied decide: 1e-9 is zero in fp16, as eager's own cast makes it."""
    _, ours, eagers = FUNCTIONS[name]
    tensors = _tensors(name)
    weight = next(t for t in tensors if t.dim() in (2, 4) and t.shape[:2] == (6, 8))
    weight.mul_(1e-9)
    testing.reset_counters()
    with torch.autocast("cpu", dtype=torch.float16):
        got, expected = ours(*tensors), eagers(*tensors)
    assert testing.counters()[name] == (0, 1)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_autocast_leaves_fp64_alone():
    for name, (shapes, ours, _) in FUNCTIONS.items():
        tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
        expected = _outputs(ours(*tensors))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = _outputs(ours(*tensors))
        for a, b in zip(got, expected, strict=True):
            testing.assert_bitwise_equal(a, b, name)
