"""Families by description (description.py): the one forward that computes what a description says.

It is made of the same parts as the families written out (adaln.py), and proved like them. A branch is added to its
stream in one pass with the norm that follows there (streams.py); one whose gate is zero is not run (step.py).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ...blocks import adaln
from ...blocks.broadcast import fits_gate, may_grow
from ...blocks.decision import is_watched
from ...blocks.one_pass import copy_if_gates_are_zero
from ...ops.register import left_to_compiler
from .. import seam
from ..family import NEVER_ZERO, Family, lacks, register
from ..report import Obstacle, Reason
from .adaln import feed_forward, fits, fused_feed_forward, gate_rows, is_plain, is_split, zeroing_tensors
from .arguments import forward_like, simple, with_arguments
from .description import GatedBlock, Joined, Row, joined
from .dit import mlp_half
from .operands import row_of, submodule
from .stand_in import find_home, inner_method, with_stand_ins
from .step import Step
from .streams import Stream


class DescribedFamily(Family):
    """What `family_of` makes subclasses of."""

    eager_rounding = True
    remakes = True

    description: ClassVar[GatedBlock]
    wrappers: ClassVar[tuple[str, ...]]  # modules around norms, which are not called themselves
    left_to_compilers: ClassVar[bool]
    alone: ClassVar[bool]  # the layers see nothing but their tokens
    gate: ClassVar[int | None]  # the row that is, where there is one branch and one linear gives its rows
    seams: ClassVar[bool]  # the rows are known before the block that comes before has returned

    def knows(self, block: nn.Module) -> bool:
        return super().knows(block) and lacks(block, *self.description.has) is None

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        d = self.description
        missing = lacks(block, *(p for b in d.branches if not b.optional for p in b.paths()), *d.linears)
        said = None if missing is not None or d.variant is None else d.variant(block)
        return missing if said is None else Obstacle(Reason.VARIANT, said)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        d = self.description
        branches = [b for b in d.branches if submodule(block, b.layer) is not None]
        if d.gates is None and not d.linears:
            return {b.layer: (torch.empty(1, device="meta") if self._gated() else NEVER_ZERO,) for b in branches}
        gates = d.gates or self._gates
        found: dict[str, tuple[Tensor, ...]] = {}
        for b in branches:
            for i in (part.gate for part in b.parts() if part.gate is not None):
                found[b.layer] = found.get(b.layer, ()) + gates(block, i)
            if d.gates is not None and b.layer not in found:
                found[b.layer] = (NEVER_ZERO,)
            if b.last is not None:
                last = block.get_submodule(b.last)
                found[b.last] = zeroing_tensors(last, last.weight)
        return found

    def inner_modules(self, block: Any) -> Iterable[nn.Module]:
        """None of a block without gates: what holds a branch at zero is in its layers, which are families' own."""
        return block.modules() if self._gated() else ()

    def _gated(self) -> bool:
        return any(part.gate is not None for b in self.description.branches for part in b.parts())

    def _gates(self, block: Any, i: int) -> tuple[Tensor, ...]:
        linears = self.description.linears
        each = self.description.rows_used // len(linears)
        return gate_rows(block.get_submodule(linears[i // each]), each, i % each)

    def entry(self, kind: type[nn.Module]) -> str:
        return inner_method(kind, self.method)

    def on_class_created(self, kind: type[nn.Module]) -> None:
        find_home(kind)

    def proof_target(self, block: nn.Module) -> nn.Module:
        return with_stand_ins(block, self.description.stand_ins or {})

    def example(self, block: Any, side: int) -> tuple:
        assert self.description.example is not None
        return self.description.example(block, side)

    def options(self, block: Any) -> dict[str, tuple]:
        found = {} if self.description.options is None else self.description.options(block)
        names = inspect.signature(self.forward).parameters  # blocks that differ in their arguments may share a function
        return {name: values for name, values in found.items() if name in names}

    def forward(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        d = self.description
        given = None
        if (d.unless is None or not d.unless(block)) and not self._watched(block):
            given = simple(d, block, *args, **kwargs) if d.given is None else d.given(block, *args, **kwargs)
        if given is None:
            return self.eager(block, *args, **kwargs)
        seams = self.seams and seam.possible(args[0] if args else next(iter(kwargs.values()), None))
        prepared = seam.taken(block, args, kwargs) if seams else None
        xs, prepared = joined(given.streams, prepared)
        if not self._takes(xs):
            return self.eager(block, *args, **kwargs)
        flat = xs[0].dim() == 2
        may_skip = self.gate is not None and not is_compiling()
        if prepared is None and may_skip and not torch.is_grad_enabled() and not block.training:
            y = self._copy_if_zero(block, xs[0], args, kwargs)
            if y is not None:
                return y if d.finish is None else d.finish(block, (y,), given.more)
        if prepared is not None:
            rows = prepared.rows
        else:
            rows = [row_of(row) for row in (given.rows if d.rows is None else self._rows(block, args, kwargs))]
        if flat:  # one sample whose tokens have rows of their own
            streams = [Stream(xs[0][None], d.fp32)]
            rows = [Row(None if r.rows is None else r.rows[None], r.table) for r in rows]
        else:
            index = given.which or (None,) * len(xs)
            streams = [Stream(x.contiguous(), d.fp32, i) for x, i in zip(xs, index, strict=True)]
        # What is clipped at the end is another tensor.
        seams = seams and not flat and not (d.finish is not None and xs[0].dtype is torch.float16)
        following = seam.following(block) if seams else None
        for branch in d.branches:
            if branch.optional and submodule(block, branch.layer) is None:
                continue
            step = Step(block, branch, streams, rows, given.layers)
            if prepared is not None and branch is d.branches[0]:
                step.run(self.name, self.zero_skip, prepared.normed, following is not None)
            elif not self._feeds_forward(step):
                step.run(self.name, self.zero_skip, None, following is not None)
        after = None if following is None else self._next_step(following, streams, args, kwargs)
        normed = None if after is None else after.normed()
        results = tuple(stream.settled() for stream in streams)
        result = results if len(results) > 1 else results[0][0] if flat else results[0]
        if d.finish is not None:
            result = d.finish(block, results, given.more)
        if seams:
            prepared = None
            if after is not None and normed is not None:
                of = zip(results, given.streams, strict=True)
                found = [functools.partial(_same, x) if isinstance(g, Joined) else weakref.ref(x) for x, g in of]
                prepared = seam.Prepared(after.rows, normed, found)
            seam.leave(block, args, kwargs, result if isinstance(result, tuple) else (result,), prepared)
        return result

    def _copy_if_zero(self, block: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result of a block of one branch whose gate is zero whatever the condition is, before that is looked at.
        None: it is not, or the condition may make x larger."""
        linear = submodule(block, self.description.linears[0])
        if x.dim() != 3 or may_grow(x, tuple(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))):
            return None
        chunks, gate = self.description.rows_used, self.gate
        assert gate is not None
        return copy_if_gates_are_zero(self.name, self.zero_skip, x, linear, block.children(), chunks, (gate,))

    def _rows(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        d: Any = self.description
        if d.given is None:  # without x, the first argument or one of that name
            args, kwargs = args[1:], {name: v for name, v in kwargs.items() if name != "x"}
        return d.rows(block, *args, **kwargs)

    def _next_step(
        self, block: Any, streams: list[Stream], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Step | None:
        """The first step of the next block, if its norms can end what waits for the streams."""
        d = self.description
        if streams[0].waiting is None or d.unless is not None and d.unless(block) or self._watched(block):
            return None
        rows = [row_of(row) for row in self._rows(block, args, kwargs)]
        step = Step(block, d.branches[0], streams, rows, {})
        return step if step.fuses() else None

    def _watched(self, block: Any) -> bool:
        for path in self.wrappers:
            if is_watched(submodule(block, path)):
                return True
        return False

    def _takes(self, streams: tuple[Any, ...]) -> bool:
        """[B, T, D]; [N, D] where the layers see nothing but that. For training, a compiler fuses the original as
        well."""
        if self.left_to_compilers and is_compiling():
            return False
        for x in streams:
            if (
                not isinstance(x, Tensor)
                or x.dim() != 3
                and not (x.dim() == 2 and self.alone and len(streams) == 1)
                or left_to_compiler(x)
            ):
                return False
        return True

    def _feeds_forward(self, step: Step) -> bool:
        """Whether the branch is a feed-forward that is computed by its layers; it is then."""
        branch, norm, stream = step.branch, step.norms[0], step.streams[0]
        whole = branch.call is not None or branch.context is not None or branch.reads is not None
        (shift, scale), gate = step.modulations[0], step.gates[0]
        if whole or norm is None or shift is None or not gate.is_plain() or stream.index is not None:
            return False
        if shift.table is not None or scale is not None and scale.table is not None:
            return False
        layer, x = submodule(step.block, branch.layer), stream.x
        one, three = shift.rows, gate.row.rows  # type: ignore[union-attr]
        two = torch.zeros_like(one) if scale is None else scale.rows  # type: ignore[arg-type]
        assert one is not None and two is not None and three is not None
        if not (one.dim() == three.dim() == 2 and is_plain(three) and fits_gate(three, x.shape)):
            return False
        half = mlp_half(norm, layer)
        if half is not None and not fits(norm, x, one, two):
            return False
        half = half or fused_feed_forward(layer, norm, x, one, two, three)
        if half is None:
            if not is_split(layer) or not fits(norm, x, one, two):
                return False
            stream.x = feed_forward(self, layer, norm, stream.settled(), one, two, three)
            return True
        answer = adaln.decide_half(self.name, self.zero_skip, x, three, half)
        if adaln.is_plain_inference(self.zero_skip, [answer], x):
            stream.add(adaln.run_half(stream.normed(norm, shift, Row(two)), half), gate)
        else:
            vectors = (one, two, three)
            stream.x = adaln.decided_half(self.name, self.zero_skip, stream.settled(), vectors, half, answer)
        return True


def _same(x: Tensor) -> Tensor:
    return x


def family_of(description: GatedBlock) -> type[Family]:
    d = description
    doc = f"""{d.formula()}

    Source: {d.about or "a description given to register_family."}
    Use: zb.accelerate(model), before torch.compile.
    Inference: a branch is not run while its gate is zero.
    Training forward while a gate is zero: its branch runs once, without a graph.
    Training backward while a gate is zero: the gate's gradient alone; the rest are zeros.
    """
    if d.given is None:
        branches = (b if b.call is None else dataclasses.replace(b, call=with_arguments(b.call)) for b in d.branches)
        d = dataclasses.replace(d, branches=tuple(branches))
    parts = [part for b in d.branches for part in b.parts()]
    norms = [part.norm for part in parts if isinstance(part.norm, str)]
    # A norm that is a function has a stand-in, made at the first call. And norms and sums alone a compiler fuses with
    # what surrounds them, while tracing ours would cost it more than half as much again (compile_times.py, control-xs).
    functions = any(isinstance(part.norm, float) for part in parts)
    plain = all(part.shift is None and part.scale is None and part.gate is None for part in parts)
    plain = plain and all(b.last is None for b in d.branches)
    fields = {
        "description": d,
        "left_to_compilers": functions or plain,
        "alone": all(b.call is None for b in d.branches),
        "gate": d.branches[0].gate if len(d.linears) == 1 == len(d.branches) and not d.branches[0].context else None,
        "seams": d.rows is not None and d.first is None,
        "wrappers": tuple(dict.fromkeys(norm.rpartition(".")[0] for norm in norms if "." in norm)),
        "name": d.name,
        "classes": d.classes or (d.name,),
        "method": d.method,
        "forward": forward_like(DescribedFamily.forward, d.given or d.rows, int(d.given is None)),  # type: ignore[arg-type]
        "__doc__": doc,
        "__module__": __name__,
    }
    return type(d.name, (DescribedFamily,), fields)


def described(*args: Any, **fields: Any) -> type[Family]:
    """Registers the family of such a GatedBlock."""
    return register(family_of(GatedBlock(*args, **fields)))
