"""What autograd need not keep: tensors that are made again in backward of what is kept anyway.

In `remaking(...)`, of all that any code saves for its backward (a model's own attention too), these are not kept:

- what a norm of zeroblock's returned, which is saved by every linear that it is given to: it is made of x again;
- GELU or SiLU of a tensor, which keeps that tensor for its own backward; so only the input of an activation stays;
- products both of whose factors are kept (the norms of q and k before their weight, SwiGLU);
- `joined` tensors.

Each is made by the op that made it, of the same operands: gradients have the same bits. It is known by the node of the
autograd graph that made it, which holds the operands, and runs after all that may ask. No product of matrices and no
attention runs twice. Where others have set hooks for saved tensors (checkpointing, offloading), which may be asked but
once for each, everything is theirs, as without zeroblock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _autograd
from torch.compiler import is_compiling

from .. import zero
from ..kernels._torch import TELLS_SAVED
from ..plan.mode import REDUCED, TRAINING, mode
from .register import Op, from_node

# Smaller tensors cost more to look at than they hold.
LEAST_BYTES = 2**18
# Where a CPU multiplies by narrower matrices, an activation takes a share of the time that shows.
LEAST_WIDTH = 768

Rule = Callable[[Any], Tensor]


class remaking:  # noqa: N801
    """Context: see above. Calls that record no gradients and blocks with few tokens need none (`worthwhile`)."""

    def __init__(self) -> None:
        others = _autograd._top_saved_tensors_default_hooks(False)  # such as only count
        self.keep, take = (_Kept.of, _Kept.tensor) if others is None else others
        self.theirs = others is not None
        self.made: dict[tuple[Any, int], _Remade] = {}

        def unpack(packed: Any) -> Tensor:
            return packed.tensor() if type(packed) in _OURS else take(packed)

        self.unpack = unpack

    def __enter__(self) -> None:
        _autograd._push_saved_tensors_default_hooks(self._pack, self.unpack)

    def __exit__(self, *error: object) -> None:
        _autograd._pop_saved_tensors_default_hooks()
        self.made.clear()  # nodes hold this object by its hooks

    def _pack(self, t: Tensor) -> Any:
        if type(t) is not Tensor or t.is_leaf or t.nbytes < LEAST_BYTES:
            return self.keep(t)
        base = t._base
        whole = t if base is None else base
        node = whole.grad_fn
        made = None if node is None or whole._version else self._remade(whole, node)
        if made is None:
            return self.keep(t)
        return made if base is None else _View(made, t, int(whole.storage_offset()))

    def _remade(self, t: Tensor, node: Any) -> _Remade | None:
        key = node, t.output_nr
        made = self.made.get(key)
        if made is None:
            rule = _rule(node, t.output_nr)
            if rule is None or not self._keeps(node):
                return None
            made = self.made[key] = _Remade(rule, node, t)
        made.asked += 1
        return made

    def _keeps(self, node: Any) -> bool:
        """Whether what the node saved is at hand: it is, and was not left to hooks set in between."""
        if self.theirs:
            return True
        raw = getattr(node, "_raw_saved_tensors", None)
        if raw is None:
            raw = [node._raw_saved_self] + ([node._raw_saved_other] if type(node).__name__ == _MUL else [])
            return all(type(t.data) in _PACKED for t in raw)
        return all(t.data is None or type(t.data) in _PACKED for t in raw)


def is_remaking() -> bool:
    """Whether this is within `remaking`, and no other hooks are set since."""
    hooks = _autograd._top_saved_tensors_default_hooks(False) if TELLS_SAVED else None
    return hooks is not None and isinstance(getattr(hooks[0], "__self__", None), remaking)


def worthwhile(x: Any) -> bool:
    """Whether a block whose tokens are x should run in `remaking`."""
    if type(x) is not Tensor or x.nbytes < LEAST_BYTES or not torch.is_grad_enabled() or not TELLS_SAVED:
        return False
    if x.dim() == 0 or x.is_cpu and x.shape[-1] < LEAST_WIDTH:
        return False
    hooks = _autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and not getattr(hooks[0], "only_counts", False):
        return False
    return not zero.transforms_active() and bool(_autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


class _Remade:
    """A tensor that was not kept; made once for all that ask for it in one backward."""

    __slots__ = ("asked", "left", "node", "rule", "stride", "value")

    def __init__(self, rule: Rule, node: Any, t: Tensor):
        self.rule, self.node, self.stride = rule, node, t.stride()
        self.asked = self.left = 0
        self.value: Tensor | None = None

    def tensor(self) -> Tensor:
        value = self.value
        if value is None:
            with torch.no_grad():
                value = self.rule(self.node)
                if value.stride() != self.stride:  # others' hooks may have kept the operands in another order
                    given, value = value, torch.empty_strided(value.shape, self.stride).to(value)
                    value.copy_(given)
            self.left = self.asked
        self.left -= 1
        self.value = value if self.left > 0 else None
        return value


class _View:
    """A view of such a tensor."""

    __slots__ = ("made", "offset", "size", "stride")

    def __init__(self, made: _Remade, t: Tensor, start: int):
        self.made, self.size, self.stride, self.offset = made, t.shape, t.stride(), t.storage_offset() - start

    def tensor(self) -> Tensor:
        whole = self.made.tensor()
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


_OURS = (_Remade, _View)


class _Kept(NamedTuple):
    """What stays. A parameter as it is: who shards or offloads it exchanges what it holds. Nothing else may hold the
    node that saves it, which made it perhaps."""

    t: Tensor
    version: int

    @staticmethod
    def of(t: Tensor) -> _Kept:
        return _Kept(t if t.is_leaf else t.detach(), t._version)

    def tensor(self) -> Tensor:
        t, version = self
        if t._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{t.type()} {list(t.shape)}] is at version {t._version}; expected version {version} instead."
            )
        return t


_PACKED = (*_OURS, _Kept)


# ---- how a tensor is made again --------------------------------------------------------------------------------------


def _gelu(node: Any) -> Tensor:
    return F.gelu(node._saved_self, approximate=node._saved_approximate)


def _silu(node: Any) -> Tensor:
    return F.silu(node._saved_self)


def _product(node: Any) -> Tensor:
    product: Tensor = node._saved_self * node._saved_other
    return product


_MUL = "MulBackward0"
_OF_TORCH: dict[str, Rule] = {"GeluBackward0": _gelu, "SiluBackward0": _silu, _MUL: _product}


def _rule(node: Any, output: int) -> Rule | None:
    kind = type(node)
    rule = _OF_TORCH.get(kind.__name__)
    if rule is not None:  # a product does not keep a factor beside one without gradients
        kept = rule is not _product or node._raw_saved_self.data is not None is not node._raw_saved_other.data
        return rule if kept else None
    function = getattr(kind, "_forward_cls", None)
    if function is _Joined:
        return _join
    op: Op | None = getattr(function, "op", None)
    return None if op is None or op.again is None or output != op.again[0] else _of_op


def _of_op(node: Any) -> Tensor:
    op, inputs, extra = from_node(node)
    assert op.again is not None
    bits = mode.bits
    mode.bits = bits & ~REDUCED | node.reduced | TRAINING
    try:
        return op.again[1](inputs, extra)
    finally:
        mode.bits = bits


class _Joined(torch.autograd.Function):
    """torch.cat that keeps its parts."""

    @staticmethod
    def forward(ctx: Any, dim: int, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.dim, ctx.sizes = dim, [t.shape[dim] for t in parts]
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        return None, *(d if n else None for n, d in zip(needed, dy.split(ctx.sizes, ctx.dim), strict=True))


def _join(node: Any) -> Tensor:
    return torch.cat(node.saved_tensors, dim=node.dim)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat(parts, dim) for a linear; in `remaking` the parts are kept in its place, each as it is kept anyway."""
    if is_compiling() or not is_remaking() or any(type(t) is not Tensor for t in parts):
        return torch.cat(list(parts), dim=dim)
    result: Tensor = _Joined.apply(dim, *parts)
    return result
