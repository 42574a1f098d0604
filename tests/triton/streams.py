"""Bytes in flight and idle lanes of the row norms: `python -m tests.triton.streams` prints them. A model, not measured.
Of backward also the cycles that a multiprocessor issues the instructions of a row in (four a cycle; idle lanes issue,
too), beside those in which its bytes arrive: where the first are fewer, idle lanes cost nothing.

In flight is what a multiprocessor has asked for and not yet got while its programs reduce: resident programs (by
registers and shared memory, static.csv, and no more than a launch has) x tiles ahead x bytes of the tensors of a tile.
That the tiles are in shared memory shows in the compiled kernel's size of it. Bandwidth x latency asks for 16 KB on
an H100, 25 on an H200, of a kernel that does nothing else.
"""

from __future__ import annotations

import csv
import math
import re
from typing import Any, NamedTuple

import torch

from .static import TABLE, _disassemble, _target

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
H200 = 4800 / 132 / 1.755  # bytes that reach a multiprocessor in a cycle, by the data sheet
STREAMED = ("dx_new", "dy", "x", "x_new", "branch")
B, T = 32, 256  # as many tokens as DiT-XL/2 trains with on one GPU


class Stream(NamedTuple):
    launch: Any
    lanes: int  # of a row
    tile_bytes: int  # of all streamed tensors, without what is masked
    buffers: int  # shared memory that the tiles ahead take
    ahead: int
    programs: int
    warps: int
    idle: float  # share of the lanes


def stream(launch) -> Stream:
    arguments = launch.arguments
    sizes = [arguments[name].element_size() for name in STREAMED if arguments.get(name) is not None]
    rows, D = arguments["ROWS"], arguments["D"]
    lanes, ahead = arguments["BLOCK_D"] + arguments.get("TAIL", 0), arguments.get("STAGES", 1) - 1
    return Stream(
        launch=launch,
        lanes=lanes,
        tile_bytes=rows * D * sum(sizes),
        buffers=ahead * rows * lanes * sum(sizes),
        ahead=ahead,
        programs=math.prod(launch.grid),
        warps=launch.options["num_warps"],
        idle=1 - D / lanes,
    )


def launches(D: int) -> dict[str, Stream]:
    """{op: what it starts} in bf16 with a shift, scale and gate per sample."""
    from zeroblock.kernels import gate_residual_layer_norm_modulate, layer_norm_modulate
    from zeroblock.kernels._launch import recording

    x, stat = torch.empty(B, T, D, dtype=torch.bfloat16, device="meta"), torch.empty(B, T, device="meta")
    v = torch.empty(B, D, dtype=torch.bfloat16, device="meta")
    calls = {
        "layer_norm_modulate": lambda: layer_norm_modulate.forward(x, v, v, None, None, 1e-6, False),
        "layer_norm_modulate_bwd": lambda: layer_norm_modulate.backward(x, x, stat, stat, v, v, None, None, False),
        "gate_residual_layer_norm_modulate": lambda: gate_residual_layer_norm_modulate.forward(x, v, x, v, v, 1e-6),
        "gate_residual_layer_norm_modulate_bwd": lambda: gate_residual_layer_norm_modulate.backward(
            x, x, x, stat, stat, v, x, v, v
        ),
    }
    found = {}
    for op, call in calls.items():
        with recording(run=False) as recorded:
            call()
        found[op] = stream(recorded[0])
    return found


def facts(op: str, D: int, target: str, warps: int) -> dict[str, str]:
    """The row of static.csv."""
    kernel = "_backward" if op.endswith("_bwd") else "_forward"
    case = f"{op.removesuffix('_bwd')}-{D}-bfloat16-sample"
    with TABLE.open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if (row["case"], row["kernel"], row["target"]) == (case, kernel, target)
        ]
    return next(row for row in rows if int(row["warps"]) == warps)  # the launcher's own choice comes first


def cycles(found: Stream) -> tuple[float, float]:
    """(to issue a row's instructions on sm_90, until its bytes arrive on an H200); compiles the kernel."""
    import triton

    compiled = triton.compile(found.launch.source(), target=_target("sm_90"), options=found.launch.options_for(32))
    longest = 0  # loop, in instructions of 16 bytes
    for at, to in re.findall(
        r"/\*([0-9a-f]{4,})\*/[^;]*BRA[^;]*?0x([0-9a-f]+)", _disassemble(compiled.asm["cubin"])[1]
    ):
        longest = max(longest, (int(at, 16) - int(to, 16)) // 16)
    rows = found.launch.arguments["ROWS"]
    moved = found.tile_bytes / rows * 1.5  # half as much is written as is read
    return longest * found.warps / 4 / rows, moved / H200


def in_flight(found: Stream, row: dict[str, str]) -> float:
    """KB on a multiprocessor."""
    assert int(row["shared"]) >= found.buffers, (row, "the tiles ahead are not in shared memory")
    return min(int(row["blocks"]), found.programs / PROCESSORS[row["target"]]) * found.ahead * found.tile_bytes / 1000


def main() -> None:
    print("| kernel | D | idle lanes | registers, blocks (sm_90) | KB in flight per SM | cycles a row: issue, H200 |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for D in (1152, 3072):
        for op, found in launches(D).items():
            cells = [op, f"{D}", f"{found.idle:.0%}", "", "", ""]
            if op.endswith("_bwd"):
                row, (issue, memory) = facts(op, D, "sm_90", found.warps), cycles(found)
                cells[3:5] = f"{row['registers']}, {row['blocks']}", f"{in_flight(found, row):.1f}"
                cells[5] = f"{issue:.0f}, {memory:.0f}"
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
