"""channel_rms_norm_silu, residual_norm_modulate and gate_residual of the CUDA kernels, emulated: where they cut their
work, beyond the cases that every backend runs."""

import pytest
import torch

from zeroblock.backends.cuda import CUDA
from zeroblock.backends.cuda_images import MOST_CHANNELS
from zeroblock.backends.cuda_rows import MOST_ROW
from zeroblock.backends.residual_norm import Branch, Needed, Norm, Rows
from zeroblock.testing import assert_bitwise_equal, poison_empty, use_backend
from zeroblock.testing.cases import Case
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import assert_parity

from .simt import emulated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing())),
]
BF16, F32 = torch.bfloat16, torch.float32
ALL = Needed(*[True] * 11)
TANH_RMS = {"gate_activation": "tanh", "branch_norm": "rms", "norm": "rms"}


@pytest.fixture(autouse=True)
def cuda():
    with emulated.emulated(seed=3), use_backend("cuda"):
        yield


def _rows(variant, options=None, **sizes):
    return Case("residual_norm_modulate", variant, {"B": 1, "tables": True, **sizes}, options or {})


WIDE = _rows("several warps", T=19, D=1048, branch_weight=True, affine="both", B=2)
CHOSEN = _rows("chosen rows", TANH_RMS, T=67, D=1032, gate="bkd", kind="bkd", K=5, branch_weight=True)
SHORT = _rows("teams of a block", T=97, D=37, gate="bkd", kind="bkd", K=11, affine="both", B=3)
FRAMES = _rows("more frames than blocks", T=600, D=8, gate="bfd", kind="bfd", K=300)
TOKEN = _rows("per token", {"gate_activation": "tanh", "branch_norm": "rms"}, T=35, D=264, gate="btd", kind="btd")


@pytest.mark.parametrize("shared", (0, 163 * 1024), ids=("in memory", "in shared memory"))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", (WIDE, CHOSEN, SHORT, FRAMES, TOKEN), ids=lambda c: c.variant)
def test_sums_over_tokens(case, dtype, shared):
    with emulated.gpu(shared, 1):
        assert_parity(case, dtype)


@pytest.mark.parametrize("dtype, D", ((F32, 1032), (BF16, 2056), (BF16, 301)), ids=("fp32", "bf16", "odd"))
@pytest.mark.parametrize("gate", ("d", "bd"))
def test_a_gate_of_two_tiles_of_columns(gate, dtype, D):
    """The second one is cut; its sums over tokens, of several blocks, lie beside those of the next block."""
    assert_parity(Case("gate_residual", "two tiles", {"size": (2, 19, D), "gate": gate}), dtype)


def _call(kind, dtype=BF16, seed=0, B=2, T=41, D=136, K=7):
    draw, size = Draw(dtype, seed=seed), {"bd": (136,), "bkd": (K, D), "btd": (T, D)}[kind]
    v = Rows(draw.normal(B, *size), draw.vector(D))
    x, branch, dx, dy = (draw.tokens(B, T, D) for _ in range(4))
    weight = draw.vector(D, 1.0)
    index = torch.arange(T).mul(5).remainder(K).int().repeat(B, 1) if kind == "bkd" else None
    return (
        x,
        Branch(branch, v, True, True, weight, 1e-6, dtype),
        Norm(False, weight, weight, v, v, 1e-6, dtype),
        index,
        dx,
        dy,
    )


def _results(x, branch, norm, index, dx, dy, needed=ALL):
    with poison_empty():
        x_new, y, stats = CUDA.residual_norm_modulate(x, branch, norm, index)
        grads = CUDA.residual_norm_modulate_bwd(dx, dy, x_new, stats, branch, norm, index, x.dtype, needed)
    return [x_new, y, *stats, *grads]


@pytest.mark.parametrize("kind", ("bd", "bkd", "btd"))
def test_the_same_bits_in_any_order_of_threads_and_blocks(kind):
    call, results = _call(kind), []
    for seed in (0, 5):
        with emulated.emulated(seed):
            results.append(_results(*call))
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("kind", ("bd", "bkd", "btd"))
def test_a_gradient_alone_is_the_same(kind):
    call = _call(kind)
    every = _results(*call)[5:]
    for i in range(len(ALL)):
        alone = _results(*call, Needed(*[j == i for j in range(len(ALL))]))[5:]
        assert_bitwise_equal(alone[i], every[i], ALL._fields[i])
        assert [t is None for t in alone].count(False) == 1


def test_an_index_out_of_range_takes_the_nearest_row():
    x, branch, norm, index, dx, dy = _call("bkd")
    far = index.clone()
    far[0, 3], far[1, 20] = -7, 1000
    for a, b in zip(
        _results(x, branch, norm, far, dx, dy), _results(x, branch, norm, far.clamp(0, 6), dx, dy), strict=True
    ):
        assert_bitwise_equal(a, b)


def test_without_a_gradient_of_one_result():
    """dx_new or dy alone, and the norm or the branch alone."""
    x, branch, norm, index, dx, dy = _call("bkd")
    _, _, stats = CUDA.residual_norm_modulate(x, branch, norm, index)
    both = CUDA.residual_norm_modulate_bwd(dx, dy, x, stats, branch, norm, index, BF16, ALL)
    zero = torch.zeros_like(dx)
    for given, full in (((None, dy), (zero, dy)), ((dx, None), (dx, zero))):
        got, expected = (
            CUDA.residual_norm_modulate_bwd(*g, x, stats, branch, norm if g[1] is not None else None, index, BF16, ALL)
            for g in (given, full)
        )
        for a, b, c in zip(got[:5], expected[:5], both[:5], strict=True):
            assert_bitwise_equal(a, b)
            assert not torch.equal(a, c)


def test_constant_rows_have_a_norm_of_zero():
    for value, D in ((-3.14, 1048), (123.456, 37), (7e4, 136)):
        x = torch.full((1, 3, D), value)
        y = CUDA.residual_norm_modulate(x, None, Norm(False, None, None, Rows(), Rows(), 1e-6, F32), None).y
        assert (y == 0).all(), value


@pytest.mark.parametrize("layout", ("dense", "nhwc"))
@pytest.mark.parametrize("sizes", ((1, 1024, (4, 6)), (1, 1000, (3, 8)), (2, 96, (16, 90)), (1, 261, (5, 7))), ids=str)
def test_pixels(sizes, layout):
    """The most channels; several warps of a pixel; several tiles and blocks; one element at a time."""
    N, C, S = sizes
    case = Case("channel_rms_norm_silu", "cuda", {"N": N, "C": C, "S": S, "film": True}, {}, ("dense", "nhwc"))
    for dtype in (F32, BF16):
        assert_parity(case, dtype, layout)


def test_the_same_bits_of_pixels_in_any_order():
    for layout in ("dense", "nhwc"):
        draw = Draw(BF16, layout)
        x, dy, weight, film = (
            draw.tensor(2, 48, 9, 40),
            draw.tensor(2, 48, 9, 40),
            draw.vector(48),
            draw.chunks(2, 48, 2),
        )
        results = []
        for seed in (0, 5):
            with emulated.emulated(seed), poison_empty():
                y, rstd = CUDA.channel_rms_norm_silu(x, weight, weight, 1e-6, False, *film, True)
                results.append((y, rstd, *CUDA.channel_rms_norm_silu_bwd(dy, x, rstd, weight, weight, *film, True)))
        for a, b in zip(*results, strict=True):
            assert_bitwise_equal(a, b)


def test_what_registers_do_not_hold_is_refused_with_a_reason():
    long, wide = torch.zeros(1, 1, MOST_ROW + 1), torch.zeros(1, MOST_CHANNELS + 1, 1, 1)
    for op, x, number in (("residual_norm_modulate", long, MOST_ROW), ("channel_rms_norm_silu", wide, MOST_CHANNELS)):
        for suffix in ("", "_bwd"):
            reason = CUDA.why_not(op + suffix, x)
            assert reason is not None and str(number) in reason and str(number + 1) in reason
            kept = x.narrow(-1, 0, MOST_ROW) if x is long else x[:, 1:]
            assert CUDA.why_not(op + suffix, kept) is None
    assert "float64" in CUDA.why_not("residual_norm_modulate", torch.zeros(1, 1, 8, dtype=torch.float64))
    before = emulated.launches()
    y = CUDA.residual_norm_modulate(long, None, Norm(True, None, None, Rows(), Rows(), 1e-6, F32), None).y
    assert y.shape == long.shape and emulated.launches() == before
