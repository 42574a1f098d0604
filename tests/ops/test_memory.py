"""What a ResBlock allocates: nothing the size of an activation that eager does not allocate, and bounded scratch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.autograd.profiler import profile

import zeroblock as zb
from zeroblock.plan.mode import fixed_rule
from zeroblock.steps import winograd as _winograd
from zeroblock.testing import CPU_MISSING, eager, use_backend

from ..support import HANG

if CPU_MISSING is not None:
    pytestmark = pytest.mark.skip(reason=f"the cpu backend cannot run: {CPU_MISSING}")
else:
    from zeroblock.backends.cpu import CPU

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPE = (4, 64, 24, 24)  # larger than any weight of the block
# How many allocations of that size the block makes. Winograd in float32: conv1's result and y; backward the gradients
# of both convolutions' inputs, of both norms' and of x. bfloat16: beside these what the norms give to the library's
# convolutions. (Contiguous bfloat16 is reordered by oneDNN, as in eager: no number of ours.)
COUNTS = {
    (torch.float32, "nchw"): (2, 7),
    (torch.float32, "nhwc"): (2, 7),
    (torch.bfloat16, "nhwc"): (4, 13),
}


def allocations(call: Callable[[], object]) -> list[int]:
    """The sizes of what torch's allocator hands out (positive) and takes back (negative) during the call, in order."""
    call()  # warm
    with profile(profile_memory=True) as found:
        result = call()
    del result
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def most(sizes: list[int]) -> int:
    held = top = 0
    for size in sizes:
        held += size
        top = max(top, held)
    return top


def step(block, inputs, mode: str) -> Callable[[], object]:
    if mode != "training":
        return lambda: block(*inputs)
    wrt = (*inputs, *block.parameters())
    dy = torch.randn_like(inputs[0])
    return lambda: (y := block(*inputs), torch.autograd.grad(y, wrt, dy))


def pair(dtype: torch.dtype, layout: str, mode: str, film: bool):
    torch.manual_seed(0)
    plain = eager.ResBlock(SHAPE[1], 32, 0.0, use_scale_shift_norm=film)
    torch.nn.init.normal_(plain.out_layers[-1].weight, std=0.1)
    own = zb.nn.ResBlock(SHAPE[1], 32, 0.0, use_scale_shift_norm=film)
    own.load_state_dict(plain.state_dict())
    inputs = torch.randn(SHAPE), torch.randn(SHAPE[0], 32)
    for block in (plain, own):
        block.to(dtype=dtype, memory_format=LAYOUTS[layout])
    inputs = [inputs[0].to(dtype, memory_format=LAYOUTS[layout]), inputs[1].to(dtype)]
    for tensor in inputs:
        tensor.requires_grad_(mode == "training")
    return plain, own, inputs


@pytest.mark.parametrize("mode", ("inference", "frozen", "training"))
@pytest.mark.parametrize("film", (True, False), ids=("film", "add"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_a_resblock_allocates_no_activation_that_eager_does_not(dtype, layout, film, mode):
    plain, own, inputs = pair(dtype, layout, mode, film)
    if mode == "frozen":
        zb.freeze(own.eval())
    with use_backend("cpu"), torch.set_grad_enabled(mode == "training"):
        if dtype is torch.float32:
            assert _winograd.choose(CPU, inputs[0], own.in_layers[2].weight, (1, 1)) == 2, "the rule takes Winograd"
        with fixed_rule():
            theirs, ours = (allocations(step(block, inputs, mode)) for block in (plain, own))
    zb.unfreeze(own)
    activation = inputs[0].nbytes
    large = [[size for size in sizes if size >= activation] for sizes in (theirs, ours)]
    if (dtype, layout) in COUNTS:
        assert len(large[1]) == COUNTS[dtype, layout][mode == "training"]
    assert len(large[1]) <= len(large[0]) and max(large[1]) <= max(large[0])
    assert sum(large[1]) <= sum(large[0]) and most(ours) <= most(theirs)


def test_the_counter_sees_an_allocation_more():
    x = torch.randn(SHAPE)
    once, twice = (
        [s for s in allocations(call) if s >= x.nbytes] for call in (lambda: x + 1, lambda: (x + 1).add(1).clone())
    )
    assert once == [x.nbytes] and twice == [x.nbytes] * 3


SCRATCH = """
import json, sys
from pathlib import Path
import torch
from zeroblock.backends.cpu import CPU
from zeroblock.steps import winograd
from zeroblock.steps.conv import ConvCall, unit_geometry
from zeroblock.steps.conv_bwd import ConvGradsCall
torch.set_num_threads(2)

def status(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

def growth(call):
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    call()
    return status("VmHWM") - before

x, weight = torch.randn(1, 64, 448, 448), torch.randn(64, 64, 3, 3)
tile = int(sys.argv[1])
conv = lambda x: winograd.conv(tile, ConvCall(CPU, x, weight, None, None, unit_geometry((1, 1))))
conv_grads = lambda x, mask: winograd.conv_grads(tile, ConvGradsCall(CPU, x, x, weight, False, (1, 1), mask))
grads = lambda mask: lambda: conv_grads(x, mask)
small = x[:, :, :24, :24].contiguous()
conv(small), conv_grads(small, (True, True, False))
kept = status("VmRSS")
found = [growth(lambda: conv(x)), growth(grads((True, False, False))), growth(grads((False, True, False)))]
print(json.dumps({"activation": x.nbytes, "growth": found, "kept": status("VmRSS") - kept}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("tile", (2, 4))
def test_the_scratch_of_winograd_is_bounded_and_kept(tile):
    """V of a whole map would be 4 (tile 2) or 2.25 (tile 4) times the activation of 51 MB."""
    done = subprocess.run([sys.executable, "-c", SCRATCH, str(tile)], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    results = found["activation"], found["activation"], 64 * 64 * 9 * 4
    for grown, result in zip(found["growth"], results, strict=True):
        assert grown <= result + (24 << 20), found
    assert found["kept"] <= 24 << 20, found
