"""accelerate() and restore(): other people's blocks run by zeroblock, in place (families and their contract:
`family.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import _checks, zero
from ..backends import available as _backends
from ..backends.select import select
from ..blocks.layers import sharded_weights_count
from .accelerated import accelerated_class, applied
from .choice import PREFERENCES
from .families import known
from .families.description import GatedBlock, GatedBranch, Given, Row
from .family import Family, register
from .report import Branch, LeftAlone, Reason, Report
from .search import Found, in_order, search

__all__ = [
    "Branch",
    "Family",
    "GatedBlock",
    "GatedBranch",
    "Given",
    "LeftAlone",
    "Reason",
    "Report",
    "Row",
    "accelerate",
    "coverage",
    "families",
    "register_family",
    "restore",
]

PRECISIONS = ("strict", "fast")
ROUNDINGS = ("once", "eager")


class Pipeline(Protocol):
    """What diffusers' pipelines have: their models are among the components."""

    @property
    def components(self) -> dict[str, Any]: ...


def families() -> dict[str, str]:
    """{name: what it computes, how it is used, what is skipped while zero} of every family accelerate knows."""
    return {name: inspect.cleandoc(family.__doc__ or "") for name, family in known().items()}


def register_family(family: GatedBlock | type[Family]) -> type[Family]:
    """Has accelerate know another kind of block from now on: a fork of your own, or a block that has no family yet.

    Args:
        family: a description (`zeroblock.convert.GatedBlock`: rows of a modulation, and gated branches that use them),
            or a subclass of `zeroblock.convert.Family` with methods of its own. It replaces a family that was
            registered under the same name before; those that zeroblock comes with stay.

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
    from .families.described import family_of  # with what all of them compute with: read when first needed

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
    model: nn.Module | Pipeline,
    *,
    zero_skip: str = "auto",
    backend: str = "auto",
    precision: str = "strict",
    strict: bool = False,
    prefer: str = "memory",
    rounding: str = "once",
) -> Report:
    """Has zeroblock run the blocks of `model` that it knows, in place; returns what was done, printable as a table.

    Blocks are found by class name and structure. Each distinct implementation is verified once, on a copy with random
    parameters: a block that computes something else is left alone. Every residual block that is left alone, or of which
    only parts are taken, is a row of the report, with the reason (`Reason`) and what can be done. Parameters, their
    names and order, state_dict, hooks, isinstance relations, deepcopy and pickle (which writes the original class) stay
    as they are; only `type(block)` changes, to a subclass. zeroblock.nn's own modules need nothing and are not listed.

    Args:
        model: any module; blocks at every depth are found, the module itself included. Or a pipeline of diffusers, of
            which every model is meant; their paths in the report begin with the component's name.
        zero_skip: "auto", "sync" or "never", as in zeroblock/zero.py.
        backend: "auto", or the one that runs the blocks' forwards.
        precision: "strict", the accuracy of eager, or "fast", which allows ways of reduced float32 precision in the
            blocks' forward and backward as torch.set_float32_matmul_precision("high") does everywhere (F(4x4) Winograd:
            relative error up to 2e-6 in the L2 norm, 7e-6 in the maximum norm).
        prefer: what a training step on a CPU is to have less of where both cannot be had: "memory" runs zeroblock's
            forwards, which keep less for backward; "speed" a block's own where that is measured faster, as inference
            does in any case, and training of tiny blocks. `zeroblock.explain(block, *args)` shows the choice.
        rounding: "once", or "eager", for images that must stay what they were to the bit: norms, modulations, gates and
            residual sums are PyTorch's operators, one after another, with their roundings, and a block is proved to
            give its own bits in bfloat16. Branches are skipped while they are zero as ever. Blocks whose forward only
            rounds once (ResBlocks of U-Nets and autoencoders) are left alone.
        strict: raise when a residual block is left alone, or of one only parts are taken, or none is found.

    Called again, the new options replace the old; `restore` undoes it. Accelerate before torch.compile. Before or after
    DDP, FSDP, optimizers and load_state_dict does not matter.

    Raises:
        TypeError, ValueError: wrong arguments.
        RuntimeError: a compiled model; strict, and something was left alone (the model is unchanged); backend="cpu",
            and its kernels cannot run here.

    >>> print(zb.accelerate(unet))  # doctest: +SKIP
    """
    model = _as_module("accelerate", model)
    _checks.choice("accelerate", "zero_skip", zero_skip, zero.POLICIES)
    _checks.choice("accelerate", "backend", backend, ("auto", *_backends.BACKENDS))
    _checks.choice("accelerate", "precision", precision, PRECISIONS)
    _checks.choice("accelerate", "prefer", prefer, PREFERENCES)
    _checks.choice("accelerate", "rounding", rounding, ROUNDINGS)
    if backend == "cpu" and _backends.CPU_MISSING is not None:
        raise RuntimeError(f"accelerate: the cpu backend cannot run: {_backends.CPU_MISSING}")
    _refuse_compiled("accelerate", model)
    before = [(m, type(m)) for m in model.modules() if applied(m) is not None and _is_ours(m)]
    restore(model)
    try:
        with sharded_weights_count(model):
            found, left_alone = search(model, [f(zero_skip, backend, precision, prefer, rounding) for f in in_order()])
        if strict and (left_alone or not found):
            rest = "\n".join(f"  {b.path} ({b.block}): {b.reason}" for b in left_alone) or "  no block is known"
            raise RuntimeError(f"accelerate: strict, and not everything could be accelerated:\n{rest}")
    except BaseException:
        for m, kind in before:
            m.__class__ = kind
        raise
    report = _report(found, left_alone)
    for _, block, family, options in found:
        block.__class__ = accelerated_class(type(block), family, options)
    return report


def coverage(model: nn.Module | Pipeline) -> Report:
    """What `accelerate(model)` would do, and why it would leave blocks alone; nothing is changed.

    Args:
        model: any module, or pipeline of diffusers, that is not accelerated (`restore` first) and not compiled.

    Returns the report that accelerate would return: print it, or read `branches`, `left_alone` and `blocks`.
    Raises TypeError when model is neither, RuntimeError when it is accelerated or compiled.

    >>> print(zb.coverage(transformer))  # doctest: +SKIP
    """
    model = _as_module("coverage", model)
    _refuse_compiled("coverage", model)
    for path, m in model.named_modules():
        if applied(m) is not None:
            raise RuntimeError(f"coverage: {path or 'the model'} is accelerated already; call restore first")
    with sharded_weights_count(model):
        return _report(*search(model, [family() for family in in_order()]))


def _report(found: list[Found], left_alone: list[LeftAlone]) -> Report:
    rows = [row for path, block, family, _ in found for row in _rows(path, block, family)]
    skipped = sum(family.only_skips for _, _, family, _ in found)
    fused = sum(not family.only_skips and bool(family.branches(block)) for _, block, family, _ in found)
    return Report(tuple(rows), tuple(left_alone), len(found), fused, skipped)


def restore(model: nn.Module | Pipeline) -> int:
    """Gives every block of `model` its own class back, parameters as they are now; returns how many blocks there were.

    Raises RuntimeError when the model is compiled, or a block's class was extended after accelerate (fully_shard).
    """
    model = _as_module("restore", model)
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


def _as_module(what: str, model: nn.Module | Pipeline) -> nn.Module:
    """The model, or a pipeline's models under the names of its components."""
    if isinstance(model, nn.Module):
        return model
    components = getattr(model, "components", None)
    models = components.items() if isinstance(components, dict) else ()
    named = {name: m for name, m in models if isinstance(m, nn.Module)}
    if not named:
        raise TypeError(
            f"{what}: model must be an nn.Module, or a pipeline with modules among its components, got "
            f"{type(model).__name__}"
        )
    return nn.ModuleDict(named)


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


def _rows(path: str, block: nn.Module, family: Family) -> Iterator[Branch]:
    for name, tensors in family.branches(block).items():
        chosen = select("group_norm_silu", tensors[0]).name if family.backend == "auto" else family.backend
        backend, fused = ("eager", False) if family.only_skips else (chosen, True)
        yield Branch(".".join(filter(None, (path, name))), family.name, _zero_now(tensors), backend, fused)


def _zero_now(tensors: tuple[Tensor, ...]) -> bool | None:
    """Whether all of them are zero; None where one cannot be judged."""
    return all(map(zero.is_exactly_zero, tensors)) if all(map(zero.may_test, tensors)) else None
