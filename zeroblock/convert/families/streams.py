"""What blocks by description compute with: a stream of tokens, its norms and modulations, and the branches that are
added to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import functional
from ...blocks.broadcast import add_gated, cannot_be_saved, fits_gate
from ...blocks.layers import is_plain_norm
from ...reference import modulation
from .adaln import fits, is_plain, norm_kind


def submodule(block: nn.Module, path: str) -> Any:
    """block.get_submodule(path), at a tenth of its price; None where there is none."""
    found: Any = block
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


# Layer norms of blocks that call torch's function.
_functions: dict[tuple[int, float], nn.LayerNorm] = {}


def norm_of(block: nn.Module, norm: str | float | None, x: Tensor) -> Any:
    """The norm of a description."""
    if not isinstance(norm, float):
        return None if norm is None else submodule(block, norm)
    key = x.shape[-1], norm
    if key not in _functions:
        _functions[key] = nn.LayerNorm(x.shape[-1], norm, elementwise_affine=False)
    return _functions[key]


def modulate(norm: Any, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """norm(x) * (1 + scale) + shift; what is None is left out."""
    rows = [v for v in (shift, scale) if v is not None]
    if norm is not None and rows and fits(norm, x, *rows):
        if norm_kind(norm) == "rms":
            return functional.rms_norm_modulate(x, shift, scale, eps=norm.eps, weight=norm.weight)
        return functional.layer_norm_modulate(x, shift, scale, eps=norm.eps, weight=norm.weight, bias=norm.bias)
    h = x if norm is None else norm(x)
    h = h if scale is None else h * (1 + modulation(scale))
    return h if shift is None else h + modulation(shift)


class Stream:
    """x, and the branch that is still to be added to it: with the norm that comes next, where there is one."""

    __slots__ = ("waiting", "x")

    def __init__(self, x: Tensor):
        self.x = x
        self.waiting: tuple[Tensor, Tensor | None] | None = None

    def add(self, branch: Tensor, gate: Tensor | None) -> None:
        """x + gate * branch, from now on; nothing waits."""
        self.waiting = branch, gate

    def settled(self) -> Tensor:
        """x with all that was added."""
        if self.waiting is not None:
            branch, gate = self.waiting
            self.x = self.x + branch if gate is None else _gated(self.x, gate, branch)
            self.waiting = None
        return self.x

    def normed(self, norm: Any, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """norm(x) * (1 + scale) + shift, in one pass with what waits to be added."""
        if self.waiting is not None and shift is not None and scale is not None and is_plain_norm(norm):
            branch, gate = self.waiting
            if gate is not None and fits(norm, self.x, shift, scale) and self._fits_seam(branch, gate):
                self.x, h = functional.gate_residual_layer_norm_modulate(
                    self.x, gate, branch, shift, scale, eps=norm.eps
                )
                self.waiting = None
                return h
        return modulate(norm, self.settled(), shift, scale)

    def _fits_seam(self, branch: Tensor, gate: Tensor) -> bool:
        x = self.x
        same = x.shape == branch.shape and x.dtype == branch.dtype == gate.dtype
        return same and is_plain(branch, gate) and fits_gate(gate, x.shape) and not cannot_be_saved(branch)


def _gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    if x.dim() == 3 and is_plain(x, gate, branch):
        return add_gated(x, gate, branch)
    return x + modulation(gate) * branch
