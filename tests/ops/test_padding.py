"""Padding of each side, repeated edges and cached frames, against torch's own padding in fp64; what is copied for it;
and convolutions of video as sums over time."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.profiler import profile

import zeroblock as zb
from zeroblock.backends.select import select
from zeroblock.steps.conv import CONV, ConvCall, unit_geometry
from zeroblock.steps.conv_bwd import CONV_BWD, ConvGradsCall, conv_grads
from zeroblock.testing import assert_error_budget, counters, eager_ops, reset_counters

FIRST = ("replicate", "zeros", "zeros")
PADDINGS = {
    "causal zeros": (((2, 0), 1, 1), "zeros"),
    "causal repeated": (((2, 0), (1, 1), (1, 1)), "replicate"),
    "first frame": (((2, 0), 1, 1), FIRST),
    "both ends repeated": ((1, 1, 1), FIRST),
    "anticausal": (((0, 2), (1, 0), (0, 2)), "zeros"),
    "beyond the kernel": (((4, 0), 1, 1), FIRST),
    "same on both sides": (((1, 1), (1, 1), (1, 1)), "zeros"),
    "in space alone": ((1, 1, 1), ("zeros", "replicate", "replicate")),
}


def _draw(frames: int, layout: torch.memory_format, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(frames)
    sizes = (2, 4, frames, 5, 6), (3, 4, 3, 3, 3), (3,)
    h, weight, bias = (torch.randn(size, generator=g).to(dtype) for size in sizes)
    return [t.requires_grad_() for t in (h.to(memory_format=layout), weight, bias)]


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last_3d))
@pytest.mark.parametrize("name", PADDINGS)
def test_result_and_gradients_are_those_of_a_padded_copy(name, layout):
    """For as many frames as edges overlap, and more."""
    padding, mode = PADDINGS[name]
    for frames in (1, 2, 3, 6):
        h, weight, bias = _draw(frames, layout)
        expected = eager_ops.conv_residual(h, weight, bias, None, padding, mode) if _fits(h, padding) else None
        if expected is None:
            with pytest.raises(ValueError, match="fit into the padded input"):
                zb.conv_residual(h, weight, bias, None, padding=padding, padding_mode=mode)
            continue
        residual = torch.randn_like(expected).requires_grad_()
        for added, wanted in ((None, (h, weight, bias)), (residual, (h, weight, bias, residual))):
            y = zb.conv_residual(h, weight, bias, added, padding=padding, padding_mode=mode)
            z = expected if added is None else expected + added
            assert y.shape == z.shape and y.stride() == z.stride()
            torch.testing.assert_close(y, z)
            ours = torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
            theirs = torch.autograd.grad(z, wanted, torch.ones_like(z), retain_graph=True)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)


def _fits(h: Tensor, padding) -> bool:
    front, back = (padding[0],) * 2 if isinstance(padding[0], int) else padding[0]
    return h.shape[2] + front + back >= 3


def test_the_fused_op_pads_what_is_activated():
    h, weight, bias = _draw(4, torch.contiguous_format)
    padding, mode = PADDINGS["first frame"]
    a = F.silu(F.group_norm(h, 2))
    expected = eager_ops.conv_residual(a, weight, bias, None, padding, mode)
    y = zb.group_norm_silu_conv_residual(h, 2, None, None, weight, bias, padding=padding, padding_mode=mode)
    torch.testing.assert_close(y, expected)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (h, weight, bias)) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pieces", ([1, 2, 3], [4, 1, 1], [6]))
def test_pieces_with_cached_frames_are_the_whole(pieces):
    h, weight, bias = _draw(6, torch.contiguous_format)
    whole = zb.conv_residual(h, weight, bias, None, padding=((2, 0), 1, 1))
    seen, ys = None, []
    for piece in h.split(pieces, 2):
        cache = None if seen is None else seen[:, :, -2:]  # of one frame after a first piece of one
        ys.append(zb.conv_residual(piece, weight, bias, None, padding=((2, 0), 1, 1), conv_cache=cache))
        seen = piece if seen is None else torch.cat([seen, piece], 2)
    got = torch.cat(ys, 2)
    torch.testing.assert_close(got, whole)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (h, weight, bias)) for t in (got, whole)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_zero_weight_is_not_executed():
    h, _, bias = _draw(4, torch.contiguous_format, torch.float32)
    weight, residual = torch.zeros(3, 4, 3, 3, 3, requires_grad=True), torch.randn(2, 3, 4, 5, 6)
    expected = eager_ops.conv_residual(h, weight, bias, residual, *PADDINGS["first frame"])
    reset_counters()
    y = zb.conv_residual(h, weight, bias, residual, padding=((2, 0), 1, 1), padding_mode=FIRST)
    assert counters()["conv_residual"] == (0, 1) and torch.equal(y, expected)
    ours, theirs = (torch.autograd.grad(t.square().sum(), (h, weight, bias)) for t in (y, expected))
    assert torch.equal(ours[0], theirs[0]) and not ours[0].any()
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-4, atol=1e-4)


def _largest(call) -> int:
    call()
    with profile(profile_memory=True) as found:
        call()
    return max(e.nbytes() for e in found.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("mode", ["zeros", FIRST])
def test_nothing_is_padded_in_time(mode):
    """No allocation is larger than the result: a padded copy would be."""
    h, weight = torch.randn(2, 16, 6, 24, 24), torch.randn(16, 16, 3, 3, 3)
    call = lambda: zb.conv_residual(h, weight, None, h, padding=((2, 0), 1, 1), padding_mode=mode)  # noqa: E731
    assert _largest(call) <= h.numel() * 4
    padded = lambda: eager_ops.conv_residual(h, weight, None, h, ((2, 0), 1, 1), mode)  # noqa: E731
    assert _largest(padded) > h.numel() * 4


BAD = {
    "three sides": ({"padding": ((1, 1, 1), 1, 1)}, TypeError, "padding must be an int or 3 of them, or of pairs"),
    "negative": ({"padding": ((2, -1), 1, 1)}, ValueError, "padding must be >= 0"),
    "another mode": ({"padding_mode": "reflect"}, ValueError, "padding_mode must be one of 'zeros', 'replicate'"),
    "two modes": (
        {"padding_mode": ("zeros", "zeros")},
        ValueError,
        "padding_mode must be 'zeros' or 'replicate', or 3",
    ),
    "too large": ({"padding": ((0, 0), 1, 1)}, ValueError, "fit into the padded input"),
    "a long cache": ({"conv_cache": torch.zeros(2, 4, 3, 5, 6)}, ValueError, "at most as many frames as the padding"),
    "another cache": ({"conv_cache": torch.zeros(2, 4, 1, 5, 5)}, ValueError, "conv_cache must have shape"),
    "no frames": (
        {"padding_mode": "replicate", "padding": ((3, 0), 1, 1), "h": torch.zeros(2, 4, 0, 5, 6)},
        ValueError,
        "at least one element",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_padding(name):
    change, error, message = BAD[name]
    given = {"h": torch.zeros(2, 4, 2, 5, 6), "padding": ((2, 0), 1, 1)} | change
    with pytest.raises(error, match=message):
        zb.conv_residual(**given, weight=torch.zeros(3, 4, 3, 3, 3), bias=None, residual=None)


# ---- sums over time -------------------------------------------------------------------------------------------------

LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)


@pytest.mark.parametrize("padding", ([0, 1, 1], [1, 1, 1], [1, 0, 0]))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sum_over_time_is_the_convolution(layout, padding):
    """In the error budget, in eager's layout, with and without a residual; and its gradients."""
    backend = select("conv_residual", torch.zeros(1))
    g = torch.Generator().manual_seed(0)
    for samples, kernel in itertools.product((1, 2), (3, 1)):
        pads = [padding[0] if kernel == 3 else 0, *padding[1:]]
        h = torch.randn(samples, 33, 5, 9, 8, generator=g).to(memory_format=layout)
        weight = torch.randn(34, 33, kernel, 3, 3, generator=g) * 0.05
        bias = torch.randn(34, generator=g)
        eager, exact = (F.conv3d(*(t.to(d) for t in (h, weight, bias)), padding=pads) for d in (h.dtype, torch.double))
        residual = torch.randn(eager.shape, generator=g).to(memory_format=layout)
        for added in (None, residual):
            call = ConvCall(backend, h, weight, bias, added, unit_geometry(pads))
            takers = CONV.takers(call)
            if backend.name != "cpu":
                assert "sum over time" not in takers
                return
            y, sums = takers["sum over time"].run(call), [t if added is None else added + t for t in (eager, exact)]
            assert_error_budget(y, *sums)
            assert y.stride() == sums[0].stride()
        dy = torch.randn(eager.shape, generator=g).to(memory_format=layout)
        for mask in ((True, True, True), (True, False, False), (False, True, False)):
            way = CONV_BWD.takers(ConvGradsCall(backend, dy, h, weight, True, tuple(pads), mask))["sum over time"]
            ours = way.run(ConvGradsCall(backend, dy, h, weight, True, tuple(pads), mask))
            theirs = conv_grads(dy, h, weight, True, pads, mask)
            exact_grads = conv_grads(dy.double(), h.double(), weight.double(), True, pads, mask)
            for a, b, c in zip(ours, theirs, exact_grads, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert_error_budget(a, b, c)
                    assert a.stride() == b.stride()


def test_by_the_fixed_rule_images_large_enough_for_winograd_take_it():
    backend = select("conv_residual", torch.zeros(1))
    large, small = torch.zeros(1, 32, 3, 16, 16), torch.zeros(1, 4, 3, 16, 16)
    for h, expected in ((large, backend.name == "cpu"), (small, False)):
        weight = torch.zeros(h.shape[1], h.shape[1], 3, 3, 3)
        plan = zb.explain("conv_residual", h, weight, None, None, padding=((2, 0), 1, 1)).plans
        assert any(p.choice == "sum over time" for p in plan) == expected
