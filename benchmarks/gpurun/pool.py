"""Runs the units of a step on processes, each unit with a limit of its own, until the time is up.

One thread: it hands out names, waits for the first answer or limit, and writes rows. A process that dies or hangs is
replaced; what it was at is a failed row. What runs when the time is up has no row: the next run does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import ROOT, Setting
from .results import Results

START = 120  # seconds until a process must have its units
LAST_WORDS = 10  # seconds that a process may take to end
TAIL = 600  # bytes of the log that are kept of a process that died
MOST_FAILED_STARTS = 3
MOST_LOG = 8 << 20  # bytes
START_UNIT = "(start)"  # of the row that says why a process did not start


def trim(log: Path) -> None:
    """Keeps the end of a log that grew too long (its writers append)."""
    if log.exists() and log.stat().st_size > MOST_LOG:
        log.write_bytes(log.read_bytes()[-MOST_LOG // 2 :])


class Step(NamedTuple):
    name: str
    jobs: int  # processes at a time
    limit: float  # seconds of a unit
    share: float  # of the whole time: after it no unit of this step starts, as long as others wait
    environment: dict[str, str] = {}
    every_run: bool = False  # also what an earlier run has done: it is of this machine
    module: str = ""  # with its units; gpurun.<name>


class Worker:
    """A process, starting (`unit` None) or at a unit; done with it by `until`."""

    def __init__(self, step: Step, setting: Setting, environment: dict[str, str], log: Path):
        module = step.module or f"gpurun.{step.name}"
        command = [sys.executable, "-m", "gpurun.worker", module, setting.device, *["--quick"] * setting.quick]
        self.log = log
        with log.open("ab") as file:
            self.log_start = file.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                cwd=ROOT,
                env={**environment, **step.environment},
                start_new_session=True,
            )
        self.unit: str | None = None
        self.until = time.monotonic() + START

    def give(self, unit: str, seconds: float) -> None:
        self.unit, self.until = unit, time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):  # it has died: its output says so
            self.process.stdin.write((json.dumps(unit) + "\n").encode())
            self.process.stdin.flush()

    def answer(self) -> dict | None:
        """None: it has died."""
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def said(self) -> str:
        """The end of what stands in the log since it started (others write there too), or since it was trimmed."""
        text = self.log.read_bytes()
        start = self.log_start if self.log_start < len(text) else 0
        return text[start:][-TAIL:].decode(errors="replace")

    def stop(self) -> int:
        """Ends it and what it started; again, it changes nothing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        return self.process.wait()


class Pool:
    def __init__(
        self,
        step: Step,
        setting: Setting,
        results: Results,
        environment: dict[str, str],
        done: Callable[[str], bool],
    ):
        self.step, self.results, self.done = step, results, done
        self.log = results.folder / "log.txt"
        self.start = lambda: Worker(step, setting, environment, self.log)
        self.waiting: deque[str] | None = None  # None: not known yet
        self.workers: list[Worker] = []
        self.failed_starts = 0

    def run(self, share: float, end: float) -> int:
        """Starts units until `share`, and ends by `end` (of time.monotonic). How many were left waiting."""
        if time.monotonic() >= share:
            return 1
        units = self.results.units(self.step.name)
        if units is not None and all(map(self.done, units)):
            return 0
        try:
            self._launch()
            while self.workers and time.monotonic() < end:
                self._turn(share, end)
        finally:
            for worker in self.workers:
                worker.stop()
            self.workers.clear()
        return len(self.waiting or ())

    def _launch(self) -> None:
        self.workers.append(self.start())

    def _turn(self, share: float, end: float) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            first = min(end, *(worker.until for worker in self.workers))
            ready = [key.data for key, _ in selector.select(max(0.0, first - time.monotonic()))]
        for worker in ready:
            self._heard(worker, worker.answer(), share)
        for worker in [w for w in self.workers if w.until <= time.monotonic() < end]:
            self._lost(worker, f"not done after {self.step.limit if worker.unit else START:g} s", share)

    def _heard(self, worker: Worker, answer: dict | None, share: float) -> None:
        if answer is None:
            self._lost(worker, None, share)
        elif worker.unit is None:
            self.failed_starts = 0
            if self.waiting is None:
                self.results.set_units(self.step.name, answer["units"])
                self.waiting = deque(unit for unit in answer["units"] if not self.done(unit))
                for _ in range(min(self.step.jobs, len(self.waiting)) - 1):
                    self._launch()
            self._next(worker, share)
        else:
            ends = answer.pop("ends")
            self._row(worker.unit, answer)
            if ends:
                self._replace(worker, share)
            else:
                self._next(worker, share)

    def _next(self, worker: Worker, share: float) -> None:
        if self.waiting and time.monotonic() < share:
            worker.give(self.waiting.popleft(), self.step.limit)
        else:
            worker.stop()
            self.workers.remove(worker)

    def _lost(self, worker: Worker, hangs: str | None, share: float) -> None:
        """A process that hangs, or, without a word about that, has died (or is about to, with its last words)."""
        if hangs is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(LAST_WORDS)
        status = worker.stop()
        error = hangs or f"the process ended with {status}: {worker.said()}"
        if worker.unit is None:
            self.failed_starts += 1
        self._row(worker.unit or START_UNIT, {"status": "failed", "error": error})
        self._replace(worker, share)

    def _replace(self, worker: Worker, share: float) -> None:
        worker.stop()
        self.workers.remove(worker)
        wanted = self.waiting is None or len(self.waiting) > len(self.workers)
        if wanted and self.failed_starts < MOST_FAILED_STARTS and time.monotonic() < share:
            self._launch()

    def _row(self, unit: str, row: dict) -> None:
        self.results.add({"step": self.step.name, "unit": unit, **row})
        trim(self.log)
