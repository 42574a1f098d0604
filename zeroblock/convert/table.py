"""What `accelerate` makes of each model of diffusers, run in a small size (coverage.csv; a test compares it)."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path

TABLE = Path(__file__).with_name("coverage.csv")


def coverage_table(width: int = 100) -> str:
    """The table as text: a class and its level, and indented the blocks that zeroblock runs and those left alone."""
    lines = []
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            lines.append(f"{row['class']}: {row['level']}")
            for column in ("blocks", "left alone"):
                if row[column]:
                    text = f"{column}: {row[column]}"
                    lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
