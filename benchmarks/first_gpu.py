"""All that a few minutes on a GPU can show, most telling first: `python benchmarks/first_gpu.py --minutes 8 --out DIR`.

Nothing is downloaded or installed. It may be cut off at any moment: results.jsonl in DIR has a row for each thing that
was found, written as it came, and `--resume DIR` goes on from there; what failed is tried again once the sources have
changed. summary.txt, written again after each step, is the table of it all; log.txt is what the processes said. What is
done, in this order, is in gpurun/__init__.py; `make gpu-cache` prepares what saves time here (gpurun/cache.py).
`--dry-run` goes the same way on the CPU, at tiny sizes.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHMARKS))  # also where this file is imported

from gpurun import ROOT, Setting, parts, summary  # noqa: E402
from gpurun.pool import START_UNIT, Pool, Step  # noqa: E402
from gpurun.results import FILE, Results, latest  # noqa: E402

FIXED = {"ZEROBLOCK_PLAN": "fixed", "ZEROBLOCK_CACHE_DIR": ""}
MEASURED = {"ZEROBLOCK_PLAN": "measure", "ZEROBLOCK_CACHE_DIR": str(ROOT / "build/gpu/plans")}
DRY = {**MEASURED, "ZEROBLOCK_CACHE_DIR": ""}


def steps(jobs: int, dry: bool) -> list[Step]:
    measured = DRY if dry else MEASURED
    return [
        Step("machine", 1, 60, 0.25, every_run=True),
        Step("parts", 1, 170, 0.35, every_run=True),
        Step("correct", jobs, 100, 0.6, FIXED),
        Step("headlines", 1, 60, 0.8, measured),
        Step("compiled", 1, 100, 0.88, measured),
        Step("sanitizer", 2, 90, 0.95, FIXED),
        Step("models", 1, 90, 1.0, measured),
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", default=8.0, type=float, help="when to end, whatever is left (default 8)")
    parser.add_argument("--out", type=Path, help="a folder for the results (default: that of --resume)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="the results of an earlier run, to go on from")
    parser.add_argument("--jobs", default=min(12, os.cpu_count() or 1), type=int, help="processes that test (up to 12)")
    parser.add_argument("--steps", default="", help="only these, comma-separated")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes: does everything run?")
    options = parser.parse_args(arguments)
    options.out = options.out or options.resume
    if options.out is None:
        parser.error("--out or --resume must name a folder")
    if options.resume != options.out and (options.out / FILE).exists():
        parser.error(
            f"{options.out} has the results of a run: go on with --resume {options.out}, or name another folder"
        )
    if options.resume is not None and not (options.resume / FILE).exists():
        parser.error(f"{options.resume} has no {FILE}")
    names = [step.name for step in steps(1, True)]
    unknown = set(filter(None, options.steps.split(","))) - set(names)
    if unknown:
        parser.error(f"--steps must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    return options


def environment() -> dict[str, str]:
    """Of every process: the package of this tree, one thread each, the Triton cache of the run."""
    path = os.pathsep.join([str(ROOT), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(parts.CACHE)}
    return {**os.environ, **own}


def why_no_gpu(results: Results) -> str | None:
    rows = latest(results.rows)
    row = rows.get(("machine", "gpu")) or rows.get(("machine", START_UNIT)) or {"status": "ok"}
    return row["error"] if row["status"] == "failed" else None


def run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    setting = Setting("cpu" if options.dry_run else "cuda", options.dry_run)
    results = Results(options.out, options.resume)
    named = options.steps.split(",") if options.steps else None
    wanted = [step for step in steps(options.jobs, options.dry_run) if named is None or step.name in named]
    seconds = 60 * options.minutes
    left = dict.fromkeys((step.name for step in wanted), 1)
    for everything in (False, True):  # what a step's share was too short for, once all others have had theirs
        for step in wanted:
            if not left[step.name] or time.monotonic() - start > seconds:
                continue

            def done(unit: str, step: Step = step, again: bool = everything) -> bool:
                return not (step.every_run and not again) and results.is_done(step.name, unit)

            pool = Pool(step, setting, results, environment(), done)
            share = 1.0 if everything or len(wanted) == 1 else step.share
            left[step.name] = pool.run(start + share * seconds, start + seconds)
            summary.write(results.folder)
            print(f"{step.name}: {time.monotonic() - start:.0f} s, {left[step.name]} left", flush=True)
            if step.name == "machine" and why_no_gpu(results):
                print(f"no GPU that torch can use, nothing else is tried: {why_no_gpu(results)}")
                return 1
    print(summary.write(results.folder))
    failed = any(row["status"] == "failed" for row in latest(results.rows).values())
    return 1 if failed or any(left.values()) else 0


def main() -> int:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, stop)
    try:
        return run(options)
    except KeyboardInterrupt:
        print(summary.write(options.out))
        return 1


if __name__ == "__main__":
    sys.exit(main())
