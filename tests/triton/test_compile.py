"""The triton backend behind the registered ops: opcheck and torch.compile through the interpreter, and tracing on fake
CUDA tensors, which needs neither a GPU nor triton."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from zeroblock import zero
from zeroblock.backends import available as _backends
from zeroblock.testing import use_backend

from ..ops.op_calls import backward_calls, forward_calls, maker, registered
from ..ops.test_compile import FUNCTIONS, _assert_same, _inputs, _op_names, _results

pytestmark = pytest.mark.interpreted
functions = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture
def interpreter():
    if _backends.triton() is None or not _backends.interprets():
        pytest.skip("triton is missing or does not interpret (TRITON_INTERPRET=1 was not set)")
    torch._dynamo.reset()
    with use_backend("triton"):
        yield
    torch._dynamo.reset()


def _on_device(op: str, args: tuple) -> tuple:
    """The arguments with the zero test on the device instead of on the host."""
    names = [a.name for a in registered(op)._schema.arguments]
    if "zero_skip" not in names:
        return args
    at = names.index("zero_skip")
    return (*args[:at], zero.DEVICE if args[at] == zero.HOST else args[at], *args[at + 1 :])


def _has_zero_weight(op: str, args: tuple) -> bool:
    names = [a.name for a in registered(op)._schema.arguments]
    return "zero_skip" in names and not args[names.index("weight")].any()


@pytest.mark.parametrize("op", sorted(forward_calls(maker(torch.float32, "contiguous"))))
def test_opcheck(op, interpreter):
    """The calls with everything given, and with a zero weight; channels-last, so that the own convolution runs."""
    make = maker(torch.float32, "channels-last" if "conv" in op else "contiguous")
    every = forward_calls(make)[op]
    for args in [every[0]] + [args for args in every[1:] if _has_zero_weight(op, args)][:1]:
        args = _on_device(op, args)
        for t in args:
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                t.requires_grad_()
        torch.library.opcheck(registered(op), args)
        with torch.no_grad():
            out = registered(op)(*args)
        out = out if isinstance(out, tuple) else (out,)
        for backward in backward_calls(op, args, out, make)[:1]:
            backward = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in backward)
            torch.library.opcheck(registered(f"{op}_bwd"), backward, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_is_zero(interpreter):
    tensors = [torch.zeros(3, 5), torch.ones(2, dtype=torch.bfloat16), torch.zeros(0)]
    torch.library.opcheck(registered("is_zero"), (tensors,))


@functions
def test_function_compiles_whole(name, interpreter):
    operands, function = FUNCTIONS[name]
    tensors = [_inputs()[k] for k in operands]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with use_backend("reference"):
        expected = _results(function, tensors)
    _assert_same(_results(compiled, tensors), expected)


def _fake(mode: FakeTensorMode, t):
    """t as a tensor on a GPU that need not be there."""
    if not isinstance(t, torch.Tensor):
        return t
    with mode:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch was built without CUDA")
@pytest.mark.parametrize("op", sorted(forward_calls(maker(torch.float32, "contiguous"))))
@pytest.mark.parametrize("layout", ("contiguous", "channels-last"))
def test_fake_cuda_tensors(op, layout):
    """Results of forward and backward are on the device, in the shapes and strides of the reference's on the CPU."""
    make, mode = maker(torch.float32, layout), FakeTensorMode()
    args = _on_device(op, forward_calls(make)[op][0])
    fakes = tuple(_fake(mode, t) for t in args)

    def like(*size):
        return torch.empty(size)

    def run(args, like):
        out = registered(op)(*args)
        out = out if isinstance(out, tuple) else (out,)
        return *out, *(t for call in backward_calls(op, args, out, like) for t in registered(f"{op}_bwd")(*call))

    with use_backend("reference"), torch.no_grad():
        expected = run(args, like)
        with mode:
            got = run(fakes, lambda *size: torch.empty(size, device="cuda"))
    for fake, real in zip(got, expected, strict=True):
        assert fake.device.type == "cuda" and fake.shape == real.shape and fake.dtype == real.dtype
    assert got[0].stride() == expected[0].stride()


@functions
def test_make_fx_and_export_on_fake_cuda_tensors(name):
    """The op stays whole in the graph, and the zero test is the one that does not read back."""
    operands, function = FUNCTIONS[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    mode = FakeTensorMode()
    fakes = [_fake(mode, _inputs()[name]) for name in operands]
    with mode:
        graphs = [make_fx(lambda *tensors: function(*tensors))(*fakes).graph]
        graphs.append(torch.export.export(Module(), tuple(fakes)).graph)
    for graph in graphs:
        assert f"zeroblock.{name}.default" in _op_names(graph)
        (node,) = (n for n in graph.nodes if str(n.target) == f"zeroblock.{name}.default")
        schema = [a.name for a in node.target._schema.arguments]
        if "zero_skip" in schema:
            assert node.args[schema.index("zero_skip")] == zero.DEVICE
