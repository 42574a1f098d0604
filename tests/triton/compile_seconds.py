"""What Triton takes to compile kernels: `python -m tests.triton.compile_seconds [--target sm_90] [PREFIX ...]`.

CPU seconds, the assembler's included, of every kernel whose case begins so; nothing comes from a cache. For sm_90 they
go into compile_seconds.csv; rows of other kernels stay as they are. What takes more than AGAIN is measured once more,
and the lesser kept: a machine with other work takes longer.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from pathlib import Path

TABLE = Path(__file__).with_name("compile_seconds.csv")
AGAIN = 0.4


def seconds() -> float:
    return sum(os.times()[:4])


def read() -> dict[tuple[str, str], list[float]]:
    """The seconds of every kernel, by its case and name; of one that a case starts in several ways, of each."""
    found: dict[tuple[str, str], list[float]] = {}
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["case"], row["kernel"]), []).append(float(row["seconds"]))
    return found


def write(found: dict[tuple[str, str], list[float]]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("case", "kernel", "seconds"))
        writer.writerows((*key, f"{one:.2f}") for key, every in found.items() for one in every)


def measure(prefixes: list[str], name_of_target: str) -> None:
    import triton

    from . import static

    target, lanes = static._target(name_of_target), static.warp(name_of_target)

    def once(launch) -> float:
        before = seconds()
        triton.compile(launch.source(), target=target, options=launch.options_for(lanes))
        return seconds() - before

    every = static.fullest(static.launches())
    once(every[0][1])  # the first loads the compiler
    taken: dict[tuple[str, str], list[float]] = {}
    for name, launch in every:
        if not name.startswith(tuple(prefixes)):
            continue
        least = once(launch)
        if least > AGAIN:
            least = min(least, once(launch))
        taken.setdefault((name, launch.kernel.__name__), []).append(least)
        print(f"{least:6.2f} {name} {launch.kernel.__name__}", flush=True)
    found = [one for kernel in taken.values() for one in kernel]
    mean = sum(found) / len(found)
    print(f"{len(found)} kernels: {min(found):.2f} to {max(found):.2f} CPU seconds, {mean:.2f} on average")
    if name_of_target == "sm_90":
        known = read() if TABLE.exists() else {}
        keys = dict.fromkeys((name, launch.kernel.__name__) for name, launch in every)
        write({key: taken.get(key, known.get(key, [])) for key in keys})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="*", default=[""])
    parser.add_argument("--target", default="sm_90")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1"}
        measure(options.prefixes, options.target)


if __name__ == "__main__":
    main()
