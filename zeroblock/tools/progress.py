"""The progress bar of the commands."""

from __future__ import annotations

import sys
import time


class Progress:
    """A bar on stderr, redrawn in place on a terminal.

    terminal: whether stderr is one; None: ask it.
    lines: how many lines are printed where it is none, of all steps of a phase.
    """

    def __init__(self, terminal: bool | None = None, lines: int = 0):
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.lines = lines
        self.start = time.perf_counter()

    def __call__(self, phase: str, done: int, total: int, note: str) -> None:
        """After `done` of `total` steps of a phase; the note stands at the end."""
        bar, seconds = "#" * (24 * done // total), time.perf_counter() - self.start
        line = f"{phase:6s} [{bar:24s}] {done}/{total} {seconds:5.1f} s  {note}"
        if self.terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif self.lines and (done % max(1, total // self.lines) == 0 or done == total):
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
