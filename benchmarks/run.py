"""Measure zeroblock against eager PyTorch and torch.compile: `python benchmarks/run.py` (see README.md).

Prints a line per case, stores every row at once (CSV), and ends with the targets and whether they are met. Nothing
is left out: losses are rows like any other.
"""

import argparse
import gc
import itertools
import os
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
from cases import Case, Side, Work

from zeroblock.testing.timing import SAMPLE_SECONDS, Timing, measure

BASELINES = {"eager": (), "default": ("compile",), "all": ("compile", "max_autotune", "freezing")}
AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2}  # of all results together; a guard against timing different work, not a test
QUICK_COMPILED = "memory_bound/gate_residual-2x4x64-fp32-inference"  # the only compile of a quick run: it takes seconds
NAN = float("nan")


def make_cases(group: str, quick: bool) -> Iterator[Case]:
    if group == "memory_bound":
        return cases.memory_bound(quick)
    if group == "overhead":
        return overhead.cases(quick)
    if group == "saved":
        return itertools.chain(memory.cases(quick), models.cases(quick, "saved"))
    if group == "models":
        return models.cases(quick)
    return blocks.whole_blocks(group, quick)


def compiled_candidates(case: Case, side: Side, baselines: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """A compiled and warm step per baseline. One that fails to compile must not cost the case its other baselines."""
    options = {
        "compile": {},
        "max_autotune": {"mode": "max-autotune"},
        "freezing": {"options": {"freezing": True}},  # weights become constants, laid out at compile time
    }
    calls = {}
    for name in baselines:
        if name == "freezing" and case.mode == "training":
            continue
        try:
            step = side.compiled(**options[name]).step(case.mode)
            step()
            calls[name] = step
        except Exception as error:
            print(f"{name} failed: {str(error).splitlines()[0]}  ", end="", flush=True)
    return calls


def candidates(case: Case, work: Work, baselines: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    calls = {"eager": work.eager.step(case.mode), "zeroblock": work.own.step(case.mode)}
    if not case.op.startswith("zero_check"):  # there the two sides are different work on purpose
        check_agreement(case, calls)
        calls |= compiled_candidates(case, work.eager, baselines)
    if work.floor is not None:
        calls["floor"] = work.floor
    return calls


def check_agreement(case: Case, calls: dict[str, Callable[[], object]]) -> None:
    """Both sides must give the same results before either is timed: relative L2 distance of all of them together."""

    def flat(result) -> torch.Tensor:
        tensors = result if isinstance(result, tuple) else (result,)
        return torch.cat([tensor.detach().double().flatten() for tensor in tensors])

    expected, actual = flat(calls["eager"]()), flat(calls["zeroblock"]())
    distance = ((actual - expected).norm() / expected.norm()).item()
    if not distance <= AGREEMENT[case.dtype]:
        raise RuntimeError(f"results differ from eager by {distance:.2g} (relative L2), so no time is taken")


def time_row(
    case: Case, baselines: tuple[str, ...], seconds: float, min_rounds: int, sample_seconds: float = SAMPLE_SECONDS
) -> dict:
    torch._dynamo.reset()  # one fresh compile per shape, never a recompile with dynamic sizes
    with torch.set_grad_enabled(case.mode == "training"):
        calls = candidates(case, case.work(), baselines)
        timing = measure(calls, seconds, min_rounds, sample_seconds=sample_seconds)
    return {"unit": "us", **compare(timing, [name for name in ("eager", *baselines) if name in calls])}


def compare(timing: Timing, baselines: list[str]) -> dict:
    medians = {name: timing.median(name) for name in timing.times}
    best = timing.fastest([name for name in baselines if name in ("eager", "compile")])
    best_of_all = timing.fastest(baselines)
    ratio = timing.ratio(best, "zeroblock")
    return {
        **medians, "best": best,
        "ratio": ratio.median, "lo": ratio.lo, "hi": ratio.hi, "p20": ratio.p20, "p80": ratio.p80,
        "ratio_all": timing.ratio(best_of_all, "zeroblock").median,
        "floor_percent": 100 / timing.ratio("zeroblock", "floor").median if "floor" in medians else NAN,
        "rounds": ratio.rounds, "dropped": timing.dropped(best, "zeroblock"),
    }  # fmt: skip


def bytes_row(case: Case) -> dict:
    work = case.work()
    eager, own = memory.saved_bytes(work.eager), memory.saved_bytes(work.own)
    ratio = eager / own if own else NAN
    return {
        "unit": "bytes", "eager": float(eager), "zeroblock": float(own), "best": "eager", "ratio": ratio, "lo": ratio,
        "hi": ratio, "p20": ratio, "p80": ratio, "ratio_all": ratio, "rounds": 1, "dropped": 0,
    }  # fmt: skip


def progress(row: dict) -> str:
    if row["unit"] == "bytes":
        return f"eager {row['eager']:.0f}  zeroblock {row['zeroblock']:.0f} bytes   {1 / row['ratio']:.3f} of eager"
    names = ("eager", "compile", "max_autotune", "freezing", "zeroblock", "floor")
    times = "  ".join(f"{name} {row[name]:.4g}" for name in names if row[name] == row[name])
    line = f"{times} us   {row['ratio']:.2f}x [{row['lo']:.2f}, {row['hi']:.2f}] vs {row['best']}"
    return line + (f"   {row['floor_percent']:.0f} % of floor" if row["floor_percent"] == row["floor_percent"] else "")


def prepare(selected: list[Case], baselines: tuple[str, ...], threads: list[int]) -> None:
    """Fill the compiler's cache, so that the measuring run need not wait for it; times nothing."""
    for count in threads:
        torch.set_num_threads(count)
        for i, case in enumerate(selected, 1):
            torch._dynamo.reset()
            start = time.perf_counter()
            with torch.set_grad_enabled(case.mode == "training"):
                compiled_candidates(case, case.work().eager, baselines)
            print(f"[{i:3d}/{len(selected)}] {case.id}-t{count} {time.perf_counter() - start:.1f} s", flush=True)


def measured_row(case: Case, threads: int, options: argparse.Namespace) -> dict:
    row = {name: NAN for name in store.NUMBERS} | {"case": case.id, "threads": threads}
    row |= {name: getattr(case, name) for name in ("group", "op", "shape", "layout", "dtype", "mode")}
    if case.group == "saved":
        return row | bytes_row(case)
    if options.quick:
        baselines = BASELINES[options.baselines] if case.id == QUICK_COMPILED else ()
        return row | time_row(case, baselines, options.seconds, min_rounds=3)
    return row | time_row(case, BASELINES[options.baselines], options.seconds, 7, options.sample_ms / 1e3)


def run(options: argparse.Namespace) -> int:
    groups = options.group or list(store.GROUPS)
    selected = [case for group in groups for case in make_cases(group, options.quick)]
    selected = [case for case in selected if any(part in case.id for part in options.filter.split(","))]
    if options.prepare:
        timed = [case for case in selected if case.group != "saved" and not case.op.startswith("zero_check")]
        prepare(timed, BASELINES[options.baselines], options.threads)
        return 0
    folder, common, failed = options.out / store.machine_slug(), store.provenance(), 0
    torch._dynamo.reset()  # loads the compiler
    gc.freeze()  # what is loaded by now stays: collections between the cases need not walk it
    for threads in options.threads:
        torch.set_num_threads(threads)
        if threads != options.threads[0]:  # bytes do not depend on the number of threads
            selected = [case for case in selected if case.group != "saved"]
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
    parser.add_argument("--baselines", default="default", choices=BASELINES, help="default: eager and torch.compile")
    parser.add_argument("--allocator", default="pinned", choices=store.ALLOCATORS, help="see README.md")
    parser.add_argument("--out", default=store.RESULTS, type=Path, help="default: benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that everything runs, not how fast")
    parser.add_argument("--prepare", action="store_true", help="only compile the baselines, into the compiler's cache")
    parser.add_argument("--report", action="store_true", help="only print the tables of the stored results (markdown)")
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
