"""Families by description: a block of gated branches, each norm, modulation, layer and gate, put down in a few lines.

What a description says is computed by the same parts as the families written out (adaln.py), and proved like them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks import adaln
from ...blocks.broadcast import fits_gate
from ...reference import modulation as rows_of
from ..family import Family, lacks
from ..report import Obstacle
from .adaln import feed_forward, fits, gate_rows, gated_branch, is_plain, modulated
from .dit import mlp_half


@dataclasses.dataclass(frozen=True)
class GatedBranch:
    """x = x + gate * layer(norm(x) * (1 + scale) + shift), a part of `GatedBlock`.

    Args:
        layer: where the block has the module that is the branch ("attn", "mlp.0").
        norm: where it has the norm, a LayerNorm or RMSNorm; None: the layer is given x as it is.
        shift, scale, gate: which of the block's rows; None: without.
        call: call(block, h, *args, **kwargs) for a layer that takes more than h, args and kwargs being what the block
            was called with beside x. It may call that layer, nothing else of the block.
    """

    layer: str
    norm: str | None = None
    shift: int | None = None
    scale: int | None = None
    gate: int | None = None
    call: Callable[..., Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class GatedBlock:
    """A transformer block of gated branches, one after the other, for `register_family`.

    Each function is given the block and what it was called with beside x.

    Args:
        name: of the family, in reports.
        branches: in the order in which they change x.
        rows: rows(block, *args, **kwargs): the vectors of the modulation, [B, D] or [B, 1, D], in a sequence. Its
            parameters are named as the block's own; those with a default are optional.
        example: example(block, side): arguments of a call, x first, for side ** 2 tokens and two samples; float32
            tensors on the CPU with random values.
        options: options(block): {optional argument: values that fit the example}. An optional argument that is not
            proved with a value of these or of the example goes to the original, unless it is the default.
        classes: the names of the classes that may be this block; () stands for `name`.
        linear: where the block has the linear whose output is the rows, as many equal parts as the branches use: which
            gates are zero then shows in the report.
        first: first(block, x, *args, **kwargs): x as the branches get it.
        unless: unless(block): where the description does not hold (active stochastic depth), the original runs.
        method: the method that computes the block, where forward only calls it (checkpointing).
        about: where the block comes from.
    """

    name: str
    branches: tuple[GatedBranch, ...]
    rows: Callable[..., Sequence[Tensor]]
    example: Callable[[Any, int], tuple]
    options: Callable[[Any], dict[str, tuple]] | None = None
    classes: tuple[str, ...] = ()
    linear: str | None = None
    first: Callable[..., Tensor] | None = None
    unless: Callable[[Any], bool] | None = None
    method: str = "forward"
    about: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"GatedBlock: name must be an identifier, got {self.name!r}")
        if not self.branches or not all(isinstance(b, GatedBranch) for b in self.branches):
            raise TypeError(f"GatedBlock: branches must be a tuple of GatedBranch, got {self.branches!r}")
        for argument in ("rows", "example"):
            if not callable(getattr(self, argument)):
                kind = type(getattr(self, argument)).__name__
                raise TypeError(f"GatedBlock: {argument} must be a function, got {kind}")

    def formula(self) -> str:
        """The branches in words."""
        found = []
        for b in self.branches:
            h = "x" if b.norm is None else f"{b.norm} x"
            h = h if b.scale is None and b.shift is None else f"modulate({h})"
            found.append(f"x + {'' if b.gate is None else 'gate * '}{b.layer}({h})")
        return ", then ".join(found)


class DescribedFamily(Family):
    """What `family_of` makes subclasses of."""

    description: ClassVar[GatedBlock]

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        paths = [p for b in self.description.branches for p in (b.norm, b.layer) if p is not None]
        return lacks(block, *paths, *([self.description.linear] if self.description.linear else []))

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        path = self.description.linear
        if path is None:
            return {b.layer: (torch.empty(1, device="meta"),) for b in self.description.branches}
        linear = block.get_submodule(path)
        chunks = 1 + max(i for b in self.description.branches for i in (b.shift, b.scale, b.gate) if i is not None)
        return {b.layer: gate_rows(linear, chunks, b.gate) for b in self.description.branches if b.gate is not None}

    def example(self, block: Any, side: int) -> tuple:
        return self.description.example(block, side)

    def options(self, block: Any) -> dict[str, tuple]:
        return {} if self.description.options is None else self.description.options(block)

    def forward(self, block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        d = self.description
        if not self._takes(x) or d.unless is not None and d.unless(block):
            return self.eager(block, x, *args, **kwargs)
        rows = tuple(row.squeeze(1) if row.dim() == 3 else row for row in d.rows(block, *args, **kwargs))
        if d.first is not None:
            x = d.first(block, x, *args, **kwargs)
        flat = x.dim() == 2
        if flat:  # one sample whose tokens have rows of their own
            x, rows = x[None], tuple(row[None] for row in rows)
        for branch in d.branches:
            x = self._branch(block, branch, x, rows, args, kwargs)
        return x[0] if flat else x

    def _takes(self, x: Any) -> bool:
        """[B, T, D]; [N, D] where the layers see nothing but that."""
        alone = all(b.call is None for b in self.description.branches)
        return isinstance(x, Tensor) and (x.dim() == 3 or x.dim() == 2 and alone)

    def _branch(
        self,
        block: Any,
        branch: GatedBranch,
        x: Tensor,
        rows: tuple[Tensor, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        layer = block.get_submodule(branch.layer)
        norm = None if branch.norm is None else block.get_submodule(branch.norm)
        shift, scale, gate = (None if i is None else rows[i] for i in (branch.shift, branch.scale, branch.gate))
        if shift is None and scale is not None:
            shift = torch.zeros_like(scale)
        if scale is None and shift is not None:
            scale = torch.zeros_like(shift)
        if branch.call is None and None not in (norm, shift, gate):
            return self._feed_forward(layer, norm, x, shift, scale, gate)
        modulation = () if shift is None or scale is None else (shift, scale)
        given = (*args, *kwargs.values())
        tensors = tuple(v for v in given if isinstance(v, Tensor))

        def body(x: Tensor, *operands: Tensor) -> Tensor:
            if modulation:
                shift, scale = operands[:2]
                plain = norm is None
                h = x * (1 + rows_of(scale)) + rows_of(shift) if plain else modulated(norm, x, shift, scale)
            else:
                h = x if norm is None else norm(x)
            if branch.call is None:
                return layer(h)
            rest = iter(operands[len(modulation) :])
            values = [next(rest) if isinstance(v, Tensor) else v for v in given]
            return branch.call(block, h, *values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

        activations = (x, *modulation, *(tensors if branch.call is not None else ()))
        if gate is None:
            return x + body(*activations)
        return gated_branch(self, x, gate, body, activations, *(m for m in (norm, layer) if m is not None))

    def _feed_forward(self, layer: Any, norm: Any, x: Tensor, shift: Any, scale: Any, gate: Any) -> Tensor:
        half = mlp_half(norm, layer)
        if half is None or not fits(norm, x, shift, scale) or not is_plain(gate) or not fits_gate(gate, x.shape):
            return feed_forward(self, layer, norm, x, shift, scale, gate)
        return adaln.half(self.name, self.zero_skip, x, (shift, scale, gate), half)


def _forward_like(rows: Callable[..., Any]) -> Callable[..., Tensor]:
    """DescribedFamily.forward with the parameters of `rows` after x: by these it is known what may be passed."""

    @functools.wraps(DescribedFamily.forward)
    def forward(self: DescribedFamily, block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return DescribedFamily.forward(self, block, x, *args, **kwargs)

    ours = list(inspect.signature(DescribedFamily.forward).parameters.values())[:3]
    theirs = list(inspect.signature(rows).parameters.values())[1:]
    forward.__signature__ = inspect.Signature([*ours, *theirs])  # type: ignore[attr-defined]
    return forward


def family_of(description: GatedBlock) -> type[Family]:
    doc = f"""{description.formula()}

    Source: {description.about or "a description given to register_family."}
    Use: zb.accelerate(model), before torch.compile.
    Inference: a branch is not run while its gate is zero.
    Training forward while a gate is zero: its branch runs once, without a graph.
    Training backward while a gate is zero: the gate's gradient alone; the rest are zeros.
    """
    fields = {
        "description": description,
        "name": description.name,
        "classes": description.classes or (description.name,),
        "method": description.method,
        "forward": _forward_like(description.rows),
        "__doc__": doc,
        "__module__": __name__,
    }
    return type(description.name, (DescribedFamily,), fields)
