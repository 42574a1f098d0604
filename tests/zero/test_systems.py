"""Rule 9 of the zero contract and the systems around a block: autocast, compile, export, copies, DDP, DTensor."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zeroblock as zb
from zeroblock import zero
from zeroblock.testing import counters, eager, reset_counters

from ..convert.ranks import run_on_two_ranks
from ..twins import assert_gradients, gradients, random_like, run
from .cases import CASES, TAILED, assert_parity, image, was_skipped

# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: f"x {d}")
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=lambda d: f"autocast {d}")
@pytest.mark.parametrize("name", CASES)
def test_autocast_equals_eager(name, autocast, dtype, phase):
    """Dtypes of y and of every gradient, and the values within the budget."""
    case = CASES[name]
    ours, theirs = case.pair()
    if phase == "dense":
        torch.manual_seed(3)
        fresh = torch.randn_like(case.weight(ours)) * 0.3
        for module in (ours, theirs):
            case.weight(module).data.copy_(fresh)
    assert_parity(case, ours, theirs, case.example(dtype), skipped=phase == "zero", autocast=autocast)


@pytest.mark.parametrize(
    "shortcut, x_dtype, expected",
    [
        ({}, torch.float32, torch.float32),
        ({}, torch.bfloat16, torch.bfloat16),
        ({"out_channels": 64}, torch.float32, torch.bfloat16),
        ({"out_channels": 64, "use_conv": True}, torch.float32, torch.bfloat16),
        ({"up": True}, torch.float32, torch.float32),
        ({"down": True}, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_autocast_output_dtype_of_a_resblock(shortcut, x_dtype, expected):
    for ns in (zb.nn, eager):
        block = ns.ResBlock(32, 16, 0.0, **shortcut)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert block(image().to(x_dtype), torch.randn(2, 16)).dtype == expected


# ---- compile and export: only the op's own test, no graph break ------------------------------------------------------

COMPILED = {
    "ResBlock": "group_norm_silu_conv_residual",
    "DiTBlock": "linear_gate_residual",
    "ResidualBranch-conv": None,
    "FinalLayer": None,
    "ZeroConv2d": None,
    "FixupBasicBlock": None,
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_without_a_graph_break(name):
    """The compiled block tests the weight at each run: a silent write after compilation is seen."""
    case = CASES[name]
    ours, theirs = case.pair()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs = case.example()
    op = COMPILED[name]
    for value in (0.0, 0.5, 0.0):
        for module in (ours, theirs):
            case.weight(module).data.fill_(value)
        exact = copy.deepcopy(theirs).double()
        exact = run(exact, tuple(t.detach().double().requires_grad_() for t in inputs))[1]
        expected_y, expected = run(theirs, inputs)
        reset_counters()
        y = compiled(*inputs)
        got = gradients(ours, inputs, y, random_like(y))
        if op == "group_norm_silu_conv_residual":  # conv1 is executed, conv2 skipped while it is zero
            assert counters()[op] == ((2, 0) if value else (1, 1))
        assert counters().get(case.counter, (0, 0))[1] == 0
        if value == 0:
            assert torch.equal(y, expected_y)
        assert_gradients((got, expected, exact))


@pytest.mark.parametrize("name", COMPILED)
def test_export(name):
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = tuple(t.detach() for t in case.example())
    exported = torch.export.export(ours, inputs).module()
    assert torch.equal(exported(*inputs), theirs(*inputs))
    with torch.no_grad():
        case.weight(exported).fill_(0.5)
        case.weight(theirs).fill_(0.5)
        torch.testing.assert_close(exported(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-4)


# ---- modes, copies, distribution ------------------------------------------------------------------------------------


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_no_branch_is_skipped_under_a_dispatch_mode(name):
    """A mode that counts FLOPs or traces sees the operations that eager runs."""
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = case.example()
    reset_counters()
    with Mode():
        y = ours(*inputs)
    assert case.counter not in counters()
    assert torch.equal(y, theirs(*inputs)) or name == "ResidualBranch-linear"


@pytest.mark.parametrize("name", TAILED)
def test_inference_mode_with_weights_made_in_it(name):
    """Such weights have no version to read."""
    case = CASES[name]
    with torch.inference_mode():
        ours, theirs = case.pair()
        inputs = tuple(t.detach() for t in case.example())
        assert was_skipped(case.counter, lambda: ours(*inputs))
        assert torch.equal(ours(*inputs), theirs(*inputs))


@pytest.mark.parametrize("name", CASES)
def test_copies_skip_by_their_own_values(name):
    case = CASES[name]
    ours, _ = case.pair()
    inputs = case.example()
    ours(*inputs)
    twin = copy.deepcopy(ours) if name.startswith("Resi") else pickle.loads(pickle.dumps(ours))
    case.weight(twin).data.fill_(0.5)
    assert was_skipped(case.counter, lambda: ours(*inputs))
    assert not was_skipped(case.counter, lambda: twin(*inputs))


def test_ddp_on_two_ranks(tmp_path):
    """In its default mode, where a parameter that autograd does not reach is an error."""
    run_on_two_ranks(Path(__file__).with_name("ddp_worker.py"), tmp_path)


@pytest.fixture
def mesh():
    """A device mesh of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weight_is_dense(mesh):
    """Its local shard may be zero where another rank's is not."""
    for placement in (Replicate(), Shard(0)):
        weight = distribute_tensor(torch.zeros(8, 8), mesh, [placement])
        assert not zero.is_exactly_zero(weight) and not zero.is_exactly_zero(nn.Parameter(weight))
    branch = zb.nn.ResidualBranch(nn.Identity(), nn.Linear(8, 8, bias=False))
    branch.tail.weight = nn.Parameter(distribute_tensor(torch.zeros(8, 8), mesh, [Replicate()]))
    x = distribute_tensor(torch.randn(2, 3, 8), mesh, [Replicate()])
    reset_counters()
    assert torch.equal(branch(x).full_tensor(), x.full_tensor())
    assert counters() == {}, "nobody judges it"


# ---- torch.jit.trace and compiled autograd ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_trace_holds_the_dense_formula(name):
    """torch.jit.trace records what runs, for weights that may change later: nothing is skipped."""
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = tuple(t.detach() for t in case.example())
    for p in ours.parameters():
        p.requires_grad_(False)
    traced = torch.jit.trace(ours, inputs)
    with torch.no_grad():
        torch.testing.assert_close(traced(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-4)
        for traced_p, p in zip(traced.parameters(), theirs.parameters(), strict=True):
            fresh = 0.1 * torch.randn_like(p)
            p.copy_(fresh), traced_p.copy_(fresh)
        torch.testing.assert_close(traced(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_compiled_autograd(name):
    """It sums gradients with torch.add: a gradient that is wanted is a tensor."""
    from torch._dynamo import compiled_autograd

    case = CASES[name]
    ours, theirs = case.pair()
    found = []
    for module in (ours, theirs):
        inputs = case.example()
        with torch.enable_grad():
            loss = module(*inputs).square().sum()
        if module is ours:
            with compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        else:
            loss.backward()
        found.append([t.grad for t in (*inputs, *module.parameters())])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
