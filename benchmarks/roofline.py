"""A lower bound of every kernel's time on several GPUs, and what share of the bandwidth it can use:
`python benchmarks/roofline.py` writes roofline.md (with triton installed).

No clock runs: bytes are the compulsory ones of an op at a real shape, times the ratio of moved to compulsory bytes that
the interpreter and the emulator count exactly (traffic.csv of tests/triton and tests/cuda/simt); FLOPs are those of the
products; rates are the data sheets'; registers and blocks are those of the compiled kernels (static.csv beside).
"""

import csv
import functools
import math
import sys
from pathlib import Path

from zbench.busy import COPY, GPU, GPUS, LATENCY_NS, WAITING, Use
from zbench.kernel_rows import KERNELS, SIZE, Cuda, Kernel, Started, started

ROOT = Path(__file__).parent.parent
TRITON, CUDA = ROOT / "tests/triton", ROOT / "tests/cuda/simt"
PAGE = Path(__file__).parent / "roofline.md"
COLUMNS = (
    *("GPU", "by", "launches", "registers", "spills", "blocks", "threads", "bytes", "in flight", "bandwidth"),
    "loses most by",
)


@functools.cache
def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def traffic(folder: Path, case: str) -> dict[str, str]:
    return next(row for row in table(folder / "traffic.csv") if row["case"] == case)


def work(kernel: Kernel, shape: tuple[int, ...]) -> tuple[float, float]:
    """(compulsory bytes, FLOPs) in bf16: activations and weights, per-channel operands left out."""
    n, width = math.prod(shape), shape[1] if len(shape) == 4 else shape[2]
    weight = {"": 0, "3x3": 9 * width * width, "1x1": width * width, "linear": 4 * width * width}[kernel.product]
    return SIZE * (kernel.passes * n + weight), 2 * weight * n / width


def bound(moved: float, flops: float, gpu: GPU) -> tuple[float, str]:
    """(microseconds, what binds): no kernel that moves these bytes and does these FLOPs is faster."""
    memory, products = moved / gpu.gb_s / 1e3, flops / gpu.bf16_tflop_s / 1e6
    return (memory, "memory") if memory >= products else (products, "products")


def ratio(row: dict[str, str]) -> float:
    """Bytes moved over compulsory ones, without workspaces: their share depends on the shape."""
    return (int(row["moved"]) - int(row["partials"])) / int(row["compulsory"])


def sectors(row: dict[str, str]) -> float:
    return int(row["sectors"]) / int(row["requested"])


# ---- what a kernel can use of a GPU ---------------------------------------------------------------------------------


def triton_use(kernel: Kernel, found: Started, gpu: GPU) -> tuple[dict[str, str], Use]:
    """(its row of static.csv, what it keeps busy)"""
    row = next(
        row
        for row in table(TRITON / "static.csv")
        if (row["case"], row["kernel"], row["target"]) == (*kernel.static, gpu.target)
        and int(row["warps"]) == found.warps(gpu.target)
    )
    counted, compulsory = traffic(TRITON, kernel.traffic), work(kernel, kernel.shapes[0])[0]
    return row, Use(
        block_kb=found.block_kb,
        ahead=found.ahead,
        blocks=int(row["blocks"]),
        programs=found.programs,
        reads=kernel.reads / kernel.passes,
        moved=ratio(counted),
        partials=found.partials / compulsory,
        sectors=sectors(counted),
    )


def cuda_use(kernel: Kernel, cuda: Cuda, gpu: GPU) -> tuple[dict[str, str], Use]:
    """The same. The emulator counts no sectors; of launches without a fixed number of blocks there are enough."""
    row = next(
        row
        for row in table(CUDA / "static.csv")
        if (row["kernel"], row["target"], bool(row["threads"])) == (cuda.kernel, gpu.target, True)
    )
    compulsory, blocks = work(kernel, kernel.shapes[0])[0], int(row["blocks"])
    return row, Use(
        block_kb=16 * cuda.loads * int(row["threads"]) / 1000,
        ahead=cuda.ahead,
        blocks=blocks,
        programs=cuda.blocks or blocks * gpu.processors,
        reads=kernel.reads / kernel.passes,
        moved=ratio(traffic(CUDA, cuda.traffic)),
        partials=8 * cuda.sums * kernel.shapes[0][-1] * cuda.blocks / compulsory,
        sectors=1.0,
    )


def line(gpu: GPU, by: str, kernel: Kernel, launches: int, row: dict[str, str], threads: int, use: Use) -> str:
    cells = [f"{gpu.name} ({gpu.target})", by, str(launches), row["registers"], row["spills"], row["blocks"]]
    cells += [f"{int(row['blocks']) * threads}", f"{use.moved + use.partials:.2f}"]
    if bound(*work(kernel, kernel.shapes[0]), gpu)[1] == "products":
        cells += ["", "", "the products bind"]
    else:
        share, loss = use.expected(gpu)
        cells += [f"{use.in_flight(gpu):.0f} / {gpu.needed(use.reads):.0f}", f"{share:.0%}", loss]
    return "| " + " | ".join(cells) + " |"


def facts(kernel: Kernel) -> list[str]:
    """A row per GPU and backend."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "| --- | --- |" + " ---: |" * (len(COLUMNS) - 3) + " --- |",
    ]
    found = started(kernel)
    for gpu in GPUS:
        row, use = triton_use(kernel, found, gpu)
        threads = int(row["warps"]) * (64 if gpu.target.startswith("gfx") else 32)
        lines.append(line(gpu, "Triton", kernel, found.count, row, threads, use))
    for gpu in GPUS:
        cuda = kernel.cuda.get(gpu.target) if isinstance(kernel.cuda, dict) else kernel.cuda
        if cuda is not None and gpu.target.startswith("sm_"):
            row, use = cuda_use(kernel, cuda, gpu)
            lines.append(line(gpu, "CUDA", kernel, cuda.launches, row, int(row["threads"]), use))
    return lines


def bounds(kernel: Kernel) -> list[str]:
    """A row per shape."""
    moved = ratio(traffic(TRITON, kernel.traffic))
    lines = [
        "| shape | MB | GFLOP | " + " | ".join(gpu.name for gpu in GPUS) + " | bound by |",
        "| --- |" + " ---: |" * (len(GPUS) + 2) + " --- |",
    ]
    for shape in kernel.shapes:
        compulsory, flops = work(kernel, shape)
        found = [bound(compulsory * moved, flops, gpu) for gpu in GPUS]
        times, binding = " | ".join(f"{time:.1f}" for time, _ in found), sorted({by for _, by in found})
        size = f"{compulsory * moved / 1e6:.1f} | {flops / 1e9:.2f}"
        lines.append(f"| {'x'.join(map(str, shape))} | {size} | {times} | {', '.join(binding)} |")
    return lines


HEAD = f"""\
# What the kernels can reach

**Model, not measured.** Of each kernel first what it can use of a GPU, at the first shape of its second table; then,
for every shape, microseconds that no kernel can beat which moves these bytes and executes these FLOPs, at data-sheet
rates, in bf16. Launches, tails and clocks are left out: real times are longer. Regenerate with
`python benchmarks/roofline.py`.

- launches: of the whole op. registers (of a thread), spills (bytes), blocks and threads (resident on a multiprocessor):
  of the kernel that moves the bytes, as compiled (`static.csv` in `tests/triton` and `tests/cuda/simt`).
- bytes: moved over compulsory, counted exactly (`traffic.csv` there), with the partial sums of this shape. Sectors:
  bytes in whole 32-byte sectors over those asked for (Triton; the emulator counts none).
- in flight: KB that the blocks on a multiprocessor ask for before they wait / KB that bandwidth x {LATENCY_NS} ns wants
  of a kernel that reads so much.
- bandwidth: expected share of the data sheet's, counting compulsory bytes alone. A copy reaches {COPY:.0%}; a block
  that loads nothing ahead has loads in flight for {WAITING:.0%} of its life (both assumed). Last: what costs most.

- a second read: of channels-last group norms of large images, in two passes. From sm_90 on clusters of CUDA's read once
  at every stage of the U-Nets of Stable Diffusion 1.5 and XL and of ADM, for batches of 1, 2 and 8, but at 960 x 128 x
  128 and 256 x 256 x 256, in backward also at 960 and 1920 x 64 x 64 and 320 and 640 x 128 x 128
  (`tests/cuda/test_cluster.py`). The plan measures both; where nothing is measured it takes CUDA's where they alone
  read once.
- idle lanes of rows that no power of 2 holds are no loss here: `python -m tests.triton.streams` has them, beside the
  cycles that instructions and bytes of a row take.

| GPU | GB/s | bf16 TFLOP/s | multiprocessors |
| --- | ---: | ---: | ---: |
"""


def render() -> str:
    lines = [HEAD + "\n".join(f"| {g.name} | {g.gb_s:g} | {g.bf16_tflop_s:g} | {g.processors} |" for g in GPUS)]
    for kernel in KERNELS:
        whole = sectors(traffic(TRITON, kernel.traffic))
        lines += ["", f"## {kernel.op}", "", f"Sectors {whole:.2f}.", "", *facts(kernel), "", *bounds(kernel)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"wrote {PAGE}", file=sys.stderr)
