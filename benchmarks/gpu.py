"""Measure zeroblock on a GPU: `python benchmarks/gpu.py` (CUDA or ROCm; see README.md).

The cases of run.py on the device, each from a CUDA-graph replay between two device events (calls that cannot be
captured are timed as launched, column `timer`). Every call of a replay works on other buffers, more than twice the L2
cache in all, so that nothing is found in cache that would not be there in a model. Candidates are interleaved in random
order. Ceilings, a large copy and a large bf16 product, are measured in the same run.
"""

import argparse
import csv
import datetime
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from zbench import blocks, ops, store
from zbench.candidates import check_agreement
from zbench.case import DTYPES, Case, Side, as_tuple

import zeroblock
from zeroblock.testing.timing import Timing

COMPILED = {"compile": {}, "max_autotune": {"mode": "max-autotune-no-cudagraphs"}}  # the timer captures, not inductor
BASELINES = {"eager": (), "compile": ("compile",), "all": tuple(COMPILED)}
# cuDNN's fp32 convolutions round their operands to tf32 unless told otherwise: what eager and zeroblock may differ by.
AGREEMENT = {"fp32": 1e-2}
COLUMNS = (
    "group", "case", "op", "shape", "layout", "dtype", "mode", "timer", "sets",
    "eager", "compile", "max_autotune", "zeroblock", "best", "ratio", "lo", "hi",  # us; zeroblock against the best
    "bytes", "gb_s", "copy_percent", "flops", "tflop_s", "matmul_percent",  # of zeroblock
    "copy_gb_s", "matmul_tflop_s", "device", "torch", "zeroblock_version", "commit", "date",
)  # fmt: skip
MOST_SETS = 64
NAN = float("nan")


def make_cases(quick: bool) -> Iterator[Case]:
    yield from ops.cases(quick)
    if not quick:
        yield from ops.large_token_cases()
    for group in ("dense", "zero"):
        yield from (case for case in blocks.cases(quick, group) if case.dtype in DTYPES)


def step(side: Side, mode: str) -> Callable[[], object]:
    """The forward, or forward and backward with all gradients; nothing but device work, so that it can be captured."""
    if mode == "inference":
        return lambda: side.function(*side.inputs)
    outputs = as_tuple(side.function(*side.inputs))
    generator = torch.Generator(device=outputs[0].device).manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, device=y.device).to(y) for y in outputs]

    def train() -> tuple:
        outputs = as_tuple(side.function(*side.inputs))
        return *outputs, *torch.autograd.grad(outputs, side.wrt, grads)

    return train


class Replay:
    """A sample is the time of one call, averaged over calls on every set of buffers in turn."""

    def __init__(self, calls: list[Callable[[], object]], device: str):
        self.calls, self.device, self.timer = calls, device, "wall"
        if device == "cpu":
            self.run = self._launch
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._launch()
        torch.cuda.current_stream().wait_stream(stream)
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._launch()
            self.run, self.timer = graph.replay, "graph"
        except RuntimeError as error:
            print(f"(no graph: {str(error).splitlines()[0]}) ", end="", flush=True)
            torch.cuda.synchronize()
            self.run, self.timer = self._launch, "events"

    def _launch(self) -> None:
        for call in self.calls:
            call()

    def sample(self) -> float:
        """Microseconds per call."""
        if self.device == "cpu":
            start = time.perf_counter()
            self.run()
            return (time.perf_counter() - start) * 1e6 / len(self.calls)
        self.start.record()
        self.run()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) * 1e3 / len(self.calls)


def cache_bytes(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size


def build_sets(case: Case, device: str) -> list:
    """Copies of the case's work, their inputs larger than twice the L2 cache together."""
    with torch.device(device):
        first = case.work()
        size = sum(t.numel() * t.element_size() for t in first.eager.wrt)
        count = 2 if device == "cpu" else max(2, min(MOST_SETS, math.ceil(2 * cache_bytes(device) / size) + 1))
        return [first, *(case.work() for _ in range(count - 1))]


def candidates(case: Case, device: str, baselines: str) -> dict[str, Replay]:
    works = build_sets(case, device)
    limit = AGREEMENT.get(case.dtype) if device == "cuda" else None
    check_agreement(case, step(works[0].eager, case.mode), step(works[0].own, case.mode), limit)
    sides = {"eager": [w.eager for w in works], "zeroblock": [w.own for w in works]}
    found = {name: Replay([step(side, case.mode) for side in all_], device) for name, all_ in sides.items()}
    for name in BASELINES[baselines]:
        torch._dynamo.reset()
        try:
            function = works[0].eager.compiled(**COMPILED[name]).function
            calls = [step(Side(function, s.inputs, s.wrt), case.mode) for s in sides["eager"]]
            if case.group != "memory_bound":  # a module's weights are its own: one compiled module, one set
                calls = calls[:1]
            found[name] = Replay(calls, device)
        except Exception as error:
            print(f"({name} failed: {str(error).splitlines()[0]}) ", end="", flush=True)
    return found


def measure(replays: dict[str, Replay], rounds: int) -> Timing:
    timing = Timing({name: [] for name in replays}, {name: [True] * rounds for name in replays})
    order, shuffle = list(replays), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            timing.times[name].append(replays[name].sample())
    return timing


def least_bytes(case: Case) -> float:
    """Bytes that the result needs at least: every activation read or written once (NaN for whole blocks)."""
    if case.group != "memory_bound":
        return NAN
    passes = ops.OPS[case.op].passes[case.mode]
    return passes * math.prod(map(int, case.shape.split("x"))) * DTYPES[case.dtype].itemsize


def count_flops(case: Case, device: str) -> float:
    """Of one call by eager: products and convolutions (NaN for memory-bound cases)."""
    if case.group == "memory_bound":
        return NAN
    with torch.device(device):
        side = case.work().eager
    with FlopCounterMode(display=False) as counter:
        outputs = as_tuple(side.function(*side.inputs))
        if case.mode == "training":  # grad() does not work under the counter
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    return float(counter.get_total_flops())


def ceilings(device: str, quick: bool, rounds: int) -> tuple[float, float]:
    """(GB/s of a copy, read and write counted; TFLOP/s of a bf16 product)."""
    words, side = (1 << 16, 64) if quick else (1 << 28, 8192)
    source = torch.ones(words, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "mm": lambda: a @ b}
    timing = measure({name: Replay([call], device) for name, call in calls.items()}, rounds)
    return 8 * words / timing.median("copy") / 1e3, 2 * side**3 / timing.median("mm") / 1e6


def device_name(device: str) -> str:
    return store.cpu_model() if device == "cpu" else torch.cuda.get_device_name(0)


def measured_row(case: Case, options: argparse.Namespace, copy: float, matmul: float) -> dict:
    with torch.set_grad_enabled(case.mode == "training"):
        replays = candidates(case, options.device, options.baselines)
        timing = measure(replays, options.rounds)
        flops = count_flops(case, options.device)
    names = [name for name in replays if name != "zeroblock"]
    best = timing.fastest(names)
    ratio, own, size = timing.ratio(best, "zeroblock"), timing.median("zeroblock"), least_bytes(case)
    gb_s, tflop_s = size / own / 1e3, flops / own / 1e6
    skipped = case.group == "zero"  # its products are not executed: no rate
    row = {name: NAN for name in COLUMNS} | {"case": case.id}
    row |= {name: getattr(case, name) for name in ("group", "op", "shape", "layout", "dtype", "mode")}
    return (
        row
        | {name: timing.median(name) for name in replays}
        | {
            "timer": replays["zeroblock"].timer,
            "sets": len(replays["zeroblock"].calls),
            "best": best,
            "ratio": ratio.median,
            "lo": ratio.lo,
            "hi": ratio.hi,
            "bytes": size,
            "gb_s": gb_s,
            "copy_percent": 100 * gb_s / copy,
            "flops": flops,
            "tflop_s": NAN if skipped else tflop_s,
            "matmul_percent": NAN if skipped else 100 * tflop_s / matmul,
            "copy_gb_s": copy,
            "matmul_tflop_s": matmul,
        }
    )


def run(options: argparse.Namespace) -> int:
    common = {
        "device": device_name(options.device),
        "torch": torch.__version__,
        "zeroblock_version": zeroblock.__version__,
        "commit": store.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    selected = [c for c in make_cases(options.quick) if any(part in c.id for part in options.filter.split(","))]
    copy, matmul = ceilings(options.device, options.quick, options.rounds)
    print(f"{common['device']}: copy {copy:.0f} GB/s, bf16 product {matmul:.0f} TFLOP/s", flush=True)
    path = options.out / re.sub(r"[^a-z0-9]+", "-", common["device"].lower()).strip("-") / "gpu.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for i, case in enumerate(selected, 1):
            print(f"[{i:3d}/{len(selected)}] {case.id}  ", end="", flush=True)
            try:
                row = measured_row(case, options, copy, matmul) | common
            except Exception as error:
                failed += 1
                print(f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            writer.writerow({name: store.text(row[name]) for name in COLUMNS})
            file.flush()
            rate = f"{row['copy_percent']:.0f} % of copy" if not math.isnan(row["bytes"]) else ""
            print(f"{row['zeroblock']:.1f} us   {row['ratio']:.2f}x vs {row['best']}   {rate}", flush=True)
    print(f"results: {path}")
    return 1 if failed else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="only cases whose id contains one of these, comma-separated")
    parser.add_argument("--rounds", default=21, type=int, help="replays of each candidate (default 21)")
    parser.add_argument("--baselines", default="all", choices=tuple(BASELINES), help="all: also with max-autotune")
    parser.add_argument("--out", default=store.RESULTS, type=Path, help="default: benchmarks/results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: shows that everything runs")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that everything runs, not how fast")
    options = parser.parse_args(arguments)
    if (options.quick or options.device == "cpu") and options.out == store.RESULTS:
        parser.error("--quick and --device cpu need --out: their times must not replace measured ones")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: PyTorch sees no CUDA or ROCm device")
    return options


if __name__ == "__main__":
    sys.exit(run(parse(sys.argv[1:])))
