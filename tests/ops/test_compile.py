"""torch.compile, torch.export and make_fx: nothing breaks the graph, and the ops stay whole in it; but for norms and
gates, which torch.compile sees as plain PyTorch in training on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import zeroblock as zb
from zeroblock import testing
from zeroblock.kernels._torch import TELLS_EXPORTS


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _r(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def _inputs(n: int = 2, s: int = 5) -> dict[str, torch.Tensor]:
    """One set of operands for all functions: n samples, s rows of pixels, s tokens."""
    return {
        "x": _r(n, 8, s, 3),
        "image": _r(n, 6, s, 3),
        "conv": _r(6, 8, 3, 3),
        "scale": _r(n, 8),
        "shift": _r(n, 8) + 1,
        "t": _r(n, s, 8),
        "u": _r(n, s, 8) + 1,
        "linear": _r(6, 8),
        "bias": _r(6),
        "gate": _r(n, 6),
        "weight": _r(8),
        "tokens": _r(n, s, 6),
    }


FUNCTIONS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "group_norm_silu": (
        ("x", "weight", "scale", "shift"),
        lambda x, w, scale, shift: zb.group_norm_silu(x, 4, w, None, scale=scale, shift=shift),
    ),
    "group_norm_silu_conv_residual": (
        ("x", "weight", "conv", "bias", "image", "scale"),
        lambda x, w, conv, b, r, scale: zb.group_norm_silu_conv_residual(x, 4, w, None, conv, b, r, scale=scale),
    ),
    "conv_residual": (("x", "conv", "bias", "image"), zb.conv_residual),
    "channel_rms_norm_silu": (
        ("x", "weight", "scale", "shift"),
        lambda x, w, scale, shift: zb.channel_rms_norm_silu(x, w.view(-1, 1, 1), scale=scale, shift=shift),
    ),
    "layer_norm_modulate": (("t", "shift", "scale"), zb.layer_norm_modulate),
    "rms_norm_modulate": (
        ("t", "shift", "scale", "weight"),
        lambda x, shift, scale, w: zb.rms_norm_modulate(x, shift, scale, weight=w),
    ),
    "gate_residual": (("t", "scale", "u"), zb.gate_residual),
    "gate_residual_layer_norm_modulate": (
        ("t", "scale", "u", "shift", "scale"),
        zb.gate_residual_layer_norm_modulate,
    ),
    "layer_norm_modulate_linear": (("t", "shift", "scale", "linear", "bias"), zb.layer_norm_modulate_linear),
    "linear_gate_residual": (
        ("t", "linear", "bias", "gate", "tokens"),
        lambda h, w, b, g, r: zb.linear_gate_residual(h, w, b, g, r, activation="gelu_tanh"),
    ),
}


def _results(function: Callable, tensors: list[torch.Tensor], parameters: tuple = ()) -> list[torch.Tensor]:
    """Outputs, then the gradient of every input and parameter."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, [*leaves, *parameters])]


def _assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """The same values and output layout; compiled code may add up gradients in its own order, and lay them out so."""
    assert got[0].stride() == expected[0].stride()
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda text, i=i: f"result {i}: {text}")


# What torch.compile traces as plain PyTorch in training on a CPU, for the compiler to fuse with what is around it.
NORMS_AND_GATES = (
    "layer_norm_modulate layer_norm_modulate_linear rms_norm_modulate gate_residual gate_residual_layer_norm_modulate"
)
LEFT_TO_COMPILER = NORMS_AND_GATES.split() if TELLS_EXPORTS else []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_compiles_whole(name):
    operands, function = FUNCTIONS[name]
    tensors = [_inputs()[k] for k in operands]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    _assert_same(_results(compiled, tensors), _results(function, tensors))
    with torch.no_grad():
        expected, got = function(*tensors), compiled(*tensors)
    for a, b in zip(_tuple(got), _tuple(expected), strict=True):
        testing.assert_bitwise_equal(a, b)
    whole = {f"zeroblock.{name}.default"}
    in_training, in_inference = (
        {op for op in _op_names(graph.graph) if op.startswith("zeroblock.")} for graph in counter.graphs
    )
    assert in_inference == whole and in_training == (set() if name in LEFT_TO_COMPILER else whole)


@pytest.mark.skipif(not TELLS_EXPORTS, reason="this torch cannot tell an export from a compilation: ops stay whole")
def test_what_the_compiler_takes_over_keeps_the_zero_path_of_the_product():
    """A trained gate and the activation are traced; the product is an op that tests its weight, alone."""
    operands, function = FUNCTIONS["linear_gate_residual"]
    tensors = [_inputs()[k].clone().requires_grad_() for k in operands]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for zeros, plans in ((True, (0, 1)), (False, (1, 0)), (True, (0, 1))):
        tensors[1].data.copy_(_inputs()["linear"] * (0.0 if zeros else 1.0))
        counts, y = _counted("linear_gate_residual", lambda: compiled(*tensors))
        assert counts == plans
        _assert_same(_results(compiled, tensors), _results(function, tensors))
    (graph,) = counter.graphs
    assert [n.args[3:6] for n in graph.graph.nodes if "zeroblock" in str(n.target)] == [(None, None, None)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dynamic_sizes_need_one_compilation(name):
    operands, function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, s, stance in ((2, 5, "default"), (3, 7, "fail_on_recompile"), (5, 4, "fail_on_recompile")):
        tensors = [_inputs(n, s)[k] for k in operands]
        with torch.compiler.set_stance(stance):
            got = _results(compiled, tensors)
        _assert_same(got, _results(function, tensors))


def _tuple(results):
    return results if isinstance(results, tuple) else (results,)


def _op_names(graph: torch.fx.Graph) -> set[str]:
    return {str(n.target) for n in graph.nodes if n.op == "call_function"}


class _Module(nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_export_keeps_the_op(name, strict):
    operands, function = FUNCTIONS[name]
    tensors = tuple(_inputs()[k] for k in operands)
    program = torch.export.export(_Module(function), tensors, strict=strict)
    assert f"zeroblock.{name}.default" in _op_names(program.graph)
    for a, b in zip(_tuple(program.module()(*tensors)), _tuple(function(*tensors)), strict=True):
        testing.assert_bitwise_equal(a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_make_fx_keeps_the_op(name):
    operands, function = FUNCTIONS[name]
    tensors = [_inputs()[k] for k in operands]
    graph = make_fx(lambda *t: function(*t), tracing_mode="fake")(*tensors)
    assert f"zeroblock.{name}.default" in _op_names(graph.graph)
    for a, b in zip(
        *((y if isinstance(y, tuple) else (y,)) for y in (graph(*tensors), function(*tensors))), strict=True
    ):
        testing.assert_bitwise_equal(a, b)


def _resblock(**options) -> tuple[nn.Module, list[torch.Tensor]]:
    return zb.nn.ResBlock(32, 8, 0.0, **options), [_r(2, 32, 6, 4), _r(2, 8)]


BLOCKS: dict[str, Callable[[], tuple[nn.Module, list[torch.Tensor]]]] = {
    "ResBlock-film": lambda: _resblock(use_scale_shift_norm=True),
    "ResBlock-add-1x1": lambda: _resblock(out_channels=64),
    "ResBlock-up": lambda: _resblock(up=True),
    "DiTBlock": lambda: (zb.nn.DiTBlock(16, 2), [_r(2, 5, 16), _r(2, 16)]),
    "FinalLayer": lambda: (zb.nn.FinalLayer(16, 2, 3), [_r(2, 5, 16), _r(2, 16)]),
    "ZeroConv2d": lambda: (zb.nn.ZeroConv2d(6, 8, 3, padding=1), [_r(2, 6, 5, 4), _r(2, 8, 5, 4)]),
    "ZeroLinear": lambda: (zb.nn.ZeroLinear(6, 8), [_r(2, 5, 6), _r(2, 5, 8)]),
    "FixupBasicBlock": lambda: (zb.nn.FixupBasicBlock(8, 8), [_r(2, 8, 5, 4)]),
    "FixupBottleneck": lambda: (zb.nn.FixupBottleneck(8, 2), [_r(2, 8, 5, 4)]),
    "ReZero": lambda: (zb.nn.ReZero(nn.Sequential(nn.Linear(8, 8), nn.SiLU())), [_r(2, 5, 8)]),
    "ResidualBranch": lambda: (
        zb.nn.ResidualBranch(nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(8))),
        [_r(2, 5, 8)],
    ),
}


def _randomised(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(1)
    block, inputs = BLOCKS[name]()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return block, inputs


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_compiles_whole(name, phase):
    block, inputs = BLOCKS[name]() if phase == "zero" else _randomised(name)
    parameters = tuple(block.parameters())
    expected = _results(block, inputs, parameters)
    got = _results(torch.compile(block, fullgraph=True, backend="aot_eager"), inputs, parameters)
    _assert_same(got, expected)


@pytest.mark.parametrize("name", ["ResBlock-film", "DiTBlock", "FinalLayer", "ZeroConv2d"])
def test_block_exports(name):
    block, inputs = _randomised(name)
    program = torch.export.export(block.eval(), tuple(inputs), strict=False)
    if name != "ZeroConv2d":
        assert any(op.startswith("zeroblock.") for op in _op_names(program.graph))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*inputs), block(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResBlock-film", "DiTBlock", "ZeroConv2d"])
def test_block_compiles_with_inductor(name):
    block, inputs = _randomised(name)
    parameters = tuple(block.parameters())
    compiled = torch.compile(block, fullgraph=True)
    _assert_same(_results(compiled, inputs, parameters), _results(block, inputs, parameters))


@pytest.mark.slow
def test_functions_compile_with_inductor_in_channels_last():
    def function(x, w, scale, shift, conv, b, r):
        h = zb.group_norm_silu(x * 2, 4, w, None, scale=scale, shift=shift)
        return zb.conv_residual(h + 1, conv, b, r) * 2

    values = _inputs()
    tensors = [values[k] for k in ("x", "weight", "scale", "shift", "conv", "bias", "image")]
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    _assert_same(_results(torch.compile(function, fullgraph=True), tensors), _results(function, tensors))


def _counted(op: str, call: Callable) -> tuple[tuple[int, int], torch.Tensor]:
    testing.reset_counters()
    result = call()
    return testing.counters()[op], result


@pytest.mark.parametrize("op", ["conv_residual", "group_norm_silu_conv_residual", "linear_gate_residual"])
def test_a_compiled_call_decides_by_the_weights_it_sees(op):
    operands, function = FUNCTIONS[op]
    values = _inputs()
    weight = values["linear" if op == "linear_gate_residual" else "conv"]
    tensors = [values[k] for k in operands]
    dense = weight.clone()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for value, expected in ((dense * 0, (0, 1)), (dense, (1, 0)), (dense * 0, (0, 1)), (dense * -0.0, (0, 1))):
        weight.data.copy_(value)  # no version bump, no guard sees it
        plans, y = _counted(op, lambda: compiled(*tensors))
        assert plans == expected
        testing.assert_bitwise_equal(y, function(*tensors))
    assert counter.frame_count == 1


def test_a_compiled_block_trains_out_of_its_zero_phase():
    torch.manual_seed(0)
    block, inputs = _resblock(use_scale_shift_norm=True)
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, fused=True) for m in (block, twin)]
    plans = []
    for _ in range(3):
        for i, (module, optimizer) in enumerate(zip((compiled, twin), optimizers, strict=True)):
            optimizer.zero_grad()
            testing.reset_counters()
            module(*inputs).square().mean().backward()
            plans += [testing.counters()["group_norm_silu_conv_residual"]] if i == 0 else []
            optimizer.step()
    assert plans == [(1, 1), (2, 0), (2, 0)]  # conv1's op always runs, conv2's is skipped at first
    for a, b in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
