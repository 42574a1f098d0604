"""Families by description (description.py): the one forward that computes what a description says.

It is made of the same parts as the families written out (adaln.py), and proved like them. A branch is added to its
stream in one pass with the norm that follows there; one whose gate is zero is not run.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...blocks import adaln
from ...blocks.broadcast import fits_gate, may_grow
from ...blocks.decision import NOT_ALLOWED, SKIP_BY_GATE, SKIPS, Answer, decide, is_watched, op_policy
from ...blocks.layers import may_draw
from ...blocks.one_pass import copy_of_residual
from ...blocks.residual import skip_residual
from ...ops.register import left_to_compiler
from ..family import Family, lacks, register
from ..report import Obstacle, Reason
from .adaln import (
    DIFFUSERS,
    feed_forward,
    fits,
    fused_feed_forward,
    gate_rows,
    is_plain,
    is_plain_linear,
    is_split,
    projected,
)
from .description import GatedBlock, GatedBranch, Given
from .dit import mlp_half
from .streams import Stream, modulate, norm_of, submodule


class DescribedFamily(Family):
    """What `family_of` makes subclasses of."""

    description: ClassVar[GatedBlock]
    wrappers: ClassVar[tuple[str, ...]]  # modules around norms, which are not called themselves

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        d = self.description
        missing = lacks(block, *(p for b in d.branches if not b.optional for p in b.paths()), *d.linears)
        said = None if missing is not None or d.variant is None else d.variant(block)
        return missing if said is None else Obstacle(Reason.VARIANT, said)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        d = self.description
        branches = [b for b in d.branches if submodule(block, b.layer) is not None]
        if not d.linears:
            return {b.layer: (torch.empty(1, device="meta"),) for b in branches}
        each = d.rows_used // len(d.linears)
        linears = [block.get_submodule(path) for path in d.linears]
        found: dict[str, tuple[Tensor, ...]] = {}
        for b in branches:
            gates = [part.gate for part in b.parts() if part.gate is not None]
            if gates:
                found[b.layer] = found.get(b.layer, ()) + tuple(
                    t for i in gates for t in gate_rows(linears[i // each], each, i % each)
                )
        return found

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
            given = _simple(d, block, *args, **kwargs) if d.given is None else d.given(block, *args, **kwargs)
        if given is None or not self._takes(given.streams):
            return self.eager(block, *args, **kwargs)
        rows = tuple(row.squeeze(1) if row.dim() == 3 and row.shape[1] == 1 else row for row in given.rows)
        flat = given.streams[0].dim() == 2
        if flat:  # one sample whose tokens have rows of their own
            streams, rows = [Stream(given.streams[0][None])], tuple(row[None] for row in rows)
        else:
            streams = [Stream(x.contiguous()) for x in given.streams]
        for branch in d.branches:
            if branch.optional and submodule(block, branch.layer) is None:
                continue
            self._branch(block, branch, streams, rows, given.layers)
        results = tuple(stream.settled() for stream in streams)
        if d.finish is not None:
            return d.finish(block, results, given.more)
        return results if len(results) > 1 else results[0][0] if flat else results[0]

    def _watched(self, block: Any) -> bool:
        return any(is_watched(submodule(block, path)) for path in self.wrappers)

    def _takes(self, streams: tuple[Any, ...]) -> bool:
        """[B, T, D]; [N, D] where the layers see nothing but that. For training, a compiler fuses the original as
        well."""
        d = self.description
        alone = len(streams) == 1 and all(b.call is None for b in d.branches)
        for x in streams:
            if not isinstance(x, Tensor) or x.dim() != 3 and not (x.dim() == 2 and alone) or left_to_compiler(x):
                return False
        return True

    def _branch(
        self, block: Any, branch: GatedBranch, streams: list[Stream], rows: tuple[Tensor, ...], layers: dict[str, Any]
    ) -> None:
        parts = branch.parts()
        norms = [norm_of(block, part.norm, streams[part.stream].x) for part in parts]
        vectors = [[None if i is None else rows[i] for i in (p.shift, p.scale, p.gate)] for p in parts]
        if self._feeds_forward(block, branch, streams[branch.stream], norms[0], *vectors[0]):
            return
        modules = [m for path in (*branch.paths(), *branch.others) if (m := submodule(block, path)) is not None]
        last = None if branch.last is None else submodule(block, branch.last)
        own = [streams[part.stream] for part in parts]
        read = own if branch.reads is None else [streams[branch.reads]]
        gates = [gate for *_, gate in vectors]
        answer = NOT_ALLOWED if read is not own else self._answer(own, gates, last, modules)
        if answer in SKIPS:
            self._skip(answer, block, branch, own, norms, vectors, layers, modules, last)
            return
        h = [s.normed(norm, v[0], v[1]) for s, norm, v in zip(read, norms, vectors, strict=True)]
        for s, gate, y in zip(own, gates, _called(block, branch, h, layers), strict=True):
            if last is not None and gate is not None:
                s.x = projected(s.settled(), gate, y, last, op_policy(answer, self.zero_skip))
            else:
                s.add(y if last is None else last(y), gate)

    def _answer(self, streams: list[Stream], gates: list[Tensor | None], last: Any, modules: list[nn.Module]) -> Answer:
        """Whether the branch is skipped: all of its gates are zero, or its last layer."""
        known = tuple(g for g in gates if g is not None)
        if len(known) < len(gates) or not is_plain(*known) or is_compiling():
            return NOT_ALLOWED
        for s, gate in zip(streams, known, strict=True):
            if not is_plain(s.x) or may_grow(s.x, (gate,)) or not fits_gate(gate, s.x.shape):
                return NOT_ALLOWED
        weights = (last.weight,) if is_plain_linear(last) and streams[0].x.shape[-1] == last.weight.shape[0] else ()
        return decide(self.name, self.zero_skip, weights, known, modules)

    def _skip(
        self,
        answer: Answer,
        block: Any,
        branch: GatedBranch,
        streams: list[Stream],
        norms: list[Any],
        vectors: list[list[Tensor | None]],
        layers: dict[str, Any],
        modules: list[nn.Module],
        last: Any,
    ) -> None:
        """Streams without the branch, all of whose gates are zero, or its last layer; in training these get their
        gradients."""
        xs = [stream.settled() for stream in streams]
        tail = last if is_plain_linear(last) else None
        modules = [m for m in modules if m is not tail]
        if answer is SKIP_BY_GATE and not torch.is_grad_enabled() and not any(may_draw(m, DIFFUSERS) for m in modules):
            for s, x in zip(streams, xs, strict=True):
                s.x = copy_of_residual(x)
            return
        leaves, spec = tree_flatten((xs, [v[:2] for v in vectors], layers))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def body(*operands: Tensor) -> Tensor:
            values = list(leaves)
            for i, operand in zip(tensors, operands, strict=True):
                values[i] = operand
            xs, modulation, layers = tree_unflatten(values, spec)
            h = [modulate(norm, x, *v) for norm, x, v in zip(norms, xs, modulation, strict=True)]
            found = _called(block, branch, h, layers)
            found = [y if last is tail else last(y) for y in found]
            return found[0] if len(found) == 1 else torch.cat(found, dim=1)

        # As one stream, so that the layer runs once and all gates get their gradients of it.
        gates = [v[2] for v in vectors]
        if len(xs) == 1:
            x, gate = xs[0], gates[0]
        else:
            x = torch.cat(xs, dim=1)
            wide = [g[:, None].expand_as(t) if g.dim() == 2 else g.expand_as(t) for g, t in zip(gates, xs, strict=True)]  # type: ignore[union-attr]
            gate = torch.cat(wide, dim=1)
        # Operands in the order of `leaves`, x first.
        operands = tuple(leaves[i] for i in tensors)
        y = skip_residual(answer, x, body, tail, gate, operands, tuple(modules), DIFFUSERS)
        for s, part in zip(streams, y.split([t.shape[1] for t in xs], dim=1), strict=True):
            s.x = part.contiguous()

    def _feeds_forward(
        self, block: Any, branch: GatedBranch, stream: Stream, norm: Any, shift: Any, scale: Any, gate: Any
    ) -> bool:
        """Whether the branch is a feed-forward that is computed by its layers; it is then."""
        whole = branch.call is not None or branch.context is not None or branch.reads is not None
        if whole or norm is None or shift is None or gate is None:
            return False
        scale = torch.zeros_like(shift) if scale is None else scale
        layer, x = submodule(block, branch.layer), stream.x
        if not (shift.dim() == gate.dim() == 2 and is_plain(gate) and fits_gate(gate, x.shape)):
            return False
        half = mlp_half(norm, layer)
        if half is not None and not fits(norm, x, shift, scale):
            return False
        half = half or fused_feed_forward(layer, norm, x, shift, scale, gate)
        if half is None:
            if not is_split(layer):
                return False
            stream.x = feed_forward(self, layer, norm, stream.settled(), shift, scale, gate)
            return True
        answer = adaln.decide_half(self.name, self.zero_skip, x, gate, half)
        if adaln.is_plain_inference(self.zero_skip, [answer], x):
            stream.add(adaln.run_half(stream.normed(norm, shift, scale), half), gate)
        else:
            stream.x = adaln.decided_half(
                self.name, self.zero_skip, stream.settled(), (shift, scale, gate), half, answer
            )
        return True


def _called(block: Any, branch: GatedBranch, h: list[Tensor], layers: dict[str, Any]) -> Sequence[Tensor]:
    """What the branch's layer returns, for each of its streams."""
    if branch.call is not None:
        y = branch.call(block, h[0] if len(h) == 1 else tuple(h), layers)
        return [y] if len(h) == 1 else y
    layer, more = submodule(block, branch.layer), layers.get(branch.layer, {})
    if len(h) == 1:
        return [layer(h[0], **more)]
    return layer(hidden_states=h[0], encoder_hidden_states=h[1], **more)


def _simple(d: GatedBlock, block: Any, x: Any, *args: Any, **kwargs: Any) -> Given:
    """`Given` of a block with one stream, its first argument; what else it was called with is for all its calls."""
    assert d.rows is not None
    rows = d.rows(block, *args, **kwargs)
    if d.first is not None:
        x = d.first(block, x, *args, **kwargs)
    return Given((x,), rows, {"": (args, kwargs)})


def _with_arguments(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A call(block, h, *args, **kwargs) as one of the `layers` that `_simple` gives."""

    def called(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
        args, kwargs = layers[""]
        return call(block, h, *args, **kwargs)

    return called


def _forward_like(function: Callable[..., Any], streams: int) -> Callable[..., Any]:
    """DescribedFamily.forward with the parameters of `function` (after `streams` named x): by these it is known what
    may be passed."""

    @functools.wraps(DescribedFamily.forward)
    def forward(self: DescribedFamily, block: Any, *args: Any, **kwargs: Any) -> Any:
        return DescribedFamily.forward(self, block, *args, **kwargs)

    ours = list(inspect.signature(DescribedFamily.forward).parameters.values())[:2]
    x = [inspect.Parameter("x", inspect.Parameter.POSITIONAL_OR_KEYWORD)] * streams
    theirs = list(inspect.signature(function).parameters.values())[1:]
    forward.__signature__ = inspect.Signature([*ours, *x, *theirs])  # type: ignore[attr-defined]
    return forward


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
        with_arguments = [
            b if b.call is None else dataclasses.replace(b, call=_with_arguments(b.call)) for b in d.branches
        ]
        d = dataclasses.replace(d, branches=tuple(with_arguments))
    norms = [part.norm for b in d.branches for part in b.parts() if isinstance(part.norm, str)]
    fields = {
        "description": d,
        "wrappers": tuple(dict.fromkeys(norm.rpartition(".")[0] for norm in norms if "." in norm)),
        "name": d.name,
        "classes": d.classes or (d.name,),
        "method": d.method,
        "forward": _forward_like(d.rows, 1) if d.given is None else _forward_like(d.given, 0),  # type: ignore[arg-type]
        "__doc__": doc,
        "__module__": __name__,
    }
    return type(d.name, (DescribedFamily,), fields)


def described(*args: Any, **fields: Any) -> type[Family]:
    """Registers the family of such a GatedBlock."""
    return register(family_of(GatedBlock(*args, **fields)))
