"""Families by description: those of zeroblock, and one that a user registers."""

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.convert import GatedBlock, GatedBranch
from zeroblock.testing import assert_bitwise_equal, counters, reset_counters

from . import oracles_gated as oracles
from .cases import Case, assert_drop_in, randomize_
from .oracles_gated import D

T = 4
BIAS = torch.randn(1, 1, T, T, generator=torch.Generator().manual_seed(3))


def zero_rows(linear, *rows, of=6):
    """A change of a block: these rows of the modulation are zero."""

    def change(block):
        layer = block.get_submodule(linear)
        with torch.no_grad():
            for t in (layer.weight, layer.bias):
                for row in rows:
                    t.chunk(of)[row].zero_()
        return block

    return change


def block(kind, name, *given, branches=2, change=lambda block: block, skipped=0, x=(2, T, D), **options):
    def inputs():
        return torch.randn(x), *(torch.randn(t) if isinstance(t, tuple) else t.clone() for t in given)

    return Case(lambda: change(kind(**options)), inputs, {name: skipped} if skipped else {}, branches, equal=False)


VAR, F5, MDT, MAR = "AdaLNSelfAttn", "F5DiTBlock", "MDTBlock", "MARResBlock"
ROPE = (torch.randn(1, T, D // oracles.HEADS, generator=torch.Generator().manual_seed(4)), 0.5)
MASK = torch.tensor([[True, True, True, False]] * 2)
CASES = {
    "var": block(oracles.AdaLNSelfAttn, VAR, (2, D), BIAS),
    "var, zero": block(oracles.AdaLNSelfAttn, VAR, (2, D), BIAS, change=zero_rows("ada_lin.1", 0, 1), skipped=2),
    "var, a shared table": block(oracles.AdaLNSelfAttn, VAR, (2, 1, 6, D), BIAS, shared_aln=True),
    "f5-tts": block(oracles.DiTBlock, F5, (2, D)),
    "f5-tts, mask": block(oracles.DiTBlock, F5, (2, D), MASK),
    "f5-tts, zero": block(oracles.DiTBlock, F5, (2, D), change=zero_rows("attn_norm.linear", 2, 5), skipped=2),
    "mdt": block(oracles.MDTBlock, MDT, (2, D)),
    "mdt, skip": block(oracles.MDTBlock, MDT, (2, D), (2, T, D), skip=True),
    "mdt, zero": block(oracles.MDTBlock, MDT, (2, D), change=zero_rows("adaLN_modulation.1", 5), skipped=1),
    "mar": block(oracles.ResBlock, MAR, (5, D), x=(5, D), branches=1),
    "mar, zero": block(
        oracles.ResBlock,
        MAR,
        (5, D),
        x=(5, D),
        branches=1,
        change=zero_rows("adaLN_modulation.1", 2, of=3),
        skipped=1,
    ),
}


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        (oracles.DiTBlock, F5, [{"mask": MASK}, {"rope": ROPE}, {"mask": MASK, "rope": ROPE}]),
        (oracles.MDTBlock, MDT, [{"ids_keep": torch.tensor([[2, 0], [3, 1]])}]),
    ],
    ids=(F5, MDT),
)
def test_optional_arguments_are_proved_and_used(kind, name, options):
    plain = randomize_(kind()).eval()
    ours = copy.deepcopy(plain)
    zb.accelerate(ours, strict=True)
    for given in options:
        x, c = torch.randn(2, given["ids_keep"].shape[1] if "ids_keep" in given else T, D), torch.randn(2, D)
        reset_counters()
        torch.testing.assert_close(ours(x, c, **given), plain(x, c, **given), rtol=1e-4, atol=1e-5)
        assert counters()[name] == (2, 0), given


def test_an_argument_that_was_not_proved_goes_to_the_original(registry):
    class Fork(oracles.Fork):
        def forward(self, x, context, c, strength=1.0):
            return x + strength * (super().forward(x, context, c) - x)

    def described(**more):
        first, _, last = fork().branches
        cross = GatedBranch("cross", call=lambda block, h, context, c, strength=1.0: block.cross(h, context))
        rows = lambda block, context, c, strength=1.0: block.rows(c)  # noqa: E731
        return fork(branches=(first, cross, last), rows=rows, **more)

    x, context, c = torch.randn(2, T, D), torch.randn(2, 3, D), torch.randn(2, D)
    plain = randomize_(Fork())
    for more in ({}, {"options": lambda block: {"strength": (2.0,)}}):  # the second is found to be wrong
        zb.register_family(described(**more))
        ours = copy.deepcopy(plain)
        assert zb.accelerate(ours).blocks == 1
        reset_counters()
        assert torch.equal(ours(x, context, c, strength=0.5), plain(x, context, c, strength=0.5))
        assert "Fork" not in counters()
        ours(x, context, c, 1.0)
        assert "Fork" in counters()


@pytest.mark.parametrize("name", CASES)
def test_drop_in(name):
    assert_drop_in(CASES[name])


def test_the_stream_by_its_name():
    plain = randomize_(oracles.ResBlock())
    ours = copy.deepcopy(plain)
    zb.accelerate(ours, strict=True)
    x, y = torch.randn(5, D), torch.randn(5, D)
    reset_counters()
    torch.testing.assert_close(ours(x=x, y=y), plain(x=x, y=y), rtol=1e-4, atol=1e-5)
    assert counters()[MAR] == (1, 0)


def test_active_stochastic_depth_is_the_originals():
    plain = oracles.AdaLNSelfAttn(drop_path=True)
    ours = copy.deepcopy(plain)
    assert zb.accelerate(ours).blocks
    x, c, bias = CASES["var"].inputs()
    torch.manual_seed(0)
    expected = plain(x, c, bias)
    torch.manual_seed(0)
    assert_bitwise_equal(ours(x, c, bias), expected)
    reset_counters()
    ours.eval()(x, c, bias)
    assert counters()[VAR] == (2, 0)


@pytest.mark.parametrize("name", ["var", "f5-tts", "mdt, skip", "mar"])
def test_compiled_in_one_graph(name):
    torch.manual_seed(0)
    block = randomize_(CASES[name].make())
    zb.accelerate(block, strict=True)
    x, *rest = CASES[name].inputs()
    x.requires_grad_()
    y = block(x, *rest)
    z = torch.compile(block, fullgraph=True, backend="aot_eager")(x, *rest)
    torch.testing.assert_close(z, y)
    (dx,), (dz,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, z))
    torch.testing.assert_close(dz, dx)


# ---- a user's own ----------------------------------------------------------------------------------------------------


def fork(**changes):
    """The description of oracles.Fork."""
    fields = {
        "branches": (
            GatedBranch("attend", norm="before", scale=0, shift=1, gate=3),
            GatedBranch("cross", call=lambda block, h, context, c: block.cross(h, context)),
            GatedBranch("mlp", norm="after", scale=2, gate=4),
        ),
        "rows": lambda block, context, c: block.rows(c),
        "example": lambda block, side: (torch.randn(2, side**2, D), torch.randn(2, 3, D), torch.randn(2, D)),
    }
    return GatedBlock("Fork", **(fields | changes))


@pytest.fixture
def registry():
    """Families as they were before the test."""
    before, added = dict(zb.convert.known()), set(zb.convert._added)
    yield
    zb.convert.known().clear()
    zb.convert.known().update(before)
    zb.convert._added.clear()
    zb.convert._added.update(added)


FORK = block(oracles.Fork, "Fork", (2, 3, D), (2, D), branches=3)


def test_a_fork_of_ones_own(registry):
    zb.register_family(fork())
    assert_drop_in(FORK)
    text = zb.convert.families()["Fork"]
    assert "x + gate * attend(modulate(before x)), then x + cross(x), then x + gate * mlp(modulate(after x))" in text


def test_its_zero_gate_is_skipped(registry):
    zb.register_family(fork())

    def change(block):
        with torch.no_grad():
            block.table[3:].zero_()
            for t in (block.embed.weight, block.embed.bias):
                t.unflatten(0, (5, D))[3:].zero_()
        return block

    assert_drop_in(block(oracles.Fork, "Fork", (2, 3, D), (2, D), branches=3, change=change, skipped=2))


def wrong_rows(block, context, c):
    scale, shift, *rest = block.rows(c)
    return shift, scale, *rest


def test_a_wrong_description_leaves_the_block_alone(registry):
    zb.register_family(fork(rows=wrong_rows))
    fork_block = oracles.Fork()
    (row,) = zb.accelerate(fork_block).left_alone
    assert "does not compute" in row.reason and type(fork_block) is oracles.Fork


def test_registered_again_it_is_replaced(registry):
    zb.register_family(fork(rows=wrong_rows))
    assert zb.accelerate(oracles.Fork()).blocks == 0
    zb.register_family(fork())
    assert zb.accelerate(oracles.Fork()).blocks == 1


class Whole(zb.convert.Family):
    """Somebody's own family."""

    name = "Whole"
    classes = ("Doubling",)

    def match(self, block, path, root):
        return None

    def branches(self, block):
        return {}

    def example(self, block, side):
        return (torch.randn(3),)

    def forward(self, block, x):
        return 2 * x


def test_a_family_written_out(registry):
    class Doubling(nn.Module):
        def forward(self, x):
            return x + x

    assert zb.register_family(Whole) is Whole
    assert zb.accelerate(Doubling()).blocks == 1


@pytest.mark.parametrize(
    ("family", "error", "message"),
    [
        (lambda: "Fork", TypeError, "register_family: family must be"),
        (lambda: nn.Linear, TypeError, "register_family: family must be"),
        (lambda: GatedBlock("DiTBlock", fork().branches, print, print), TypeError, "zeroblock's own"),
        (lambda: GatedBlock("a b", fork().branches, print, print), ValueError, "GatedBlock: name"),
        (lambda: GatedBlock("Fork", ("attn",), print, print), TypeError, "GatedBlock: branches"),
        (lambda: GatedBlock("Fork", (), print, print), TypeError, "GatedBlock: branches"),
        (lambda: GatedBlock("Fork", fork().branches, None, print), TypeError, "GatedBlock: rows"),
    ],
)
def test_what_is_refused(family, error, message, registry):
    with pytest.raises(error, match=message):
        zb.register_family(family())
