"""Operands of tokens: every shape that broadcasts, every dtype as it is, gradients in its own shape and dtype."""

import pytest
import torch
import torch.nn.functional as F

import zeroblock as zb
from zeroblock.testing import assert_error_budget, eager_ops, poison_empty
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import evaluate

B, T, D = 3, 7, 40
DRAWS = 4  # their errors are combined: that of a few numbers is luck
# A row for everything, for each sample, for each token; as `rows` has to see them to broadcast by PyTorch's rules.
SHAPES = {
    "d": (D,), "1d": (1, D), "11d": (1, 1, D), "bd": (B, D), "b1d": (B, 1, D), "1td": (1, T, D), "btd": (B, T, D)
}  # fmt: skip
MODULATED = (
    "layer_norm_modulate",
    "rms_norm_modulate",
    "layer_norm_modulate_linear",
    "gate_residual_layer_norm_modulate",
)
GATED = ("gate_residual", "gate_residual_layer_norm_modulate", "linear_gate_residual")
HALVES = (torch.bfloat16, torch.float16)


def _inputs(op, draw, operand, batch=B):
    """Activations of `batch` samples, and operands that operand(name) draws."""
    x = draw.tokens(batch, T, D, mean=0.5, std=2.0)
    if op in ("layer_norm_modulate", "rms_norm_modulate"):
        return {"x": x, "shift": operand("shift"), "scale": operand("scale")}
    if op == "layer_norm_modulate_linear":
        weight, bias = draw.normal(24, D, std=D**-0.5), draw.normal(24)
        return {"x": x, "shift": operand("shift"), "scale": operand("scale"), "weight": weight, "bias": bias}
    gated = {"gate": operand("gate"), "residual": draw.tokens(batch, T, D)}
    if op == "linear_gate_residual":
        return {"h": x[..., :33], "weight": draw.normal(D, 33, std=33**-0.5), "bias": draw.normal(D), **gated}
    gated["branch"] = draw.tokens(batch, T, D)
    if op == "gate_residual":
        return gated
    return {**gated, "shift": operand("shift"), "scale": operand("scale")}


def _layer_norm_modulate_linear(x, shift, scale, weight, bias):
    """Eager's linear takes one dtype."""
    return F.linear(eager_ops.layer_norm_modulate(x, shift, scale).to(weight.dtype), weight, bias)


_EAGER = {"layer_norm_modulate_linear": _layer_norm_modulate_linear}


def _leaves(inputs, wrt, dtype=None):
    return {n: t.detach().to(dtype or t.dtype).requires_grad_(wrt is None or n in wrt) for n, t in inputs.items()}


def _assert_within_budget(op, make, wrt=None):
    """Results and gradients, of inputs of any dtypes that make(seed) draws, against eager's with the same inputs and in
    fp64."""
    run, eager = getattr(zb, op), _EAGER.get(op, getattr(eager_ops, op))
    stacks = {}
    for seed in range(DRAWS):
        inputs = make(seed)
        with torch.no_grad():
            outputs = run(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
        with poison_empty():
            got = evaluate(run, _leaves(inputs, wrt), grads)
        exact = evaluate(eager, _leaves(inputs, wrt, torch.float64), [g.double() for g in grads])
        expected = evaluate(eager, _leaves(inputs, wrt), grads)
        for name, t in got.items():
            if name[0] == "d":
                operand = inputs[name[1:]]
                assert (t.shape, t.dtype) == (operand.shape, operand.dtype), f"{op}: {name}"
            stacks.setdefault(name, []).append([t, expected[name].to(t.dtype), exact[name]])
    for name, triples in stacks.items():
        assert_error_budget(
            *(torch.stack(column) for column in zip(*triples, strict=True)), f"{op}: {name}", draws=True
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", (*MODULATED, "gate_residual", "linear_gate_residual"))
def test_every_shape_that_broadcasts(backend, device, op, shape):
    def make(seed):
        draw = Draw(torch.float32, seed=seed, device=device)
        return _inputs(op, draw, lambda name: draw.normal(*SHAPES[shape]))

    _assert_within_budget(op, make)


@pytest.mark.parametrize("op", (*MODULATED, "gate_residual", "linear_gate_residual"))
def test_shapes_and_strides_mixed(backend, device, op):
    """Each operand of another shape, as parts of larger tensors: their rows are dense, and far from one another."""

    def make(seed):
        draw, others = Draw(torch.bfloat16, "strided", seed, device), iter(("b1d", "1td", "d"))

        def operand(name):
            return draw.normal(*SHAPES[next(others)][:-1], 3 * D)[..., D : 2 * D]

        return _inputs(op, draw, operand)

    _assert_within_budget(op, make)


@pytest.mark.parametrize("shape", ("bd", "b1d", "btd"))
@pytest.mark.parametrize("op", (*MODULATED, "gate_residual", "linear_gate_residual"))
def test_activations_of_batch_1_beside_operands_of_a_batch(backend, device, op, shape):
    def make(seed):
        draw = Draw(torch.float32, seed=seed, device=device)
        return _inputs(op, draw, lambda name: draw.normal(*SHAPES[shape]), batch=1)

    _assert_within_budget(op, make)


@pytest.mark.parametrize("op", ("gate_residual", "gate_residual_layer_norm_modulate"))
@pytest.mark.parametrize("single", ("residual", "branch"))
def test_residual_or_branch_of_batch_1(backend, device, op, single):
    def make(seed):
        draw = Draw(torch.float32, seed=seed, device=device)
        inputs = _inputs(op, draw, lambda name: draw.normal(D))
        return {**inputs, single: inputs[single][:1]}

    _assert_within_budget(op, make)


@pytest.mark.parametrize("single", ("residual", "branch"))
def test_images_of_batch_1(backend, device, single):
    def make(seed):
        draw = Draw(torch.float32, seed=seed, device=device)
        images = {name: draw.normal(1 if name == single else 2, 6, 5, 4) for name in ("residual", "branch")}
        return {**images, "gate": draw.normal(1)}

    _assert_within_budget("gate_residual", make, ("residual", "branch"))


def test_x_new_keeps_its_batch_of_1(backend, device):
    op = "gate_residual_layer_norm_modulate"

    def make(seed):
        draw = Draw(torch.float32, seed=seed, device=device)
        return {**_inputs(op, draw, lambda name: draw.normal(B, D), batch=1), "gate": draw.normal(D)}

    _assert_within_budget(op, make)


@pytest.mark.parametrize("shape", ("d", "bd", "btd"))
@pytest.mark.parametrize("of", (torch.float32, *HALVES), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("op", MODULATED)
def test_operands_are_used_as_they_are(backend, device, op, dtype, of, shape):
    """Near a scale of -1 what is left of the norm are the last bits of the scale, and a shift may be beyond the range
    of float16."""
    if dtype == of:
        pytest.skip("the cases of the ops")

    def make(seed):
        draw = Draw(dtype, seed=seed, device=device)

        def operand(name):
            t = torch.randn(SHAPES[shape], generator=draw.generator)
            return (t if name == "gate" else t * 1e-3 - 1 if name == "scale" else t * 1e-4).to(device, of)

        return _inputs(op, draw, operand)

    _assert_within_budget(op, make)


@pytest.mark.parametrize("op", ("layer_norm_modulate", "gate_residual_layer_norm_modulate"))
def test_a_scale_and_shift_beyond_the_range_of_float16(backend, device, op):
    draw = Draw(torch.float16, device=device)
    inputs = _inputs(op, draw, lambda name: torch.zeros(B, D, dtype=torch.float16, device=device))
    x = inputs["x" if "x" in inputs else "residual"]
    normed = F.layer_norm(x.double(), (D,), eps=1e-6)
    inputs["scale"] = torch.full((B, T, D), 1e5, device=device)
    inputs["shift"] = (3 - normed * (1 + inputs["scale"].double())).float()
    y = getattr(zb, op)(**inputs)
    y = y[1] if isinstance(y, tuple) else y
    assert (y.float() - 3).abs().max() < 0.1


@pytest.mark.parametrize("op", MODULATED)
@pytest.mark.parametrize("shape", ("bd", "btd"))
def test_fp64_operands_are_used_in_fp64(backend, device, op, shape):
    def make(seed):
        draw = Draw(torch.float32, seed=seed, device=device)

        def operand(name):
            t = torch.randn(SHAPES[shape], generator=draw.generator, dtype=torch.float64)
            return (t.float() if name == "gate" else t * 1e-9 - 1 if name == "scale" else t * 1e-10).to(device)

        return _inputs(op, draw, operand)

    _assert_within_budget(op, make)


@pytest.mark.parametrize("of", (torch.float64, torch.float32, *HALVES), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=lambda d: str(d)[6:])
def test_film_and_affine_are_used_as_they_are(backend, device, dtype, of):
    draw, C = Draw(dtype, device=device), 16
    x = draw.tensor(2, C, 5, 6)
    generator = torch.Generator().manual_seed(1)
    vectors = {name: torch.randn(C, generator=generator).to(device, of) for name in ("weight", "bias")}
    scale = (torch.randn(2, C, generator=generator, dtype=torch.float64) * 1e-3 - 1).to(device, of)
    inputs = {"x": x, "scale": scale, "shift": torch.zeros_like(scale), **vectors}
    got = zb.group_norm_silu(num_groups=4, activation=None, **inputs)
    exact = eager_ops.group_norm_silu(num_groups=4, activation=None, **{n: t.double() for n, t in inputs.items()})
    fp32 = eager_ops.group_norm_silu(num_groups=4, activation=None, **{n: t.float() for n, t in inputs.items()})
    assert_error_budget(got, (exact if of == torch.float64 else fp32).to(dtype), exact, "group_norm_silu")
