"""What the tests of the zero contract share: every block beside its eager twin, and which matmuls were executed."""

import dataclasses
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import profile

import zeroblock as zb
from zeroblock.testing import assert_bitwise_equal, assert_error_budget, counters, eager, reset_counters

MATMULS = {
    "aten::convolution": "conv",
    "aten::convolution_backward": "conv backward",
    "aten::mm": "gemm",
    "aten::addmm": "gemm",
    "aten::bmm": "gemm",
    "aten::baddbmm": "gemm",
    "mkldnn::_linear_pointwise": "gemm",
    "zeroblock::_winograd_conv": "conv",  # of the gradient's, too
    "zeroblock::_winograd_weight_grad": "conv backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention backward",
}


class EagerZeroLayer(nn.Module):
    """residual + layer(x), the eager twin of ZeroConv and ZeroLinear; parameter names as theirs."""

    def __init__(self, layer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(layer.weight))
        self.bias = nn.Parameter(torch.zeros_like(layer.bias))
        self.__dict__["layer"] = layer  # not registered: its parameters are not ours

    def forward(self, x, residual=None):
        y = torch.func.functional_call(self.layer, {"weight": self.weight, "bias": self.bias}, x)
        return y if residual is None else residual + y


def image(channels=32, size=6, **kwargs):
    return torch.randn(2, channels, size, size, **kwargs)


def conv_body(channels=32):
    return nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))


def linear_body(features=16):
    return nn.Sequential(nn.LayerNorm(features), nn.Linear(features, features), nn.GELU())


def zeroed(layer):
    return eager.zero_module(layer)


def conv_branch(ns=zb.nn, **kwargs):
    torch.manual_seed(0)
    return ns.ResidualBranch(conv_body(), zeroed(nn.Conv2d(32, 32, 3, padding=1)), **kwargs)


@dataclasses.dataclass(frozen=True)
class Case:
    """make(ns) builds the block from `zb.nn` or `eager`; `tail` names the weight that is zero."""

    make: Callable
    inputs: Callable
    tail: str
    counter: str
    rows: tuple[int, ...] | None = None  # the gates among the tail's six groups of rows, where only those are zero

    def pair(self, dtype=torch.float32, seed=0):
        """(ours, eager) with the same random weights everywhere but in the zero ones."""
        torch.manual_seed(seed)
        ours, theirs = self.make(zb.nn), self.make(eager)
        with torch.no_grad():
            for name, p in ours.named_parameters():
                fresh = torch.randn_like(p) * 0.2
                if name != self.tail:
                    p.copy_(fresh if p.dim() > 1 else fresh + ("norm" in name and name.endswith("weight")))
                elif self.rows is not None:
                    for i, chunk in enumerate(fresh.chunk(6)):
                        p.chunk(6)[i].copy_(0 * chunk if i in self.rows else chunk)
                if self.rows is not None and name == self.tail.replace("weight", "bias"):
                    for i in self.rows:
                        p.chunk(6)[i].zero_()
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    def weight(self, module):
        return module.get_parameter(self.tail)

    def example(self, dtype=torch.float32, seed=1):
        torch.manual_seed(seed)
        return tuple(t.to(dtype).requires_grad_() for t in self.inputs())


def zero_conv(ns):
    if ns is zb.nn:
        return zb.nn.ZeroConv2d(32, 32, 3, padding=1)
    return EagerZeroLayer(nn.Conv2d(32, 32, 3, padding=1))


def zero_linear(ns):
    return zb.nn.ZeroLinear(16, 16) if ns is zb.nn else EagerZeroLayer(nn.Linear(16, 16))


CASES = {
    "ResBlock": Case(
        lambda ns: ns.ResBlock(32, 16, 0.0, use_scale_shift_norm=True),
        lambda: (image(), torch.randn(2, 16)),
        "out_layers.3.weight",
        "ResBlock",
    ),
    "ResBlock-add-1x1": Case(
        lambda ns: ns.ResBlock(32, 16, 0.0, out_channels=64),
        lambda: (image(), torch.randn(2, 16)),
        "out_layers.3.weight",
        "ResBlock",
    ),
    "ResBlock-down": Case(
        lambda ns: ns.ResBlock(32, 16, 0.0, use_scale_shift_norm=True, down=True),
        lambda: (image(), torch.randn(2, 16)),
        "out_layers.3.weight",
        "ResBlock",
    ),
    "DiTBlock": Case(
        lambda ns: ns.DiTBlock(16, 2),
        lambda: (torch.randn(2, 5, 16), torch.randn(2, 16)),
        "adaLN_modulation.1.weight",
        "DiTBlock",
        rows=(2, 5),
    ),
    "FinalLayer": Case(
        lambda ns: ns.FinalLayer(16, 2, 3),
        lambda: (torch.randn(2, 5, 16), torch.randn(2, 16)),
        "linear.weight",
        "FinalLayer",
    ),
    "ResidualBranch-conv": Case(
        lambda ns: ns.ResidualBranch(conv_body(), zeroed(nn.Conv2d(32, 32, 3, padding=1))),
        lambda: (image(),),
        "tail.weight",
        "ResidualBranch",
    ),
    "ResidualBranch-linear": Case(
        lambda ns: ns.ResidualBranch(linear_body(), zeroed(nn.Linear(16, 16)), nn.Parameter(torch.randn(16))),
        lambda: (torch.randn(2, 5, 16),),
        "tail.weight",
        "ResidualBranch",
    ),
    "ResidualBranch-gate": Case(
        lambda ns: ns.ResidualBranch(linear_body(), nn.Linear(16, 16), nn.Parameter(torch.zeros(16))),
        lambda: (torch.randn(2, 5, 16),),
        "gate",
        "ResidualBranch",
    ),
    "ResidualBranch-conv-gate": Case(
        lambda ns: ns.ResidualBranch(conv_body(), nn.Conv2d(32, 32, 1), nn.Parameter(torch.zeros(32))),
        lambda: (image(),),
        "gate",
        "ResidualBranch",
    ),
    "ReZero": Case(
        lambda ns: ns.ReZero(linear_body()), lambda: (torch.randn(2, 5, 16),), "resweight", "ReZero"
    ),
    "ZeroConv2d": Case(zero_conv, lambda: (image(), image()), "weight", "ZeroConv2d"),
    "ZeroLinear": Case(
        zero_linear, lambda: (torch.randn(2, 5, 16), torch.randn(2, 5, 16)), "weight", "ZeroLinear"
    ),
    "FixupBasicBlock": Case(
        lambda ns: ns.FixupBasicBlock(8, 8), lambda: (image(8),), "conv2.weight", "FixupBasicBlock"
    ),
}  # fmt: skip
GATED = ["DiTBlock", "ResidualBranch-gate", "ResidualBranch-conv-gate", "ReZero"]  # zero by their gate
TAILED = [name for name in CASES if name not in GATED]


def gradients(module, inputs, y, dy):
    """{name: gradient} of every input and parameter; a missing one is None."""
    names = [*(f"input {i}" for i in range(len(inputs))), *(n for n, _ in module.named_parameters())]
    tensors = [*inputs, *module.parameters()]
    found = torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy, allow_unused=True)
    found = iter(found)
    return {n: next(found) for n, t in zip(names, tensors, strict=True) if t.requires_grad}


def random_like(y, seed=2):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)


def run(module, inputs, seed=2, autocast=None):
    """(y, {name: gradient}) for a random gradient of y, the same for the same seed."""
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = module(*inputs)
    return y, gradients(module, inputs, y, random_like(y, seed))


def assert_gradients(got, expected, exact):
    """As eager's: the same tensors, exact zeros where eager has them, the rest by error budget, all of them together.

    Each gradient is measured relative to its own norm: a wrong one shows, however small, while a single number that
    eager happens to hit exactly does not set the budget.
    """
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        assert (got[name] is None) == (g is None), f"{name}: {got[name]}, eager has {g}"
        if g is not None:
            assert got[name].dtype == g.dtype and got[name].shape == g.shape, name
            if not g.any():
                assert torch.equal(got[name], torch.zeros_like(g)), f"{name}: not zero"
    nonzero = [n for n, g in expected.items() if g is not None and g.any()]
    nonzero = [n for n in nonzero if (expected[n].double() - exact[n]).norm() < exact[n].norm()]  # the others cancel
    scales = {n: exact[n].norm() for n in nonzero}
    joint = [torch.cat([(g[n].double() / scales[n]).flatten() for n in nonzero]) for g in (got, expected, exact)]
    assert_error_budget(*joint, f"gradients of {', '.join(nonzero)}")


def assert_parity(case, ours, theirs, inputs, skipped=True, autocast=None):
    """Forward equal and gradients in budget, and the branch was skipped or executed as expected."""
    oracle = case.make(eager).double()
    oracle.load_state_dict(theirs.state_dict())
    exact_y, exact = run(oracle, tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs))
    expected_y, expected = run(theirs, inputs, autocast=autocast)
    reset_counters()
    y, got = run(ours, inputs, autocast=autocast)
    executed_count, skipped_count = counters()[case.counter]
    assert bool(skipped_count) == skipped and bool(executed_count) != skipped, counters()
    if skipped:
        assert torch.equal(y, expected_y)
    assert_error_budget(y, expected_y, exact_y, "y")
    assert_gradients(got, expected, exact)


def was_skipped(name, fn):
    """Whether every branch that fn() met in the module `name` was skipped; it must have met one."""
    reset_counters()
    fn()
    executed, skipped = counters()[name]
    assert (executed == 0) != (skipped == 0), counters()
    return executed == 0


def matmuls(fn):
    """{kind: calls} of the convolutions, GEMMs and attentions that fn() executed, by the profiler."""
    with profile(record_shapes=True) as recorded:
        fn()
    calls = Counter()
    for event in recorded.events():
        if event.name in MATMULS:
            # A convolution's backward is up to two convolutions, as its output mask asks.
            wanted = event.concrete_inputs[-1][:2] if event.name.endswith("convolution_backward") else [True]
            calls[MATMULS[event.name]] += sum(wanted)
    return dict(calls)


def same(a, b, what="result"):
    """Bitwise, strides included."""
    assert_bitwise_equal(a, b, what)
    assert a.stride() == b.stride(), f"{what}: strides {a.stride()}, expected {b.stride()}"
