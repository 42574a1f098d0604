"""accelerate() and restore(): other people's blocks run by zeroblock, in place (families and their contract:
`family.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _checks, zero
from .._dtypes import FLOATING
from ..backends import available as _backends
from ..backends.select import select
from ..blocks.decision import is_watched
from ..blocks.layers import is_distributed, is_own, is_whole, on_trial, sharded_weights_count
from . import proof, residual
from .families import known
from .families.described import GatedBlock, GatedBranch, family_of
from .family import Family, accelerated_class, applied, register
from .report import Branch, LeftAlone, Obstacle, Reason, Report

__all__ = [
    "Branch",
    "Family",
    "GatedBlock",
    "GatedBranch",
    "LeftAlone",
    "Reason",
    "Report",
    "accelerate",
    "families",
    "register_family",
    "restore",
]

PRECISIONS = ("strict", "fast")


def families() -> dict[str, str]:
    """{name: what it computes, how it is used, what is skipped while zero} of every family accelerate knows."""
    return {name: inspect.cleandoc(family.__doc__ or "") for name, family in known().items()}


def register_family(family: GatedBlock | type[Family]) -> type[Family]:
    """Has accelerate know another kind of block from now on: a fork of your own, or a block that has no family yet.

    family: a description (`zeroblock.convert.GatedBlock`: rows of a modulation, and gated branches that use them), or a
        subclass of `zeroblock.convert.Family` with methods of its own. It replaces a family that was registered under
        the same name before; those that zeroblock comes with stay.

    accelerate proves it on every block like its own families: where it computes something else than the block, the
    block is left alone, and the report says so.

    Raises:
        TypeError: something else was given, or the name is that of one of zeroblock's own families.

    >>> zb.register_family(
    ...     zb.convert.GatedBlock(
    ...         "MyBlock",
    ...         branches=(
    ...             zb.convert.GatedBranch("attn", norm="norm1", shift=0, scale=1, gate=2),
    ...             zb.convert.GatedBranch("mlp", norm="norm2", shift=3, scale=4, gate=5),
    ...         ),
    ...         rows=lambda block, c: block.adaLN(c).chunk(6, dim=-1),
    ...         example=lambda block, side: (torch.randn(2, side**2, block.dim), torch.randn(2, block.dim)),
    ...     )
    ... )  # doctest: +SKIP
    """
    kind = family_of(family) if isinstance(family, GatedBlock) else family
    if not (isinstance(kind, type) and issubclass(kind, Family)):
        raise TypeError(f"register_family: family must be a GatedBlock or a subclass of Family, got {family!r}")
    if kind.name in known() and kind.name not in _added:
        raise TypeError(f"register_family: {kind.name} is a family of zeroblock's own; give it another name")
    known().pop(kind.name, None)
    _added.add(kind.name)
    return register(kind)


# Names of the families that register_family was given.
_added: set[str] = set()


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
    parameters: a block that computes something else is left alone. Every residual block that is left alone, or of which
    only parts are taken, is a row of the report, with the reason (`Reason`) and what can be done. Parameters, their
    names and order, state_dict, hooks, isinstance relations, deepcopy and pickle (which writes the original class) stay
    as they are; only `type(block)` changes, to a subclass. zeroblock.nn's own modules need nothing and are not listed.

    Args:
        model: any module; blocks at every depth are found, the module itself included.
        zero_skip: "auto", "sync" or "never", as in zeroblock/zero.py.
        backend: "auto", or the one that runs the blocks' forwards.
        precision: "strict", the accuracy of eager, or "fast", which allows ways of reduced float32 precision in the
            blocks' forward and backward as torch.set_float32_matmul_precision("high") does everywhere (F(4x4) Winograd:
            relative error up to 2e-6 in the L2 norm, 7e-6 in the maximum norm).
        strict: raise when a residual block is left alone, or of one only parts are taken, or none is found.

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
        with sharded_weights_count(model):
            found, left_alone = _search(model, [family(zero_skip, backend, precision) for family in _in_order()])
        if strict and (left_alone or not found):
            rest = "\n".join(f"  {b.path} ({b.block}): {b.reason}" for b in left_alone) or "  no block is known"
            raise RuntimeError(f"accelerate: strict, and not everything could be accelerated:\n{rest}")
    except BaseException:
        for m, kind in before:
            m.__class__ = kind
        raise
    rows = [row for path, block, family, _ in found for row in _rows(path, block, family)]
    for _, block, family, options in found:
        block.__class__ = accelerated_class(type(block), family, options)
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
    return sorted(known().values(), key=lambda family: family.inner)


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


class _Found(NamedTuple):
    path: str
    block: nn.Module
    family: Family
    options: frozenset[str] | None  # see proof.Verdict


def _search(model: nn.Module, known: list[Family]) -> tuple[list[_Found], list[LeftAlone]]:
    found: list[_Found] = []
    obstacles: dict[nn.Module, Obstacle] = {}
    blocks: set[nn.Module] = set()  # that families know, no parts of blocks
    taken: set[nn.Module] = set()  # what belongs to a block that was found already
    for path, block in model.named_modules():
        if is_own(block):
            taken.update(block.modules())
            continue
        for family in known:
            if block in taken and family.inner or not family.knows(block):
                continue
            verdict = _verdict(block, path, model, family)
            if verdict.obstacle is None:
                found.append(_Found(path, block, family, verdict.options))
                taken.update(family.inner_modules(block))
                obstacles.pop(block, None)
                if not family.inner and family.branches(block):
                    blocks.add(block)
                break
            # Another part of a block by the name of a known one (Attention) is no block that was left alone.
            if not family.inner:
                blocks.add(block)
            elif verdict.obstacle.reason is Reason.NAMESAKE:
                continue
            # Families share names of classes: the one that has the block's structure knows more.
            first = obstacles.setdefault(block, verdict.obstacle)
            if first.reason is Reason.NAMESAKE and verdict.obstacle.reason is not Reason.NAMESAKE:
                obstacles[block] = verdict.obstacle
    names = {f.block: f.family.name for f in found}
    for block in residual.blocks_beside(model, blocks, taken):
        parts = sorted({names[m] for m in block.modules() if m in names})
        said = f"no family knows it, but parts of it: {', '.join(parts)}" if parts else "no family knows it"
        obstacles[block] = Obstacle(Reason.PARTS if parts else Reason.UNKNOWN, said)
    rows = [(path, block, obstacles[block]) for path, block in model.named_modules() if block in obstacles]
    return found, [LeftAlone(path, type(block).__name__, o.found, o.reason) for path, block, o in rows]


def _verdict(block: nn.Module, path: str, model: nn.Module, family: Family) -> proof.Verdict:
    """Whether the family can have the block."""
    if isinstance(block, torch.jit.ScriptModule):
        return proof.Verdict(Obstacle(Reason.CLASS, "it is a ScriptModule"))
    if applied(block) is not None:
        return proof.Verdict(Obstacle(Reason.CLASS, f"its class became {type(block).__name__} after accelerate"))
    with on_trial() as keep:
        verdict = _tried(block, path, model, family)
        if verdict.obstacle is None:
            keep()
    return verdict


def _tried(block: nn.Module, path: str, model: nn.Module, family: Family) -> proof.Verdict:
    entry = family.entry(type(block))
    try:
        obstacle = family.match(block, path, model)
    except Exception as error:  # foreign attributes can be anything
        said = f"its attributes are not those of {family.name}: {type(error).__name__}: {error}"
        obstacle = Obstacle(Reason.NAMESAKE, said)
    if obstacle is not None:
        state = _state(block) if obstacle.reason is Reason.LAYERS else None
        return proof.Verdict(state or obstacle)
    if vars(block).keys() & {"forward", entry, "_hf_hook"}:
        said = f"its {entry} is replaced on the instance (an offloading or casting hook)"
        return proof.Verdict(Obstacle(Reason.WATCHED, said))
    try:
        accelerated_class(type(block), family)
    except TypeError as error:
        return proof.Verdict(Obstacle(Reason.CLASS, f"its class cannot be extended: {error}"))
    verdict = proof.verdict(family.proof_target(block), family)
    state = None if verdict.obstacle is None else _state(block)
    return verdict if state is None else proof.Verdict(state)


def _state(block: nn.Module) -> Obstacle | None:
    """What may keep a family from having the block that is not of its kind but of its modules' state now."""
    for path, t in block.named_parameters():
        if is_distributed(t):
            return Obstacle(Reason.DISTRIBUTED, f"its {path} is a DTensor when it is called")
        if t.dtype not in FLOATING:
            return Obstacle(Reason.STORAGE, f"its {path} is stored as {t.dtype}")
        if type(t.data) is not Tensor and not is_whole(t):
            return Obstacle(Reason.STORAGE, f"its {path} is a {type(t.data).__name__}")
    for path, m in block.named_modules():
        if is_watched(m) and m is not block:
            return Obstacle(Reason.WATCHED, f"its {path} has hooks, or a forward replaced on the instance")
        if parametrize.is_parametrized(m):
            return Obstacle(Reason.LAYERS, f"its {path or 'own weight'} is parametrised")
    return None


def _rows(path: str, block: nn.Module, family: Family) -> Iterator[Branch]:
    for name, tensors in family.branches(block).items():
        chosen = select("group_norm_silu", tensors[0]).name if family.backend == "auto" else family.backend
        backend, fused = ("eager", False) if family.only_skips else (chosen, True)
        yield Branch(".".join(filter(None, (path, name))), family.name, _zero_now(tensors), backend, fused)


def _zero_now(tensors: tuple[Tensor, ...]) -> bool | None:
    """Whether all of them are zero; None where one cannot be judged."""
    return all(map(zero.is_exactly_zero, tensors)) if all(map(zero.may_test, tensors)) else None
