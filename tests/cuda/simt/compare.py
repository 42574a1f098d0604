"""The two GPU backends side by side: `python -m tests.cuda.simt.compare` writes backends.md from the four tables.

Static facts (static.csv here and in tests/triton) and bytes and FLOPs (traffic.csv) of the same ops at the same shapes.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TRITON = HERE.parents[1] / "triton"
PAGE = HERE / "backends.md"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
COLUMNS = (
    "op",
    "kernel",
    "registers",
    "spills",
    "shared",
    "threads",
    "blocks",
    "instructions",
    "bytes moved",
    "ratio",
    "tensor FLOPs",
)
Row = dict[str, str]


class Pair(NamedTuple):
    """An op at a shape: rows of the traffic tables (the same unless said) and kernels of the static ones."""

    traffic: str
    cuda: tuple[str, ...]
    triton: tuple[str, tuple[str, ...]]  # case, kernels
    triton_traffic: str = ""
    # Where there are clusters, and two passes where there are not.
    two_passes: tuple[str, ...] = ()


FWD, BWD = "group_norm_silu_fwd_kernel<bf16,8,{}>", "group_norm_silu_bwd_kernel<bf16,8,{}>"
TOTALS, PARAMS = "group_norm_silu_bwd_totals_kernel", "group_norm_silu_bwd_params_kernel<bf16>"
SAMPLES, GATE = "row_norm_bwd_samples_kernel<bf16>", "gate_residual_bwd_gate_kernel<bf16>"
ROWS, FUSED = "layer_norm_modulate-1152", "gate_residual_layer_norm_modulate-1152"
PAIRS = (
    Pair(
        "group_norm_silu-320x64-bf16-nchw",
        (FWD.format("false,3"),),
        ("group_norm_silu-320x64-bfloat16-nchw", ("_one_read",)),
        two_passes=(FWD.format("false,1"), FWD.format("false,2")),
    ),
    Pair(
        "group_norm_silu_bwd-320x64-bf16-nchw",
        (BWD.format("false,3"), PARAMS),
        ("group_norm_silu_bwd-320x64-bfloat16-nchw", ("_sums", "_apply", "_parameters")),
        two_passes=(BWD.format("false,1"), TOTALS, BWD.format("false,2"), PARAMS),
    ),
    Pair(
        "group_norm_silu-1280x8-bf16-nhwc",
        (FWD.format("true,0"),),
        ("group_norm_silu-1280x8-bfloat16-nhwc", ("_one_read",)),
    ),
    Pair(
        "group_norm_silu_bwd-1280x8-bf16-nhwc",
        (BWD.format("true,0"), PARAMS),
        ("group_norm_silu_bwd-1280x8-bfloat16-nhwc", ("_one_read", "_parameters")),
    ),
    Pair(ROWS, ("row_norm_fwd_kernel<bf16,8,false>",), (f"{ROWS}-bfloat16-sample", ("_forward",))),
    Pair(
        ROWS.replace("-", "_bwd-"),
        ("row_norm_bwd_kernel<bf16,8,false>", SAMPLES),
        (f"{ROWS}-bfloat16-sample", ("_backward",)),
    ),
    Pair(FUSED, ("row_norm_fwd_kernel<bf16,8,true>",), (f"{FUSED}-bfloat16-sample", ("_forward",))),
    Pair(
        FUSED.replace("-", "_bwd-"),
        ("row_norm_bwd_kernel<bf16,8,true>", SAMPLES),
        (f"{FUSED}-bfloat16-sample", ("_backward",)),
    ),
    Pair(
        "gate_residual-sample",
        ("gate_residual_fwd_kernel<bf16,8>",),
        ("gate_residual-1152-bfloat16-sample", ("_forward",)),
    ),
    Pair(
        "gate_residual_bwd-sample",
        ("gate_residual_bwd_kernel<bf16,8>", GATE),
        ("gate_residual-1152-bfloat16-sample", ("_backward", "_sum_partials")),
    ),
    Pair(
        "conv_residual-3x3",
        ("conv_residual_kernel<bf16,128,false>",),
        ("conv_residual-3x3-128x128-bf16", ("_conv_residual",)),
        "conv_residual-3x3-0",
    ),
    Pair(
        "conv_residual-1x1",
        ("conv_residual_kernel<bf16,128,false>",),
        ("conv_residual-1x1-64x64-bf16", ("_conv_residual",)),
    ),
    Pair(
        "group_norm_silu_conv_residual-1x1",
        ("conv_residual_kernel<bf16,128,true>",),
        ("group_norm_silu_conv_residual-128x128-bf16", ("_fold", "_conv_residual")),
    ),
    Pair("zero_flag-zero", ("zero_flag_kernel",), ("zero_flag-bfloat16", ("_scan",))),
)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cuda_rows(pair: Pair, target: str, table: list[Row]) -> list[Row]:
    kernels = pair.two_passes if target == "sm_80" and pair.two_passes else pair.cuda
    known = {row["kernel"]: row for row in table if row["target"] == target}
    return [
        {**known[name], "shared": str(int(known[name]["static_shared"]) + int(known[name]["dynamic_shared"] or 0))}
        for name in kernels
    ]


def triton_rows(pair: Pair, target: str, table: list[Row]) -> list[Row]:
    """Of a kernel's specialisations the one of most instructions, which does all that the op can ask for."""
    case, kernels = pair.triton
    rows = []
    for name in kernels:
        found = [row for row in table if (row["case"], row["kernel"], row["target"]) == (case, name, target)]
        if found:
            row = max(found, key=lambda row: int(row["instructions"]))
            rows.append({**row, "threads": str(32 * int(row["warps"]))})
    assert rows, f"{case} {target} is not in the Triton table"
    return rows


def lines(backend: str, rows: list[Row], bytes_of: Row) -> list[str]:
    found = []
    for number, row in enumerate(rows):
        facts = [row[key] for key in ("registers", "spills", "shared", "threads", "blocks", "instructions")]
        moved = [f"{int(bytes_of['moved']):,}", bytes_of["ratio"], f"{int(bytes_of['dot_flops']):,}"]
        cells = [backend if number == 0 else "", f"`{row['kernel']}`", *facts, *(moved if number == 0 else [""] * 3)]
        found.append(f"| {' | '.join(cells)} |")
    return found


def render() -> str:
    static, triton_static = read(HERE / "static.csv"), read(TRITON / "static.csv")
    traffic, triton_traffic = ({row["case"]: row for row in read(path / "traffic.csv")} for path in (HERE, TRITON))
    page = [
        "# The CUDA kernels beside the Triton ones",
        "",
        "Compiled and counted, not timed: registers, spills, shared memory (bytes of a block), resident blocks and",
        "instructions of the build for each target, bf16; bytes to and from memory of the whole op as the two",
        "`traffic.csv` count them, their ratio to the compulsory ones, and FLOPs on tensor cores. Triton's",
        "convolutions have the tile of its static table. Regenerate with `python -m tests.cuda.simt.compare`.",
    ]
    for target in TARGETS:
        page += ["", f"## {target}", "", f"| {' | '.join(COLUMNS)} |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
        for pair in PAIRS:
            clustered = f"{pair.traffic}-cluster" if pair.two_passes and target != "sm_80" else pair.traffic
            page.append(f"| **{pair.traffic}** |" + " |" * (len(COLUMNS) - 1))
            page += lines("CUDA", cuda_rows(pair, target, static), traffic[clustered])
            theirs = triton_traffic[pair.triton_traffic or pair.traffic]
            page += lines("Triton", triton_rows(pair, target, triton_static), theirs)
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"wrote {PAGE.name}", file=sys.stderr)
