"""Puts a model back bit for bit: parameters, buffers, gradients, modes, attributes, hooks, the batch, random streams.

The copies live in host memory, so that the device holds no more than in an ordinary training step. Restored is the
memory itself, and then what the modules refer to: tensors keep their identity.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

# What a Module keeps in containers of its own, beside plain attributes.
_REGISTRIES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


def tensors_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """Parameters, buffers, tensors kept as plain attributes, and the batch."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        found += [v for v in vars(module).values() if isinstance(v, Tensor)]
    return found + [t for t in tree_flatten(batch)[0] if isinstance(t, Tensor)]


@contextlib.contextmanager
def preserved(model: nn.Module, batch: Any) -> Iterator[None]:
    """Whatever the block does to the model, its batch and the random number generators is undone, also on errors."""
    tensors = tensors_of(model, batch)
    gradients = [(t, t.grad) for t in tensors if t.is_leaf]
    memory = _Memory([*tensors, *(g for _, g in gradients if g is not None)])
    flags = [(t, t.requires_grad) for t in tensors if t.is_leaf]
    attributes = [(m, dict(vars(m)), _registries(m)) for m in model.modules()]
    streams = _RandomStreams()
    try:
        yield
    finally:
        for module, before, registries in attributes:
            vars(module).clear()
            vars(module).update(before)
            for name, (registry, content) in registries.items():
                registry.clear()
                registry.update(content)
                vars(module)[name] = registry
        memory.restore()
        for t, g in gradients:
            if t.grad is not g:
                t.grad = g
        for t, flag in flags:
            if t.requires_grad != flag:
                t.requires_grad_(flag)
        streams.restore()


def _registries(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    found = {name: vars(module)[name] for name in _REGISTRIES if vars(module).get(name) is not None}
    return {name: (registry, registry.copy()) for name, registry in found.items()}


class _Memory:
    """Copies of the memory behind some tensors, once for each piece however many tensors share it."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.others: dict[int, tuple[Tensor, Tensor]] = {}  # wrapper and sparse tensors
        for t in tensors:
            if t.is_meta:
                continue
            try:
                storage = t.untyped_storage()
                if storage.nbytes() and storage.data_ptr() == 0:
                    raise NotImplementedError
            except (NotImplementedError, RuntimeError):
                self.others.setdefault(id(t), (t, t.detach().to("cpu", copy=True)))
                continue
            if storage._cdata not in self.storages:
                self.storages[storage._cdata] = storage, storage.cpu() if storage.is_cuda else storage.clone()

    @torch.no_grad()
    def restore(self) -> None:
        for storage, saved in self.storages.values():
            if storage.nbytes() != saved.nbytes():
                storage.resize_(saved.nbytes())
            storage.copy_(saved)
        for t, copy in self.others.values():
            t.detach().copy_(copy)


class _RandomStreams:
    """The states of Python's, NumPy's and PyTorch's generators."""

    def __init__(self) -> None:
        self.python = random.getstate()
        self.numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
