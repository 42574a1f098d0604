"""The targets, and tables that set the stored results beside them. A target that is missed is printed, never raised."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zeroblock.testing.timing import geometric_mean

from . import store
from .seams import SEAMS

# Geometric mean of all cases against the better of eager and torch.compile: (inference, training).
OP_TARGETS = {
    "group_norm_silu": (2.2, 1.8),
    "group_norm_silu_film": (3.0, 2.5),
    "layer_norm_modulate": (2.3, 2.0),
    "gate_residual": (1.5, 1.6),
    "gate_residual_layer_norm_modulate": (1.6, 1.5),
    **dict.fromkeys(SEAMS, (1.8, 1.4)),
}
WORST_OP = 1.1  # no case below this ...
COPY_PERCENT = 85.0  # ... unless it runs at this percentage of the copy bandwidth
ZERO_INFERENCE = 100.0
ZERO_FLOOR = 1.5  # times the floor
ZERO_TRAINING = 2.8  # identity skips and DiT blocks; a 1x1 skip has work of its own that no zero removes
DENSE, DENSE_LOWER_BOUND = 1.0, 0.95
LARGE_MAP = 32 * 32
TRAINING = {"fp32": 1.15, "fp32_high": 1.5}  # ResBlocks at maps of at least that size
DIT_TRAINING = 1.04  # float32, against eager
FROZEN = {
    ("resblock", "fp32"): 1.4,
    ("resblock", "fp32_high"): 2.0,
    ("resblock", "bf16"): 1.06,
    ("dit_block", "fp32"): 1.15,
    ("dit_block", "bf16"): 1.0,
}
COMPILED = 0.98  # lower bound of accelerate + torch.compile against torch.compile alone
CHECK_PERCENT = 1.0
SAVED = {"resblock": 0.25, "dit_block": 0.7}  # of eager's bytes
MODES = ("inference", "training")


@dataclass(frozen=True)
class Check:
    """One line of the summary. `met` is None where there is a number to report but no target."""

    what: str
    value: str
    target: str = ""
    met: bool | None = None


def _worst(rows: list[dict], key: Callable[[dict], float]) -> dict:
    return min(rows, key=key)


def _name(row: dict) -> str:
    return row["case"].split("/", 1)[1]


def _mean(rows: list[dict]) -> float:
    return geometric_mean([row["ratio"] for row in rows])


def memory_bound_checks(rows: list[dict]) -> list[Check]:
    checks = []
    for op, targets in OP_TARGETS.items():
        for mode, target in zip(MODES, targets, strict=True):
            chosen = [row for row in rows if row["op"] == op and row["mode"] == mode]
            if chosen:
                mean = _mean(chosen)
                checks.append(Check(f"{op}, {mode}: geometric mean", f"{mean:.2f}x", f">= {target}x", mean >= target))
    slow = [row for row in rows if row["ratio"] < WORST_OP and not row["floor_percent"] >= COPY_PERCENT]
    for row in sorted(slow, key=lambda row: row["ratio"]):
        value = f"{row['ratio']:.2f}x, {row['floor_percent']:.0f} % of copy"
        checks.append(Check(f"  below: {_name(row)}", value))
    worst = _worst(rows, lambda row: row["ratio"])
    value = f"{worst['ratio']:.2f}x, {worst['floor_percent']:.0f} % of copy"
    target = f"none < {WORST_OP}x unless >= {COPY_PERCENT:.0f} % of copy"
    return [*checks, Check(f"worst case: {_name(worst)}", value, target, not slow)]


def zero_checks(rows: list[dict]) -> list[Check]:
    checks = []
    inference = [row for row in rows if row["mode"] == "inference"]
    if inference:
        mean, worst = _mean(inference), _worst(inference, lambda row: row["floor_percent"])
        target = f">= {ZERO_INFERENCE:.0f}x"
        checks.append(Check("inference: geometric mean", f"{mean:.0f}x", target, mean >= ZERO_INFERENCE))
        parts = {op: [row for row in inference if row["op"] == op] for op in ("resblock", "resblock_1x1", "dit_block")}
        parts["identity skips and DiT"] = [row for row in inference if row["op"] != "resblock_1x1"]
        for part, chosen in parts.items():
            if chosen:
                checks.append(Check(f"  {part}", f"{_mean(chosen):.0f}x"))
        limit = geometric_mean([row["ratio"] * 100 / row["floor_percent"] for row in inference])
        checks.append(Check("  the floor itself", f"{limit:.0f}x"))
        times = 100 / worst["floor_percent"]
        what = f"inference, farthest from the floor: {_name(worst)}"
        checks.append(Check(what, f"{times:.2f}x floor", f"<= {ZERO_FLOOR}x", times <= ZERO_FLOOR))
    training = [row for row in rows if row["mode"] == "training"]
    full = [row for row in training if row["op"] != "resblock_1x1"]
    if full:
        mean, worst = _mean(full), _worst(full, lambda row: row["ratio"])
        what = "training step, identity skips and DiT: geometric mean"
        checks.append(Check(what, f"{mean:.2f}x", f">= {ZERO_TRAINING}x", mean >= ZERO_TRAINING))
        checks.append(Check(f"  worst: {_name(worst)}", f"{worst['ratio']:.2f}x"))
    skips = [row for row in training if row["op"] == "resblock_1x1"]
    if skips:
        checks.append(Check("training step, 1x1 skips: geometric mean", f"{_mean(skips):.2f}x"))
    return checks


def _lower_bound(row: dict) -> float:
    """Of the ratio to the best of all baselines; rows that are older than this column have it for two of them."""
    return row["lo"] if math.isnan(row["lo_all"]) else row["lo_all"]


def _pixels(row: dict) -> int:
    """Of one image of a ResBlock's input, "NxCxHxW" or "NxCxHxWtoK"."""
    height, width = row["shape"].split("to")[0].split("x")[2:]
    return int(height) * int(width)


def _at_least(what: str, values: list[float], target: float | None = None) -> Check:
    mean = geometric_mean(values)
    return Check(what, f"{mean:.3f}x", f">= {target}x" if target else "", mean >= target if target else None)


def dense_checks(rows: list[dict]) -> list[Check]:
    """Against the best of the baselines that were measured: all of them with --baselines all."""
    checks = [_at_least("all blocks and modes: geometric mean", [row["ratio_all"] for row in rows], DENSE)]
    for op in ("resblock", "resblock_1x1", "dit_block"):
        for dtype in ("fp32", "fp32_high", "bf16"):
            for mode in MODES:
                chosen = [r["ratio_all"] for r in rows if (r["op"], r["dtype"], r["mode"]) == (op, dtype, mode)]
                if chosen:
                    checks.append(_at_least(f"  {op}, {dtype}, {mode}", chosen))
    training = [row for row in rows if row["mode"] == "training"]
    for dtype, target in TRAINING.items():
        images = [row for row in training if row["op"].startswith("resblock") and row["dtype"] == dtype]
        large = [row["ratio_all"] for row in images if _pixels(row) >= LARGE_MAP]
        if large:
            checks.append(_at_least(f"ResBlocks, {dtype}, training at 32x32 and more: mean", large, target))
    tokens = [row["eager"] / row["zeroblock"] for row in training if (row["op"], row["dtype"]) == ("dit_block", "fp32")]
    if tokens:
        checks.append(_at_least("dit_block, fp32, training against eager: geometric mean", tokens, DIT_TRAINING))
    worst = _worst(rows, _lower_bound)
    value = f"{worst['ratio_all']:.3f}x [{_lower_bound(worst):.3f}]"
    target = f"lower bound >= {DENSE_LOWER_BOUND}"
    return [*checks, Check(f"worst case: {_name(worst)}", value, target, _lower_bound(worst) >= DENSE_LOWER_BOUND)]


def frozen_checks(rows: list[dict]) -> list[Check]:
    """Against the best of all baselines that were measured: --baselines all has torch.compile's freezing among them."""
    checks = []
    for (op, dtype), target in FROZEN.items():
        chosen = [row for row in rows if row["op"].startswith(op) and row["dtype"] == dtype]
        if chosen:
            worst = _worst(chosen, lambda row: row["ratio_all"])
            what = f"{op}, {dtype}: geometric mean against the best of all"
            checks.append(_at_least(what, [row["ratio_all"] for row in chosen], target))
            checks.append(Check(f"  worst: {_name(worst)}", f"{worst['ratio_all']:.3f}x {worst['best_all']}".rstrip()))
    return checks


def overhead_checks(rows: list[dict]) -> list[Check]:
    checks = []
    for prefix, what, target in (
        ("zero_check_late_", "zero check of a weight whose last element alone is not zero", None),
        ("zero_check_", "zero check of a dense tail", CHECK_PERCENT),
    ):
        chosen = [row for row in rows if row["op"].startswith(prefix)]
        rows = [row for row in rows if row not in chosen]
        if chosen:
            worst = _worst(chosen, lambda row: row["ratio"])
            percent = 100 / worst["ratio"]
            value = f"{percent:.3f} % of the block ({worst['zeroblock']:.2f} us)"
            met = percent < target if target else None
            checks.append(Check(f"{what}, worst: {_name(worst)}", value, f"< {target:.0f} %" if target else "", met))
    for row in rows:
        value = f"{row['zeroblock']:.1f} us, {row['best']} {row[row['best']]:.1f} us ({row['ratio']:.2f}x)"
        checks.append(Check(f"call, {row['op']}, {row['mode']}", value))
    return checks


def saved_checks(rows: list[dict]) -> list[Check]:
    checks = []
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == op]
        worst = max(chosen, key=lambda row: row["zeroblock"] / row["eager"])
        share = worst["zeroblock"] / worst["eager"]
        target = SAVED.get(op)
        met = share <= target if target else None
        required = f"<= {target}x" if target else ""
        checks.append(Check(f"{op}, worst: {_name(worst)}", f"{share:.3f}x eager", required, met))
    return checks


def models_checks(rows: list[dict]) -> list[Check]:
    """What a model gains depends on how much of it is not a block, so that has no target; under torch.compile no model
    may lose."""
    checks = []
    for row in sorted(rows, key=lambda row: (row["mode"], row["op"])):
        checks.append(Check(_name(row), f"{row['ratio']:.2f}x [{row['lo']:.2f}, {row['hi']:.2f}] {row['best']}"))
        if not math.isnan(row["ratio_compile"]):
            value, lower = f"{row['ratio_compile']:.3f}x [{row['lo_compile']:.3f}]", row["lo_compile"]
            target = f"lower bound >= {COMPILED}"
            checks.append(Check("  both under torch.compile", value, target, lower >= COMPILED))
    return checks


def peak_checks(rows: list[dict]) -> list[Check]:
    """The process's most memory, and what of it the steps took: more than eager's process had before its first one."""
    checks = []
    for row in sorted(rows, key=lambda row: (row["mode"], row["op"])):
        total = f"{row['zeroblock'] / 2**20:.0f} MiB, {row['zeroblock'] / row['eager']:.2f}x eager"
        steps = (row["zeroblock"] - row["floor"]) / (row["eager"] - row["floor"])
        checks.append(Check(_name(row), f"{total}; the steps' {steps:.2f}x"))
    return checks


CHECKS = {
    "memory_bound": memory_bound_checks,
    "zero": zero_checks,
    "dense": dense_checks,
    "frozen": frozen_checks,
    "overhead": overhead_checks,
    "saved": saved_checks,
    "models": models_checks,
    "whole": models_checks,
    "peak": peak_checks,
}


def _setting(row: dict) -> tuple[str, str, str]:
    return row["group"], row["threads"], row["allocator"]


def _order(setting: tuple[str, str, str]) -> tuple:
    group, threads, allocator = setting
    return store.GROUPS.index(group), allocator != "pinned", int(threads)


def by_setting(rows: list[dict]) -> list[tuple[tuple[str, str, str], list[dict]]]:
    """((group, threads, allocator), their rows), groups in their fixed order."""
    settings = sorted({_setting(row) for row in rows}, key=_order)
    return [(setting, [row for row in rows if _setting(row) == setting]) for setting in settings]


def checked(rows: list[dict]) -> list[tuple[str, list[Check]]]:
    """(heading, checks) of every group, thread count and allocator setting that has rows."""
    sections = []
    for (group, threads, allocator), chosen in by_setting(rows):
        count = f"{threads} thread" + ("" if threads == "1" else "s")
        heading = f"{group}, {count}, {allocator} allocator, {len(chosen)} cases"
        sections.append((heading, CHECKS[group](chosen)))
    return sections


def summary(rows: list[dict]) -> str:
    """The table at the end of a run: what was asked, what was measured, whether it is met."""
    lines = []
    for heading, checks in checked(rows):
        lines.append(f"== {heading} ==")
        width = max(len(check.what) for check in checks)
        for check in checks:
            verdict = "" if check.met is None else "met" if check.met else "MISSED"
            lines.append(f"{check.what:{width}}  {check.value:24}  {check.target:12}  {verdict}".rstrip())
    return "\n".join(lines)


def markdown(results: Path) -> str:
    """The committed results as README tables: one section per machine."""
    lines = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        rows = store.read_all(folder)
        if not rows:
            continue
        first = max(rows, key=lambda row: row["date"])
        lines += [f"### {first['machine']}", ""]
        lines += [f"torch {first['torch']}, zeroblock {first['zeroblock_version']}, {first['date'][:10]}.", ""]
        for heading, checks in checked(rows):
            lines += [f"**{heading}**", "", "| measured | result | target | met |", "|---|---|---|---|"]
            for check in checks:
                verdict = "" if check.met is None else "yes" if check.met else "**no**"
                lines.append(f"| {check.what.strip()} | {check.value} | {check.target} | {verdict} |")
            lines.append("")
    return "\n".join(lines).rstrip()
