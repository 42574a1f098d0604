"""A row of the results, made of the times of a case's candidates or of two numbers of bytes."""

import math

from zeroblock.testing.timing import Timing

from . import store
from .candidates import COMPILED, Candidate
from .case import Case

NAN = float("nan")


def empty_row(case: Case, threads: int) -> dict:
    """The case's name, and NaN for every number."""
    row = {name: NAN for name in store.NUMBERS} | {"case": case.id, "threads": threads}
    return row | {name: getattr(case, name) for name in ("group", "op", "shape", "layout", "dtype", "mode")}


def time_columns(timing: Timing, candidates: list[Candidate]) -> dict:
    """Medians, and zeroblock against the best of the baselines, from paired ratios."""
    medians = {c.name: timing.median(c.label) for c in candidates if not c.other_layout}
    baselines = [c for c in candidates if c.is_baseline]
    others = [timing.median(c.label) for c in baselines if c.other_layout]
    best = timing.fastest([c.label for c in baselines if c.name in ("eager", "compile") and not c.other_layout])
    best_of_all = timing.fastest([c.label for c in baselines])
    ratio, ratio_all = timing.ratio(best, "zeroblock"), timing.ratio(best_of_all, "zeroblock")
    both = timing.ratio("compile", "zeroblock_compile") if "zeroblock_compile" in medians else None
    return {
        "unit": "us",
        **medians,
        "other_layout": min(others, default=NAN),
        "best": best,
        "ratio": ratio.median,
        "lo": ratio.lo,
        "hi": ratio.hi,
        "p20": ratio.p20,
        "p80": ratio.p80,
        "best_all": best_of_all,
        "ratio_all": ratio_all.median,
        "lo_all": ratio_all.lo,
        "ratio_compile": NAN if both is None else both.median,
        "lo_compile": NAN if both is None else both.lo,
        "floor_percent": 100 / timing.ratio("zeroblock", "floor").median if "floor" in medians else NAN,
        "rounds": ratio.rounds,
        "dropped": timing.dropped(best, "zeroblock"),
    }


def byte_columns(eager: int, own: int, floor: float = NAN) -> dict:
    """Bytes are counted, not measured: the ratio is its own interval."""
    ratio = eager / own if own else NAN
    same = dict.fromkeys(("ratio", "lo", "hi", "p20", "p80", "ratio_all", "lo_all"), ratio)
    numbers = {"eager": float(eager), "zeroblock": float(own), "floor": floor}
    return {"unit": "bytes", **numbers, **same, "best": "eager", "best_all": "eager", "rounds": 1, "dropped": 0}


def line(row: dict) -> str:
    """What is printed of a row while the others are measured."""
    if row["unit"] == "bytes":
        return f"eager {row['eager']:.0f}  zeroblock {row['zeroblock']:.0f} bytes   {1 / row['ratio']:.3f} of eager"
    names = ("eager", *COMPILED, "other_layout", "zeroblock", "zeroblock_compile", "floor")
    times = "  ".join(f"{name} {row[name]:.4g}" for name in names if not math.isnan(row[name]))
    text = f"{times} us   {row['ratio']:.2f}x [{row['lo']:.2f}, {row['hi']:.2f}] vs {row['best']}"
    if row["best_all"] != row["best"]:
        text += f"   {row['ratio_all']:.2f}x [{row['lo_all']:.2f}] vs {row['best_all']}"
    if not math.isnan(row["ratio_compile"]):
        text += f"   both compiled {row['ratio_compile']:.2f}x [{row['lo_compile']:.2f}]"
    if not math.isnan(row["floor_percent"]):
        text += f"   {row['floor_percent']:.0f} % of floor"
    return text
