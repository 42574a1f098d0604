"""Measure zeroblock against eager PyTorch and torch.compile: `python benchmarks/run.py` (see README.md).

Prints a line per case, stores every row at once (CSV), and ends with the targets and whether they are met. Nothing
is left out: losses are rows like any other.
"""

import argparse
import contextlib
import gc
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import blocks
import cases
import memory
import models
import overhead
import plot
import report
import store
import torch
import whole
from cases import HIGH, Case, Side, Work

from zeroblock.testing.timing import SAMPLE_SECONDS, Timing, measure

COMPILED = {
    "compile": {},
    "max_autotune": {"mode": "max-autotune"},
    "freezing": {"options": {"freezing": True}},  # weights become constants, laid out at compile time
    "max_autotune_freezing": {"options": {"freezing": True, "max_autotune": True}},
}
BASELINES = {"eager": (), "default": ("compile",), "all": tuple(COMPILED)}
OTHER = " other layout"  # what the names of the baselines in the other layout end with
BOTH_LAYOUTS = ("dense", "frozen")  # groups in which --baselines all tries both
AGREEMENT = {"fp32": 1e-4, HIGH: 1e-4, "bf16": 5e-2}  # of all results together; a guard, not a test
# The only compile of a quick run that does not ask for baselines: compiling takes seconds.
QUICK_COMPILED = "memory_bound/gate_residual-2x4x64-fp32-inference"
NAN = float("nan")


def make_cases(group: str, quick: bool) -> Iterator[Case]:
    if group == "memory_bound":
        return cases.memory_bound(quick)
    if group == "overhead":
        return overhead.cases(quick)
    if group == "saved":
        return itertools.chain(memory.cases(quick), models.cases(quick, "saved"), whole.cases(quick, "saved"))
    if group == "models":
        return models.cases(quick)
    if group in ("whole", "peak"):
        return whole.cases(quick, group)
    return blocks.whole_blocks(group, quick)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in the block after so long, where the system has timers."""

    def stop(*_) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled_candidates(
    case: Case, side: Side, baselines: tuple[str, ...], limit: float
) -> dict[str, Callable[[], object]]:
    """A compiled and warm step per baseline. One that fails to compile, or takes longer than `limit` seconds, must not
    cost the case its other baselines."""
    calls = {}
    for name in baselines:
        if "freezing" in name and case.mode == "training":
            continue
        try:
            with at_most(limit):
                step = side.compiled(**COMPILED[name]).step(case.mode)
                step()
            calls[name] = step
        except Exception as error:
            print(f"{name} failed: {str(error).splitlines()[0]}  ", end="", flush=True)
    return calls


def baseline_candidates(case: Case, side: Side, baselines: tuple[str, ...], limit: float) -> dict[str, Callable]:
    """What zeroblock is compared with; with all baselines, whole blocks of images in both layouts."""
    calls = {"eager": side.step(case.mode)} | compiled_candidates(case, side, baselines, limit)
    if baselines == BASELINES["all"] and case.group in BOTH_LAYOUTS and side.has_layouts():
        other = side.in_other_layout()
        calls[f"eager{OTHER}"] = other.step(case.mode)
        found = compiled_candidates(case, other, baselines, limit)
        calls |= {name + OTHER: step for name, step in found.items()}
    return calls


def candidates(case: Case, work: Work, baselines: tuple[str, ...], limit: float) -> dict[str, Callable[[], object]]:
    calls = {"eager": work.eager.step(case.mode), "zeroblock": work.own.step(case.mode)}
    if not case.op.startswith("zero_check"):  # there the two sides are different work on purpose
        check_agreement(case, calls)
        calls |= baseline_candidates(case, work.eager, baselines, limit)
    if work.floor is not None:
        calls["floor"] = work.floor
    return calls


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.dtype == HIGH else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_agreement(case: Case, calls: dict[str, Callable[[], object]]) -> None:
    """Both sides must give the same results before either is timed: relative L2 distance of all of them together."""

    def flat(result) -> torch.Tensor:
        tensors = result if isinstance(result, tuple) else (result,)
        return torch.cat([tensor.detach().double().flatten() for tensor in tensors])

    expected, actual = flat(calls["eager"]()), flat(calls["zeroblock"]())
    distance = ((actual - expected).norm() / expected.norm()).item()
    if not distance <= AGREEMENT[case.dtype]:
        raise RuntimeError(f"results differ from eager by {distance:.2g} (relative L2), so no time is taken")


def time_row(case: Case, baselines: tuple[str, ...], options: argparse.Namespace) -> dict:
    torch._dynamo.reset()  # one fresh compile per shape, never a recompile with dynamic sizes
    with torch.set_grad_enabled(case.mode == "training"), precision(case):
        calls = candidates(case, case.work(), baselines, options.compile_seconds)
        rounds = 3 if options.quick else 7
        timing = measure(calls, options.seconds, rounds, sample_seconds=options.sample_ms / 1e3)
    return {"unit": "us", **compare(timing)}


def compare(timing: Timing) -> dict:
    medians = {name: timing.median(name) for name in timing.times}
    baselines = [name for name in medians if name not in ("zeroblock", "floor")]
    others = [medians.pop(name) for name in baselines if name.endswith(OTHER)]
    best = timing.fastest([name for name in baselines if name in ("eager", "compile")])
    best_of_all = timing.fastest(baselines)
    ratio, ratio_all = timing.ratio(best, "zeroblock"), timing.ratio(best_of_all, "zeroblock")
    return {
        **medians, "other_layout": min(others, default=NAN), "best": best,
        "ratio": ratio.median, "lo": ratio.lo, "hi": ratio.hi, "p20": ratio.p20, "p80": ratio.p80,
        "best_all": best_of_all, "ratio_all": ratio_all.median, "lo_all": ratio_all.lo,
        "floor_percent": 100 / timing.ratio("zeroblock", "floor").median if "floor" in medians else NAN,
        "rounds": ratio.rounds, "dropped": timing.dropped(best, "zeroblock"),
    }  # fmt: skip


def bytes_row(eager: int, own: int, floor: float = NAN) -> dict:
    ratio = eager / own if own else NAN
    return {
        "unit": "bytes", "eager": float(eager), "zeroblock": float(own), "floor": floor, "best": "eager",
        "ratio": ratio, "lo": ratio, "hi": ratio, "p20": ratio, "p80": ratio, "best_all": "eager", "ratio_all": ratio,
        "lo_all": ratio, "rounds": 1, "dropped": 0,
    }  # fmt: skip


def saved_row(case: Case) -> dict:
    work = case.work()
    return bytes_row(memory.saved_bytes(work.eager), memory.saved_bytes(work.own))


BYTES = {"saved": saved_row, "peak": lambda case: bytes_row(*whole.high_water(case))}


def progress(row: dict) -> str:
    if row["unit"] == "bytes":
        return f"eager {row['eager']:.0f}  zeroblock {row['zeroblock']:.0f} bytes   {1 / row['ratio']:.3f} of eager"
    names = (*("eager", *COMPILED), "other_layout", "zeroblock", "floor")
    times = "  ".join(f"{name} {row[name]:.4g}" for name in names if row[name] == row[name])
    line = f"{times} us   {row['ratio']:.2f}x [{row['lo']:.2f}, {row['hi']:.2f}] vs {row['best']}"
    if row["best_all"] != row["best"]:
        line += f"   {row['ratio_all']:.2f}x [{row['lo_all']:.2f}] vs {row['best_all']}"
    return line + (f"   {row['floor_percent']:.0f} % of floor" if row["floor_percent"] == row["floor_percent"] else "")


def prepare(selected: list[Case], options: argparse.Namespace) -> None:
    """Fill the compiler's cache, so that the measuring run need not wait for it; times nothing."""
    baselines = BASELINES[options.baselines or "default"]
    for count in options.threads:
        torch.set_num_threads(count)
        for i, case in enumerate(selected, 1):
            torch._dynamo.reset()
            start = time.perf_counter()
            with torch.set_grad_enabled(case.mode == "training"), precision(case):
                baseline_candidates(case, case.work().eager, baselines, options.compile_seconds)
            print(f"[{i:3d}/{len(selected)}] {case.id}-t{count} {time.perf_counter() - start:.1f} s", flush=True)


def measured_row(case: Case, threads: int, options: argparse.Namespace) -> dict:
    row = {name: NAN for name in store.NUMBERS} | {"case": case.id, "threads": threads}
    row |= {name: getattr(case, name) for name in ("group", "op", "shape", "layout", "dtype", "mode")}
    if case.group in BYTES:
        return row | BYTES[case.group](case)
    everything = not options.quick or options.baselines is not None
    baselines = BASELINES[options.baselines or "default"] if everything or case.id == QUICK_COMPILED else ()
    return row | time_row(case, baselines, options)


def run(options: argparse.Namespace) -> int:
    groups = options.group or list(store.GROUPS)
    selected = [case for group in groups for case in make_cases(group, options.quick)]
    selected = [case for case in selected if any(part in case.id for part in options.filter.split(","))]
    if options.prepare:
        prepare([c for c in selected if c.group not in BYTES and not c.op.startswith("zero_check")], options)
        return 0
    folder, common, failed = options.out / store.machine_slug(), store.provenance(), 0
    torch._dynamo.reset()  # loads the compiler
    gc.freeze()  # what is loaded by now stays: collections between the cases need not walk it
    for threads in options.threads:
        torch.set_num_threads(threads)
        if threads != options.threads[0]:  # bytes do not depend on the number of threads
            selected = [case for case in selected if case.group not in BYTES]
        for i, case in enumerate(selected, 1):
            print(f"[{i:3d}/{len(selected)}] {case.id}-t{threads}  ", end="", flush=True)
            try:
                row = measured_row(case, threads, options)
            except Exception as error:
                failed += 1
                print(f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            store.write(folder / f"{case.group}.csv", [row | common])
            print(progress(row), flush=True)
    print(f"\n{report.summary(store.read_all(folder, groups))}\n\nresults: {folder}")
    if failed:
        print(f"{failed} cases failed: see the lines with FAILED above")
    if not options.quick:
        plot.draw(folder)
    return 1 if failed else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", action="append", choices=store.GROUPS, help="repeatable; default: all groups")
    parser.add_argument("--filter", default="", help="only cases whose id contains one of these, comma-separated")
    parser.add_argument("--threads", default="1,2", type=lambda s: [int(n) for n in s.split(",")], help="default 1,2")
    parser.add_argument("--seconds", default=2.0, type=float, help="time per case, after compiling (default 2)")
    parser.add_argument(
        "--sample-ms", default=SAMPLE_SECONDS * 1e3, type=float, help="shorter calls are repeated within one sample"
    )
    parser.add_argument("--baselines", choices=BASELINES, help="default: eager and torch.compile (--quick: eager)")
    parser.add_argument(
        "--compile-seconds", default=120.0, type=float, help="a baseline that takes longer is left out (default 120)"
    )
    parser.add_argument("--prepare", action="store_true", help="only compile the baselines, into the compiler's cache")
    parser.add_argument("--report", action="store_true", help="only print the tables of the stored results (markdown)")
    return parse_common(parser, arguments)


def parse_common(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """With the options of every script that stores times; the parser has --seconds of its own."""
    parser.add_argument("--allocator", default="pinned", choices=store.ALLOCATORS, help="see README.md")
    parser.add_argument("--out", default=store.RESULTS, type=Path, help="default: benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that everything runs, not how fast")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = min(options.seconds, 0.02)
        if options.out == store.RESULTS:
            parser.error("--quick needs --out: its times must not replace measured ones")
    return options


def use_allocator(name: str) -> None:
    """malloc reads its settings once, at start: begin again under the wanted ones."""
    if name != store.allocator():
        pinned = store.ALLOCATORS["pinned"]
        kept = {key: value for key, value in os.environ.items() if key not in pinned}
        os.execve(sys.executable, sys.orig_argv, kept | store.ALLOCATORS[name])


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    if options.report:
        print(report.markdown(options.out))
        sys.exit(0)
    use_allocator(options.allocator)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compile workers beside the measurement
    sys.exit(run(options))
