"""The zero path on a GPU under "auto": the verdict is a flag that only kernels read.

Runs on a GPU, and, with TRITON_INTERPRET=1, on the CPU through the interpreter, where the sequence of kernels that a
CUDA graph would capture is run again on changed weights.
"""

import contextlib

import pytest
import torch

import zeroblock as zb
from zeroblock import zero
from zeroblock.backends import available as _backends
from zeroblock.testing import assert_bitwise_equal, assert_error_budget, poison_empty, use_backend
from zeroblock.testing.draw import Draw

pytestmark = [pytest.mark.interpreted, pytest.mark.gpu]
MISSING = _backends.missing("triton")
if MISSING is not None:
    pytest.skip(f"the triton backend cannot run: {MISSING}", allow_module_level=True)

from zeroblock.backends.triton import TRITON  # noqa: E402
from zeroblock.kernels import _launch, group_norm_silu_bwd  # noqa: E402

DEVICE = "cpu" if _backends.interprets() else "cuda"
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
NHWC = torch.channels_last
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def triton_alone():
    with use_backend("triton"):
        yield


def _conv(draw, k):
    x, weight = draw.normal(2, 24, 6, 5).to(memory_format=NHWC), draw.normal(40, 24, k, k).to(memory_format=NHWC)
    residual = draw.normal(2, 40, 6, 5).to(memory_format=NHWC)
    return x, weight, draw.normal(40), residual, k // 2


def _conv_residual(draw, k=3):
    h, weight, bias, residual, padding = _conv(draw, k)
    inputs = {"h": h, "weight": weight, "bias": bias, "residual": residual}
    return zb.conv_residual, inputs, {"padding": padding}


def _fused(draw, k=3):
    x, weight, bias, residual, padding = _conv(draw, k)
    norm = {"norm_weight": draw.normal(24), "norm_bias": draw.normal(24)}
    inputs = {"x": x, **norm, "weight": weight, "bias": bias, "residual": residual}
    film = {"scale": draw.normal(2, 24), "shift": draw.normal(2, 24)}
    return zb.group_norm_silu_conv_residual, {**inputs, **film}, {"num_groups": 4, "padding": padding}


def _linear(draw, gate="bd", activation="gelu_tanh"):
    gates = {"bd": draw.chunks(2, 24, 1)[0], "one": draw.normal(1), None: None}
    inputs = {"h": draw.normal(2, 7, 40), "weight": draw.normal(24, 40), "bias": draw.normal(24)}
    inputs |= {"gate": gates[gate], "residual": draw.normal(2, 7, 24)}
    return zb.linear_gate_residual, inputs, {"activation": activation}


CALLS = {
    "conv_residual-1x1": lambda draw: _conv_residual(draw, 1),
    "conv_residual-3x3": _conv_residual,
    "group_norm_silu_conv_residual-3x3": _fused,
    "group_norm_silu_conv_residual-1x1": lambda draw: _fused(draw, 1),
    "linear_gate_residual-bd": _linear,
    "linear_gate_residual-one": lambda draw: _linear(draw, "one", None),
    "linear_gate_residual-no-gate": lambda draw: _linear(draw, None, "silu"),
}
calls = pytest.mark.parametrize("call", CALLS)


def _assert_bare(y, inputs, what):
    """y is what is left of the branch, residual + gate * bias; without a gate, bit by bit."""
    bias, gate, residual = inputs["bias"], inputs.get("gate"), inputs["residual"]
    step = bias if inputs["weight"].dim() == 2 else bias[:, None, None]
    if gate is None:
        assert_bitwise_equal(y, (residual.double() + step.double()).to(residual.dtype), what)
        return
    gate = gate[:, None] if gate.dim() == 2 else gate
    assert_error_budget(y, residual + gate * step, residual.double() + gate.double() * step.double(), what)


@contextlib.contextmanager
def host_is_blind():
    """Reading a tensor on the host is an error."""

    def forbidden(*_):
        raise AssertionError("a tensor was read on the host")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "__bool__", "__int__", "__float__", "tolist"):
            patch.setattr(torch.Tensor, name, forbidden)
        patch.setattr(zero, "is_exactly_zero", forbidden)
        yield


def test_the_blindfold_holds():
    with host_is_blind(), pytest.raises(AssertionError, match="read on the host"):
        int(torch.zeros(1))
    conv = _conv_residual(Draw(torch.float32, device=DEVICE))[1]
    with host_is_blind(), pytest.raises(AssertionError, match="read on the host"):
        zb.conv_residual(**conv, zero_skip="sync")


@calls
@DTYPES
def test_zero_weight_leaves_residual_and_bias(call, dtype):
    """Also where the branch's input is not finite: nothing of it was multiplied."""
    function, inputs, options = CALLS[call](Draw(dtype, device=DEVICE))
    inputs["weight"].zero_().mul_(-1)
    inputs["x" if "x" in inputs else "h"][0, 1] = float("nan")
    with poison_empty(), host_is_blind():
        y = function(**inputs, **options)
    _assert_bare(y, inputs, call)


@calls
@pytest.mark.parametrize("is_zero", (False, True))
def test_gradients(call, is_zero):
    """Within the budget of eager's; upstream of a zero weight exactly zero, and the weight's own are not."""
    draw = Draw(torch.float32, device=DEVICE)
    function, inputs, options = CALLS[call](draw)
    if is_zero:
        inputs["weight"].zero_()
    dy = draw.normal(*inputs["residual"].shape)
    results = []
    for policy, wide in (("auto", torch.float32), ("never", torch.float32), ("never", torch.float64)):
        leaves = {k: v if v is None else v.detach().to(wide).requires_grad_() for k, v in inputs.items()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(use_backend("triton" if policy == "auto" else "reference"))
            if policy == "auto":
                stack.enter_context(poison_empty())
                stack.enter_context(host_is_blind())
            y = function(**leaves, **options, zero_skip=policy)
            y.backward(dy.to(wide))
        grads = {f"d{k}": v.grad for k, v in leaves.items() if v is not None}
        results.append({"y": y.detach(), **grads})
    for name in results[0]:
        if is_zero and name not in ("y", "dweight", "dbias", "dresidual", "dgate"):
            assert bool(torch.equal(results[0][name], torch.zeros_like(results[0][name]))), name
        else:
            assert_error_budget(*(r[name] for r in results), f"{call} {name}")


@pytest.mark.parametrize("weights", ("zero", "dense"))
def test_zero_gate_of_linear_gate_residual(weights):
    function, inputs, options = _linear(Draw(torch.float32, device=DEVICE))
    inputs["gate"] = torch.zeros(2, 24, device=DEVICE)
    if weights == "zero":
        inputs["weight"].zero_()
    inputs["h"].fill_(float("nan"))
    assert torch.equal(function(**inputs, **options), inputs["residual"])


def _run_again(launches):
    for recorded in launches:
        _launch.launch(recorded.kernel, recorded.grid, **recorded.options, **recorded.arguments)


@calls
def test_captured_kernels_judge_the_weights_of_each_replay(call):
    """The recorded launches are all there is between the inputs and the result: a graph of them is right for any
    weights, whichever were there at capture."""
    draw = Draw(torch.float32, device=DEVICE)
    function, inputs, options = CALLS[call](draw)
    dense = inputs["weight"].clone()
    for at_capture in (torch.zeros_like(dense), dense):
        inputs["weight"].copy_(at_capture)
        with host_is_blind(), _launch.recording() as launches:
            y = function(**inputs, **options)
        assert [launch.kernel.__name__ for launch in launches].count("_scan") == 1
        for weight in (dense, torch.zeros_like(dense), 2 * dense, at_capture):
            inputs["weight"].copy_(weight)
            expected = function(**inputs, **options).clone()
            y.fill_(float("nan"))
            _run_again(launches)
            assert_bitwise_equal(y, expected, call)
        inputs["weight"].zero_()
        _run_again(launches)
        _assert_bare(y, inputs, call)


def test_captured_backward_of_group_norm_silu():
    draw = Draw(torch.float32, device=DEVICE)
    x, dy, flag = draw.normal(2, 24, 6, 5), draw.normal(2, 24, 6, 5), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    vectors = (draw.normal(24), draw.normal(24), draw.normal(2, 24), draw.normal(2, 24))
    for split in (False, True):
        _, mean, rstd = TRITON.group_norm_silu(x, 4, *vectors[:2], 1e-5, *vectors[2:], True)
        arguments = (dy, x, mean, rstd, *vectors, 4, True, False, flag)
        with poison_empty(), _launch.recording() as launches:
            grads = group_norm_silu_bwd.backward(*arguments, split=split)
        expected = [g.clone() for g in grads]
        for value in (1, 0):
            flag.fill_(value)
            for g in grads:
                g.fill_(float("nan"))
            _run_again(launches)
            for g, e in zip(grads, expected, strict=True):
                assert torch.equal(g, torch.zeros_like(e) if value else e)


def test_explain_tells_which_gemms_read_the_flag():
    draw = Draw(torch.float32, device=DEVICE)
    function, inputs, options = _conv_residual(draw)
    assert "flag on the device" in str(zb.explain("conv_residual", **inputs, **options))
    inputs["h"], inputs["weight"] = inputs["h"].contiguous(), inputs["weight"].contiguous()
    assert "library call" in str(zb.explain("conv_residual", **inputs, **options))
    assert zb.explain("conv_residual", **inputs, **options).backend == "triton"
    padded = zb.explain("conv_residual", **inputs, padding=((2, 0), 1))
    assert "its padding takes several convolutions" in str(padded) and len(padded.plans) == 1


def test_explain_tells_what_does_not_fit_a_grid():
    """Nothing of that size is allocated: every sample is the same one."""
    x = torch.zeros(1, 1, 4, device=DEVICE).expand(70000, 1, 4)
    why = zb.explain("layer_norm_modulate", x, None, None)
    assert why.backend == "reference" and "70000 samples" in why.not_used["triton"]
    x = torch.zeros(1, device=DEVICE).expand(2**29)
    why = zb.explain("gate_residual", x, torch.zeros(1, device=DEVICE), x)
    assert why.backend == "reference" and "elements" in why.not_used["triton"]
    why = zb.explain("layer_norm_modulate", torch.zeros(1, 1, 9000, device=DEVICE), None, None)
    assert why.backend == "reference" and "9000" in why.not_used["triton"]


@GPU
@calls
def test_cuda_graph_replays_on_changed_weights(call):
    draw = Draw(torch.float32, device=DEVICE)
    function, inputs, options = CALLS[call](draw)
    dense = inputs["weight"].clone()
    function(**inputs, **options)  # compiles the kernels
    inputs["weight"].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function(**inputs, **options)
    for weight in (dense, torch.zeros_like(dense), dense):
        inputs["weight"].copy_(weight)
        y.fill_(float("nan"))
        graph.replay()
        assert_bitwise_equal(y, function(**inputs, **options), call)
