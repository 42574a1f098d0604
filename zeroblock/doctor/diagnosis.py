"""The diagnosis: what prediction and measurement together say of each parameter, and of the whole model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .conventions import expected_zero
from .factors import Ranks
from .html import page
from .kinds import ALARMS, NEAR_ZERO, UNUSED, finite
from .measure import Measurement, identical_units, is_zero
from .savings import Savings
from .text import render
from .zeros import Prediction


@dataclass
class ParameterReport:
    """What was found about one parameter."""

    name: str
    shape: list[int]
    kind: str  # a key of kinds.KINDS
    role: str  # "tail", "gate", "norm", "bias" or "other": see factors.roles
    is_zero: bool  # exactly, before the first step
    max_abs: float  # of its elements, before the first step
    predicted: int | None  # the step of its first non-zero gradient; None: never (where `proved`), or not predicted
    measured: int | None  # the same, seen in the steps taken; None: in none of them
    proved: bool  # the prediction is "never"
    agrees: bool  # prediction and measurement do not contradict each other
    waits_for: list[list[str]] = field(default_factory=list)  # step by step: the parameters that keep its gradient zero
    ranks: Ranks | None = None

    @property
    def holder(self) -> list[str]:
        """The parameters it waits for last, just before it moves."""
        return self.waits_for[-1] if self.waits_for else []


@dataclass
class Diagnosis:
    """The result of `zeroblock.doctor`; str() is the report for a terminal."""

    model: str  # its class
    steps: int  # SGD steps taken
    losses: list[float]  # one for each step
    parameters: list[ParameterReport]  # in the model's order
    predicted_steps: int | None  # after so many steps nothing more moves; None: no prediction
    near_zero: list[ParameterReport] = field(default_factory=list)  # close to zero, but not zero
    savings: Savings | None = None  # what the fast path leaves out now
    # Not zero, though a fresh model of its family has it at zero: {name: "class, whose code"} (conventions.py).
    expected_zero: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)  # what is wrong with the diagnosis itself, in sentences
    explanation: list[str] = field(default_factory=list)  # in paragraphs, with the measured numbers

    def of_kind(self, *kinds: str) -> list[ParameterReport]:
        """The parameters of these kinds (keys of kinds.KINDS)."""
        return [p for p in self.parameters if p.kind in kinds]

    def __getitem__(self, name: str) -> ParameterReport:
        """The report of the parameter of this name. Raises KeyError if there is none."""
        for p in self.parameters:
            if p.name == name:
                return p
        raise KeyError(name)

    @property
    def mismatches(self) -> list[ParameterReport]:
        """Parameters whose prediction the steps contradict."""
        return [p for p in self.parameters if not p.agrees]

    @property
    def healthy(self) -> bool:
        """No parameter is dead or symmetric."""
        return not self.of_kind(*ALARMS)

    @property
    def exit_status(self) -> int:
        """Of `python -m zeroblock doctor`: 0 healthy, 1 not."""
        return 0 if self.healthy else 1

    @property
    def verdict(self) -> str:
        """One sentence about the whole model."""
        alarms, unused = len(self.of_kind(*ALARMS)), len(self.of_kind(UNUSED))
        if alarms:
            return f"{alarms} parameters are dead or symmetric"
        if unused:
            return f"nothing is dead or symmetric, but {unused} parameters are unused"
        return "healthy: nothing is dead or symmetric"

    def to_dict(self) -> dict[str, Any]:
        """Everything found, in plain containers, for programs. Every key is there for every model.

        - schema: 1; a key that changes its meaning gets another number. New keys may come.
        - healthy: bool, what decides the exit status.
        - alarms, unused, not_seen, mismatches: the names of the parameters that never learn, that the loss does not
          depend on, that got no gradient in the steps without a proof that they never do, and whose prediction the
          steps contradict; all lists are empty for a model without fault.
        - model: str; steps: int; losses: [float], NaN or infinite where they were; predicted_steps: int or None.
        - parameters: [{name, shape, kind, role, is_zero, max_abs, predicted, measured, proved, agrees, waits_for,
          ranks}] in the model's order, as in `ParameterReport`: predicted and measured are steps, counted from 1, or
          None; waits_for: [[name]]; ranks: None or {h, dy, grad, unit_differences}, each None or [rank, most].
        - near_zero: the same of those that are close to zero.
        - expected_zero: {name: "class, whose code"} of those that its family's code starts at zero and that are not.
        - savings: None or {branches: [{parameters, by, flops, steps}], inference_flops, inference_saved,
          training_flops, training_saved, activation_bytes, activation_saved}.
        - findings, explanation: sentences for people, which may be worded otherwise in another version.
        """
        return {
            "schema": 1,
            "healthy": self.healthy,
            "alarms": [p.name for p in self.of_kind(*ALARMS)],
            "unused": [p.name for p in self.of_kind(UNUSED)],
            "not_seen": [p.name for p in self.of_kind("not seen")],
            "mismatches": [p.name for p in self.mismatches],
            **dataclasses.asdict(self),
        }

    def to_json(self) -> str:
        """The same as JSON, NaN and infinities as strings."""
        return json.dumps(finite(self.to_dict()), indent=1, allow_nan=False)

    def to_html(self) -> str:
        """One self-contained page: timeline, table and explanation."""
        return page(self)

    def __str__(self) -> str:
        return render(self, color=False)


@dataclass
class Initial:
    """What the parameters are before the first step, by name."""

    zero: dict[str, bool]  # all elements are zero
    constant: dict[str, bool]  # zero, or all elements the same, or all units the same
    max_abs: dict[str, float]

    @classmethod
    def of(cls, model: nn.Module) -> Initial:
        named = dict(model.named_parameters())
        zero = dict(zip(named, is_zero(list(named.values())), strict=True))
        constant = {name: zero[name] or _is_constant(p) for name, p in named.items()}
        max_abs = {name: 0.0 if zero[name] else _max_abs(p) for name, p in named.items()}
        return cls(zero, constant, max_abs)


@torch.no_grad()
def _is_constant(p: Tensor) -> bool:
    """All elements the same, or all units the same."""
    if p.numel() == 0 or p.is_meta:
        return False
    return identical_units(p) or (p.numel() > 1 and bool((p == p.flatten()[0]).all())) or p.numel() == 1


@torch.no_grad()
def _max_abs(p: Tensor) -> float:
    if p.numel() == 0 or p.is_meta:
        return 0.0
    low, high = p.aminmax()
    return max(abs(float(low)), abs(float(high)))


def diagnose(
    model: nn.Module,
    initial: Initial,
    roles: dict[str, str],
    prediction: Prediction | None,
    measured: Measurement,
    savings: Savings | None,
    by_chance: set[str],
) -> Diagnosis:
    """Prediction and measurement of every parameter put together.

    by_chance: parameters that a random mask may keep from moving in a step (dropout, stochastic depth).
    """
    reports = []
    for name, p in model.named_parameters():
        predicted = prediction.first.get(name) if prediction else None
        known = prediction is not None and name in prediction.first
        seen = measured.first.get(name)
        kind = _kind(name, p, initial, roles, known, predicted, measured)
        waits = prediction.waits_for.get(name, []) if prediction else []
        reports.append(
            ParameterReport(
                name=name,
                shape=list(p.shape),
                kind=kind,
                role=roles.get(name, "other"),
                is_zero=initial.zero[name],
                max_abs=initial.max_abs[name],
                predicted=predicted,
                measured=seen,
                proved=known and predicted is None,
                agrees=not known or _agrees(predicted, seen, measured.steps, name in by_chance),
                waits_for=[sorted(b) for b in waits],
                ranks=measured.ranks.get(name),
            )
        )
    _keep_symmetric_with_a_matrix(reports)
    near = [r for r in reports if 0 < r.max_abs < NEAR_ZERO]
    result = Diagnosis(
        type(model).__name__,
        measured.steps,
        measured.losses,
        reports,
        prediction.steps if prediction else None,
        near,
        savings,
        expected_zero(model, initial.zero),
    )
    result.findings = _findings(result)
    return result


def _agrees(predicted: int | None, seen: int | None, steps: int, by_chance: bool) -> bool:
    if predicted is None or predicted > steps:
        return seen is None
    return seen == predicted or (by_chance and (seen is None or seen > predicted))


def _kind(
    name: str,
    p: nn.Parameter,
    initial: Initial,
    roles: dict[str, str],
    known: bool,
    predicted: int | None,
    measured: Measurement,
) -> str:
    constant, seen = initial.constant[name], measured.first.get(name)
    if not p.requires_grad:
        return "frozen" if constant and p.numel() > 1 else "free"
    if name not in measured.arrived:
        return UNUSED
    if seen is None:
        if known and predicted is None:
            return "dead"
        return "waits" if known and predicted is not None and predicted > measured.steps else "not seen"
    if name in measured.identical:
        return "symmetric"
    if not constant:
        return "free"
    role = roles.get(name)
    if initial.zero[name] and role in ("tail", "gate", "norm") and seen == 1:
        return "zero tail" if role == "tail" else "zero gate"
    return "waits" if seen > 1 else "constant"


def _keep_symmetric_with_a_matrix(reports: list[ParameterReport]) -> None:
    """A vector whose elements move alike is a finding only beside a matrix whose rows do: biases may well do so."""
    if not any(r.kind == "symmetric" and len(r.shape) > 1 for r in reports):
        for r in reports:
            if r.kind == "symmetric":
                r.kind = "constant" if r.measured == 1 else "waits"


def _findings(d: Diagnosis) -> list[str]:
    found = []
    for r in d.mismatches:
        expected = "never" if r.predicted is None else f"in step {r.predicted}"
        got = f"not seen in {d.steps} steps" if r.measured is None else f"in step {r.measured}"
        found.append(f"MISMATCH {r.name}: first motion predicted {expected}, measured {got}")
    if any(not torch.tensor(loss).isfinite() for loss in d.losses):
        found.append(f"the loss is not finite ({d.losses}): the steps prove nothing; try a smaller lr")
    if d.predicted_steps is None:
        found.append("no prediction: the step could not be taped")
    return found
