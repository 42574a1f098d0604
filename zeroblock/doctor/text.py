"""The report for a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from .explain import REFERENCES, listed
from .kinds import KINDS, UNUSED

if TYPE_CHECKING:
    from .diagnosis import Diagnosis, ParameterReport

# ANSI codes by kind.
_RED, _GREEN, _YELLOW, _CYAN, _FAINT = "31", "32", "33", "36", "2"
_COLORS = {
    "dead": _RED,
    "symmetric": _RED,
    "not seen": _YELLOW,
    "unused": _YELLOW,
    "zero tail": _GREEN,
    "zero gate": _GREEN,
    "waits": _CYAN,
    "constant": _FAINT,
    "free": _FAINT,
    "frozen": _FAINT,
}
_ROWS = 24  # of the table; --json and --html have all


def wants_color(stream: TextIO) -> bool:
    """Only on a terminal, and not where NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def with_prefix(n: float, unit: str) -> str:
    """4 significant digits and a prefix: with_prefix(2.5e9, "FLOP") == "2.5 GFLOP"."""
    if unit == "B":
        prefixes, base = ["", "Ki", "Mi", "Gi", "Ti"], 1024
    else:
        prefixes, base = ["", "k", "M", "G", "T", "P"], 1000
    for prefix in prefixes[:-1]:
        if abs(n) < base:
            return f"{n:.4g} {prefix}{unit}"
        n /= base
    return f"{n:.4g} {prefixes[-1]}{unit}"


def step_or(value: int | None, none: str) -> str:
    return none if value is None else str(value)


def prediction(p: ParameterReport) -> str:
    return "never" if p.proved else step_or(p.predicted, "-")


def render(d: Diagnosis, color: bool | None = None, width: int | None = None) -> str:
    """The whole report.

    color: with ANSI colours; None: as `wants_color` says of stdout.
    width: of a line, in characters; None: the terminal's, 120 at most.
    """
    color = wants_color(sys.stdout) if color is None else color
    width = width or min(shutil.get_terminal_size((110, 24)).columns, 120)

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if color else text

    lines = [paint(f"zeroblock doctor: {d.model}", "1") + f", {len(d.parameters)} parameters, {d.steps} SGD steps", ""]
    counts = Counter(p.kind for p in d.parameters)
    for kind, meaning in KINDS.items():
        if counts[kind]:
            lines.append(f"  {paint(f'{counts[kind]:5d} {kind:<10}', _COLORS[kind])} {meaning}")
    lines += ["", *_timeline(d)]
    for finding in d.findings:
        lines += ["", *_wrap(finding, width, paint("!! ", "1;31"))]
    lines += _table(d, width, paint)
    for paragraph in d.explanation:
        lines += ["", *_wrap(paragraph, width)]
    lines += ["", *_savings(d, width)]
    if d.explanation and any(p.is_zero for p in d.parameters):
        lines += ["", "References: " + REFERENCES[0], *(f"            {r}" for r in REFERENCES[1:])]
    color_of_verdict = _RED if not d.healthy else _YELLOW if d.of_kind(UNUSED) else _GREEN
    return "\n".join([*lines, "", paint(d.verdict, f"1;{color_of_verdict}")])


def _wrap(text: str, width: int, first: str = "") -> list[str]:
    return [first + line if i == 0 else line for i, line in enumerate(textwrap.wrap(text, width - 4))]


def _timeline(d: Diagnosis) -> list[str]:
    """How many parameters move first in each step."""
    total, lines = len(d.parameters), ["first motion (predicted from the zeros alone / measured)"]
    measured = Counter(p.measured for p in d.parameters)
    predicted = Counter(p.predicted for p in d.parameters)
    for s in range(1, d.steps + 1):
        bar = "#" * -(-30 * measured[s] // total)
        lines.append(f"  step {s:<3} {predicted[s]:5d} / {measured[s]:<5d} {bar}")
    later = [p for p in d.parameters if p.measured is None and p.kind not in ("free", "frozen")]
    lines.append(f"  not seen {len(later):11d}")
    return lines


def _table(d: Diagnosis, width: int, paint: Callable[[str, str], str]) -> list[str]:
    """Dead, symmetric and unseen ones first, then the zero tails and gates."""
    order = ["dead", "symmetric", "not seen", "unused", "zero tail", "zero gate", "waits"]
    rows = [p for p in d.parameters if p.kind in order]
    rows = [p for p in rows if p.kind != "waits" or not p.agrees or p.is_zero and p.role != "bias"]
    rows.sort(key=lambda p: order.index(p.kind))
    if not rows:
        return []
    name = max(len("parameter"), min(max(len(p.name) for p in rows), width - 66))
    lines = ["", f"{'parameter':<{name}}  {'kind':<10} {'predicted':>9} {'measured':>9}  waits for"]
    for p in rows[:_ROWS]:
        short = p.name if len(p.name) <= name else "..." + p.name[3 - name :]
        steps = f"{prediction(p):>9} {step_or(p.measured, 'not seen'):>9}"
        text = f"{short:<{name}}  {p.kind:<10} {steps}  {listed(p.holder, 1)}"
        lines.append(paint(text.rstrip(), _COLORS[p.kind]))
    if len(rows) > _ROWS:
        lines.append(f"... and {len(rows) - _ROWS} more (--json and --html have them all)")
    return lines


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def savings_lines(d: Diagnosis) -> list[str]:
    """What the fast path leaves out, in sentences: for the terminal and for the page."""
    s = d.savings
    near = []
    if d.near_zero:
        shown = listed(f"{p.name} ({p.max_abs:.1e})" for p in d.near_zero)
        near = [f"Near misses, not zero (largest element): {shown}. No branch is skipped for them."]
    if s is None:
        return near
    if not s.branches:
        return ["No residual branch is exactly zero: the fast path would skip nothing now.", *near]
    last = [b.steps for b in s.branches if b.steps is not None]
    branches = "1 branch" if len(s.branches) == 1 else f"{len(s.branches)} branches"
    lines = [
        f"The fast path would skip {branches} now, zero by "
        f"{listed(f'{b.parameters[0]} ({b.by})' for b in s.branches)}.",
        f"Inference: {with_prefix(s.inference_saved, 'FLOP')} of {with_prefix(s.inference_flops, 'FLOP')} "
        f"({_share(s.inference_saved, s.inference_flops)}).",
        f"Training: {with_prefix(s.training_saved, 'FLOP')} of {with_prefix(s.training_flops, 'FLOP')} a step "
        f"({_share(s.training_saved, s.training_flops)}), and {with_prefix(s.activation_saved, 'B')} of "
        f"{with_prefix(s.activation_bytes, 'B')} kept for backward are not needed.",
    ]
    if last:
        steps = "1 step" if max(last) == 1 else f"{max(last)} steps"
        lines.append(f"In ordinary training that lasts {steps}, until the tails have moved.")
    if len(last) < len(s.branches):
        lines.append(f"Zero throughout, because frozen or never moved: {len(s.branches) - len(last)} of them.")
    return lines + near


def _savings(d: Diagnosis, width: int) -> list[str]:
    return [line for text in savings_lines(d) for line in _wrap(text, width)]
