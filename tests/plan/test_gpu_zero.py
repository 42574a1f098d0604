"""Plans of GPU calls and zero branches, what `explain` says of both, and how a GPU is timed; see `test_gpu.py`."""

import contextlib

import pytest
import torch

import zeroblock as zb
from zeroblock.backends import available as _backends
from zeroblock.plan import measure as _plan_measure
from zeroblock.plan import planned as _plan

from .gpu_cases import OPTIONS, TAKEN, Timer, choices, inputs, ops, run, tails
from .gpu_cases import backends_fixture as _backends_fixture  # noqa: F401  (the tests' `backends`)

if _backends.interprets():
    pytest.skip("stand-ins need a process that does not interpret", allow_module_level=True)


# ---- the zero path --------------------------------------------------------------------------------------------------


@tails
def test_a_zero_tail_does_not_decide_the_plan(op, backends):
    """New tails are zero. The dense plan is what is measured, and reads no flag; the flagged one is not measured."""
    given = inputs(op, grad=True)
    given["weight"] = torch.nn.Parameter(torch.zeros_like(given["weight"]))
    measuring, timed = [], set()

    def timer(name, run, device):
        before = [len(b.flags) for b in backends.values()]
        run()
        measuring.extend(f for b, n in zip(backends.values(), before, strict=True) for f in b.flags[n:])
        timed.add(name)
        return 0.5 if name.startswith("triton") else 1.0

    with _plan.use(timer=timer):
        for _ in range(3):
            y = getattr(zb, op)(**given, **OPTIONS[op])
        assert measuring and set(measuring) == {None}
        assert backends["triton"].flags[-1] == 1, "the weight was seen zero"
        y.square().sum().backward()
        assert not any(key.startswith("flagged") for key in _plan.open_store().entries)
    assert set(measuring) == {None}
    step = given["bias"] if op == "linear_gate_residual" else given["bias"][:, None, None]
    step = given["gate"][:, None] * step if "gate" in given else step
    assert torch.equal(y, given["residual"] + step)
    upstream = given["x" if "x" in given else "h"].grad
    assert torch.equal(upstream, torch.zeros_like(upstream)) and bool(given["weight"].grad.any())


@tails
def test_a_plan_of_library_calls_has_a_zero_path(op, backends):
    """The hint leads to the kernels that read the flag, however fast the library's are when dense."""
    given = inputs(op)
    given["weight"] = torch.nn.Parameter(torch.zeros_like(given["weight"]), requires_grad=False)
    with _plan.use(timer=Timer({"library": 0.5})):
        for _ in range(3):
            getattr(zb, op)(**given, **OPTIONS[op])
        text = str(zb.explain(op, **given, **OPTIONS[op]))
        assert backends["triton"].flags[-1] == 1 and choices()[op] == "library"
    assert "zero path: the weight was last seen zero: our kernels; a flag on the device" in text


@tails
def test_no_tensor_is_read_on_the_host(op, backends, monkeypatch):
    """Once measured; the stand-ins read flags, the library's way reads none."""
    with _plan.use(timer=Timer({"library": 0.5})):
        given = inputs(op)
        getattr(zb, op)(**given, **OPTIONS[op])

        def forbidden(*_):
            raise AssertionError("a tensor was read on the host")

        for name in ("item", "__bool__", "__int__", "__float__", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, forbidden)
        getattr(zb, op)(**given, **OPTIONS[op])


# ---- explain --------------------------------------------------------------------------------------------------------


@ops
def test_explain_shows_candidates_and_times(op, backends):
    given = inputs(op, grad=True)
    with _plan.use(timer=Timer({"cuda": 0.0005, "library": 0.001, "triton": 0.002})):
        before = zb.explain(op, **given, **OPTIONS[op])
        assert "the first call will measure" in str(before)
        run(op, grad=True)
        after = zb.explain(op, **given, **OPTIONS[op])
    steps = [plan.step for plan in after.plans]
    assert steps[0] == TAKEN[op][0] and ("linear_gate_residual" in steps) == ("linear" in op)
    if op != "linear_gate_residual":
        assert after.backend == "cuda" and after.not_used["triton"] == "the plan has chosen cuda"
        assert f"plan {TAKEN[op][0]}: cuda (the fastest as measured)\n    cuda: 0.5 ms" in str(after)
    assert "library: 1 ms" in str(after)
    backward = [plan for plan in after.plans if plan.step.endswith(("bwd", "dgrad", "wgrad"))]
    assert all(plan.milliseconds or plan.why == "the only way here" for plan in backward)
    assert backward or op == "linear_gate_residual"
    if "conv" in op:
        assert "a flag on the device" in after.zero_path


# ---- the timer ------------------------------------------------------------------------------------------------------


def test_a_gpu_is_timed_cold_with_the_host_ahead(monkeypatch):
    """Cache emptied, device kept busy, and only the candidate between the two events."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2.5

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(_plan_measure, "_cache_bytes", lambda device: 8)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: (log.append(f"{n} bytes"), empty(n, dtype=dtype))[1])
    seconds = _plan_measure.time_call("way", lambda: log.append("run"), torch.device("cuda", 0))
    assert seconds == 0.0025 and log == ["16 bytes", "sleep", "event", "run", "event", "wait"]
