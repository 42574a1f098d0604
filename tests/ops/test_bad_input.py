"""Wrong arguments raise an error that names op, argument and requirement, and write nothing."""

import re

import pytest
import torch

import zeroblock as zb
from zeroblock.testing.cases import CASES, OPS
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import floating

CASE = {case.op: case for case in reversed(CASES) if not case.large}  # the first of each op
NORMS = ("group_norm_silu", "group_norm_silu_conv_residual")
MODULATED = (
    "layer_norm_modulate",
    "rms_norm_modulate",
    "gate_residual_layer_norm_modulate",
    "layer_norm_modulate_linear",
)
GATED = ("gate_residual", "gate_residual_layer_norm_modulate", "linear_gate_residual")
CONVS = ("conv_residual", "group_norm_silu_conv_residual")
LINEARS = ("layer_norm_modulate_linear", "linear_gate_residual")
SKIPPING = ("conv_residual", "group_norm_silu_conv_residual", "linear_gate_residual")
WITH_EPS = (*NORMS, *MODULATED, "channel_rms_norm_silu")
NUMBER = (TypeError, "must be a number")


def _cases():
    """(op, argument, make its bad value from the good inputs, error type, requirement as a regular expression)"""
    for op in OPS:
        for name in floating(CASE[op].inputs(Draw(torch.float32))):
            yield (
                op,
                name,
                lambda t, n=name: t[n].to(torch.int64),
                TypeError,
                "must be float32, bfloat16, float16 or float64",
            )
            yield op, name, lambda t, n=name: t[n].to(torch.complex64), TypeError, "must be float32"
            yield op, name, lambda t, n=name: t[n].tolist(), TypeError, "must be a Tensor, got list"
        first, *others = floating(CASE[op].inputs(Draw(torch.float32)))
        yield op, first, lambda t: None, TypeError, "must be a Tensor, got None"
        for name in others:
            yield op, name, lambda t, n=name: t[n].to("meta"), ValueError, "must be on the device of"
        if op != "gate_residual":  # takes any shape
            yield op, first, lambda t, f=first: t[f].flatten()[:3], ValueError, "must have shape|must have the shape"
    for op in NORMS:
        yield op, "num_groups", lambda t: 5, ValueError, "must be positive and divide C ="
        yield op, "num_groups", lambda t: 0, ValueError, "must be positive and divide C ="
        yield op, "num_groups", lambda t: -4, ValueError, "must be positive and divide C ="
        yield op, "num_groups", lambda t: True, TypeError, "must be an int, got bool"
        yield op, "num_groups", lambda t: 4.0, TypeError, "must be an int, got float"
        yield op, "x", lambda t: t["x"][:, :0], ValueError, "must have at least one channel"
        for name in ("scale", "shift"):
            yield op, name, lambda t: torch.zeros(t["x"].shape[1]), ValueError, r"must have shape \[N, C\] ="
            yield op, name, lambda t: torch.zeros(1, t["x"].shape[1]), ValueError, r"must have shape \[N, C\] ="
    for name in ("weight", "bias"):
        yield "group_norm_silu", name, lambda t: torch.zeros(1), ValueError, r"must have shape \[C\] ="
        yield (
            "group_norm_silu_conv_residual",
            f"norm_{name}",
            lambda t: torch.zeros(1),
            ValueError,
            r"must have shape \[C\] =",
        )
        yield "channel_rms_norm_silu", name, lambda t: torch.zeros(1), ValueError, r"must have shape \[C\] ="
        yield "channel_rms_norm_silu", name, lambda t: torch.zeros(24, 1, 2), ValueError, r"must have shape \[C\] ="
    yield "channel_rms_norm_silu", "x", lambda t: t["x"][:, :0], ValueError, "must have at least one channel"
    yield "channel_rms_norm_silu", "eps_mode", lambda t: "outside", ValueError, "must be one of"
    yield "channel_rms_norm_silu", "activation", lambda t: "gelu", ValueError, "must be one of"
    for name in ("scale", "shift"):
        yield "channel_rms_norm_silu", name, lambda t: torch.zeros(24), ValueError, r"must have shape \[N, C\] ="
    for op in WITH_EPS:
        for eps in (-1e-6, float("nan"), float("inf"), -float("inf")):
            yield op, "eps", lambda t, e=eps: e, ValueError, "must be finite and >= 0"
        for eps in (True, "1e-5", None):
            yield op, "eps", lambda t, e=eps: e, *NUMBER
    for op in MODULATED:
        for name in ("shift", "scale"):
            for bad in (
                lambda v: torch.cat([v, v]),
                lambda v: v[:, :1],
                lambda v: v[:, None].expand(-1, 2, -1),
                lambda v: torch.cat([v, v])[:, None],
                lambda v: v[0, :-1],
                lambda v: v[0, 0],
                lambda v: v[:, None, None],
            ):
                yield op, name, lambda t, n=name, f=bad: f(t[n]), ValueError, r"must have shape \[D\] = .*\[B, T, D\]"
    for op in ("layer_norm_modulate", "rms_norm_modulate", "layer_norm_modulate_linear"):
        yield op, "x", lambda t: t["x"][0], ValueError, r"must have shape \[B, T, D\]"
        yield op, "x", lambda t: t["x"][:, :, :0], ValueError, "must have at least one feature"
    for op in ("layer_norm_modulate", "rms_norm_modulate"):
        yield op, "weight", lambda t: torch.ones(1), ValueError, r"must have shape \[D\] ="
    yield "layer_norm_modulate", "bias", lambda t: torch.ones(1), ValueError, r"must have shape \[D\] ="
    for op in GATED:
        for size in ((2,), (1, 1), (3, 1), (1, 1, 1), ()):
            yield op, "gate", lambda t, s=size: torch.ones(s), ValueError, "must have shape"
    yield "gate_residual", "branch", lambda t: t["branch"][:, :1], ValueError, "must have the shape of residual"
    yield (
        "gate_residual_layer_norm_modulate",
        "branch",
        lambda t: t["branch"][:, :1],
        ValueError,
        "must have the shape of residual",
    )
    for op in CONVS:
        yield op, "weight", lambda t: t["weight"][:, :1], ValueError, "must take"
        yield op, "weight", lambda t: t["weight"][0], ValueError, "must have shape"
        yield (
            op,
            "weight",
            lambda t: t["weight"].new_zeros(8, t["weight"].shape[1], 99, 99),
            ValueError,
            "must fit into",
        )
        yield op, "bias", lambda t: t["bias"][:1], ValueError, r"must have shape \[Cout\]"
        yield op, "residual", lambda t: t["residual"][:1], ValueError, "must have the shape of the convolution's output"
        yield (
            op,
            "residual",
            lambda t: t["residual"][:, :1],
            ValueError,
            "must have the shape of the convolution's output",
        )
        for padding in (-1, (1,), (1, 1, 1), (1, -1)):
            yield op, "padding", lambda t, p=padding: p, ValueError, "must be >= 0"
        for padding in (1.5, "same", None, (1.5, 1)):
            yield op, "padding", lambda t, p=padding: p, TypeError, "must be"
    for op in LINEARS:
        yield op, "weight", lambda t: t["weight"][:, :1], ValueError, "must have shape"
        yield op, "weight", lambda t: t["weight"][0], ValueError, "must have shape"
        yield op, "bias", lambda t: t["bias"][:1], ValueError, r"must have shape \[out\]"
    yield (
        "linear_gate_residual",
        "residual",
        lambda t: t["residual"][:, :1],
        ValueError,
        "must have the shape of the output",
    )
    yield "linear_gate_residual", "activation", lambda t: "relu", ValueError, "must be one of"
    yield "group_norm_silu", "activation", lambda t: "gelu", ValueError, "must be one of"
    for op in SKIPPING:
        yield op, "zero_skip", lambda t: "always", ValueError, "must be one of"
        yield op, "zero_skip", lambda t: None, ValueError, "must be one of"
    for p in (-0.1, 1.5, float("nan")):
        yield "group_norm_silu_conv_residual", "dropout_p", lambda t, p=p: p, ValueError, r"must be in \[0, 1\]"
    yield "group_norm_silu_conv_residual", "dropout_p", lambda t: "0.5", *NUMBER
    yield "group_norm_silu_conv_residual", "keep", lambda t: torch.ones(3) > 0, ValueError, "must have the shape of x"


def _id(op, name, make, error, requirement):
    return f"{op}-{name}-{re.sub('[^a-z0-9]+', '_', requirement.lower())}"


@pytest.mark.parametrize(
    ("op", "name", "make", "error", "requirement"), [pytest.param(*c, id=_id(*c)) for c in _cases()]
)
def test_error_names_op_argument_and_requirement(op, name, make, error, requirement):
    case = CASE[op]
    inputs = case.inputs(Draw(torch.float32))
    arguments = {**inputs, **case.options, name: make(inputs)}
    before = {k: t.clone() for k, t in arguments.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    with pytest.raises(error) as caught:
        getattr(zb, op)(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{op}: "), message
    others = r"(\w+, )*"  # an error about several arguments lists them
    assert re.search(rf"^{op}: {others}{name}(, \w+)* ({requirement})", message), message
    for k, t in before.items():
        assert torch.equal(arguments[k], t), f"{k} was written to"


@pytest.mark.parametrize("op", SKIPPING)
def test_operands_of_a_convolution_or_linear_have_one_dtype(op):
    inputs = CASE[op].inputs(Draw(torch.float32))
    with pytest.raises(TypeError, match=f"^{op}: .*weight, bias must have one dtype, got .*torch.float16"):
        getattr(zb, op)(**{**inputs, **CASE[op].options, "bias": inputs["bias"].half()})


def test_is_zero_takes_floating_tensors_on_one_device():
    for bad, got in ((torch.zeros(2, dtype=torch.int64), "torch.int64"), (3.0, "float"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"is_zero: tensors\[1\] must be .*, got {got}"):
            zb.is_zero(torch.zeros(2), bad)
    with pytest.raises(ValueError, match=r"is_zero: tensors\[1\] must be on the device of tensors\[0\]"):
        zb.is_zero(torch.zeros(2), torch.zeros(2, device="meta"))
