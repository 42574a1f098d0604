"""Rule 1 of the zero contract: what zero is, and which weights are never judged."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import zeroblock as zb
from zeroblock import zero
from zeroblock.testing import CPU_MISSING, counters, eager, reset_counters, use_backend

from ..twins import run
from .cases import CASES, TAILED, assert_parity, conv_branch, image, was_skipped

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
needs_cpu_kernels = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]


def skips(module, *inputs):
    return was_skipped(type(module).__name__, lambda: module(*inputs))


# ---- what zero is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 4099])
def test_is_zero_reads_the_bits(dtype, size, backend):
    info = torch.finfo(dtype)
    smallest = torch.tensor(info.smallest_normal, dtype=dtype) * info.eps
    assert smallest > 0
    with use_backend(backend):
        for value in (0.0, -0.0):
            assert zero.is_exactly_zero(torch.full((size,), value, dtype=dtype))
        for value in (float("nan"), float("inf"), smallest, -smallest, 1.0):
            for position in {0, size // 2, size - 1}:
                t = torch.zeros(size, dtype=dtype)
                t[::2] = -0.0
                t[position] = value
                assert not zero.is_exactly_zero(t), (value, position)
                assert not zb.is_zero(t).item(), (value, position)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_zero_under_flush_denormal(backend):
    t = torch.tensor([0.0, 1e-40])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        with use_backend(backend):
            assert not zero.is_exactly_zero(t)
            assert zb.is_zero(t, torch.zeros(2)).tolist() == [False, True]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_zero_reads_every_element_of_a_view(backend):
    """And none beside it: slices, transposes, expanded and channels-last views."""
    with use_backend(backend):
        base = torch.zeros(6, 8, 4, 4)
        base[:, 4:] = 1
        assert zero.is_exactly_zero(base[:, :4])
        assert not zero.is_exactly_zero(base[:, :5])
        assert zero.is_exactly_zero(base[:, :4].transpose(0, 1))
        assert not zero.is_exactly_zero(base[:, 3:5].to(memory_format=torch.channels_last))
        assert zero.is_exactly_zero(torch.zeros(1).expand(5, 5))
        assert zero.is_exactly_zero(torch.zeros(0))


class Marked(nn.Parameter):
    pass


@pytest.mark.parametrize(
    "weight",
    [
        Marked(torch.zeros(4)),
        torch.zeros(4).as_subclass(Marked),
        torch.zeros(4, device="meta"),
        torch.zeros(4).to_sparse(),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.float8_e4m3fn),
        torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8),
    ],
    ids=["parameter subclass", "tensor subclass", "meta", "sparse", "int", "float8", "quantised"],
)
def test_only_plain_floating_tensors_are_judged(weight):
    assert not zero.is_exactly_zero(weight)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [-0.0, 1e-40, float("nan")], ids=["-0.0", "denormal", "nan"])
def test_modules_judge_the_bits(name, value):
    case = CASES[name]
    ours, _ = case.pair()
    with torch.no_grad():
        flat = case.weight(ours).view(-1)
        flat[-1 if case.rows is None else flat.numel() // 2 - 1] = value  # a gate's row where only those count
    inputs = case.example()
    skipped = was_skipped(case.counter, lambda: run(ours, inputs)) if value == 0 or case.rows is None else None
    if case.rows is not None and value != 0:  # one half is dense, the other still zero
        reset_counters()
        run(ours, inputs)
        assert counters()[case.counter] == (1, 1)
        skipped = False
    assert skipped == (value == 0)


@pytest.mark.parametrize("name", TAILED)
def test_all_negative_zero_weight_equals_eager(name):
    case = CASES[name]
    ours, theirs = case.pair()
    with torch.no_grad():
        for module in (ours, theirs):
            case.weight(module).fill_(-0.0)
    assert_parity(case, ours, theirs, case.example())


def test_nan_weight_gives_nan():
    branch = conv_branch()
    with torch.no_grad():
        branch.tail.weight.view(-1)[5] = float("nan")
        assert branch(image()).isnan().any()


def test_denormal_weight_is_dense_under_flush_denormal():
    branch = conv_branch()
    with torch.no_grad():
        branch.tail.weight.fill_(1e-40)
    x = image()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert not skips(branch, x)
    finally:
        torch.set_flush_denormal(False)


# ---- what takes the dense path ------------------------------------------------------------------------------


class Weight(nn.Module):
    """A parametrization that counts its evaluations."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, w):
        self.calls += 1
        return w * 1.0


def parametrized(make):
    module = make()
    conv = module.tail if hasattr(module, "tail") else module.out_layers[3]
    parametrize.register_parametrization(conv, "weight", Weight())
    return module, conv.parametrizations.weight


@pytest.mark.parametrize("ns", [zb.nn, eager], ids=["zeroblock", "eager"])
@pytest.mark.parametrize("name", ["ResBlock", "ResidualBranch-conv"])
def test_parametrized_weight_is_evaluated_once_and_never_judged(name, ns):
    """Evaluating it can have effects (spectral norm's power iteration), so it happens as often as in eager."""
    case = CASES[name]
    module, parametrization = parametrized(lambda: case.build(ns))
    reset_counters()
    module(*case.example()).sum().backward()
    assert counters().get(case.counter, (0, 0))[1] == 0
    assert parametrization[0].calls == 2  # registering evaluates it once
    assert parametrization.original.grad.any()


@pytest.mark.parametrize("name", ["ResBlock", "ResBlock-add-1x1", "ResidualBranch-conv"])
def test_fully_pruned_weight_equals_eager(name):
    case = CASES[name]
    ours, theirs = case.pair()
    results = []
    for module in (ours, theirs):
        owner = module.get_submodule(case.tail.rpartition(".")[0])
        with torch.no_grad():
            owner.weight.normal_(generator=torch.Generator().manual_seed(0))
        prune.l1_unstructured(owner, "weight", amount=1.0)
        y, grads = run(module, case.example())
        results.append((y, grads[f"{case.tail}_orig"]))
    assert torch.equal(results[0][0], results[1][0])
    assert not results[0][1].any() and not results[1][1].any()


def test_weight_norm_is_dense():
    branch = conv_branch()
    nn.init.normal_(branch.tail.weight)
    parametrizations.weight_norm(branch.tail)
    with torch.no_grad():
        branch.tail.parametrizations.weight.original0.zero_()  # a zero magnitude
    reset_counters()
    branch(image()).sum().backward()
    assert counters().get("ResidualBranch", (0, 0))[1] == 0
    assert branch.tail.parametrizations.weight.original0.grad.any()


def test_weight_subclass_is_dense():
    branch = conv_branch()
    branch.tail.weight = Marked(branch.tail.weight.detach())
    x = image()
    reset_counters()
    assert torch.equal(branch(x), x + branch.tail(branch.body(x)))
    assert counters() == {}, "nobody judges it"


@pytest.mark.parametrize("grad", (True, False), ids=("training", "inference"))
@pytest.mark.parametrize("name", ["ResBlock", "DiTBlock", "ZeroConv2d", "ResidualBranch-conv"])
def test_meta_weights_give_meta_results(name, grad):
    case = CASES[name]
    module = case.build(zb.nn).to("meta")
    inputs = tuple(t.detach().to("meta") for t in case.example())
    with torch.set_grad_enabled(grad):
        assert module(*inputs).device.type == "meta"


class Doubled(nn.Conv2d):
    """Whose output is not the convolution by its weight."""

    def forward(self, x):
        return super().forward(x) + x


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x


@pytest.mark.parametrize(
    "name, path, layer",
    [
        ("ResBlock", "out_layers.3", lambda: Doubled(32, 32, 3, padding=1)),
        ("ResidualBranch-conv", "tail", lambda: Doubled(32, 32, 3, padding=1)),
        ("ResidualBranch-linear", "tail", lambda: DoubledLinear(16, 16)),
        ("FixupBasicBlock", "conv2", lambda: Doubled(8, 8, 3, padding=1, bias=False)),
    ],
)
def test_subclass_with_a_forward_of_its_own_is_dense(name, path, layer):
    case = CASES[name]
    ours, theirs = case.pair()
    outer, _, leaf = path.rpartition(".")
    for module in (ours, theirs):
        setattr(module.get_submodule(outer), leaf, eager.zero_module(layer()))
    with torch.no_grad():
        inputs = case.example()
        reset_counters()
        y, expected = ours(*inputs), theirs(*inputs)
    assert counters().get(case.counter, (0, 0))[1] == 0
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "options", [{"padding_mode": "reflect"}, {"padding": "same"}, {"stride": 2}, {"groups": 4}], ids=str
)
def test_convolution_options(options):
    """Whether they are skipped or not, the result has eager's shape and value."""
    torch.manual_seed(0)
    options = {"padding": 1} | options
    layer = eager.zero_module(nn.Conv2d(32, 32, 3, **options))
    nn.init.normal_(layer.bias)
    ours = zb.nn.ZeroConv2d(32, 32, 3, **options)
    ours.load_state_dict(layer.state_dict())
    x = image()
    assert torch.equal(ours(x), layer(x))
    assert torch.equal(ours(x, layer(x).detach()), layer(x) * 2)
