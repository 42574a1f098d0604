"""A copy of a block with random parameters, for a proof: nothing of the original is touched or kept."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs")]
# How many numbers are drawn for a weight; odd, so that its rows differ where they are as long as a power of two.
_DRAWN = (1 << 18) + 1


def random_copy(block: nn.Module) -> nn.Module:
    """block with fresh float32 parameters on the CPU and no hooks; nothing of the original is copied."""
    memo: dict[int, Any] = {}
    for m in block.modules():
        for name in _HOOKS:
            memo[id(getattr(m, name))] = type(getattr(m, name))()
        for name, value in vars(m).items():
            if name.startswith("__composable_api"):  # what fully_shard keeps in a module: process groups
                memo[id(value)] = None
        for tensors in (m._parameters, m._buffers):
            for name, t in tensors.items():
                if t is not None and t.is_floating_point() and id(t) not in memo:
                    memo[id(t)] = _random(t, name, tensors is m._parameters)
    with _unsharded(block):
        twin = copy.deepcopy(block, memo)
    for m in twin.modules():
        m.__dict__.pop("_compiled_call_impl", None)
    return twin


@contextlib.contextmanager
def _unsharded(block: nn.Module) -> Iterator[None]:
    """Takes the classes that fully_shard gave the block and its parts away, whose copies are forbidden."""
    kinds = [(m, type(m)) for m in block.modules() if any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]
    for m, kind in kinds:
        m.__class__ = next(c for c in kind.__mro__ if all(base.__name__ != "FSDPModule" for base in c.__mro__))
    try:
        yield
    finally:
        for m, kind in kinds:
            m.__class__ = kind


def _random(t: Tensor, name: str, is_parameter: bool) -> Tensor:
    """Weights that keep a signal's size, biases and gates of about 1; buffers keep their values."""
    if not is_parameter:
        return torch.ones(t.shape) if t.is_meta else t.detach().to("cpu", torch.float32, copy=True)
    # Repeated numbers are as good, and large weights cost less than drawing each of them.
    n = min(t.numel(), _DRAWN)
    fresh = torch.randn(n).repeat(-(-t.numel() // max(n, 1)))[: t.numel()].view(t.shape)
    if t.dim() > 1 and t.numel():
        fresh /= max(t[0].numel(), 1) ** 0.5
    elif name.endswith("weight"):
        fresh = 1 + 0.3 * fresh
    return nn.Parameter(fresh)
