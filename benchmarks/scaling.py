"""How blocks scale: `python benchmarks/scaling.py` times a ResBlock and a DiT block against batch, channels, resolution
and threads, beside the least time that the machine's products and its memory allow.

Both limits are measured in the same run, for each number of threads: the rate of the library's fastest large product
(a GEMM or a 3x3 convolution), and that of a copy beyond the caches. FLOPs are those of eager's products, so that
Winograd's convolutions may pass their limit; bytes are the least: inputs and weights read once, results written once,
in the forward and again in the backward pass. Writes scaling.csv and a picture per mode.
"""

import argparse
import csv
import gc
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from zbench import store
from zbench.blocks import dit_blocks, resblocks
from zbench.case import MODES, Side, Work, module_work
from zbench.options import parse_common, use_allocator
from zbench.plot import GRID, INK

from zeroblock.testing.timing import measure

COLUMNS = (
    "block", "axis", "batch", "channels", "size", "threads", "mode",
    "eager", "zeroblock", "flop_limit", "bandwidth_limit",  # us
    "gflop", "mbytes", "gflop_s", "gb_s", *("allocator", "machine", "torch", "zeroblock_version", "commit", "date"),
)  # fmt: skip
NAMES = {"resblock": "ResBlock", "dit_block": "DiT block"}
AXES = ("batch", "channels", "size", "threads")
SIZES = {"resblock": "height and width", "dit_block": "tokens"}  # what "size" means
LINES = {
    "eager": ("#555555", "o-"),
    "zeroblock": ("#2e8b57", "o-"),
    "flop_limit": ("#c0392b", "--"),
    "bandwidth_limit": ("#3b6fb6", ":"),
}


@dataclass(frozen=True)
class Point:
    """A block: `size` is the height and width of a ResBlock's images, the number of tokens of a DiT block."""

    block: str
    batch: int
    channels: int
    size: int
    threads: int

    def work(self, mode: str) -> Work:
        torch.manual_seed(0)
        if self.block == "resblock":
            shape = (self.batch, self.channels, self.size, self.size)
            pair = resblocks(shape, self.channels, torch.float32, "nchw", zero=False)
        else:
            pair = dit_blocks((self.batch, self.size, self.channels), torch.float32, zero=False)
        return module_work(*pair, mode)


def sweeps(quick: bool, threads: list[int]) -> Iterator[tuple[str, list[Point]]]:
    """(axis, points): everything at its middle value but one."""
    most = threads[-1]
    if quick:
        bases = Point("resblock", 1, 32, 4, most), Point("dit_block", 1, 64, 4, most)
        axes = {"batch": (1, 2), "channels": (64, 128), "size": (4, 8)}
        values = {base.block: axes for base in bases}
    else:
        bases = Point("resblock", 2, 256, 32, most), Point("dit_block", 4, 384, 256, most)
        values = {
            "resblock": {"batch": (1, 2, 4, 8), "channels": (64, 128, 256, 512), "size": (8, 16, 32, 64)},
            "dit_block": {"batch": (1, 2, 4, 8), "channels": (192, 384, 768, 1152), "size": (64, 256, 512, 1024)},
        }
    for base in bases:
        for axis, chosen in {**values[base.block], "threads": threads}.items():
            yield axis, [replace(base, **{axis: value}) for value in chosen]


def _rate(calls: dict, amount: dict[str, float], seconds: float) -> float:
    """The largest amount per second."""
    timing = measure(calls, seconds, min_rounds=5)
    return max(amount[name] / min(timing.times[name]) * 1e6 for name in calls)


def ceilings(quick: bool, seconds: float) -> tuple[float, float]:
    """(FLOP/s, bytes/s) of this many threads."""
    n, channels, elements = (64, 16, 1 << 12) if quick else (1536, 256, 1 << 25)
    a, b = torch.randn(n, n), torch.randn(n, n)
    x, weight = torch.randn(2, channels, 32, 32), torch.randn(channels, channels, 3, 3)
    xl, wl = x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last)
    conv = 2 * x.numel() * weight.numel() / channels
    products = {
        "gemm": lambda: a @ b,
        "conv": lambda: F.conv2d(x, weight, padding=1),
        "conv channels-last": lambda: F.conv2d(xl, wl, padding=1),
    }
    source, target = torch.ones(elements), torch.empty(elements)
    with torch.no_grad():
        flops = _rate(products, {"gemm": 2.0 * n**3, "conv": conv, "conv channels-last": conv}, seconds)
        moved = _rate({"copy": lambda: target.copy_(source)}, {"copy": 8.0 * elements}, seconds)
    return flops, moved


def count(side: Side, mode: str) -> tuple[float, float]:
    """(FLOPs of the products, least bytes) of a step."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        side.function(*side.inputs)
    parameters = sum(t.nbytes for t in side.wrt[len(side.inputs) :])
    inputs = sum(t.nbytes for t in side.inputs)
    result = side.inputs[0].nbytes  # of the input's size
    # Backward: each product has two gradients; dy and what the forward read are read, every gradient is written.
    passes, results = (1, 1) if mode == "inference" else (3, 2)
    return float(passes * counter.get_total_flops()), float(passes * (inputs + parameters) + results * result)


def measured(point: Point, mode: str, seconds: float, limits: tuple[float, float]) -> dict:
    torch.set_num_threads(point.threads)
    with torch.set_grad_enabled(mode == "training"):
        work = point.work(mode)
        calls = {"eager": work.eager.step(mode), "zeroblock": work.own.step(mode)}
        timing = measure(calls, seconds, min_rounds=5)
    flops, moved = count(work.eager, mode)
    return {
        "mode": mode,
        "eager": timing.median("eager"),
        "zeroblock": timing.median("zeroblock"),
        "flop_limit": flops / limits[0] * 1e6,
        "bandwidth_limit": moved / limits[1] * 1e6,
        "gflop": flops / 1e9,
        "mbytes": moved / 1e6,
        "gflop_s": limits[0] / 1e9,
        "gb_s": limits[1] / 1e9,
    }


def run(options: argparse.Namespace) -> list[dict]:
    common = store.provenance()
    gc.freeze()  # what is loaded by now stays: collections between the points need not walk it
    rates = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        rates[threads] = ceilings(options.quick, options.seconds)
        print(
            f"{threads} threads: {rates[threads][0] / 1e9:.0f} GFLOP/s, {rates[threads][1] / 1e9:.1f} GB/s", flush=True
        )
    chosen = sweeps(options.quick, options.threads)
    points = [(axis, point, mode) for axis, sweep in chosen for point in sweep for mode in MODES]
    known: dict[tuple[Point, str], dict] = {}  # the middle of the sweeps is one point
    rows, start = [], time.perf_counter()
    for i, (axis, point, mode) in enumerate(points, 1):
        if (point, mode) not in known:
            known[point, mode] = measured(point, mode, options.seconds, rates[point.threads])
        row = vars(point) | {"axis": axis} | known[point, mode] | common
        rows.append({name: row[name] for name in COLUMNS})
        print(
            f"[{i:3d}/{len(points)}] {time.perf_counter() - start:4.0f} s  {point.block} {axis} {getattr(point, axis)} "
            f"{mode}: eager {row['eager']:.4g}  zeroblock {row['zeroblock']:.4g} us  "
            f"limits {row['flop_limit']:.4g}, {row['bandwidth_limit']:.4g} us",
            flush=True,
        )
    return rows


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: store.text(value) for name, value in row.items()} for row in rows)


def draw(folder: Path, rows: list[dict]) -> list[Path]:
    """One picture per mode: a row per block, a column per axis."""
    try:
        import matplotlib
    except ImportError:
        print("scaling: matplotlib is not installed, so no pictures are drawn")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for mode in MODES:
        figure, grid = plt.subplots(len(NAMES), len(AXES), figsize=(13, 6.6), squeeze=False, layout="constrained")
        for axes, block in zip(grid, NAMES, strict=True):
            for panel, axis in zip(axes, AXES, strict=True):
                chosen = [r for r in rows if (r["block"], r["axis"], r["mode"]) == (block, axis, mode)]
                _panel(panel, chosen, axis, SIZES[block] if axis == "size" else axis)
                panel.set_title(NAMES[block] if axis == "batch" else "", fontsize=10, loc="left")
            axes[0].set_ylabel("ms", fontsize=9)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, frameon=False, ncols=len(LINES), loc="outside lower center")
        step = "inference" if mode == "inference" else "training step (forward + backward)"
        figure.suptitle(f"{step}, float32: {rows[0]['machine']}, torch {rows[0]['torch']}", fontsize=12, color=INK)
        path = folder / f"scaling-{mode}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written


def _panel(panel, rows: list[dict], axis: str, label: str) -> None:
    places = [row[axis] for row in rows]
    for name, (color, style) in LINES.items():
        panel.plot(places, [row[name] / 1e3 for row in rows], style, color=color, ms=4, label=name.replace("_", " "))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(places, [str(place) for place in places])
    panel.minorticks_off()
    panel.set_xlabel(label, fontsize=9)
    panel.tick_params(labelsize=8, colors=INK)
    panel.grid(color=GRID)
    panel.spines[["top", "right"]].set_visible(False)


def parse(arguments: list[str]) -> argparse.Namespace:
    cores = os.cpu_count() or 1
    doubled = sorted({2**i for i in range(int(math.log2(cores)) + 1)} | {cores})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--threads",
        default=doubled,
        type=lambda s: sorted({int(n) for n in s.split(",")}),
        help=f"default {','.join(map(str, doubled))}; all but the sweep of threads has the most of them",
    )
    parser.add_argument("--seconds", default=1.0, type=float, help="time per point (default 1)")
    return parse_common(parser, arguments)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    use_allocator(options.allocator)
    folder = options.out / store.machine_slug()
    rows = run(options)
    write(folder / "scaling.csv", rows)
    for path in (folder / "scaling.csv", *draw(folder, rows)):
        print(path)
