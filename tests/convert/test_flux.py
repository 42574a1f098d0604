"""The blocks of black-forest-labs/flux, torchtitan and kohya's trainers, accelerated."""

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import assert_bitwise_equal, counters, reset_counters

from . import oracles_flux as oracles
from .cases import Case, assert_drop_in, randomize_
from .model_cases import outputs
from .oracles_flux import TEXT, D

T = 5


def zero_gates(block):
    """Both streams' gates, and the single stream's."""
    with torch.no_grad():
        for m in block.modules():
            if isinstance(m, oracles.Modulation):
                for t in (m.lin.weight, m.lin.bias):
                    for gate in range(2, t.shape[0] // D, 3):
                        t.unflatten(0, (-1, D))[gate] = 0
    return block


def zero_last(block):
    torch.nn.init.zeros_(block.linear2.weight if hasattr(block, "linear2") else block.linear.weight)
    return block


def double(kind=oracles.DoubleStreamBlock, prepare=lambda block: block, skipped=0, text=TEXT, **options):
    heads = 2 if issubclass(kind, oracles.WithInner) else 1

    def inputs():
        return torch.randn(2, T, D), torch.randn(2, text, D), torch.randn(2, D), oracles.rotations(text + T, heads)

    names = {"DoubleStreamBlock": skipped} if skipped else {}
    return Case(lambda: prepare(kind(**options)), inputs, names, 3, equal=False)


def single(kind=oracles.SingleStreamBlock, prepare=lambda block: block, skipped=0):
    heads = 2 if issubclass(kind, oracles.WithInner) else 1

    def inputs():
        return torch.randn(2, T, D), torch.randn(2, D), oracles.rotations(T, heads)

    names = {"SingleStreamBlock": skipped} if skipped else {}
    return Case(lambda: prepare(kind()), inputs, names, 2, equal=False)


def last(prepare=lambda block: block, skipped=0):
    names = {"LastLayer": skipped} if skipped else {}
    inputs = lambda: (torch.randn(2, T, D), torch.randn(2, D))  # noqa: E731
    return Case(lambda: prepare(oracles.LastLayer()), inputs, names, 1, equal=False)


def checkpointed(block):
    block.gradient_checkpointing = True
    return block


CASES = {
    "double": double(),
    "double, zero gates": double(prepare=zero_gates, skipped=3),
    "double without a bias": double(qkv_bias=False),
    "double without text": double(text=0),
    "single": single(),
    "single, zero gate": single(prepare=zero_gates, skipped=1),
    "single, zero linear": single(prepare=zero_last, skipped=1),
    "last": last(),
    "last, zero": last(zero_last, 1),
    "trainers' double": double(oracles.CheckpointedDouble),
    "trainers' single": single(oracles.CheckpointedSingle),
    "trainers' double, checkpointed": double(oracles.CheckpointedDouble, checkpointed),
    "trainers' single, checkpointed": single(oracles.CheckpointedSingle, checkpointed),
    "double with inner attention": double(oracles.DoubleWithInner),
    "single with inner attention": single(oracles.SingleWithInner),
}


@pytest.mark.parametrize("name", CASES)
def test_drop_in(name):
    assert_drop_in(CASES[name])


FORKS = {
    "double with another gate": (oracles.TwiceGated, "does not compute"),
    "single with another result": (oracles.Relu, "does not compute"),
    "single without modulation": (oracles.Distilled, "it has no modulation.lin"),
}


@pytest.mark.parametrize("name", FORKS)
def test_forks_are_left_alone(name):
    kind, reason = FORKS[name]
    block = kind()
    (row,) = [row for row in zb.accelerate(block).left_alone if not row.path]
    assert reason in row.reason and type(block) is kind


class Flux(nn.Module):
    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList(oracles.DoubleStreamBlock() for _ in range(2))
        self.single_blocks = nn.ModuleList(oracles.SingleStreamBlock() for _ in range(2))
        self.final_layer = oracles.LastLayer()

    def forward(self, img, txt, vec, pe):
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        x = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            x = block(x, vec=vec, pe=pe)
        return self.final_layer(x[:, txt.shape[1] :], vec)


def made(seed=0):
    torch.manual_seed(seed)
    return randomize_(Flux()), CASES["double"].inputs()


def test_a_model_of_them():
    plain, inputs = made()
    model = copy.deepcopy(plain)
    names = [n for n, _ in model.named_parameters()]
    report = zb.accelerate(model, strict=True)
    assert report.blocks == 5 and names == [n for n, _ in model.named_parameters()]
    reset_counters()
    y = model(*inputs)
    assert {n: c for n, c in counters().items() if n in zb.convert.families()} == {
        "DoubleStreamBlock": (6, 0),
        "SingleStreamBlock": (2, 0),
        "LastLayer": (1, 0),
    }
    torch.testing.assert_close(y, plain(*inputs), rtol=1e-4, atol=1e-4)
    assert_bitwise_equal(copy.deepcopy(model)(*inputs), y)
    assert zb.restore(model) == 5
    assert_bitwise_equal(model(*inputs), plain(*inputs))


def test_compiled_in_one_graph():
    model, inputs = made()
    zb.accelerate(model, strict=True)
    inputs[0].requires_grad_()
    y = model(*inputs)
    z = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(z, y)
    for t, u in zip(
        torch.autograd.grad(z.square().sum(), [inputs[0], *model.parameters()], allow_unused=True),
        torch.autograd.grad(y.square().sum(), [inputs[0], *model.parameters()], allow_unused=True),
        strict=True,
    ):
        assert (t is None) == (u is None)
        if t is not None:
            torch.testing.assert_close(t, u, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [CASES["double"], CASES["single"], CASES["last"]], ids=["double", "single", "last"])
def test_bfloat16(make):
    torch.manual_seed(0)
    plain = randomize_(make.make()).bfloat16()
    ours = copy.deepcopy(plain)
    zb.accelerate(ours, strict=True)
    inputs = [t.bfloat16() for t in make.inputs()]
    exact = copy.deepcopy(plain).double()(*(t.double() for t in inputs))
    results = (outputs(result) for result in (ours(*inputs), plain(*inputs), exact))
    for y, expected, right in zip(*results, strict=True):
        assert y.dtype == expected.dtype
        zb.testing.assert_error_budget(y.detach(), expected.detach(), right.detach(), "y")


def test_attention_is_the_authors_at_every_call(monkeypatch):
    """Somebody who puts another attention into the module finds it called."""
    block, (img, txt, vec, pe) = oracles.DoubleStreamBlock(), CASES["double"].inputs()
    zb.accelerate(block, strict=True)
    calls, plain = [], oracles.attention
    monkeypatch.setattr(oracles, "attention", lambda *a, **kw: (calls.append(1), plain(*a, **kw))[1])
    block(img, txt, vec, pe)
    assert len(calls) == 1


def test_a_mask_goes_to_the_original():
    block = oracles.CheckpointedSingle()
    plain = copy.deepcopy(block)
    zb.accelerate(block, strict=True)
    x, vec, pe = CASES["single"].inputs()
    mask = torch.ones(2, 1, 1, T, dtype=torch.bool)
    mask[..., 2:] = False
    reset_counters()
    assert_bitwise_equal(block(x, vec, pe, mask), plain(x, vec, pe, mask))
    assert "SingleStreamBlock" not in counters()


@pytest.mark.parametrize("name", ["double", "single"])
def test_hooked_layers_are_called(name):
    block, inputs = CASES[name].make(), CASES[name].inputs()
    zb.accelerate(block, strict=True)
    called = []
    for path, m in block.named_modules():
        if not list(m.children()):
            m.register_forward_hook(lambda *_, path=path: called.append(path))
    block(*inputs)
    expected = {path for path, m in block.named_modules() if not list(m.children())}
    assert set(called) == expected and len(called) == len(expected)


def test_layers_of_another_kind_are_called_as_they_are():
    """LoRA and the like: norms and gates stay fused."""

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.low = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + 0.1 * self.low(x)

    torch.manual_seed(0)
    plain = oracles.DoubleStreamBlock()
    for owner, name in ((plain.img_attn, "qkv"), (plain.txt_attn, "proj"), (plain.img_mlp, "0")):
        setattr(owner, name, Lora(getattr(owner, name)))
    ours, inputs = copy.deepcopy(plain), CASES["double"].inputs()
    assert zb.accelerate(ours).blocks
    for y, expected in zip(ours(*inputs), plain(*inputs), strict=True):
        torch.testing.assert_close(y, expected)
