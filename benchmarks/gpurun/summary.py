"""What a run has found, in one page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .parts import kernels
from .pool import START_UNIT
from .results import latest, read, source_digest

MOST = 40  # failures that are listed
TIMES = ("eager", "compile", "zeroblock")


def page(folder: Path) -> str:
    rows = latest(read(folder))
    lines = [*_machine(rows), "", *_steps(rows), "", *_times(rows), "", *_failures(rows)]
    return "\n".join(lines) + "\n"


def write(folder: Path) -> str:
    text = page(folder)
    draft = folder / "summary.new"
    draft.write_text(text)
    draft.replace(folder / "summary.txt")
    return text


Rows = dict[tuple[str, str], dict]


def _machine(rows: Rows) -> list[str]:
    found = {unit: row for (step, unit), row in rows.items() if step == "machine"}
    versions, gpu, top = (found.get(name, {}) for name in ("versions", "gpu", "ceilings"))
    name = gpu.get("properties", {}).get("name", "no GPU")
    lines = [f"{name}: python {versions.get('python')}, torch {versions.get('torch')}, triton {versions.get('triton')}"]
    if "copy_gb_s" in top:
        lines.append(f"copy {top['copy_gb_s']:.0f} GB/s, bf16 product {top['matmul_tflop_s']:.1f} TFLOP/s")
    parts = {unit: row for (step, unit), row in rows.items() if step == "parts"}
    lines.append(f"extension: {parts.get('extension', {}).get('extension', 'none')}")
    if "kernels" in parts.get("triton_cache", {}):
        came = parts["triton_cache"]["kernels"]
        lines.append(f"Triton kernels: {came} came with the cache, {kernels() - came} were compiled here")
    old = sum(row["source"] != source_digest() for row in rows.values())
    return [*lines, *[f"{old} results are of other sources"] * bool(old)]


def _started_later(rows: Rows, step: str) -> bool:
    names = list(rows)
    return any(name[0] == step for name in names[names.index((step, START_UNIT)) + 1 :])


def _steps(rows: Rows) -> list[str]:
    lines = [f"{'step':12s} {'ok':>6s} {'failed':>6s} {'skipped':>7s} {'seconds':>8s}"]
    for step in dict.fromkeys(step for step, _ in rows):
        own = [row for (name, _), row in rows.items() if name == step]
        count = Counter(row["status"] for row in own)
        seconds = sum(row.get("seconds", 0) for row in own)
        lines.append(f"{step:12s} {count['ok']:6d} {count['failed']:6d} {count['skipped']:7d} {seconds:8.1f}")
    return lines


def _times(rows: Rows) -> list[str]:
    """Microseconds of each case, and how near to the copy or the product of this device."""
    lines = [
        f"{'case':76s} {'eager':>9s} {'compile':>9s} {'zeroblock':>9s} {'x best':>7s} {'copy':>5s} {'product':>7s}"
    ]
    timed: dict[str, dict] = {}
    for (step, unit), row in rows.items():
        if step in ("headlines", "compiled", "models") and row["status"] == "ok":
            timed[unit] = {**timed.get(unit, {}), **row}
    for unit, row in timed.items():
        times = " ".join(f"{row[name]:9.1f}" if name in row else " " * 9 for name in TIMES)
        rates = [f"{row[k]:.0f}%" if k in row else "" for k in ("copy_percent", "matmul_percent")]
        lines.append(f"{unit:76s} {times} {row.get('ratio', 0):6.2f}x {rates[0]:>5s} {rates[1]:>7s}")
    return lines if timed else []


def _failures(rows: Rows) -> list[str]:
    failed = [
        (step, unit, row)
        for (step, unit), row in rows.items()
        if row["status"] == "failed" and not (unit == START_UNIT and _started_later(rows, step))
    ]
    lines = [f"{len(failed)} failed"]
    for step, unit, row in failed[:MOST]:
        error = " ".join(row.get("error", "").split())
        lines.append(f"  {step}: {unit}: {error[:200]} {row.get('at', '')}")
    return lines
