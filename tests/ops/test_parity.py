"""Every op on every backend against eager in fp64: outputs and all gradients, by error budget."""

import pytest
import torch
import torch.nn.functional as F

import zeroblock as zb
from zeroblock.backends.select import select
from zeroblock.testing.cases import CASES, DTYPES, Case
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import assert_parity, evaluate, floating, leaves

from ..cuda.simt import emulated

SMALL = {str(case): case for case in CASES if not case.large}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
# The emulated group norm computes all gradients whichever are wanted.
small_cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow_emulated] * case.op.startswith("group_norm_silu"))
        for name, case in SMALL.items()
    ],
)


@dtypes
@pytest.mark.parametrize(
    ("case", "layout"), [pytest.param(c, layout, id=f"{c}-{layout}") for c in CASES for layout in c.layouts]
)
def test_outputs_and_gradients(backend, device, case, layout, dtype):
    assert_parity(case, dtype, layout, device)


@pytest.mark.slow_interpreted  # in most ops kernels do not see which gradients are wanted
@small_cases
def test_gradient_of_one_input_alone(backend, device, case):
    for name in floating(case.inputs(Draw(torch.float32))):
        assert_parity(case, torch.float32, device=device, wrt=(name,))


@pytest.mark.slow_interpreted
@small_cases
def test_without_gradients(backend, device, case):
    assert_parity(case, torch.float32, device=device, wrt=())


@pytest.mark.parametrize("used", (0, 1))
@pytest.mark.parametrize("gate", ("one", "d", "bd", "btd"))
def test_gate_residual_layer_norm_modulate_through_one_of_two_outputs(backend, device, gate, used):
    """A loss that reads x_new alone still sends zeros to shift and scale."""
    case = SMALL[f"gate_residual_layer_norm_modulate-gate-{gate}"]

    class OneOutput(Case):
        def eager(self, **inputs):
            y = super().eager(**inputs)[used]
            return y if used else y + 0 * (inputs["shift"].sum() + inputs["scale"].sum())

    one = OneOutput(case.op, case.variant, case.sizes)
    assert_parity(one, torch.float32, device=device, run=lambda **inputs: case.run(**inputs)[used])


@dtypes
def test_layer_norm_modulate_of_the_tensor_that_is_chunked(backend, device, dtype):
    """DiT: the six vectors of a block are views of one [B, 6D] tensor, which gets the gradient."""
    draw, B, T, D = Draw(dtype, device=device), 3, 9, 20
    x, vectors, dy = draw.normal(B, T, D), draw.normal(B, 6 * D), draw.normal(B, T, D)

    def block(norm):
        def run(x, vectors):
            shift, scale, gate = vectors.chunk(6, dim=1)[1:4]
            return x + gate[:, None] * norm(x, shift, scale)

        return run

    results = []
    for norm, wide in ((zb.layer_norm_modulate, dtype), (_eager_norm, dtype), (_eager_norm, torch.float64)):
        inputs = leaves({"x": x, "vectors": vectors}, wide, ("x", "vectors"))
        results.append(evaluate(block(norm), inputs, [dy]))
    for name in ("y0", "dx", "dvectors"):
        zb.testing.assert_error_budget(*(r[name] for r in results), name)


def _eager_norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "name", ("group_norm_silu-film", "layer_norm_modulate-affine-prime", "rms_norm_modulate-affine-prime")
)
def test_fp32_vectors_with_half_precision_activations(backend, device, name, dtype):
    """Norm parameters stay fp32 under autocast; y has the dtype of x, each gradient the dtype of its input."""
    case = SMALL[name]
    inputs = {k: t if t is None or k != "x" else t.to(dtype) for k, t in case.inputs(Draw(torch.float32)).items()}
    dy = Draw(dtype, seed=1).normal(*inputs["x"].shape)
    names = floating(inputs)

    def as_leaves(wide):
        return {
            k: None if t is None else t.to(device, wide or t.dtype).detach().requires_grad_() for k, t in inputs.items()
        }

    got = evaluate(case.run, as_leaves(None), [dy.to(device)])
    exact = evaluate(case.eager, as_leaves(torch.float64), [dy.to(device)])
    eager = evaluate(case.eager, as_leaves(None), [dy.to(device)])  # promotes: y comes out in fp32
    eager["y0"] = eager["y0"].to(dtype)
    for key in ("y0", *(f"d{n}" for n in names)):
        zb.testing.assert_error_budget(got[key], eager[key], exact[key], f"{case} {key}")


def test_each_backend_runs_its_own_primitives(backend, device):
    for dtype in DTYPES:
        assert select("group_norm_silu", torch.empty(1, dtype=dtype, device=device)).name == backend


# ---- is_zero --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", ("dense", "nhwc", "strided"))
def test_is_zero_finds_one_element_wherever_it_is(backend, device, dtype, layout):
    base = torch.zeros(4, 8, 10, 21, dtype=dtype, device=device)
    t = base[2:, 3:, 3:, 3::2]
    zeros = torch.zeros_like(t, memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)
    t = t if layout == "strided" else zeros.clone()
    assert zb.is_zero(t, -t, zeros).tolist() == [True, True, True]
    for position in (0, 1, 7, 8, 31, 64, 313, t.numel() - 1):
        index = [int(i) for i in torch.unravel_index(torch.tensor(position), t.shape)]
        for value in (1.0, -1.0, torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal * 2**-5, float("nan")):
            t[tuple(index)] = value
            assert zb.is_zero(zeros, t).tolist() == [True, False], (position, value)
        t[tuple(index)] = -0.0
    if layout == "strided":
        base.fill_(1.0)
        t.zero_()
        assert zb.is_zero(t, base).tolist() == [True, False], "reads between the elements"


def test_is_zero_of_nothing(backend, device):
    assert zb.is_zero().tolist() == []
    assert zb.is_zero(torch.empty(0, device=device), torch.empty(3, 0, 2, device=device)).tolist() == [True, True]


@pytest.mark.skipif(emulated.missing() is not None, reason="counts the emulator's launches")
def test_is_zero_is_one_launch_of_the_zero_flag_for_64_tensors():
    tensors = [torch.empty(0), *(torch.zeros(3, 5) for _ in range(70)), torch.zeros(2, dtype=torch.float64)]
    tensors[-2][2, 4] = 1
    with emulated.emulated(), zb.testing.use_backend("cuda"):
        before = emulated.launches()
        assert zb.is_zero(*tensors).tolist() == [True] * 70 + [False, True]
    assert emulated.launches() - before == 2


# ---- numerics -------------------------------------------------------------------------------------------------------


def _norm_case(op, options, layouts=("dense",), **sizes):
    return Case(op, "numerics", sizes, options, layouts)


GROUPS = {"num_groups": 4}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", ("dense", "nhwc"))
@pytest.mark.parametrize("mean", (1000.0, -3000.0))
def test_group_norm_silu_with_mean_far_above_std(backend, device, layout, mean, dtype):
    case = _norm_case("group_norm_silu", GROUPS, N=3, C=32, S=(17, 19), film=True, mean=mean, std=1.0)
    assert_parity(case, dtype, layout, device)


@pytest.mark.parametrize("layout", ("dense", "nhwc"))
@pytest.mark.parametrize("mean", (1000.0, -3000.0))
def test_group_norm_silu_variance_is_no_difference_of_squares(backend, device, layout, mean):
    """E[x^2] - E[x]^2 is all that eager has channels-last: its error allows the same fault. Rounding the mean to fp32
    costs an ulp of it."""
    if backend == "reference" and layout == "nhwc":
        pytest.skip("the reference is eager")
    x = Draw(torch.float32, layout, device=device).tensor(3, 32, 17, 19, mean=mean)
    error = zb.group_norm_silu(x, 4).double() - F.silu(F.group_norm(x.double(), 4))
    assert error.abs().max() < 2 * torch.finfo(x.dtype).eps * abs(mean)


@pytest.mark.parametrize("layout", ("dense", "nhwc"))
@pytest.mark.parametrize("rows", (1, 9, 30))
def test_group_norm_silu_of_an_image_with_a_step(backend, device, layout, rows):
    """The mean of what comes first says nothing of the rest."""
    if backend == "reference" and layout == "nhwc":
        pytest.skip("the reference is eager")
    x = Draw(torch.float32, layout, device=device).tensor(2, 8, 31, 33)
    x[:, :, :rows] += 1e5
    error = zb.group_norm_silu(x, 2).double() - F.silu(F.group_norm(x.double(), 2))
    assert error.abs().max() < 5e-6


@pytest.mark.parametrize("op", ("layer_norm_modulate", "rms_norm_modulate"))
@pytest.mark.parametrize("mean", (1000.0, -3000.0))
def test_row_norms_with_mean_far_above_std(backend, device, op, mean):
    assert_parity(_norm_case(op, {}, B=2, T=9, D=301, mean=mean, std=1.0), torch.float32, device=device)


def test_gate_residual_layer_norm_modulate_with_mean_far_above_std(backend, device):
    case = SMALL["gate_residual_layer_norm_modulate-gate-bd"]

    class Shifted(Case):
        def inputs(self, draw):
            inputs = super().inputs(draw)
            return {**inputs, "residual": inputs["residual"] + 1000}

    assert_parity(Shifted(case.op, "mean-1000", case.sizes), torch.float32, device=device)


@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.float32, 1032), (torch.bfloat16, 2056), (torch.bfloat16, 301)], ids=lambda v: str(v)
)
def test_gate_residual_of_more_columns_than_a_tile(backend, device, dtype, D):
    """256 threads of the CUDA kernel take 1024 fp32 numbers of a row, 2048 of half precision, or 256 of an odd row."""
    assert_parity(Case("gate_residual", "wide", {"size": (2, 9, D), "gate": "bd"}), dtype, device=device)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize(
    "layout",
    [pytest.param("dense", marks=pytest.mark.slow_emulated), "nhwc"],  # its dense loop over chunks: the case "large"
)
def test_group_norm_silu_of_a_million_elements(backend, device, layout):
    case = _norm_case("group_norm_silu", {"num_groups": 1}, N=1, C=64, S=(125, 126), film=True, mean=3.0, std=1.0)
    assert_parity(case, torch.float32, layout, device)


@dtypes
def test_group_norm_silu_whose_channels_are_no_power_of_two(backend, device, dtype):
    """5 channels of 2048 pixels: a program of the Triton kernel holds them in three tiles of two channels, the last
    one half empty."""
    case = _norm_case("group_norm_silu", {"num_groups": 2}, N=2, C=10, S=(64, 32), film=True, mean=0.5, std=2.0)
    assert_parity(case, dtype, device=device)


@pytest.mark.parametrize("op", ("layer_norm_modulate", "rms_norm_modulate"))
def test_row_of_a_hundred_thousand_elements(backend, device, op):
    assert_parity(_norm_case(op, {}, B=2, T=4, D=100_003, mean=3.0, std=1.0), torch.float32, device=device)


@pytest.mark.parametrize("std", (1e-20, 1e-4, 1e12), ids=str)
@pytest.mark.parametrize("op", ("group_norm_silu", "layer_norm_modulate", "rms_norm_modulate"))
def test_tiny_and_huge_values(backend, device, op, std):
    sizes = {"N": 2, "C": 32, "S": (9, 7), "film": True} if op == "group_norm_silu" else {"B": 2, "T": 9, "D": 301}
    case = _norm_case(op, GROUPS if op == "group_norm_silu" else {}, **sizes, mean=0.0, std=std)
    assert_parity(case, torch.float32, device=device)


@dtypes
def test_group_norm_silu_far_from_zero(backend, device, dtype):
    """exp over- and underflows; silu and its derivative go to 0 on the left and to x and 1 on the right."""
    x = torch.tensor([-1e4, -500.0, -104.0, -90.0, -88.5, -30.0, 0.0, 30.0, 88.5, 90.0, 104.0, 500.0, 1e4] * 3)
    case = _norm_case("group_norm_silu", {"num_groups": 1, "eps": 0.0}, N=1, C=1, S=(39,))

    class Wide(Case):
        def inputs(self, draw):
            inputs = super().inputs(draw)
            w = draw.normal(1, mean=1e4, std=0.0) if draw.dtype != torch.float16 else draw.normal(1, mean=1e3, std=0.0)
            return {**inputs, "x": x.view(1, 1, -1).to(draw.device, draw.dtype), "weight": w}

    assert_parity(Wide(case.op, "far", case.sizes, case.options), dtype, device=device)
