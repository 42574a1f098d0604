"""What torch.compile takes for every model of test_compile.py, as it is and accelerated, in a table:

    python -m tests.convert.compile_times [--repeats 3] [--csv FILE] [NAME ...]

Seconds of processor time of Dynamo and AOT autograd (backend "aot_eager", no code is generated), one inference and one
training step each, on one thread; the least of the repeats. Graphs: 1 where nothing breaks. Ratios above LIMIT are
marked.
"""

import argparse
import copy
import csv
import gc
import sys
import time
import warnings

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import zeroblock as zb

from .test_compile import CASES, MODELS, _trained

LIMIT = 1.5
COLUMNS = ("name", "mode", "seconds", "seconds_accelerated", "ratio", "graphs", "graphs_accelerated", "torch")


def compiled_once(model, args, kwargs, training):
    """(seconds, graphs)"""
    torch._dynamo.reset()
    gc.collect()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model).train(training), backend=counter)
    start = time.process_time()
    if training:
        _trained(compiled, args, kwargs)
    else:
        with torch.no_grad():
            compiled(*args, **kwargs)
    return time.process_time() - start, counter.frame_count


def row(name, build, training, repeats):
    plain, args, kwargs = build()
    ours = copy.deepcopy(plain)
    zb.accelerate(ours)
    found = {}
    for _ in range(repeats):  # in turns
        for which, model in (("plain", plain), ("ours", ours)):
            seconds, graphs = compiled_once(model, args, kwargs, training)
            found[which] = min(seconds, found.get(which, (float("inf"),))[0]), graphs
    (before, graphs), (after, graphs_accelerated) = found["plain"], found["ours"]
    numbers = f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}"
    mode = "training" if training else "inference"
    return dict(zip(COLUMNS, (name, mode, *numbers, graphs, graphs_accelerated, torch.__version__), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of test_compile.py's CASES and MODELS; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=argparse.FileType("w"), help="the table as CSV")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    writer = csv.DictWriter(options.csv, COLUMNS, lineterminator="\n") if options.csv else None
    if writer:
        writer.writeheader()
    for name, build in {**CASES, **MODELS}.items():
        for training in (False, True):
            if options.names and name not in options.names:
                continue
            found = row(name, build, training, options.repeats)
            mark = "  above the limit" if float(found["ratio"]) > LIMIT else ""
            more = "  MORE GRAPHS" if found["graphs_accelerated"] > found["graphs"] else ""
            print(*(f"{value!s:20}" for value in found.values()), mark, more, flush=True)
            if writer:
                writer.writerow(found)
                options.csv.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
