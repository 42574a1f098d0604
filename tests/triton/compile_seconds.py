"""What Triton takes to compile kernels: `python -m tests.triton.compile_seconds [--target sm_90] [PREFIX ...]`.

CPU seconds, the assembler's included, of every kernel whose case begins so; nothing comes from a cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile


def seconds() -> float:
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="*", default=[""])
    parser.add_argument("--target", default="sm_90")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        import triton

        from . import static

        target, lanes = static._target(options.target), static.warp(options.target)
        taken: list[float] = []
        for name, launch in static.fullest(static.launches()):
            if not name.startswith(tuple(options.prefixes)):
                continue
            before = seconds()
            triton.compile(launch.source(), target=target, options=launch.options_for(lanes))
            taken.append(seconds() - before)
            print(f"{taken[-1]:6.2f} {name} {launch.kernel.__name__}", flush=True)
    taken = taken[1:]  # the first loads the compiler
    mean = sum(taken) / len(taken)
    print(f"{len(taken)} kernels: {min(taken):.2f} to {max(taken):.2f} CPU seconds, {mean:.2f} on average")


if __name__ == "__main__":
    main()
