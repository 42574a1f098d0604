"""A process that runs the units of one step: names come in and results go out, a line of JSON each.

`python -m gpurun.worker MODULE DEVICE [--quick]`, or with `--only UNIT` one unit, whose error is the process's.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from . import Setting, Skip

ERROR = 1200  # characters of an error that are kept
PR_SET_PDEATHSIG = 1

Unit = Callable[[], dict | None]


def settle() -> None:
    """Waits for the device, where the process has one in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def outcome(unit: Unit) -> dict:
    """The row of a unit, and of what the device has to say of it afterwards."""
    start = time.perf_counter()
    try:
        found = {"status": "ok", **(unit() or {})}
        settle()
    except Skip as reason:
        found = {"status": "skipped", "error": str(reason)[:ERROR]}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = {"status": "failed", "error": text[:ERROR], "at": f"{where.filename}:{where.lineno}"}
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def is_broken() -> bool:
    """Whether the device takes no more work from this process, as after an illegal access."""
    try:
        settle()
    except Exception:
        return True
    return False


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def units_of(module: str, setting: Setting) -> dict[str, Unit]:
    return importlib.import_module(module).units(setting)


def serve(module: str, setting: Setting) -> None:
    """Answers on what was the standard output; what the module and its units print goes to the log."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        units = units_of(module, setting)
        print(json.dumps({"units": list(units)}), file=answers, flush=True)
        for line in sys.stdin:
            row = outcome(units[json.loads(line)])
            ends = row["status"] == "failed" and is_broken()
            print(json.dumps({**row, "ends": ends}), file=answers, flush=True)
            if ends:
                return


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("module", help="with `units`")
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only")
    options = parser.parse_args(arguments)
    setting = Setting(options.device, options.quick)
    die_with_parent()
    if options.only is None:
        serve(options.module, setting)
    else:
        units_of(options.module, setting)[options.only]()
        settle()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
