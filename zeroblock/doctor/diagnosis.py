"""What the doctor says: one record for each parameter, and the whole."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .factors import Ranks
from .measure import Measurement, identical_units, is_zero
from .savings import Savings
from .zeros import Prediction

# What a parameter is found to be, with the words for it. Those in ALARMS never learn.
KINDS = {
    "zero tail": "zero, and learns from the first step: its input and dL/dy are both varied",
    "zero gate": "zero, multiplies a branch, and learns from the first step",
    "waits": "zero or constant, and cannot move until another parameter has moved",
    "dead": "never moves: its gradient is zero whatever the others do",
    "symmetric": "its units are identical and get identical gradients: they act as one",
    "constant": "constant but asymmetric: its units get different gradients",
    "not seen": "no gradient was seen, and no proof was found that there is none",
    "unused": "no gradient reaches it: the loss does not depend on it",
    "frozen": "zero or constant and not trained",
    "free": "neither zero nor constant",
}
ALARMS = ("dead", "symmetric")
NEAR_ZERO = 1e-4


@dataclass
class ParameterReport:
    """One parameter. predicted and measured are the steps of its first non-zero gradient; predicted None with
    proved True means never, measured None means not seen. waits_for: what holds it at zero, step by step."""

    name: str
    shape: list[int]
    kind: str
    role: str
    is_zero: bool
    max_abs: float
    predicted: int | None
    measured: int | None
    proved: bool
    agrees: bool
    waits_for: list[list[str]] = field(default_factory=list)
    ranks: Ranks | None = None

    @property
    def holder(self) -> list[str]:
        """What it waits for last."""
        return self.waits_for[-1] if self.waits_for else []


@dataclass
class Diagnosis:
    """The result of `zeroblock.doctor`. str() is the report for a terminal."""

    model: str
    steps: int
    losses: list[float]
    parameters: list[ParameterReport]
    predicted_steps: int | None
    near_zero: list[ParameterReport] = field(default_factory=list)
    savings: Savings | None = None
    findings: list[str] = field(default_factory=list)
    explanation: list[str] = field(default_factory=list)

    def of_kind(self, *kinds: str) -> list[ParameterReport]:
        return [p for p in self.parameters if p.kind in kinds]

    def __getitem__(self, name: str) -> ParameterReport:
        """The record of the parameter of this name."""
        for p in self.parameters:
            if p.name == name:
                return p
        raise KeyError(name)

    @property
    def mismatches(self) -> list[ParameterReport]:
        return [p for p in self.parameters if not p.agrees]

    @property
    def healthy(self) -> bool:
        return not self.of_kind(*ALARMS)

    @property
    def exit_status(self) -> int:
        return 0 if self.healthy else 1

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "healthy": self.healthy, "kinds": KINDS}

    def to_json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=1, allow_nan=False)

    def to_html(self) -> str:
        """One self-contained page."""
        from .html import page

        return page(self)

    def __str__(self) -> str:
        from .text import render

        return render(self, color=False)


def finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become strings."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


@dataclass
class Initial:
    """What is read off the parameters before the first step."""

    zero: dict[str, bool]
    constant: dict[str, bool]
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
    """`by_chance`: parameters that a random mask may keep from moving."""
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
        return "unused"
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
