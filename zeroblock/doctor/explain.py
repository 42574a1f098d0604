"""The explanation in words, for the model at hand, with its measured numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .diagnosis import Diagnosis, ParameterReport
    from .factors import Ranks

REFERENCES = (
    "Zhang, Dauphin & Ma 2019, Fixup Initialization (zero last layer of every residual branch)",
    "Nichol & Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models (zero_module)",
    "Peebles & Xie 2023, Scalable Diffusion Models with Transformers (adaLN-Zero)",
    "Bachlechner et al. 2021, ReZero is All You Need (zero gate)",
)
SHOWN = 4  # names in a list, paragraphs of a kind; the table has them all


def listed(names: Iterable[str], shown: int = SHOWN) -> str:
    """The first `shown` names, and how many are left: "a, b, c, d and 3 more"."""
    names = list(names)
    text = ", ".join(names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"


def rank_of(rank: tuple[int, int]) -> str:
    """(3, 16) -> "rank 3 of 16", where 16 is the most possible."""
    return f"rank {rank[0]} of {rank[1]}"


def first_motion(p: ParameterReport, steps: int) -> str:
    """The step that was measured: "in step 2", or "not in 4 steps"."""
    return f"not in {steps} steps" if p.measured is None else f"in step {p.measured}"


def explain(d: Diagnosis) -> list[str]:
    """Paragraphs: why zeros learn here, what waits for what, what never learns, and why."""
    paragraphs = []
    zeros = [p for p in d.parameters if p.is_zero and p.role in ("tail", "gate", "norm") and p.kind != "frozen"]
    tails = [p for p in zeros if p.measured is not None and p.kind != "symmetric"]
    if tails:
        paragraphs.append(_why_zeros_learn(tails))
    waiting = [p for p in tails if p.kind == "waits"]
    if waiting:
        paragraphs.append(_chain(d, waiting))
    dead = d.of_kind("dead")
    for group in _by_holder(dead)[:SHOWN]:
        paragraphs.append(_why_dead(group))
    if len(_by_holder(dead)) > SHOWN:
        paragraphs.append(
            f"{len(_by_holder(dead)) - SHOWN} more groups of parameters are dead; the table has them all."
        )
    symmetric = [p for p in d.of_kind("symmetric") if len(p.shape) > 1]
    for p in symmetric[:SHOWN]:
        paragraphs.append(_why_symmetric(p, d.steps))
    if d.of_kind("not seen"):
        unseen = listed(p.name for p in d.of_kind("not seen"))
        paragraphs.append(
            f"No gradient was seen in {d.steps} steps for {unseen}, although the "
            "structure allows one: the values of this batch and these weights stop it (a ReLU whose inputs are all "
            "negative, a saturated softmax). That is no proof that it never comes."
        )
    unused = d.of_kind("unused")
    if unused:
        paragraphs.append(_why_unused(unused))
    if d.expected_zero:
        paragraphs.append(_not_zero(d.expected_zero))
    if not zeros and not unused and d.healthy:
        paragraphs.append("No weight or gate is exactly zero: every parameter can learn from the first step.")
    return paragraphs


def _not_zero(expected: dict[str, str]) -> str:
    families = listed(dict.fromkeys(expected.values()))
    return (
        f"Zero by convention, but not here: {listed(expected)} (of {families}, where a fresh model has them at zero). "
        "That is right of a model that was trained. In a fresh one the zero initialisation was forgotten, or "
        "overwritten by one that came after it."
    )


def _factors(r: Ranks | None) -> str:
    if r is None or r.h is None or r.dy is None:
        return ""
    text = f"here h has {rank_of(r.h)} and dL/dy {rank_of(r.dy)}"
    return text + (f", and their product dL/dW has {rank_of(r.grad)}" if r.grad else "")


def _why_zeros_learn(tails: list[ParameterReport]) -> str:
    p = min(tails, key=lambda p: (p.measured or 0, p.role != "tail", -max(p.shape or [0])))
    if p.role == "tail":
        law = (
            f"{p.name} is zero and learns all the same. Of y = W h + b the gradient is dL/dW = dL/dy^T h: W itself is "
            "not in it. It needs a varied input h and a varied dL/dy"
        )
    else:
        law = (
            f"{p.name} is zero and learns all the same. Of y = x + g * f the gradient is dL/dg, the sum of dL/dy * f: "
            "g itself is not in it. It needs a branch output f (h below) that is not zero and a varied dL/dy"
        )
    found = _factors(p.ranks)
    shape = "its rows get different gradients, so that its units become different"
    if p.ranks and p.ranks.grad and p.ranks.grad[0] < 2:
        shape = "so it moves"
    end = f"; {found}: {shape}." if found else f": {shape}."
    return law + end + " What zero does stop, until then, is the gradient behind it: dL/dh = W^T dL/dy = 0."


def _chain(d: Diagnosis, waiting: list[ParameterReport]) -> str:
    first = next((p for p in waiting if p.holder), waiting[0])
    holders = ", ".join(f"{name} {_moved(d, name)}" for name in first.holder[:SHOWN])
    after = f", after {listed(first.holder)}, which held dL/dy (or h) at zero, has moved ({holders})"
    lines = [
        f"{len(waiting)} more zero weights or gates wait: {listed(p.name for p in waiting)}. "
        f"{first.name} gets its first gradient in step {first.measured}{after if holders else ''}."
    ]
    moved = [p.measured for p in d.parameters if p.measured is not None]
    lines.append(f"The last parameter to move does so in step {max(moved)}.")
    return " ".join(lines)


def _moved(d: Diagnosis, name: str) -> str:
    return next((first_motion(p, d.steps) for p in d.parameters if p.name == name), "")


def _by_holder(dead: list[ParameterReport]) -> list[list[ParameterReport]]:
    groups: dict[tuple[str, ...], list[ParameterReport]] = {}
    for p in dead:
        groups.setdefault(tuple(p.holder), []).append(p)
    return list(groups.values())


def _why_dead(group: list[ParameterReport]) -> str:
    p = next((p for p in group if p.ranks and p.ranks.h), group[0])
    one = len(group) == 1
    text = f"{listed(p.name for p in group)} never {'moves' if one else 'move'}"
    holder = [n for n in p.holder if n != p.name]
    if p.holder and not holder:
        zero = listed(p.holder)
        text += f": the output of {zero} is zero, and the activation behind it is flat there: no gradient passes"
    elif holder:
        its = "its gradient stays" if one else "their gradients stay"
        text += f": {its} zero until {listed(holder)} is not zero, which never happens"
    else:
        text += ": the structure of the model makes the gradient zero"
    r = p.ranks
    if r and r.h and r.dy:
        none = [name for name, x in (("h", r.h), ("dL/dy", r.dy)) if x[0] == 0]
        product = "dL/dW" if one else f"dL/dW of {p.name}"
        text += f"; of the two factors of {product}, h has {rank_of(r.h)} and dL/dy {rank_of(r.dy)}"
        if none:
            text += f": {' and '.join(none)} is zero in every step"
    if p.holder:
        return text + ". One zero factor is healthy, two hold each other at zero: give one of them another value."
    return text + f". {_NO_VALUE_HELPS}"


# Of parameters that the loss does not depend on, whatever the values of the others.
_NO_VALUE_HELPS = (
    "No initialisation changes that, since no value of a parameter does: freeze them with requires_grad_(False), leave "
    "them out of the model, or let something read them; DistributedDataParallel takes find_unused_parameters=True."
)


def _why_unused(unused: list[ParameterReport]) -> str:
    verb, it = ("is", "it") if len(unused) == 1 else ("are", "they")
    text = f"{listed(p.name for p in unused)} {verb} unused: the loss does not depend on {it if it == 'it' else 'them'}"
    zeros = sum(p.is_zero and not p.name.endswith("bias") for p in unused)
    if zeros:
        be = "is" if zeros == 1 else "are"
        text += f". {zeros} of them {be} exactly zero, as a gate or last layer of a branch that is never called"
    return f"{text}. {_NO_VALUE_HELPS}"


def _why_symmetric(p: ParameterReport, steps: int) -> str:
    text = f"The {p.shape[0]} units of {p.name} start identical and got identical gradients in all {steps} steps"
    if p.ranks and p.ranks.grad:
        text += f" (dL/dW has {rank_of(p.ranks.grad)}"
        if p.ranks.unit_differences:
            text += f", the differences between units {rank_of(p.ranks.unit_differences)} after them"
        text += ")"
    return text + ": they compute one number, and what reads them cannot tell them apart. Initialise them at random."
