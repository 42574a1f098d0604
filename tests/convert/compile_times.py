"""What torch.compile takes for every model of test_compile.py, as it is and accelerated, in tables:

    python -m tests.convert.compile_times --csv tests/convert/compile_seconds.csv    # seconds, some 25 minutes
    python -m tests.convert.compile_times --counts --csv tests/convert/compile.csv    # what needs no clock
    python -m tests.convert.compile_times [--repeats 3] NAME ...                      # some of them, printed

Seconds of processor time of Dynamo and AOT autograd (backend "aot_eager", no code is generated), one inference and one
training step each, on one thread, in turns, after one of each that does not count; the least of the repeats, since what
else a machine does only adds. Ratios above LIMIT are marked. Stored in compile_seconds.csv.
Counts: graphs, 1 where nothing breaks; functions that Dynamo traces through; guards, which it checks at every call;
exports, 1 where torch.export takes the model with strict=True; recompiles, those that two larger batches cost a model
that was compiled with dynamic=True (of inference; empty where the untouched model does not run with them).
test_compile_counts.py holds the package to the stored ones.
"""

import argparse
import contextlib
import copy
import csv
import gc
import platform
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
INFERENCE = ("exports", "recompiles")
COUNT_COLUMNS += [f"{k}{which}" for k in INFERENCE for which in ("", "_accelerated")]
COLUMNS = ["name", "mode", "torch", "machine", "seconds", "seconds_accelerated", "ratio", "repeats"]
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


def exports(model, args, kwargs):
    torch._dynamo.reset()
    try:
        torch.export.export(copy.deepcopy(model).eval(), args, kwargs, strict=True)
    except Exception:  # whatever torch has against it
        return 0
    return 1


def of_batch(inputs, batch, size):
    """The inputs with `size` samples instead of `batch`."""
    if isinstance(inputs, torch.Tensor):
        fits = inputs.dim() > 0 and inputs.shape[0] == batch
        return inputs.repeat(-(-size // batch), *[1] * (inputs.dim() - 1))[:size] if fits else inputs
    if isinstance(inputs, dict):
        return {k: of_batch(v, batch, size) for k, v in inputs.items()}
    return type(inputs)(of_batch(v, batch, size) for v in inputs) if isinstance(inputs, (tuple, list)) else inputs


def recompiles(model, args, kwargs):
    """The graphs that batches of 3 and 4 cost after one of 2; "" where the model does not take them."""
    batch = next(t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() > 2)
    given = [of_batch((args, kwargs), batch, size) for size in (2, 3, 4)]
    model = copy.deepcopy(model).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled, graphs = torch.compile(model, backend=counter, dynamic=True), []
    with torch.no_grad():
        try:
            for args, kwargs in given:
                model(*args, **kwargs)
        except Exception:  # its inputs mean something else
            return ""
        for args, kwargs in given:
            compiled(*args, **kwargs)
            graphs.append(counter.frame_count)
    return graphs[-1] - graphs[0]


def machine():
    """The processor's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


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
            if mode == "inference":
                row[f"exports{which}"] = exports(model, args, kwargs)
                row[f"recompiles{which}"] = recompiles(model, args, kwargs)
        yield row


def rows(name, build, repeats):
    """With seconds."""
    plain, ours, args, kwargs = pair(build)
    for mode in MODES:
        row = {"name": name, "mode": mode, "repeats": repeats, "torch": TORCH, "machine": machine()}
        seconds = {"": [], "_accelerated": []}
        for repeat in range(1 + repeats):
            for which, model in (("", plain), ("_accelerated", ours)):
                taken, _ = compiled_once(model, args, kwargs, mode == "training")
                if repeat:
                    seconds[which].append(taken)
        before, after = map(min, seconds.values())
        row |= {"seconds": f"{before:.3f}", "seconds_accelerated": f"{after:.3f}", "ratio": f"{after / before:.2f}"}
        yield row


def above_limit(row):
    """Whether the accelerated model costs more than it may; of what the row holds."""
    count = {k: int(v) for k, v in row.items() if k.startswith(("graphs", "exports", "recompiles")) and v != ""}
    more = any(count.get(f"{k}_accelerated", 0) > count[k] for k in ("graphs", "recompiles") if k in count)
    fewer = count.get("exports_accelerated", 0) < count.get("exports", 0)
    return more or fewer or float(row.get("ratio", 0)) > LIMIT


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
            if above_limit(row):
                print(name, row["mode"], "is above the limit", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
