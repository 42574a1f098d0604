"""Rows of results.jsonl, one for each unit: written as they come, read again by the next run. units.json has the names
of each step's units, so that a step of which nothing is left need not start to say so."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from . import ROOT

FILE, UNITS = "results.jsonl", "units.json"
SOURCES = ("zeroblock", "kernels", "csrc", "benchmarks/gpurun", "benchmarks/zbench", "benchmarks/gpu.py")
SETTLED = ("ok", "skipped")


@functools.cache
def source_digest() -> str:
    """Of all that a result may depend on: there may be no git where a run happens."""
    digest = hashlib.sha256()
    for top in SOURCES:
        files = [ROOT / top] if (ROOT / top).is_file() else sorted((ROOT / top).rglob("*.*"))
        for path in files:
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def read(folder: Path) -> list[dict]:
    """The rows of a run; a line that was cut off counts as not written."""
    rows = []
    if (folder / FILE).exists():
        for line in (folder / FILE).read_bytes().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def units_in(folder: Path) -> dict[str, list[str]]:
    """{step: names}, unless other sources have them."""
    try:
        found = json.loads((folder / UNITS).read_text())
    except (OSError, ValueError):
        return {}
    return found["units"] if found["source"] == source_digest() else {}


def latest(rows: Iterable[dict]) -> dict[tuple[str, str], dict]:
    """The last row of each unit."""
    return {(row["step"], row["unit"]): row for row in rows}


class Results:
    """The rows of this run in `folder`, after those of an `earlier` one."""

    def __init__(self, folder: Path, earlier: Path | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows = folder, [] if earlier is None else read(earlier)
        draft = folder / f"{FILE}.new"
        draft.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        draft.replace(folder / FILE)
        self._file = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND)
        self._latest = latest(self.rows)
        self._units = units_in(folder)

    def add(self, row: dict) -> None:
        """On the disk when this returns, in one piece."""
        row = {**row, "source": source_digest()}
        os.write(self._file, (json.dumps(row) + "\n").encode())
        os.fsync(self._file)
        self.rows.append(row)
        self._latest[row["step"], row["unit"]] = row

    def units(self, step: str) -> list[str] | None:
        """The units of a step as these sources have them, once a run in this folder has come to it."""
        return self._units.get(step)

    def set_units(self, step: str, names: list[str]) -> None:
        self._units[step] = names
        draft = self.folder / f"{UNITS}.new"
        draft.write_text(json.dumps({"source": source_digest(), "units": self._units}))
        draft.replace(self.folder / UNITS)

    def is_done(self, step: str, unit: str) -> bool:
        """It passed, or failed with these sources: what failed with others is tried again."""
        row = self._latest.get((step, unit))
        return row is not None and (row["status"] in SETTLED or row["source"] == source_digest())
