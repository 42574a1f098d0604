"""accelerate() and restore(): what they change and what they leave alone."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.backends import available as _backends
from zeroblock.testing import eager

from .cases import Net, example, guided_block, is_skipping

# ---- what stays -----------------------------------------------------------------------------------------------------


def test_only_the_class_changes():
    net = Net()
    before = [
        (m, type(m), list(vars(m)), [(n, id(p)) for n, p in m.named_parameters()], list(m.state_dict()), repr(m))
        for m in net.modules()
    ]
    seen = []
    net.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    zb.accelerate(net)
    for m, kind, names, parameters, keys, text in before:
        assert isinstance(m, kind) and list(vars(m)) == names and repr(m) == text
        assert type(m).__name__ == kind.__name__ and type(m).__qualname__ == kind.__qualname__
        assert [(n, id(p)) for n, p in m.named_parameters()] == parameters and list(m.state_dict()) == keys
    assert is_skipping(net) and seen == [1]
    assert zb.restore(net) == 2
    assert [type(m) for m in net.modules()] == [kind for _, kind, *_ in before]
    assert not is_skipping(net)


def test_pickle_and_save_write_the_original_class():
    net = Net()
    zb.accelerate(net)
    stream = io.BytesIO()
    torch.save(net.blocks[0], stream)
    stream.seek(0)
    for twin in (pickle.loads(pickle.dumps(net.blocks[0])), torch.load(stream, weights_only=False)):
        assert type(twin) is eager.ResBlock and twin.state_dict().keys() == net.blocks[0].state_dict().keys()
    assert b"zeroblock.convert" not in pickle.dumps(net.blocks[0])


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy])
def test_copies_stay_accelerated(copier):
    block = guided_block()
    zb.accelerate(block)
    twin = copier(block)
    assert type(twin) is type(block) is not eager.ResBlock
    assert is_skipping(twin) and zb.restore(twin) == 1 and type(block) is not eager.ResBlock


def test_accelerating_twice_takes_the_new_options():
    net = Net()
    zb.accelerate(net)
    first = [type(m) for m in net.blocks]
    zb.accelerate(net)
    assert [type(m) for m in net.blocks] == first
    zb.accelerate(net, zero_skip="never")
    assert not is_skipping(net)
    assert zb.restore(net) == 2 and type(net.blocks[0]) is eager.ResBlock and zb.restore(net) == 0


def test_restore_after_training_keeps_the_weights():
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    zb.accelerate(net)
    for model in (net, plain):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(*example()).square().mean().backward()
            optimizer.step()
    trained = {n: p.clone() for n, p in net.state_dict().items()}
    zb.restore(net)
    inputs = example()
    assert all(torch.equal(p, trained[n]) for n, p in net.state_dict().items())
    torch.testing.assert_close(net(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)


# ---- what is left alone ---------------------------------------------------------------------------------------------


class ForkedForward(eager.ResBlock):
    """A fork that scales its output: the family's forward would be wrong."""

    def _forward(self, x, emb):
        return super()._forward(x, emb) * 0.7071


class Detached(eager.ResBlock):
    """The same values, another gradient."""

    def _forward(self, x, emb):
        return super()._forward(x, emb.detach())


class OwnNorm(eager.GroupNorm32):
    def forward(self, x):
        return super().forward(x) * 1.01


class Renamed(eager.ResBlock):
    """A subclass that computes what its base does."""


def with_norm(norm):
    block = guided_block()
    block.out_layers[0] = norm
    return block


def strided():
    block = guided_block()
    block.out_layers[3] = eager.zero_module(nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"))
    return block


def hooked():
    block = guided_block()
    block.in_layers[2].register_forward_hook(lambda m, i, y: y * 2)
    return block


def odd_attributes():
    block = guided_block()
    block.in_layers = nn.ModuleDict({"0": nn.Identity()})
    block._modules["in_layers"].__class__ = type("Odd", (nn.Sequential,), {"__len__": lambda self: "three"})
    return block


def replaced():
    block = guided_block()
    block._forward = lambda x, emb: x
    return block


LEFT_ALONE = {
    "fork": (lambda: ForkedForward(32, 16, 0.0), "does not compute"),
    "other gradient": (lambda: Detached(32, 16, 0.0, use_scale_shift_norm=True), "does not compute"),
    "own norm": (lambda: with_norm(OwnNorm(32, 32)), "does not compute"),
    "no norm": (lambda: with_norm(nn.Identity()), "not the plain ones"),
    "circular padding": (strided, "not the plain ones"),
    "replaced on the instance": (replaced, "replaced on the instance"),
    "hooked": (hooked, "its in_layers.2 has hooks"),
    "nonsense": (lambda: odd_attributes(), "not those of ResBlock: TypeError"),
    "another ResBlock": (lambda: type("ResBlock", (nn.Linear,), {})(4, 4), "it has no in_layers"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_unknown_block_is_left_alone_and_reported(name):
    make, reason = LEFT_ALONE[name]
    net = Net(guided_block(), make())
    kind = type(net.blocks[1])
    report = zb.accelerate(net)
    (row,) = report.left_alone
    assert row.path == "blocks.1" and reason in row.reason and type(net.blocks[1]) is kind
    assert [b.path for b in report.branches if b.family == "ResBlock"] == ["blocks.0.out_layers.3"]
    assert row.reason in str(report) and "blocks.1" in str(report)


def test_strict_raises_and_changes_nothing():
    net = Net(guided_block(), ForkedForward(32, 16, 0.0))
    zb.accelerate(net)
    kinds = [type(m) for m in net.modules()]
    with pytest.raises(RuntimeError, match=r"blocks\.1 \(ForkedForward\): its forward does not compute"):
        zb.accelerate(net, strict=True)
    assert [type(m) for m in net.modules()] == kinds and is_skipping(net)
    with pytest.raises(RuntimeError, match="no block is known"):
        zb.accelerate(nn.Linear(2, 2), strict=True)


def test_subclass_that_changes_nothing_is_accelerated():
    net = Net(Renamed(32, 16, 0.0))
    assert zb.accelerate(net).blocks == 1 and isinstance(net.blocks[0], Renamed)


def test_proof_leaves_no_trace():
    net = Net()
    state, weights = torch.get_rng_state(), {n: p.clone() for n, p in net.state_dict().items()}
    net.blocks[0].register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    zb.convert.proof._proved.clear()
    zb.accelerate(net)
    assert torch.equal(torch.get_rng_state(), state) and net.training
    assert all(torch.equal(p, weights[n]) for n, p in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


class OwnKeyword(eager.DiTBlock):
    """A fork that calls its condition something else, and takes one more argument."""

    def forward(self, x, cond, offset=0):
        return super().forward(x, cond) + offset


OwnKeyword.__name__ = "DiTBlock"


def test_keywords_of_a_fork_go_to_the_original():
    ours = OwnKeyword(16, 2)
    plain = copy.deepcopy(ours)
    assert zb.accelerate(ours).blocks == 1
    x, c = torch.randn(2, 3, 16), torch.randn(2, 16)
    assert torch.equal(ours(x, cond=c), plain(x, c))
    assert torch.equal(ours(x, c, offset=1), plain(x, c, offset=1))
    assert torch.equal(ours(x, c), plain(x, c))


def test_half_converted_model():
    """Blocks of zeroblock.nn stay what they are; a part may be restored and accelerated again."""
    net = Net(zb.nn.ResBlock(32, 16, 0.0), guided_block(), guided_block())
    report = zb.accelerate(net)
    assert [b.path for b in report.branches] == ["blocks.1.out_layers.3", "blocks.2.out_layers.3"]
    assert type(net.blocks[0]) is zb.nn.ResBlock and not report.left_alone
    assert zb.restore(net.blocks[1]) == 1 and type(net.blocks[1]) is eager.ResBlock
    assert zb.accelerate(net).blocks == 2 and zb.restore(net) == 2


def test_class_extended_after_accelerate():
    """As fully_shard does it: the class cannot be given back, and says so."""
    net = Net()
    zb.accelerate(net)
    net.blocks[0].__class__ = type("Wrapped", (type(net.blocks[0]),), {})
    with pytest.raises(RuntimeError, match=r"restore: the class of blocks\.0 became Wrapped after accelerate"):
        zb.restore(net)


def test_proof_does_not_depend_on_the_surroundings():
    """accelerate() where inference, autocast, a device or another default dtype are switched on around it."""
    zb.convert.proof._proved.clear()
    net = Net()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert zb.accelerate(net).blocks == 2
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_changes_after_accelerate_fall_back_to_the_original():
    net = Net(guided_block())
    zb.accelerate(net)
    inputs = example()
    net.blocks[0].in_layers[2].register_forward_hook(lambda m, i, y: y * 2)
    nn.init.ones_(net.blocks[0].out_layers[3].weight)
    plain = copy.deepcopy(net)
    zb.restore(plain)
    assert torch.equal(net(*inputs), plain(*inputs))


def test_precision_fast_allows_reduced_precision_in_both_directions():
    """The F(4x4) Winograd convolutions: another rounding than strict's, both in forward and in backward alone."""
    torch.manual_seed(0)
    strict = eager.ResBlock(32, 64, 0.0)
    with torch.no_grad():
        strict.out_layers[-1].weight.normal_(std=0.05)
    fast = copy.deepcopy(strict)
    exact = copy.deepcopy(strict).double()
    zb.accelerate(strict)
    zb.accelerate(fast, precision="fast")
    x, emb, dy = torch.randn(2, 32, 16, 16), torch.randn(2, 64), torch.randn(2, 32, 16, 16)
    found = []
    for block, dtype in ((strict, torch.float32), (fast, torch.float32), (exact, torch.float64)):
        inputs = x.to(dtype).requires_grad_()
        y = block(inputs, emb.to(dtype))
        found.append((y, *torch.autograd.grad(y, [inputs, block.in_layers[2].weight], dy.to(dtype))))
    for ours, reduced, truth in zip(*found, strict=True):
        errors = [((t.double() - truth).norm() / truth.norm()).item() for t in (ours, reduced)]
        if _backends.CPU_MISSING is None:
            assert errors[1] > 2 * errors[0]
        assert errors[1] < 1e-4
