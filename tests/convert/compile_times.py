"""What torch.compile takes for every model of test_compile.py, as it is and accelerated, in tables:

    python -m tests.convert.compile_times [--repeats 3] [--csv FILE] [NAME ...]       # seconds, some 25 minutes
    python -m tests.convert.compile_times --counts --csv tests/convert/compile.csv    # what needs no clock

Seconds of processor time of Dynamo and AOT autograd (backend "aot_eager", no code is generated), one inference and one
training step each, on one thread, in turns, after one of each that does not count; the median of the repeats. Ratios
above LIMIT are marked.
Counts: graphs, 1 where nothing breaks; functions that Dynamo traces through; guards, which it checks at every call.
test_compile_counts.py holds the package to the stored ones.
"""

import argparse
import copy
import csv
import gc
import statistics
import sys
import time
import warnings
from contextlib import ExitStack
from unittest import mock

import torch
from torch._dynamo.guards import CheckFunctionManager
from torch._dynamo.symbolic_convert import InliningInstructionTranslator
from torch._dynamo.testing import CompileCounterWithBackend

import zeroblock as zb

from .test_compile import CASES, MODELS, _trained

LIMIT = 1.5
COUNTED = ("graphs", "functions", "guards")
COUNT_COLUMNS = ["name", "mode", "torch", *(f"{k}{which}" for k in COUNTED for which in ("", "_accelerated"))]
COLUMNS = [*COUNT_COLUMNS, "seconds", "seconds_accelerated", "ratio", "repeats"]
TORCH = torch.__version__.split("+")[0]
MODES = ("inference", "training")


def compiled_once(model, args, kwargs, training, backend="aot_eager"):
    """(seconds, {what is counted: how many})"""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    counts = dict.fromkeys(COUNTED, 0)
    inline, check = InliningInstructionTranslator.run, CheckFunctionManager.__init__

    def counted_inline(self):
        counts["functions"] += 1
        return inline(self)

    def counted_check(self, code, graph, *args, **kwargs):
        counts["guards"] += len(graph.guards)
        return check(self, code, graph, *args, **kwargs)

    compiled = torch.compile(copy.deepcopy(model).train(training), backend=counter)
    gc.collect()
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(InliningInstructionTranslator, "run", counted_inline))
        patches.enter_context(mock.patch.object(CheckFunctionManager, "__init__", counted_check))
        start = time.process_time()
        if training:
            _trained(compiled, args, kwargs)
        else:
            with torch.no_grad():
                compiled(*args, **kwargs)
        seconds = time.process_time() - start
    counts["graphs"] = counter.frame_count
    return seconds, counts


def pair(build):
    """(the model, its accelerated copy, positional and keyword arguments)"""
    plain, args, kwargs = build()
    ours = copy.deepcopy(plain)
    zb.accelerate(ours)
    return plain, ours, args, kwargs


def counts(name, build):
    """The rows of inference and training, without seconds."""
    plain, ours, args, kwargs = pair(build)
    for mode in MODES:
        row = {"name": name, "mode": mode, "torch": TORCH}
        for which, model in (("", plain), ("_accelerated", ours)):
            _, found = compiled_once(model, args, kwargs, mode == "training", backend="eager")
            row |= {f"{k}{which}": v for k, v in found.items()}
        yield row


def rows(name, build, repeats):
    """With seconds."""
    plain, ours, args, kwargs = pair(build)
    for mode in MODES:
        row = {"name": name, "mode": mode, "repeats": repeats, "torch": TORCH}
        seconds = {"": [], "_accelerated": []}
        for repeat in range(1 + repeats):
            for which, model in (("", plain), ("_accelerated", ours)):
                taken, found = compiled_once(model, args, kwargs, mode == "training")
                row |= {f"{k}{which}": v for k, v in found.items()}
                if repeat:
                    seconds[which].append(taken)
        before, after = map(statistics.median, seconds.values())
        row |= {"seconds": f"{before:.3f}", "seconds_accelerated": f"{after:.3f}", "ratio": f"{after / before:.2f}"}
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of test_compile.py's CASES and MODELS; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--counts", action="store_true", help="no seconds")
    parser.add_argument("--csv", type=argparse.FileType("w"), help="the table as CSV")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out = options.csv or sys.stdout
    writer = csv.DictWriter(out, COUNT_COLUMNS if options.counts else COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, build in {**CASES, **MODELS}.items():
        if options.names and name not in options.names:
            continue
        for row in counts(name, build) if options.counts else rows(name, build, options.repeats):
            writer.writerow(row)
            out.flush()
            if float(row.get("ratio", 0)) > LIMIT or row["graphs_accelerated"] > row["graphs"]:
                print(name, row["mode"], "is above the limit", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
