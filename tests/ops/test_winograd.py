"""Winograd convolutions: exact on integers, within the error budget, chosen by the rule, the same for any threads."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from zeroblock.backends.reference import REFERENCE
from zeroblock.plan import mode
from zeroblock.steps import winograd as _winograd
from zeroblock.steps.conv import CONV as CONV_STEP
from zeroblock.steps.conv import ConvCall, unit_geometry
from zeroblock.steps.conv_bwd import CONV_BWD, ConvGradsCall
from zeroblock.steps.norm_conv import NORM_CONV, NORM_CONV_BWD
from zeroblock.testing import CPU_MISSING, assert_bitwise_equal, poison_empty, saved_activation_bytes, use_backend
from zeroblock.testing.cases import IMAGES, Case
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import assert_deterministic, assert_parity

from .winograd_errors import Errors, errors, results

if CPU_MISSING is not None:
    pytestmark = pytest.mark.skip(reason=f"the cpu backend cannot run: {CPU_MISSING}")
else:
    from zeroblock.backends.cpu import CPU

FORMATS = (torch.contiguous_format, torch.channels_last)
layouts = pytest.mark.parametrize("layout", FORMATS, ids=("nchw", "nhwc"))
tiles = pytest.mark.parametrize("tile", (2, 4))
halves = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
CONV, FUSED = "conv_residual", "group_norm_silu_conv_residual"


def _case(op, variant, options=None, **sizes):
    return Case(op, f"winograd-{variant}", sizes, options or {}, IMAGES)


# Odd tails of rows, columns and channels; more tiles than one chunk takes; strips wider than kMaxStrip.
CASES = [
    _case(CONV, "square", N=3, C=32, S=(16, 16), out=32),
    _case(CONV, "odd", N=2, C=37, S=(13, 9), out=53),
    _case(CONV, "unpadded", {"padding": 0}, N=2, C=40, S=(11, 16), out=33, padding=0, bias=False),
    _case(CONV, "bare", N=2, C=33, S=(8, 9), out=64, bias=False, residual=False),
    _case(CONV, "wide", N=1, C=32, S=(9, 261), out=32),
    _case(CONV, "deep", N=1, C=512, S=(12, 12), out=48),
    _case(CONV, "broad", N=1, C=48, S=(12, 12), out=512),
    _case(CONV, "chunks", N=2, C=160, S=(40, 44), out=40),
    _case(FUSED, "film", {"num_groups": 32}, N=3, C=64, S=(15, 14), out=48, film=True),
    _case(FUSED, "bare", {"num_groups": 5}, N=2, C=35, S=(12, 9), out=32, affine="neither", bias=False, residual=False),
    _case(FUSED, "dropout", {"num_groups": 8, "dropout_p": 0.3}, N=2, C=32, S=(12, 10), out=40, keep=True),
    _case(FUSED, "unpadded", {"num_groups": 4, "padding": 0}, N=2, C=36, S=(12, 11), out=40, padding=0),
]
cases = pytest.mark.parametrize(
    ("case", "layout"), [pytest.param(c, layout, id=f"{c}-{layout}") for c in CASES for layout in c.layouts]
)


@pytest.fixture(autouse=True)
def cpu_backend():
    with use_backend("cpu"):
        yield


@pytest.fixture
def called(monkeypatch):
    """The tiles of the Winograd ways taken so far."""
    found = []

    def watched(tile, run):
        return lambda call: (found.append(tile), run(call))[1]

    for step in (CONV_STEP, NORM_CONV, CONV_BWD, NORM_CONV_BWD):
        monkeypatch.setattr(step, "_memory", {})  # else a call that an earlier test made runs what that test watched
        for tile in (2, 4):
            candidate = step.candidates[_winograd.plan_name(tile)]
            replaced = dataclasses.replace(candidate, run=watched(tile, candidate.run))
            monkeypatch.setitem(step.candidates, candidate.name, replaced)
    return found


@pytest.fixture
def half(monkeypatch):
    """Winograd by rule in half precision too, where only a measurement chooses it."""
    rule = _winograd.choose

    def choose(backend, x, weight, padding):
        half = _winograd.is_half(x) and _winograd.usable(backend, x, weight, padding)
        return 4 if half else rule(backend, x, weight, padding)

    monkeypatch.setattr(_winograd, "choose", choose)


@pytest.fixture
def fast():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


# ---- the ops --------------------------------------------------------------------------------------------------------


@cases
def test_ops_keep_the_error_budget(called, case, layout):
    assert_parity(case, torch.float32, layout)
    assert called and set(called) == {2}


@cases
@halves
def test_ops_keep_the_error_budget_in_half_precision(called, half, dtype, case, layout):
    assert_parity(case, dtype, layout)
    assert called and set(called) == {4}


def test_the_budget_catches_the_larger_tile(called, fast):
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_parity(CASES[0], torch.float32)
    assert set(called) == {4}


@cases
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_same_bits_for_any_number_of_threads(called, half, dtype, case, layout):
    assert_deterministic(case, dtype, layout, (1, 2, 3))
    assert called


def test_only_what_eager_saves_and_the_statistics_are_saved(called):
    case = next(c for c in CASES if c.op == FUSED)
    inputs = {k: t.requires_grad_() if t is not None else None for k, t in case.inputs(Draw(torch.float32)).items()}
    known = [t for t in inputs.values() if t is not None]
    assert saved_activation_bytes(lambda: case.run(**inputs), known) < known[0].nbytes / 50
    assert called == [2]


# ---- the convolution itself -----------------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 2), (3, 3), (4, 9), (7, 6), (5, 131), (18, 17)]
CHANNELS = [(1, 1), (3, 40), (33, 5), (16, 32)]


def conv(tile, x, weight, bias, residual, padding, prepared=None):
    call = ConvCall(CPU, x, weight, bias, residual, unit_geometry(padding))
    return _winograd.conv(tile, call, prepared=prepared)


def conv_grads(tile, dy, x, weight, has_bias, padding, mask):
    return _winograd.conv_grads(tile, ConvGradsCall(CPU, dy, x, weight, has_bias, tuple(padding), mask))


def _integers(seed, *size, step=1):
    return torch.randint(-3, 4, size, generator=torch.Generator().manual_seed(seed)).float() * step


@layouts
@pytest.mark.parametrize("weight_layout", FORMATS, ids=("oihw", "ohwi"))
@pytest.mark.parametrize("padding", (0, 1))
def test_small_tile_is_exact_on_small_integers(layout, weight_layout, padding):
    """Every number in F(2x2, 3x3) is then a small multiple of 1/4: the result is the exact one, bit by bit."""
    for (H, W), (C, K), N in itertools.product(SIZES, CHANNELS, (1, 2)):
        if min(H, W) + 2 * padding < 3:
            continue
        x = _integers(0, N, C, H, W).to(memory_format=layout)
        weight, bias = _integers(1, K, C, 3, 3, step=4).to(memory_format=weight_layout), _integers(2, K)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
        residual = _integers(3, *exact.shape).to(memory_format=layout)
        dy = _integers(4, *exact.shape, step=4).to(memory_format=layout)
        pads, what = [padding, padding], f"{N, C, K, H, W}"
        with poison_empty():
            y = conv(2, x, weight, bias, residual, pads)
            packed = conv(2, x, weight, bias, residual, pads, _winograd.pack(CPU, weight, 2))
            grads = conv_grads(2, dy, x, weight, True, pads, (True, True, True))
        assert torch.equal(y.double(), exact + residual.double()), what
        assert torch.equal(packed, y), what
        expected = torch.ops.aten.convolution_backward(
            dy.double(), x.double(), weight.double(), [K], [1, 1], pads, [1, 1], False, [0, 0], 1, [True] * 3
        )
        for got, want, name in zip(grads, expected, ("dx", "dweight", "dbias"), strict=True):
            assert torch.equal(got.double(), want), f"{name} {what}"
        assert grads[1].stride() == torch.empty_like(weight).stride(), what


# Relative errors of y, dx, dweight in the L2 and the maximum norm; the library's are a tenth and a twentieth of them
# (winograd_errors.py).
LARGE_TILE_ERRORS = Errors(l2=1e-5, max=2e-5)


@layouts
@pytest.mark.parametrize("shape", [(32, 48, 17, 23), (128, 128, 16, 16), (512, 64, 9, 12)])
def test_large_tile_is_as_exact_as_documented(layout, shape):
    for name, (got, _, exact) in results(shape, layout, 4).items():
        for error, most in zip(errors(got, exact), LARGE_TILE_ERRORS, strict=True):
            assert error < most, f"{name}: {error:.3g}"
            assert error > 1e-7, "suspiciously good: was this tile 4?"


def _step(x, weight, bias, residual, dy):
    with poison_empty():
        y = conv(4, x, weight, bias, residual, (1, 1))
        return y, *conv_grads(4, dy, x, weight, True, (1, 1), (True, True, False))[:2]


@layouts
@halves
@pytest.mark.parametrize("weight_layout", FORMATS, ids=("oihw", "ohwi"))
def test_half_precision_is_float32_rounded_once(layout, weight_layout, dtype):
    """Images and weights of 16 bits are widened exactly, and only results are rounded: bit for bit, tails included."""
    out = FORMATS[torch.channels_last in (layout, weight_layout)]  # a residual of another layout is added afterwards
    for (H, W), (C, K) in itertools.product(SIZES, CHANNELS):
        g = torch.Generator().manual_seed(5)
        shapes = ((2, C, H, W), layout), ((K, C, 3, 3), weight_layout), ((2, K, H, W), out), ((2, K, H, W), layout)
        x, weight, residual, dy = (torch.randn(s, generator=g).to(dtype).to(memory_format=to) for s, to in shapes)
        rounded = x, weight, torch.randn(K, generator=g).to(dtype), residual, dy
        wide = _step(*(t.float() for t in rounded))
        for name, got, want in zip(("y", "dx", "dweight"), _step(*rounded), wide, strict=True):
            assert_bitwise_equal(got, want.to(dtype), f"{name} {C, K, H, W}")
            assert got.stride() == want.stride()


@tiles
def test_what_is_not_finite_stays_visible(tile):
    """A tile that reads a NaN or an infinity is NaN or infinite at least where the library's output is."""
    for value in (float("nan"), float("inf")):
        x, weight = torch.randn(1, 32, 12, 12), torch.randn(32, 32, 3, 3)
        x[0, 5, 6, 7] = value
        y = conv(tile, x, weight, None, None, (1, 1))
        library = torch.isfinite(F.conv2d(x, weight, padding=1))
        assert not torch.isfinite(y[~library]).any() and torch.isfinite(y[..., :2, :2]).all()


# ---- which one runs -------------------------------------------------------------------------------------------------


def test_the_rule(called, fast):
    def choose(*size, K=64, k=3, dtype=torch.float32, padding=(1, 1), backend=CPU):
        weight = torch.empty(K, size[1], k, k, dtype=dtype)
        return _winograd.choose(backend, torch.empty(size, dtype=dtype), weight, padding)

    assert choose(2, 64, 32, 32) == 4 and choose(2, 64, 32, 32, padding=(0, 0)) == 4
    torch.set_float32_matmul_precision("highest")
    assert choose(2, 64, 32, 32) == 2
    refused = [
        choose(2, 8, 32, 32),
        choose(2, 64, 32, 32, K=3),
        choose(1, 64, 4, 4),
        choose(0, 64, 32, 32),
        choose(2, 64, 32, 32, k=1),
        choose(2, 64, 32, 32, padding=(1, 0)),
        choose(2, 64, 2, 2, padding=(0, 0)),
        choose(2, 64, 32, 32, dtype=torch.bfloat16),
        choose(2, 64, 32, 32, dtype=torch.float64),
    ]
    assert not any(refused)
    with use_backend("reference"):
        assert not choose(2, 64, 32, 32, backend=REFERENCE)
    grouped = torch.empty(64, 32, 3, 3)
    assert not _winograd.choose(CPU, torch.empty(2, 64, 32, 32), grouped, (1, 1))
    holes = torch.empty(64, 64, 3, 6)[..., ::2]
    assert not _winograd.choose(CPU, torch.empty(2, 64, 32, 32), holes, (1, 1))
    assert _winograd.tile_for() == 2
    with mode.allow_reduced():
        assert _winograd.tile_for() == 4


def test_a_residual_of_another_layout_or_shape_is_added():
    x, weight = torch.randn(2, 32, 9, 8), torch.randn(32, 32, 3, 3)
    y = conv(2, x, weight, None, None, (1, 1))
    for residual in (
        torch.randn_like(y).to(memory_format=torch.channels_last),
        torch.randn(32, 1, 1),
        torch.randn_like(y).double(),
    ):
        got = conv(2, x, weight, None, residual, (1, 1))
        assert_bitwise_equal(got, residual + y)
        assert got.stride() == (residual + y).stride()


def test_packed_weights_of_another_shape_are_refused():
    x, weight = torch.randn(1, 32, 8, 8), torch.randn(64, 32, 3, 3)
    with pytest.raises(RuntimeError, match="packed has another shape"):
        conv(4, x, weight, None, None, (1, 1), _winograd.pack(CPU, weight, 2))
