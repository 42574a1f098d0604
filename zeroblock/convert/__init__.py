"""accelerate() and restore(): other people's blocks run by zeroblock, in place (families and their contract:
`family.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import _checks, zero
from ..backends import available as _backends
from ..backends.select import select
from ..blocks.layers import is_own, on_trial, sharded_weights_count
from . import proof
from .families import FAMILIES
from .family import Family, accelerated_class, applied
from .report import Branch, LeftAlone, Report

__all__ = ["Branch", "Family", "LeftAlone", "Report", "accelerate", "families", "restore"]

PRECISIONS = ("strict", "fast")


def families() -> dict[str, str]:
    """{name: what it computes, how it is used, what is skipped while zero} of every family accelerate knows."""
    return {name: inspect.cleandoc(family.__doc__ or "") for name, family in FAMILIES.items()}


def accelerate(
    model: nn.Module,
    *,
    zero_skip: str = "auto",
    backend: str = "auto",
    precision: str = "strict",
    strict: bool = False,
) -> Report:
    """Has zeroblock run the blocks of `model` that it knows, in place; returns what was done, printable as a table.

    Blocks are found by class name and structure. Each distinct implementation is verified once, on a copy with random
    parameters: a block that computes something else is left alone and reported. Parameters, their names and order,
    state_dict, hooks, isinstance relations, deepcopy and pickle (which writes the original class) stay as they are;
    only `type(block)` changes, to a subclass. zeroblock.nn's own modules need nothing and are not listed.

    Args:
        model: any module; blocks at every depth are found, the module itself included.
        zero_skip: "auto", "sync" or "never", as in zeroblock/zero.py.
        backend: "auto", or the one that runs the blocks' forwards.
        precision: "strict", the accuracy of eager, or "fast", which allows ways of reduced float32 precision in the
            blocks' forward and backward as torch.set_float32_matmul_precision("high") does everywhere (F(4x4) Winograd:
            relative error up to 2e-6 in the L2 norm, 7e-6 in the maximum norm).
        strict: raise when a block that looks like a known one is left alone, or none is found.

    Called again, the new options replace the old; `restore` undoes it. Accelerate before torch.compile. Before or after
    DDP, FSDP, optimizers and load_state_dict does not matter.

    Raises:
        TypeError, ValueError: wrong arguments.
        RuntimeError: a compiled model; strict, and something was left alone (the model is unchanged); backend="cpu",
            and its kernels cannot run here.

    >>> print(zb.accelerate(unet))  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    _checks.choice("accelerate", "zero_skip", zero_skip, zero.POLICIES)
    _checks.choice("accelerate", "backend", backend, ("auto", *_backends.BACKENDS))
    _checks.choice("accelerate", "precision", precision, PRECISIONS)
    if backend == "cpu" and _backends.CPU_MISSING is not None:
        raise RuntimeError(f"accelerate: the cpu backend cannot run: {_backends.CPU_MISSING}")
    _refuse_compiled("accelerate", model)
    before = [(m, type(m)) for m in model.modules() if applied(m) is not None and _is_ours(m)]
    restore(model)
    try:
        with sharded_weights_count():
            found, left_alone = _search(model, [family(zero_skip, backend, precision) for family in _in_order()])
        if strict and (left_alone or not found):
            rest = "\n".join(f"  {b.path} ({b.block}): {b.reason}" for b in left_alone) or "  no block is known"
            raise RuntimeError(f"accelerate: strict, and not everything could be accelerated:\n{rest}")
    except BaseException:
        for m, kind in before:
            m.__class__ = kind
        raise
    rows = [row for path, block, family in found for row in _rows(path, block, family)]
    for _, block, family in found:
        block.__class__ = accelerated_class(type(block), family)
    return Report(tuple(rows), tuple(left_alone), len(found))


def restore(model: nn.Module) -> int:
    """Gives every block of `model` its own class back, parameters as they are now; returns how many blocks there were.

    Raises RuntimeError when the model is compiled, or a block's class was extended after accelerate (fully_shard).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be an nn.Module, got {type(model).__name__}")
    _refuse_compiled("restore", model)
    blocks = [(path, m, was) for path, m in model.named_modules() if (was := applied(m)) is not None]
    for path, m, _ in blocks:
        if not _is_ours(m):
            raise RuntimeError(
                f"restore: the class of {path or 'the model'} became {type(m).__name__} after accelerate"
            )
    for _, m, was in blocks:
        m.__class__ = was.original
    return len(blocks)


def _in_order() -> list[type[Family]]:
    """The families as they are asked: those of whole blocks before those of their parts."""
    return sorted(FAMILIES.values(), key=lambda family: family.inner)


def _is_ours(block: nn.Module) -> bool:
    """The class is the one accelerate gave it, not one derived of it since."""
    return "_zeroblock" in vars(type(block))


def _refuse_compiled(what: str, model: nn.Module) -> None:
    advice = f"call {what} on the original model, then torch.compile it (again)"
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{what}: called inside a function that is being compiled; {advice}")
    for path, m in model.named_modules():
        if type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None:
            raise RuntimeError(f"{what}: {path or 'the model'} is compiled, and its code would stay as it is; {advice}")


def _search(model: nn.Module, known: list[Family]) -> tuple[list[tuple[str, nn.Module, Family]], list[LeftAlone]]:
    found: list[tuple[str, nn.Module, Family]] = []
    left_alone: list[LeftAlone] = []
    taken: set[nn.Module] = set()  # what belongs to a block that was found already
    for path, block in model.named_modules():
        if is_own(block):
            taken.update(block.modules())
            continue
        reasons: list[str] = []
        for family in known:
            if block in taken and family.inner or not family.knows(block):
                continue
            reason = _obstacle(block, path, model, family)
            if reason is None:
                found.append((path, block, family))
                taken.update(family.inner_modules(block))
                reasons = []
                break
            reasons.append(reason)
        if reasons:
            left_alone.append(LeftAlone(path, type(block).__name__, "; ".join(dict.fromkeys(reasons))))
    return found, left_alone


def _obstacle(block: nn.Module, path: str, model: nn.Module, family: Family) -> str | None:
    """Why the family cannot have the block; None when it can."""
    if isinstance(block, torch.jit.ScriptModule):
        return "it is a ScriptModule"
    if applied(block) is not None:
        return f"its class became {type(block).__name__} after accelerate"
    with on_trial() as keep:
        reason = _why_not(block, path, model, family)
        if reason is None:
            keep()
    return reason


def _why_not(block: nn.Module, path: str, model: nn.Module, family: Family) -> str | None:
    try:
        reason = family.match(block, path, model)
    except Exception as error:  # foreign attributes can be anything
        reason = f"its attributes are not those of {family.name}: {type(error).__name__}: {error}"
    if reason is not None:
        return reason
    if vars(block).keys() & {"forward", family.method, "_hf_hook"}:
        return f"its {family.method} is replaced on the instance (an offloading or casting hook)"
    try:
        accelerated_class(type(block), family)
    except TypeError as error:
        return f"its class cannot be extended: {error}"
    return proof.disagreement(family.proof_target(block), family)


def _rows(path: str, block: nn.Module, family: Family) -> Iterator[Branch]:
    for name, tensors in family.branches(block).items():
        chosen = select("group_norm_silu", tensors[0]).name if family.backend == "auto" else family.backend
        backend = family.dense_backend or chosen
        yield Branch(".".join(filter(None, (path, name))), family.name, _zero_now(tensors), backend)


def _zero_now(tensors: tuple[Tensor, ...]) -> bool | None:
    """Whether all of them are zero; None where one cannot be judged."""
    return all(map(zero.is_exactly_zero, tensors)) if all(map(zero.may_test, tensors)) else None
