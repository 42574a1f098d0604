"""A long run: `python -m tests.ops.soak [--minutes 20] [--calls 20000]`.

Draws shapes, layouts, dtypes and options of every function anew, forward and backward, on one and two threads in turn,
and compares with fp64 as test_properties.py does. Then calls every case, training steps included, --calls times in all:
resident memory and open files may not grow between the first tenth and the end. Exit status 1, and the drawn example,
where anything differs.
"""

import argparse
import gc
import itertools
import os
import time

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from zeroblock.testing import use_backend
from zeroblock.testing.cases import CASES, OPS
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import evaluate, floating, leaves, output_grads

from .test_properties import assert_drawn_case

EXAMPLES = 25  # of one op at a time
GROWTH = 4 << 20  # bytes that the allocator may still take; what leaks is lost in every call


def drawn(op, number):
    @seed(number)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def examples(data):
        assert_drawn_case(op, data)

    examples()


def compare_with_fp64(minutes):
    end, count = time.monotonic() + 60 * minutes, 0
    start = time.time_ns()
    for number, op in enumerate(itertools.cycle(OPS)):
        if time.monotonic() >= end:
            return count
        torch.set_num_threads(1 + number // len(OPS) % 2)
        drawn(op, start + number)
        count += EXAMPLES


def resident():
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files():
    return len(os.listdir("/proc/self/fd"))


def call_again_and_again(calls):
    """(bytes, open files) by which the process grew."""
    torch.set_num_threads(2)
    prepared = []
    for case in CASES:
        if not case.large:
            draw = Draw(torch.float32)
            inputs = case.inputs(draw)
            grads = output_grads(case, inputs, draw)
            prepared.append((case, leaves(inputs, torch.float32, floating(inputs)), grads))
    before = None
    for number in range(calls):
        case, inputs, grads = prepared[number % len(prepared)]
        evaluate(case.run, inputs, grads)
        for t in inputs.values():
            if t is not None:
                t.grad = None
        if number == calls // 10:
            before = resident(), open_files()
    return resident() - before[0], open_files() - before[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="of comparing with fp64")
    parser.add_argument("--calls", type=int, default=20_000, help="of which memory is watched")
    options = parser.parse_args()
    print(f"{compare_with_fp64(options.minutes)} drawn examples agree with fp64", flush=True)
    with use_backend("cpu"):
        grown, files = call_again_and_again(options.calls)
    print(f"{options.calls} calls: {grown / 1024:.0f} KiB more memory, {files} more open files")
    return int(grown > GROWTH or files > 0)


if __name__ == "__main__":
    raise SystemExit(main())
