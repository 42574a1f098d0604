"""The proof that a family's forward computes what the block's own does, on a copy with random parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import mode as _mode
from .family import Family, accelerated_class

# Both run in float32: what rounds differently is below, another formula is far above.
TOLERANCE = 1e-3
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs")]
# How many numbers are drawn for a weight; odd, so that its rows differ where they are as long as a power of two.
_DRAWN = (1 << 18) + 1
_proved: dict[tuple, str | None] = {}


def disagreement(block: nn.Module, family: Family) -> str | None:
    """None when both forwards agree, else the reason to leave the block alone; remembered by fingerprint."""
    key = (type(family), *_fingerprint(block, family))
    if key not in _proved:
        _proved[key] = _compare(block, family)
    return _proved[key]


def _fingerprint(block: nn.Module, family: Family) -> tuple:
    """What a block's forward can depend on but its tensors' values: classes, functions, shapes, plain attributes."""
    entry = family.entry(type(block))
    code = tuple((type(m), type(m).forward, getattr(type(m), entry, None)) for m in block.modules())
    plain = tuple(
        (path, name, str(value))
        for path, m in block.named_modules()
        for name, value in sorted(vars(m).items())
        if isinstance(value, (bool, int, float, str, tuple, list, type(None))) or callable(value)
    )
    return code, repr(block), plain, tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


def _compare(block: nn.Module, family: Family) -> str | None:
    with _neutral():
        torch.default_generator.manual_seed(0)  # the CPU's alone: others are not restored
        try:
            example = family.example(block)
            if example is None:
                return None
            twin = _random_copy(block).train()
        except Exception as error:  # whatever foreign attributes raise
            return f"it cannot be copied for the proof: {type(error).__name__}: {error}"
        original = type(twin)
        results = []
        for kind in (original, accelerated_class(original, type(family)("never"))):
            twin.__class__ = kind
            torch.default_generator.manual_seed(1)
            try:
                results.append(_run(twin, family.entry(original), example))
            except Exception as error:  # whatever foreign code raises on our example
                whose = "its own" if kind is original else "zeroblock's"
                return f"{whose} forward fails on the example of {family.name}: {type(error).__name__}: {error}"
    theirs, ours = results
    if [t.shape for t in theirs] != [t.shape for t in ours]:
        return f"its forward returns something else than {family.name}"
    for a, b in zip(theirs, ours, strict=True):
        # Everything is of size 1 here: what is a hundredth of that may be rounding alone (a norm cancels its bias).
        if not torch.isfinite(a).all() or (a - b).norm() > TOLERANCE * max(a.norm(), 0.01 * a.numel() ** 0.5):
            return f"its forward does not compute what {family.name} does"
    return None


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    """Random stream, gradients, autocast and defaults of dtype and device as the proof needs them, then as before; no
    plan is measured for sizes that do not come again."""
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(_mode.fixed_rule())
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _random_copy(block: nn.Module) -> nn.Module:
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
    if t.dim() > 1:
        fresh /= max(t[0].numel(), 1) ** 0.5
    elif name.endswith("weight"):
        fresh = 1 + 0.3 * fresh
    return nn.Parameter(fresh)


def _run(block: nn.Module, method: str, example: tuple) -> list[Tensor]:
    """The floating tensors the method returns, and the gradients of its floating inputs."""
    inputs = [t.clone().requires_grad_() if _is_floating(t) else t for t in example]
    with torch.enable_grad():
        # A non-leaf like in a model: blocks may write into their input's successors, never into the input.
        result = getattr(block, method)(*(t * 1 if _is_floating(t) else t for t in inputs))
        outputs = _tensors(result)
        loss = torch.zeros(())
        for t in outputs:
            loss = loss + (t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum()
        wanted = [t for t in inputs if _is_floating(t)]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return [*(t.detach() for t in outputs), *grads]


def _is_floating(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _tensors(result: Any) -> list[Tensor]:
    """The floating tensors of a result, in the order in which a tuple, dict or model output holds them."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    values = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return [t for value in values for t in _tensors(value)]
