"""Unusual inputs that work: empty, smallest, expanded, and beyond 2^31 elements."""

import mmap

import pytest
import torch

import zeroblock as zb
from zeroblock import ops
from zeroblock.testing import CPU_MISSING
from zeroblock.testing.cases import CASES, OPS
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import assert_parity, floating

# They take every op forward and backward through the bindings.
pytestmark = pytest.mark.every_torch

CASE = {case.op: case for case in reversed(CASES) if not case.large}  # the first of each op


def _resized(op: str, **sizes):
    """The first case of the op with other sizes."""
    case = CASE[op]
    return type(case)(op, "resized", {**case.sizes, **sizes}, case.options, case.layouts)


def _empty_sizes():
    for op in OPS:
        sizes = CASE[op].sizes
        if op == "gate_residual":
            yield op, {"size": (0, 4, 5), "gate": "bd"}
            yield op, {"size": (3, 0, 5), "gate": "bd"}
            yield op, {"size": (0, 4, 5, 6)}
            continue
        yield op, {"N" if "N" in sizes else "B": 0}
        if "T" in sizes:
            yield op, {"T": 0}
    for gate in ("one", "d", "btd"):
        yield "gate_residual", {"size": (0, 4, 5), "gate": gate}
        yield "gate_residual_layer_norm_modulate", {"T": 0, "gate": gate}
        yield "linear_gate_residual", {"B": 0, "gate": gate}


@pytest.mark.parametrize(("op", "sizes"), list(_empty_sizes()), ids=str)
def test_empty_batch_and_no_tokens(backend, device, op, sizes):
    """Results are empty; gradients of weights and vectors are zeros, not None and not left unwritten."""
    assert_parity(_resized(op, **sizes), torch.float32, device=device)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("group_norm_silu", {"S": (1, 1)}),
        ("group_norm_silu", {"S": ()}),
        ("group_norm_silu", {"N": 1, "C": 32, "S": (1, 7)}),
        ("channel_rms_norm_silu", {"S": (1, 1)}),
        ("channel_rms_norm_silu", {"N": 1, "C": 2, "S": ()}),
        ("channel_rms_norm_silu", {"N": 1, "S": (1, 1, 7)}),
        ("group_norm_silu_conv_residual", {"S": (1, 1)}),
        ("conv_residual", {"S": (1, 1), "N": 1}),
        ("layer_norm_modulate", {"B": 1, "T": 1, "D": 2}),
        ("rms_norm_modulate", {"B": 1, "T": 1, "D": 1}),
        ("gate_residual", {"size": (1,)}),
        ("gate_residual_layer_norm_modulate", {"B": 1, "T": 1, "D": 17}),
        ("layer_norm_modulate_linear", {"B": 1, "T": 1, "D": 4, "out": 1}),
        ("linear_gate_residual", {"B": 1, "T": 1, "K": 1, "out": 1}),
    ],
    ids=str,
)
def test_smallest_sizes(backend, device, op, sizes, dtype):
    assert_parity(_resized(op, **sizes), dtype, device=device)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=lambda d: str(d)[6:])
def test_nan_with_any_payload_stays_nan(backend, device, dtype):
    """All bits set below the sign: rounding that looks at the lower half alone would carry into the sign, to -0."""
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32, device=device).view(torch.float32).expand(2, 40).clone()
    x = torch.randn(2, 5, 40, device=device).to(dtype).requires_grad_()
    y = zb.layer_norm_modulate(x, nan, nan)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.isnan().all() and dx.isnan().all()


@pytest.mark.parametrize("op", OPS)
def test_expanded_inputs(backend, device, op):
    """Stride 0 along the batch wherever there is one: the result is a fresh tensor, the inputs are left alone."""

    class Expanded(type(CASE[op])):
        def inputs(self, draw):
            inputs = super().inputs(draw)
            batch = inputs[floating(inputs)[0]].shape[0]
            return {
                name: t[:1].expand(t.shape) if t is not None and t.dim() > 1 and t.shape[0] == batch else t
                for name, t in inputs.items()
            }

    case = CASE[op]
    assert_parity(Expanded(op, "expanded", case.sizes, case.options), torch.bfloat16, device=device)
    inputs = Expanded(op, "expanded", case.sizes, case.options).inputs(Draw(torch.float32, device=device))
    y = case.run(**inputs)
    (y[0] if isinstance(y, tuple) else y).add_(1)


# ---- more than 2^31 elements ----------------------------------------------------------------------------------------

HUGE = 2**31 + 64


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("group_norm_silu", {"N": HUGE // 64, "C": 32, "S": (1, 2)}),
        ("group_norm_silu_conv_residual", {"N": HUGE // 64, "C": 32, "S": (1, 2)}),
        ("conv_residual", {"N": HUGE // 32, "S": (1, 2)}),
        ("channel_rms_norm_silu", {"N": 1, "C": 64, "S": (1, HUGE // 64)}),
        ("layer_norm_modulate", {"T": HUGE // 64, "D": 64}),
        ("rms_norm_modulate", {"T": HUGE // 64, "D": 64}),
        ("gate_residual", {"size": (1, HUGE // 64, 64), "gate": "bd"}),
        ("gate_residual_layer_norm_modulate", {"T": HUGE // 64, "D": 64}),
        ("layer_norm_modulate_linear", {"T": HUGE // 64, "D": 64, "out": 64}),
        ("linear_gate_residual", {"T": HUGE // 64, "K": 64, "out": 64}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_shapes_beyond_2_to_the_31(op, sizes):
    """On the meta device, which computes shapes and allocates nothing."""

    class Meta(Draw):
        def normal(self, *size, mean=0.0, std=1.0):
            return torch.empty(size, dtype=self.dtype, device="meta")

    case = _resized(op, **sizes)
    inputs = case.inputs(Meta(torch.bfloat16))
    y, expected = case.run(**inputs), case.eager(**inputs)
    for got, want in zip(*(t if isinstance(t, tuple) else (t,) for t in (y, expected)), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def _sparse(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that are one page of the system's, mapped everywhere: as much to read as there is, nothing to store."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # known to Python since 3.13
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """What reads a huge tensor and writes a small one, by the kernels: is_zero and the gradient of a gate."""
    if CPU_MISSING is not None:
        pytest.skip(f"the cpu backend cannot run, and the reference would need several such tensors: {CPU_MISSING}")
    t = _sparse(HUGE, torch.bfloat16)
    t[-1] = 3.0
    assert zb.is_zero(t, t[:-1]).tolist() == [False, True]
    tokens = t.view(2, -1, 32)
    for gate in (torch.ones(1), torch.ones(2, 32)):
        dgate, _ = ops.gate_residual_bwd(tokens, gate, tokens, True, False)
        expected = torch.zeros_like(gate)
        expected.view(-1)[-1] = 9.0
        assert torch.equal(dgate, expected)


@pytest.mark.parametrize("op", ("layer_norm_modulate", "rms_norm_modulate"))
def test_strides_beyond_2_to_the_31(backend, device, op):
    """Modulation whose second sample lies 2^31 elements after the first, in sparse memory: two pages of it are real."""
    if device != "cpu":
        pytest.skip("the memory is the host's")
    B, T, D = 2, 3, 40
    storage = _sparse(HUGE + 4096, torch.float32)

    class Distant(type(CASE[op])):
        def inputs(self, draw):
            inputs = super().inputs(draw)
            inputs["shift"] = storage.as_strided((B, D), (HUGE, 1)).copy_(draw.normal(B, D))
            inputs["scale"] = storage.as_strided((B, T, D), (HUGE, D, 1), 1024).copy_(draw.normal(B, T, D))
            return inputs

    assert_parity(Distant(op, "distant", {"B": B, "T": T, "D": D}), torch.float32)
