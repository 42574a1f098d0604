"""What is made again in backward in the place of being kept (zeroblock/ops/remade.py): bits, bytes, and who else has a
say in what autograd saves."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zeroblock as zb
from zeroblock.kernels._torch import TELLS_SAVED
from zeroblock.ops import remade
from zeroblock.testing import saved_activation_bytes

pytestmark = pytest.mark.skipif(not TELLS_SAVED, reason="torch does not tell which hooks are set before 2.11")

D = 16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(remade, "LEAST_BYTES", 0)
    monkeypatch.setattr(remade, "LEAST_WIDTH", 0)


class Block(nn.Module):
    """Linears of one modulated norm, a gated product, an activation, and both halves before one linear."""

    def __init__(self, again: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.again = again
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D)
        self.up = nn.Linear(D, 4 * D)
        self.weight = nn.Parameter(torch.randn(D))
        self.out = nn.Linear(3 * D, D)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        if not self.again or not remade.worthwhile(x):
            return self.body(x, rows)
        with remade.remaking():
            return self.body(x, rows)

    def body(self, x: Tensor, rows: Tensor) -> Tensor:
        shift, scale, gate = rows.chunk(3, dim=1)
        x, h = zb.gate_residual_layer_norm_modulate(x, gate, x.tanh(), shift, scale)
        q, k = self.q(h), self.k(h)
        q = q * (q.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight
        a, b, c = self.up(h).split((D, D, 2 * D), dim=2)
        swiglu = F.silu(a) * b
        y = remade.joined((swiglu * q, F.gelu(c, approximate="tanh")[..., D:], F.gelu(k)), 2)
        return zb.rms_norm_modulate(x + self.out(y), shift, scale)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 8, D, requires_grad=True), torch.randn(2, 3 * D, requires_grad=True)


def gradients(block: Block, call=None) -> list[Tensor]:
    given = inputs()
    y = (call or block)(*given)
    wanted = [*given, *block.parameters()]
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), wanted)]


def bytes_of(block: Block) -> int:
    given = inputs()
    return saved_activation_bytes(lambda: block(*given), exclude=[*given, *block.parameters()])


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_same_bits_of_fewer_bytes():
    ours, plain = Block(), Block(again=False)
    same(gradients(ours), gradients(plain))
    assert bytes_of(ours) < 0.6 * bytes_of(plain)


def test_hooks_of_others_are_given_everything():
    """Checkpoints, and those who fetch what they moved away, are asked once for each tensor."""
    ours, plain = Block(), Block(again=False)
    counts, results = [], []
    for block in (ours, plain):
        moved: dict[int, Tensor] = {}

        def pack(t: Tensor, moved=moved) -> int:
            moved[len(moved)] = t.detach().clone()
            return len(moved) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda i, moved=moved: moved.pop(i)):
            results.append(gradients(block))
        counts.append(len(moved))
    assert counts[0] == counts[1]
    same(*results)


def test_what_others_keep_of_a_part_is_left_alone():
    """A checkpoint within the block: its tensors too are asked for once."""

    class Inner(Block):
        def body(self, x: Tensor, rows: Tensor) -> Tensor:
            def part(x: Tensor, rows: Tensor) -> Tensor:
                return F.gelu(zb.layer_norm_modulate(x.sin(), *rows.chunk(3, dim=1)[:2]))

            h = checkpoint(part, x, rows, use_reentrant=False) if self.again else part(x, rows)
            return self.q(h) + super().body(h, rows)

    same(gradients(Inner()), gradients(Inner(again=False)))


def test_checkpointing_keeps_what_it_kept():
    ours, plain = Block(), Block(again=False)
    same(
        gradients(ours, lambda *given: checkpoint(ours, *given, use_reentrant=False)),
        gradients(plain),
    )

    def saved(block: Block) -> int:
        """Bytes of what lives between forward and backward."""
        alive: list[weakref.ref] = []
        with torch.no_grad():
            hook = block.out.register_forward_pre_hook(lambda m, a: alive.append(weakref.ref(a[0])))
        y = checkpoint(block, *inputs(), use_reentrant=False)
        hook.remove()
        left = sum(r() is not None for r in alive)
        del y
        return left

    assert saved(ours) == saved(plain) == 0


def test_differentiable_and_kept_gradients():
    ours, plain = Block(), Block(again=False)
    results = []
    for block in (ours, plain):
        given = inputs()
        y = block(*given)
        first = torch.autograd.grad(y.pow(3).sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), [*given, *block.parameters()])
        results.append([*first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    given = inputs()
    y = ours(*given).sum()
    one = torch.autograd.grad(y, given, retain_graph=True)
    same(list(torch.autograd.grad(y, given)), list(one))


def test_nothing_outlives_its_graph():
    block = Block()
    gc.disable()
    try:
        given = inputs()
        y = block(*given)
        kept = weakref.ref(y.grad_fn)
        del y
        assert kept() is None
        y = block(*given)
        y.sum().backward()
        kept = weakref.ref(y.grad_fn)
        del y
        assert kept() is None
    finally:
        gc.enable()


def test_changes_in_place_are_seen():
    block = Block()
    y = block(*inputs())
    with torch.no_grad():
        block.q.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

    x = torch.randn(4, requires_grad=True)
    with remade.remaking():
        a = F.silu(x.exp())
        with torch.no_grad():
            a.mul_(2)  # not what the op made
        y = a * a.detach().clone().requires_grad_()
    (got,) = torch.autograd.grad(y.sum(), x)
    b = x.detach().requires_grad_()
    h = F.silu(b.exp())
    (expected,) = torch.autograd.grad((h * (2 * h.detach())).sum(), b)
    torch.testing.assert_close(got, expected)


def test_weights_are_kept_as_they_are():
    """Who shards or offloads parameters exchanges what they hold until backward."""
    block = Block()
    given = inputs()
    expected = torch.autograd.grad(block(*given).sum(), given)
    y = block(*given)
    whole = block.up.weight.data
    block.up.weight.data = torch.empty(0)
    storage = weakref.ref(whole)
    copy = whole.clone()
    del whole
    assert storage() is None, "the graph holds the weights"
    block.up.weight.data = copy
    same(list(torch.autograd.grad(y.sum(), given)), list(expected))


def test_small_tensors_and_no_gradients_need_none(monkeypatch):
    x = torch.randn(2, 4, D)
    assert remade.worthwhile(x)
    with torch.no_grad():
        assert not remade.worthwhile(x)
    monkeypatch.setattr(remade, "LEAST_BYTES", x.nbytes + 1)
    assert not remade.worthwhile(x) and not remade.worthwhile(None)
    monkeypatch.setattr(remade, "LEAST_BYTES", 0)
    monkeypatch.setattr(remade, "LEAST_WIDTH", D + 1)
    assert not remade.worthwhile(x)
    monkeypatch.setattr(remade, "LEAST_WIDTH", D)
    with torch.autograd.graph.disable_saved_tensors_hooks("none"):
        assert not remade.worthwhile(x)


def test_a_branch_that_is_merely_added_is_not_kept():
    x, branch = (torch.randn(2, 8, D, requires_grad=True) for _ in range(2))
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        x_new, y = zb.residual_norm_modulate(x, branch, gate=None, norm="rms")
    assert not any(t.untyped_storage().data_ptr() == branch.untyped_storage().data_ptr() for t in seen)
    got = torch.autograd.grad((x_new.sin() + y.cos()).sum(), (x, branch), create_graph=True)
    twice = torch.autograd.grad(sum(g.pow(2).sum() for g in got), (x, branch))

    def plain(x: Tensor, branch: Tensor) -> Tensor:
        s = x + branch
        return (s.sin() + F.rms_norm(s, (D,), eps=1e-6).cos()).sum()

    expected = torch.autograd.grad(plain(x, branch), (x, branch), create_graph=True)
    for a, b in zip(
        (*got, *twice),
        (*expected, *torch.autograd.grad(sum(g.pow(2).sum() for g in expected), (x, branch))),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
