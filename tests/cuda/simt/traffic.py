"""Bytes and FLOPs of the CUDA kernels, counted in the emulator: `python -m tests.cuda.simt.traffic` renews traffic.csv.

traffic.cpp runs every kernel at the shapes of the Triton table (tests/triton/traffic.csv), in the same terms:

compulsory  every buffer that the op reads once, every buffer that it writes once; workspaces left out
moved       every request for a streamed buffer; those of at most 1/16 of the launch's largest one, and what a product
            reads, once per launch
partials    the part of `moved` that goes to workspaces
distinct    each byte that a launch touches once: what is left where a block's second read hits the cache
requested   what loads and stores ask for
dot_flops   FLOPs on tensor cores
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import NamedTuple

from . import emulated

TABLE = Path(__file__).with_name("traffic.csv")
COLUMNS = ("case", "compulsory", "moved", "partials", "ratio", "distinct", "requested", "dot_flops")
STREAMED = 16


class Access(NamedTuple):
    """One direction of one buffer in one launch."""

    buffer: int
    read: bool
    scratch: bool
    size: int
    requested: int
    once: int
    flops: int


Launch = list[Access]


def moved(launch: Launch) -> tuple[int, int]:
    """(bytes moved, those of workspaces)"""
    largest = max(a.once for a in launch)
    sums = [0, 0]
    for a in launch:
        streamed = not (a.flops and a.read) and a.once * STREAMED > largest
        sums[a.scratch] += a.requested if streamed else a.once
    return sum(sums), sums[1]


def row(case: str, launches: list[Launch]) -> dict[str, str]:
    accesses = [a for launch in launches for a in launch]
    compulsory = sum({(a.buffer, a.read): a.size for a in accesses if not a.scratch}.values())
    total, partials = (sum(values) for values in zip(*map(moved, launches), strict=True))
    return {
        "case": case,
        "compulsory": str(compulsory),
        "moved": str(total),
        "partials": str(partials),
        "ratio": f"{total / compulsory:.3f}",
        "distinct": str(sum(a.once for a in accesses)),
        "requested": str(sum(a.requested for a in accesses)),
        "dot_flops": str(sum(launch[0].flops for launch in launches)),
    }


def name_of(case: str, call: int) -> str:
    """The second call of a case is the backward pass, or combines the statistics of a convolution's tiles."""
    op, _, shape = case.partition("-")
    return case if call == 0 else f"{'conv_moments' if op == 'conv_residual' else op + '_bwd'}-{shape}"


def parse(printed: str) -> list[dict[str, str]]:
    """The table, of what traffic.cpp printed: lines of launches, and "case end" after each call."""
    rows: list[dict[str, str]] = []
    launches: dict[str, Launch] = {}
    calls: dict[str, int] = {}
    for line in printed.splitlines():
        case, *words = line.split()
        if words == ["end"]:
            rows.append(row(name_of(case, calls.get(case, 0)), list(launches.values())))
            calls[case] = calls.get(case, 0) + 1
            launches = {}
            continue
        launch, buffer, role, size, read, read_once, written, written_once, flops = words
        found = launches.setdefault(launch, [])
        for is_read, requested, once in ((True, read, read_once), (False, written, written_once)):
            if int(requested):
                found.append(
                    Access(int(buffer), is_read, role == "scratch", int(size), int(requested), int(once), int(flops))
                )
    return rows


def count() -> list[dict[str, str]]:
    """Runs the kernels."""
    done = emulated.run(str(emulated.program("traffic.cpp", "counting", emulated.kernels())))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return parse(done.stdout)


def committed() -> dict[str, dict[str, str]]:
    with TABLE.open(newline="") as file:
        return {line["case"]: line for line in csv.DictReader(file)}


def main() -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(count())
    print(f"wrote {TABLE.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
