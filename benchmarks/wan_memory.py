"""What a block of Wan 2.2 holds in a training step: `python benchmarks/wan_memory.py` writes results/wan-memory.md.

An exact account, no measurement: the step runs on fake tensors, which have a size and no memory, and every storage is
counted from when it is made until nobody holds it. What a kernel allocates for itself does not show: partial sums, of
27,280 tokens 16 MB on a CPU, 10 MB on a GPU.

A row is one way to write the block: as diffusers does; by zeroblock's functions with a temb of every token; and with
two rows of temb, of the clean first frame and of the rest, and an index.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zeroblock as zb

PAGE = Path(__file__).parent / "results/wan-memory.md"
D, HEADS, HIDDEN, TEXT = 3072, 24, 14336, 512
TOKENS = (1024, 27280)  # 27,280: 121 frames of 704 x 1280


class Account(TorchDispatchMode):
    """The storages made in it: bytes held now and at most, and the size of each."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.sizes: list[int] = []
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and id(t.untyped_storage()) not in given:
                self._made(t.untyped_storage())
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        known = self.known.get(key)
        if known is not None and known() is storage:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            self.held -= size

        self.known[key] = weakref.ref(storage, gone)
        self.sizes.append(size)
        self.held += size
        self.most = max(self.most, self.held)


def kept(forward: Callable[[], Tensor], owned: list[Tensor]) -> int:
    """Bytes that the forward leaves for backward; a storage counts once, what the caller owns does not."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        found[id(t.untyped_storage())] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    for t in owned:
        found.pop(id(t.untyped_storage()), None)
    del y
    return sum(storage.nbytes() for storage in found.values())


class Block(NamedTuple):
    """The weights of a block: attention to itself and to the text, feed-forward; norm2 is affine."""

    qkv: Tensor
    out: Tensor
    q: Tensor
    kv: Tensor
    cross: Tensor
    up: Tensor
    down: Tensor
    weight: Tensor
    bias: Tensor
    table: Tensor  # [6, D]

    @staticmethod
    def new(D: int, hidden: int, dtype: torch.dtype) -> Block:
        sizes = ((3 * D, D), (D, D), (D, D), (2 * D, D), (D, D), (hidden, D), (D, hidden), (D,), (D,))
        draw = [torch.randn(size, dtype=dtype).mul_(size[-1] ** -0.5).requires_grad_() for size in sizes]
        return Block(*draw, torch.randn(6, D).requires_grad_())


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _self(b: Block, h: Tensor, heads: int) -> Tensor:
    return F.linear(_attend(*F.linear(h, b.qkv).chunk(3, dim=2), heads), b.out)


def _text(b: Block, h: Tensor, text: Tensor, heads: int) -> Tensor:
    return F.linear(_attend(F.linear(h, b.q), *F.linear(text, b.kv).chunk(2, dim=2), heads), b.cross)


def _forward(b: Block, h: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(h, b.up), approximate="tanh"), b.down)


def eager(b: Block, x: Tensor, temb: Tensor, index: Tensor | None, text: Tensor, heads: int) -> Tensor:
    """diffusers' WanTransformerBlock."""
    size = x.shape[2:]

    def norm(x: Tensor, *affine: Tensor) -> Tensor:
        return F.layer_norm(x.float(), size, *(t.float() for t in affine), eps=1e-6)

    shift, scale, gate, c_shift, c_scale, c_gate = (b.table[None, None] + temb.float()).unbind(2)
    h = (norm(x) * (1 + scale) + shift).type_as(x)
    x = (x.float() + _self(b, h, heads) * gate).type_as(x)
    x = x + _text(b, norm(x, b.weight, b.bias).type_as(x), text, heads)
    h = (norm(x) * (1 + c_scale) + c_shift).type_as(x)
    return (x.float() + _forward(b, h).float() * c_gate).type_as(x)


def fused(b: Block, x: Tensor, temb: Tensor, index: Tensor | None, text: Tensor, heads: int) -> Tensor:
    """The same by zeroblock's functions; temb [B, T, 6, D], or rows [B, K, 6, D] and an index."""
    shift, scale, gate, c_shift, c_scale, c_gate = temb.unbind(2)
    t, more = b.table.unbind(0), {"index": index}
    h = zb.layer_norm_modulate(x, shift, scale, shift_table=t[0], scale_table=t[1], **more)
    options = {"out_dtype": x.dtype, **more}
    x, h = zb.residual_norm_modulate(
        x, _self(b, h, heads), gate=gate, gate_table=t[2], weight=b.weight, bias=b.bias, **options
    )
    modulated = {"shift": c_shift, "scale": c_scale, "shift_table": t[3], "scale_table": t[4]}
    x, h = zb.residual_norm_modulate(x, _text(b, h, text, heads), **modulated, **options)
    return zb.gate_residual(x, c_gate, _forward(b, h), gate_table=t[5], **options)


class Counted(NamedTuple):
    large: int  # tensors of the size of [B, T, 6, D] in fp32, beside the caller's temb
    saved: int  # bytes kept for backward, beside inputs and weights
    most: int  # bytes held at most in a step, gradients among them, beside inputs and weights


Way = tuple[Callable[..., Tensor], bool]
WAYS: dict[str, Way] = {
    "as diffusers writes it": (eager, False),
    "zeroblock, [B, T, 6, D]": (fused, False),
    "zeroblock, rows and index": (fused, True),
}


def inputs(T: int, D: int, hidden: int, text: int, indexed: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    """(block, x, temb, index, text)"""
    x, context = torch.randn(1, T, D, dtype=dtype), torch.randn(1, text, D, dtype=dtype)
    temb = torch.randn(1, 2 if indexed else T, 6, D)
    index = (torch.arange(T) >= T // 31).int()[None] if indexed else None
    for t in (x, temb, context):
        t.requires_grad_()
    return Block.new(D, hidden, dtype), x, temb, index, context


def step(way: Way, given: tuple[Any, ...], heads: int) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """(forward, forward and backward)"""
    block, x, temb, index, text = given
    dy = torch.randn_like(x)

    def forward() -> Tensor:
        return way[0](block, x, temb, index, text, heads)

    return forward, lambda: torch.autograd.grad(forward(), (x, temb, text, *block), dy)


def count(way: Way, T: int, D: int = D, hidden: int = HIDDEN, text: int = TEXT, heads: int = HEADS) -> Counted:
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = inputs(T, D, hidden, text, way[1], torch.bfloat16)
        forward, both = step(way, given, heads)
        owned = [t for t in (*given[0], *given[1:]) if t is not None]
        saved = kept(forward, owned)
        with Account() as account:
            both()
    return Counted(sum(size == T * 6 * D * 4 for size in account.sizes), saved, account.most)


def render() -> str:
    lines = [
        "# One block of Wan 2.2 TI2V, a training step",
        "",
        "`python benchmarks/wan_memory.py` writes this page: an exact account on fake tensors, no measurement. Width",
        "3072, 24 heads, feed-forward 14336, 512 tokens of text; tokens and weights in bfloat16, temb and table in",
        "float32. Beside inputs and weights (temb among them): tensors of the size of every token's temb, bytes kept",
        "for backward, and bytes held at most, all gradients among them.",
        "",
        "| tokens | block | temb, MB | of its size | saved, MB | held at most, MB |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for T in TOKENS:
        theirs = None
        for name, way in WAYS.items():
            found = count(way, T)
            theirs = theirs or found
            rows = 2 if way[1] else T
            saved, most = (
                f"{n / 1e6:,.0f}" + ("" if found is theirs else f" ({n / of:.2f}x)")
                for n, of in ((found.saved, theirs.saved), (found.most, theirs.most))
            )
            lines.append(f"| {T:,} | {name} | {rows * 6 * D * 4 / 1e6:,.1f} | {found.large} | {saved} | {most} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = render()
    PAGE.write_text(page)
    print(page)
