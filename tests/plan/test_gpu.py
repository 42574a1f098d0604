"""Plans of GPU calls, by a fake timer and stand-ins for the GPU backends: what competes, what is chosen, when a rule
holds instead (zero branches and `explain`: `test_gpu_zero.py`)."""

import contextlib
import warnings

import pytest
import torch

import zeroblock as zb
from zeroblock import zero
from zeroblock.backends import available as _backends
from zeroblock.backends.gpu import norms_gates
from zeroblock.plan import measure as _plan_measure
from zeroblock.plan import mode
from zeroblock.plan import planned as _plan
from zeroblock.plan import store as _plan_store
from zeroblock.testing import assert_bitwise_equal

from .cases import FakeTimer, never
from .gpu_cases import (
    CONV_RESIDUAL,
    LINEAR_GATE_RESIDUAL,
    NORM_CONV_RESIDUAL,
    NORMS_GATES,
    OPS,
    OPTIONS,
    TAKEN,
    TRITON,
    Timer,
    always_flagged,
    choices,
    inputs,
    ops,
    planned_on_the_cpu,
    run,
    tails,
)
from .gpu_cases import backends_fixture as _backends_fixture  # noqa: F401  (the tests' `backends`)

if _backends.interprets():
    pytest.skip("stand-ins need a process that does not interpret", allow_module_level=True)


# ---- choosing -------------------------------------------------------------------------------------------------------


@ops
@pytest.mark.parametrize("grad", (False, True), ids=("inference", "training"))
def test_every_step_is_measured_once_and_the_fastest_kept(op, grad, backends):
    timer = Timer({"cuda": 0.5, "triton": 0.7, "triton 64x64x64": 0.6})
    with _plan.use(timer=timer):
        run(op, grad, torch.bfloat16)
        found, count = choices(), len(timer.calls)
        for step in TAKEN[op] if grad else TAKEN[op][:1]:
            expected = "triton 64x64x64" if step in ("linear_gate_residual", "conv_wgrad") else "cuda"
            assert found[step] == expected, step
        run(op, grad, torch.bfloat16)
        assert len(timer.calls) == count


@ops
@pytest.mark.parametrize(("seconds", "kept"), [(0.5, False), (0.99, True), (1.0, True), (1.01, True), (3.0, True)])
def test_a_slower_candidate_is_never_chosen(op, seconds, kept, backends):
    """The rule's way is preferred among equals, and the library's stays where nothing beats it."""
    own = {
        name
        for step in (*NORMS_GATES, CONV_RESIDUAL, NORM_CONV_RESIDUAL, LINEAR_GATE_RESIDUAL)
        for name in step.candidates
    }
    with _plan.use(timer=Timer({name: seconds for name in own if name.startswith(("triton", "cuda"))})):
        run(op)
        choice = choices()[TAKEN[op][0]]
    by_rule = seconds <= 1 and choice.startswith("triton")  # equally fast: what the rule prefers
    assert by_rule if not kept else choice.startswith("library") or by_rule


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@tails
def test_configurations_of_the_dtype_compete(op, dtype, backends):
    timer = FakeTimer()
    with _plan.use(timer=timer):
        run(op, dtype=dtype)
    found = {name.split()[-1] for name in timer.calls if name.startswith("triton ") and name[7].isdigit()}
    half = {"128x128x64", "128x64x64", "64x64x64"}
    assert found == ({"128x64x32", "64x64x32"} if dtype == torch.float32 else half)


def unaligned(t):
    """The same values, from 4 bytes after a multiple of 16 on."""
    flat = torch.empty(t.numel() + 1)[1:]
    return flat.as_strided(t.shape, t.stride()).copy_(t)


@ops
def test_alignment_tells_calls_apart(op, backends):
    """What was measured, and compiled, with tensors at 16 bytes says nothing of others."""
    given, step = inputs(op), _plan.STEPS[TAKEN[op][0]]
    ours = [name for name in given if not op.endswith("linear") or name not in ("weight", "bias")]
    with _plan.use(timer=FakeTimer()):
        getattr(zb, op)(**given, **OPTIONS[op])
        for number, name in enumerate(ours, 2):
            getattr(zb, op)(**{**given, name: unaligned(given[name])}, **OPTIONS[op])
            assert len(step._memory) == number, name
        entries = [key for key in _plan.open_store().entries if key.startswith(step.name)]
        assert any("unaligned" in key for key in entries) and not all("unaligned" in key for key in entries)


def test_situations_are_told_apart(backends):
    timer = FakeTimer()
    with _plan.use(timer=timer):
        known = lambda: len(_plan.open_store().entries)  # noqa: E731
        x = torch.randn(2, 7, 8)
        calls = [
            lambda: zb.layer_norm_modulate(x, None, None),
            lambda: zb.layer_norm_modulate(unaligned(x), None, None),
            lambda: zb.layer_norm_modulate(x.bfloat16(), None, None),
            lambda: zb.layer_norm_modulate(x, x[:, 0], None),
            lambda: zb.layer_norm_modulate(x, x, None),
            lambda: zb.layer_norm_modulate(torch.randn(2, 7, 16), None, None),
            lambda: zb.layer_norm_modulate(torch.randn(4, 64, 8), None, None),
            lambda: zb.rms_norm_modulate(x, None, None),
            lambda: zb.gate_residual(x, torch.ones(1), x),
            lambda: zb.gate_residual(x, torch.ones(8), x),
            lambda: zb.gate_residual(x, torch.ones(2, 8), x),
            lambda: zb.group_norm_silu(torch.randn(2, 8, 6, 5), 4),
            lambda: zb.group_norm_silu(torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last), 4),
        ]
        for number, call in enumerate(calls):
            assert known() == number
            call()
        count = len(timer.calls)
        for call in calls:
            call()
        assert known() == len(calls) and len(timer.calls) == count


# ---- the cache ------------------------------------------------------------------------------------------------------


@ops
def test_a_later_process_reads_what_was_measured(op, backends, tmp_path):
    with _plan.use(timer=Timer({"cuda": 0.5}), directory=tmp_path):
        y, found = run(op), choices()
    with _plan.use(timer=never, directory=tmp_path):
        assert_same(run(op), y)
        assert choices() == found
        assert "as measured" in str(zb.explain(op, **inputs(op), **OPTIONS[op]))


def assert_same(got, expected):
    pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (got, expected)), strict=True)
    for a, b in pairs:
        assert_bitwise_equal(a, b)


def test_another_device_or_version_is_measured_anew(backends, tmp_path, monkeypatch):
    def measured() -> bool:
        timer = FakeTimer()
        with _plan.use(timer=timer, directory=tmp_path):
            run("gate_residual")
        return bool(timer.calls)

    assert measured() and not measured()
    with monkeypatch.context() as other:
        other.setattr(_plan, "place", lambda device: "another GPU, CUDA 13.0")
        assert measured() and not measured()
    for what in ("torch", "zeroblock", "source"):
        with monkeypatch.context() as other:
            header = {**_plan_store.environment(), what: "another"}
            other.setattr(_plan_store, "environment", lambda header=header: header)
            assert measured() and not measured()
    assert not measured()


def test_the_key_names_the_gpu_and_where_its_kernels_come_from(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_plan_measure.importlib.metadata, "version", lambda name: {"triton": "3.8.0"}[name])
    name = _plan_measure._gpu_name.__wrapped__(torch.device("cuda", 0))
    assert name.startswith("NVIDIA H200, CUDA 13.0, cuDNN ") and name.endswith(", triton 3.8.0")


# ---- where a rule holds ---------------------------------------------------------------------------------------------


def _capture(patch):
    patch.setattr(_plan, "capturing", lambda device: True)


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@ops
@pytest.mark.parametrize("where", ("deterministic", "fixed", "dispatcher"))
def test_a_rule_holds(op, where, backends):
    """Nothing is measured or remembered: Triton's own choice for memory-bound ops, the library for dense products."""
    with _plan.use("fixed" if where == "fixed" else "measure", timer=never), contextlib.ExitStack() as stack:
        if where == "deterministic":
            stack.enter_context(_deterministic())
        elif where == "dispatcher":
            stack.enter_context(mode.fixed_rule())
        run(op, grad=True)
        assert choices() == {}
        plan = next(p for p in zb.explain(op, **inputs(op), **OPTIONS[op]).plans if p.step in (op, *TAKEN[op]))
        assert plan.why.startswith("fixed rule") and plan.choice.startswith("library") == (op in OPS[7:])
    convolution = "conv" in op
    assert not backends["triton"].flags
    own = [name for name in backends["triton"].calls if name != "zero_flag"]
    assert own or op in ("conv_residual", "linear_gate_residual")
    assert not backends["cuda"].calls and not backends["cuda"].flags
    assert zero.executed.get(op, 0) > 0 or not (convolution or op == "linear_gate_residual")


def test_what_was_measured_before_holds_in_capture(backends, monkeypatch):
    with _plan.use(timer=Timer({"cuda": 0.5})):
        run("conv_residual")
        seen = len(backends["cuda"].flags)
        _capture(monkeypatch)
        run("conv_residual")
        assert len(backends["cuda"].flags) == seen + 1


@ops
@pytest.mark.parametrize("policy", ("measure", "fixed", "deterministic", "dispatcher"))
def test_nothing_runs_first_in_a_capture(op, policy, backends, monkeypatch):
    """It might have to be compiled and loaded: the library's runs, and is not remembered."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_plan.use("fixed" if policy == "fixed" else "measure", timer=FakeTimer()))
        if policy == "deterministic":
            stack.enter_context(_deterministic())
        if policy == "dispatcher":  # as in a compiled model
            stack.enter_context(mode.fixed_rule())
        with monkeypatch.context() as patch:
            _capture(patch)
            with pytest.warns(
                UserWarning, match=f"{TAKEN[op][0]} is captured in a CUDA graph before a call like it ran"
            ):
                run(op, grad=True)
        assert not any(b.calls or b.flags for b in backends.values()) and choices() == {}
        run(op, grad=True)
        _capture(monkeypatch)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="zeroblock")
            run(op, grad=True)


def test_the_stream_of_the_call_s_device_is_asked(monkeypatch):
    """Not that of the current one: torch asks that."""
    current = [0]

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    captured = [mode.capturing(torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")]
    assert captured == [False, False, True] and current == [0]


@TRITON
@pytest.mark.parametrize("kernel", (1, 3))
def test_the_rule_of_a_dense_convolution_is_the_library_s(kernel, backends):  # ours where it was last seen zero
    given, how = inputs("conv_residual", kernel=kernel), {"padding": kernel // 2}
    with mode.fixed_rule(), _plan.use(timer=never):
        zb.conv_residual(**given, **how)
        assert not backends["triton"].flags
        with pytest.MonkeyPatch.context() as patch:
            always_flagged(patch)
            zb.conv_residual(**given, **how)
            assert backends["triton"].flags == [0]
            zb.conv_residual(**given, **how, zero_skip="never")
            assert backends["triton"].flags == [0], "the library's where no flag is read"


def test_small_tensors_go_by_the_rule(backends, monkeypatch):
    monkeypatch.setattr(norms_gates.GATE_RESIDUAL, "worth", norms_gates.WORTH)
    with _plan.use(timer=never):
        run("gate_residual")
        assert "too small" in str(zb.explain("gate_residual", **inputs("gate_residual")))
    assert backends["triton"].calls == ["gate_residual"]


def test_without_backends_the_library_runs():
    with planned_on_the_cpu() as patch, _plan.use(timer=never):
        for name in ("triton", "cuda"):
            patch.setitem(_backends._loaded, name, None)
        for op in OPS:
            run(op, grad=True)
            why = zb.explain(op, **inputs(op), **OPTIONS[op])
            assert why.backend == "library" and "the only way here" in why.plans[0].why
