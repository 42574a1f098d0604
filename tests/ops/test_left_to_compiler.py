"""What torch.compile traces of an op in its place, on a CPU: how it is laid out, and what stays an op."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from zeroblock.kernels._torch import TELLS_EXPORTS

from .test_compile import FUNCTIONS, _assert_same, _inputs, _results, _tuple, fresh_compiler  # noqa: F401

pytestmark = pytest.mark.skipif(not TELLS_EXPORTS, reason="this torch cannot tell an export from a compilation")


@pytest.mark.parametrize("name", ["gate_residual", "gate_residual_layer_norm_modulate", "linear_gate_residual"])
def test_a_transposed_residual_does_not_lay_out_what_follows(name):
    """Patch embeddings hand over transposed tokens; a sum that took their layout would be read with strides by every
    norm after it."""
    operands, function = FUNCTIONS[name]
    tensors = [_inputs()[k] for k in operands]
    at = operands.index("tokens") if name == "linear_gate_residual" else 0
    tensors[at] = tensors[at].mT.contiguous().mT
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = compiled(*(t.clone().requires_grad_() for t in tensors))
    assert not tensors[at].is_contiguous() and all(y.is_contiguous() for y in _tuple(results))


def test_the_gradients_of_weight_and_bias_are_the_compilers():
    """Nothing of them can be skipped: in backward an op is called for the gradient of h alone."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, example):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    operands, function = FUNCTIONS["linear_gate_residual"]
    tensors = [_inputs()[k].clone().requires_grad_() for k in operands]
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    _assert_same(_results(compiled, tensors), _results(function, tensors))
    (call,) = [n for n in graphs[-1].graph.nodes if "zeroblock" in str(n.target)]
    assert call.args[-1] == [True, False, False, False] and call.args[-2] is False
