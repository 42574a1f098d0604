"""What torch.compile takes for every model of test_compile.py, as it is and accelerated, in a table:

    python -m tests.convert.compile_times [--repeats 3] [--csv benchmarks/results/compile.csv] [NAME ...]

Seconds of processor time of Dynamo and AOT autograd (backend "aot_eager", no code is generated), one inference and one
training step each, on one thread, in turns; the median of the repeats. Graphs: 1 where nothing breaks. Functions: how
many Dynamo traces through; guards: how many it checks at every call; no clock changes these two. Ratios above LIMIT are
marked.
"""

import argparse
import copy
import csv
import gc
import platform
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
COLUMNS = (
    "name mode seconds seconds_accelerated ratio graphs graphs_accelerated functions functions_accelerated guards "
    "guards_accelerated repeats torch machine"
).split()


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


def rows(name, build, repeats):
    """For inference, then training."""
    plain, args, kwargs = build()
    ours = copy.deepcopy(plain)
    zb.accelerate(ours)
    for training in (False, True):
        seconds, counts = ([], []), [None, None]
        for _ in range(repeats):
            for i, model in enumerate((plain, ours)):
                taken, counts[i] = compiled_once(model, args, kwargs, training)
                seconds[i].append(taken)
        before, after = map(statistics.median, seconds)
        row = {"name": name, "mode": "training" if training else "inference", "repeats": repeats}
        row |= {"seconds": f"{before:.3f}", "seconds_accelerated": f"{after:.3f}", "ratio": f"{after / before:.2f}"}
        row |= {"torch": torch.__version__, "machine": platform.machine()}
        yield row | counts[0] | {f"{k}_accelerated": v for k, v in counts[1].items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of test_compile.py's CASES and MODELS; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=argparse.FileType("w"), help="the table as CSV")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    writer = csv.DictWriter(options.csv or sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, build in {**CASES, **MODELS}.items():
        for row in rows(name, build, options.repeats) if not options.names or name in options.names else ():
            writer.writerow(row)
            (options.csv or sys.stdout).flush()
            mark = "above the limit" if float(row["ratio"]) > LIMIT else ""
            more = "MORE GRAPHS" if row["graphs_accelerated"] > row["graphs"] else ""
            print(row["name"], row["mode"], row["ratio"], mark, more, file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
