"""Group peak: the most memory that a process takes, as the system counts it.

Each side builds its model in a child process of its own (this module as a program) and takes two steps.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import whole
from .case import MODES, Case, module_work
from .store import BENCHMARKS


def cases(quick: bool) -> Iterator[Case]:
    """Those of the group whole; if quick, one, since each takes two processes."""
    found = whole.cases(quick, "peak")
    if quick:
        return itertools.islice((case for case in found if case.mode == "training"), 1)
    return found


def high_water(case: Case) -> tuple[int, int, float]:
    """(eager's, zeroblock's, eager's before its first step): the most bytes their processes ever held."""
    work = case.work()
    with torch.set_grad_enabled(case.mode == "training"):
        work.own.step(case.mode)()  # measures the plans, so that the child finds them on disk and measures none
    arguments = [case.op, case.mode, str(torch.get_num_threads())]
    if case.shape == "quick":
        arguments.append("--quick")
    found = []
    for side in whole.SIDES:
        command = [sys.executable, "-m", "zbench.peak", side, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS)
        if done.returncode:
            raise RuntimeError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found[0]["peak"], found[1]["peak"], float(found[0]["before"])


def most_resident() -> int:
    """Bytes. Not from getrusage where /proc is at hand: a child's ru_maxrss begins with its parent's size."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _child() -> None:
    parser = argparse.ArgumentParser(description="Two steps of one side of a model; prints its memory as JSON.")
    parser.add_argument("side", choices=whole.SIDES)
    parser.add_argument("op")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("threads", type=int)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, x = whole.build(options.op, options.side, options.mode, options.quick)
    work = module_work(model, model, (x,), options.mode)
    before = most_resident()
    with torch.set_grad_enabled(options.mode == "training"):
        step = work.own.step(options.mode)
        for _ in range(2):
            step()
    print(json.dumps({"peak": most_resident(), "before": before}))


if __name__ == "__main__":
    _child()
