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
from collections.abc import Iterator

import torch
from zbench import blocks, calls, models, ops, peak, plot, report, rows, saved, store, whole
from zbench.candidates import BASELINES, baseline_candidates, candidates, precision
from zbench.case import Case
from zbench.options import parse_common, use_allocator

from zeroblock.testing.timing import SAMPLE_SECONDS, measure

# The only compile of a quick run that does not ask for baselines: compiling takes seconds.
QUICK_COMPILED = "memory_bound/gate_residual-2x4x64-fp32-inference"
COUNTED = ("saved", "peak")  # groups of bytes, which no clock and no number of threads changes


def make_cases(group: str, quick: bool) -> Iterator[Case]:
    if group == "memory_bound":
        return ops.cases(quick)
    if group == "overhead":
        return calls.cases(quick)
    if group == "saved":
        return itertools.chain(saved.block_cases(quick), models.cases(quick, "saved"), whole.cases(quick, "saved"))
    if group == "models":
        return models.cases(quick)
    if group == "whole":
        return whole.cases(quick)
    if group == "peak":
        return peak.cases(quick)
    return blocks.cases(quick, group)


def time_columns(case: Case, baselines: tuple[str, ...], options: argparse.Namespace) -> dict:
    torch._dynamo.reset()  # one fresh compile per shape, never a recompile with dynamic sizes
    with torch.set_grad_enabled(case.mode == "training"), precision(case):
        found = candidates(case, case.work(), baselines, options.compile_seconds)
        steps = {candidate.label: candidate.step for candidate in found}
        rounds = 3 if options.quick else 7
        timing = measure(steps, options.seconds, rounds, sample_seconds=options.sample_ms / 1e3)
    return rows.time_columns(timing, found)


def measured_row(case: Case, threads: int, options: argparse.Namespace) -> dict:
    row = rows.empty_row(case, threads)
    if case.group == "saved":
        work = case.work()
        return row | rows.byte_columns(saved.saved_bytes(work.eager), saved.saved_bytes(work.own))
    if case.group == "peak":
        return row | rows.byte_columns(*peak.high_water(case))
    everything = not options.quick or options.baselines is not None
    baselines = BASELINES[options.baselines or "default"] if everything or case.id == QUICK_COMPILED else ()
    return row | time_columns(case, baselines, options)


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


def run(options: argparse.Namespace) -> int:
    groups = options.group or list(store.GROUPS)
    selected = [case for group in groups for case in make_cases(group, options.quick)]
    selected = [case for case in selected if any(part in case.id for part in options.filter.split(","))]
    if options.prepare:
        prepare([case for case in selected if case.group not in COUNTED and case.same_work], options)
        return 0
    folder, common, failed = options.out / store.machine_slug(), store.provenance(), 0
    torch._dynamo.reset()  # loads the compiler
    gc.freeze()  # what is loaded by now stays: collections between the cases need not walk it
    for threads in options.threads:
        torch.set_num_threads(threads)
        if threads != options.threads[0]:
            selected = [case for case in selected if case.group not in COUNTED]
        for i, case in enumerate(selected, 1):
            print(f"[{i:3d}/{len(selected)}] {case.id}-t{threads}  ", end="", flush=True)
            try:
                row = measured_row(case, threads, options)
            except Exception as error:
                failed += 1
                print(f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            store.write(folder / f"{case.group}.csv", [row | common])
            print(rows.line(row), flush=True)
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


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    if options.report:
        print(report.markdown(options.out))
        sys.exit(0)
    use_allocator(options.allocator)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compile workers beside the measurement
    sys.exit(run(options))
