"""Who holds the memory of a training step at its peak: `python -m zbench.holders adm_unet zeroblock` in benchmarks/.

Beside the bytes of the process, as group peak counts them, what malloc had given out at most, and which operators had
asked for what of it: the process also counts free pieces between those in use, and code and caches of libraries.
"""

import argparse
import collections
import ctypes
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.utils.checkpoint import checkpoint

from . import whole
from .case import module_work
from .peak import most_resident

BLOCKS = ("ResBlock", "ResnetBlock2D", "DiTBlock", "BasicTransformerBlock")
_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIELDS)


class Heap(NamedTuple):
    """Of glibc's malloc, in bytes."""

    used: int
    free: int  # kept between or behind what is used


def heap() -> Heap:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return Heap(found.uordblks + found.hblkhd, found.fordblks)


def most_used(step) -> Heap:
    """The heap when a step had the most in use, looked at every millisecond."""
    found, done = heap(), threading.Event()

    def watch() -> None:
        nonlocal found
        while not done.is_set():
            found = max(found, heap())
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return found


def live_at_peak(step) -> tuple[int, dict[str, int]]:
    """(the most bytes of tensors that a step holds at a time, those by "operator < what called it")."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    waiting, events = list(profile.profiler.kineto_results.experimental_event_tree()), []
    for event in waiting:  # grows by the children of each
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            events.append(event)
    events.sort(key=lambda event: event.start_time_ns)
    live: dict[int, object] = {}
    at_peak: list = []
    total = most = 0
    for event in events:
        fields = event.extra_fields
        if fields.alloc_size > 0:
            live[fields.ptr], total = event, total + fields.alloc_size
        elif fields.ptr in live:
            total -= live.pop(fields.ptr).extra_fields.alloc_size
        if total > most:
            most, at_peak = total, list(live.values())
    holders: collections.Counter = collections.Counter()
    for event in at_peak:
        holders[_holder(event)] += event.extra_fields.alloc_size
    return most, dict(holders.most_common())


def _holder(event) -> str:
    names = []
    while (event := event.parent) is not None:
        if not event.name.startswith(("aten::empty", "aten::resize", "autograd::engine")):
            names.append(event.name)
    outer = next(
        (name for name in names if "Backward" in name or name.startswith("zeroblock")), names[-1] if names else ""
    )
    return f"{names[0]} < {outer}" if names else "elsewhere"


def _checkpoint_blocks(model: nn.Module) -> None:
    """Has backward compute each residual block of the model again, as most training scripts can be told to."""
    for kind in {type(m) for m in model.modules() if type(m).__name__ in BLOCKS}:
        kind.forward = _checkpointed(kind.forward)  # of this process


def _checkpointed(forward: Callable) -> Callable:
    def again(self, *args, **kwargs):
        return checkpoint(forward, self, *args, use_reentrant=False, **kwargs)

    return again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=whole.MODELS)
    parser.add_argument("side", choices=whole.SIDES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--checkpoint", action="store_true", help="backward computes each block again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, x = whole.build(options.op, options.side, "training", options.quick)
    if options.checkpoint:
        _checkpoint_blocks(model)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    work = module_work(model, model, (x,), "training")
    before, process = heap(), most_resident()
    with torch.enable_grad():
        step = work.own.step("training")
        step()
        most = most_used(step)
        above = most_resident() - process
        tensors, holders = live_at_peak(step)
    for what, size in (
        ("the process took for the steps", above),
        ("malloc had in use at most, above the model", most.used - before.used),
        ("malloc kept free then", most.free),
        ("tensors at the peak", tensors),
        ("the parameters' gradients, all of them", gradients),
    ):
        print(f"{size / 2**20:9.1f} MiB  {what}")
    for holder, size in list(holders.items())[:16]:
        print(f"{size / 2**20:9.1f} MiB    {holder}")


if __name__ == "__main__":
    main()
