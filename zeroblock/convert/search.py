"""Which blocks of a model each family can have, and why it can have no others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._dtypes import FLOATING
from ..blocks.decision import is_watched
from ..blocks.layers import is_distributed, is_own, is_whole, on_trial
from . import families, proof, residual
from .accelerated import accelerated_class, applied
from .family import Family
from .report import LeftAlone, Obstacle, Reason


class Found(NamedTuple):
    path: str
    block: nn.Module
    family: Family
    options: frozenset[str] | None  # see proof.Verdict


def search(model: nn.Module, known: list[Family]) -> tuple[list[Found], list[LeftAlone]]:
    found: list[Found] = []
    obstacles: dict[nn.Module, Obstacle] = {}
    closest: dict[nn.Module, tuple[bool, bool]] = {}
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
                found.append(Found(path, block, family, verdict.options))
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
            if block not in obstacles or _closeness(verdict) > closest[block]:
                obstacles[block], closest[block] = verdict.obstacle, _closeness(verdict)
    names = {f.block: f.family.name for f in found}
    for block in residual.blocks_beside(model, blocks, taken):
        parts = sorted({names[m] for m in block.modules() if m in names})
        said = f"no family knows it, but parts of it: {', '.join(parts)}" if parts else "no family knows it"
        obstacles[block] = Obstacle(Reason.PARTS if parts else Reason.UNKNOWN, said)
    rows = [(path, block, obstacles[block]) for path, block in model.named_modules() if block in obstacles]
    return found, [LeftAlone(path, type(block).__name__, o.found, o.reason) for path, block, o in rows]


def _closeness(verdict: proof.Verdict) -> tuple[bool, bool]:
    """Of an obstacle: how much of the family the block has."""
    assert verdict.obstacle is not None
    return verdict.obstacle.reason is not Reason.NAMESAKE, verdict.tried


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
    if family.rounding == "eager" and not (family.eager_rounding or family.only_skips):
        return proof.Verdict(Obstacle(Reason.ROUNDING, f"the forward of {family.name} rounds once"))
    try:
        accelerated_class(type(block), family)
    except TypeError as error:
        return proof.Verdict(Obstacle(Reason.CLASS, f"its class cannot be extended: {error}"))
    verdict = proof.verdict(family.proof_target(block), family)
    state = None if verdict.obstacle is None else _state(block)
    return verdict._replace(tried=True) if state is None else proof.Verdict(state)


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


def in_order() -> list[type[Family]]:
    """The families as they are asked: those of whole blocks before those of their parts."""
    return sorted(families.known().values(), key=lambda family: family.inner)
