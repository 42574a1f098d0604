"""Plans: what is measured, once, by a fake timer; what is remembered and where; which rule holds instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import zeroblock as zb
from zeroblock import _backends, _conv, _linear, _plan, _plan_store, testing
from zeroblock._plan import PlannedOp
from zeroblock._plan_measure import bucket, choose, measure
from zeroblock._plan_store import Entry, Store

CPU = torch.device("cpu")


class FakeTimer:
    """Seconds by name; counts its calls. Runs what it times, as a timer does."""

    def __init__(self, **seconds: float):
        self.seconds = {name.replace("_", " "): s for name, s in seconds.items()}
        self.calls: list[str] = []

    def __call__(self, name, run, device):
        self.calls.append(name)
        run()
        return self.seconds.get(name, 1.0)


@pytest.fixture
def op():
    """A planned op of its own: y = 2x in three ways that leave a trace, work as large as asked."""
    ran: list[str] = []

    def way(name):
        return lambda x, work: (ran.append(name), x * 2)[1]

    planned = PlannedOp(
        "double",
        way("library"),
        signature=lambda x, work: (x.shape, x.dtype, x.stride(), work),
        describe=lambda x, work: f"{x.dtype}{[bucket(n) for n in x.shape]}{x.is_contiguous()}",
        work=lambda x, work: work,
    )
    planned.add("fast", way("fast"))
    planned.add("picky", way("picky"), lambda x, work: None if x.shape[0] % 2 == 0 else "odd")
    planned.add("coarse", way("coarse"), reduced=True)
    planned.ran = ran
    yield planned
    del _plan.OPS["double"]


BIG = _plan.WORTH_MEASURING
x3, x4 = torch.ones(3), torch.ones(4)


def chosen(op, x, work=BIG) -> str:
    """The way this call takes, measured or not."""
    op(x, work)
    return op.ran[-1]


# ---- choosing ------------------------------------------------------------------------------------------------------


def test_the_fastest_is_chosen_and_measured_once(op):
    timer = FakeTimer(library=1.0, fast=0.5, picky=0.7)
    with _plan.use(timer=timer):
        assert chosen(op, x4) == "fast"
        count = len(timer.calls)
        assert sorted(set(timer.calls)) == ["fast", "library", "picky"] and count == 3 * 7
        for _ in range(3):
            assert chosen(op, x4) == "fast"
        assert len(timer.calls) == count


def test_what_does_not_take_the_call_is_not_run(op):
    with _plan.use(timer=FakeTimer(library=1.0, fast=0.9, picky=0.1)):
        assert chosen(op, x3) == "fast"
        assert "picky" not in op.ran and "coarse" not in op.ran


@pytest.mark.parametrize("fast, expected", [(0.5, "fast"), (0.96, "fast"), (0.99, "library"), (1.01, "library")])
def test_the_library_stays_unless_another_is_really_faster(op, fast, expected):
    with _plan.use(timer=FakeTimer(library=1.0, fast=fast, picky=2.0)):
        assert chosen(op, x4) == expected


def test_never_slower_than_the_library():
    """The preferred way wins ties only: measured slower than the library it is out, however little."""
    assert choose({"library": 1.0, "mine": 1.01, "other": 1.2}, "mine") == "library"
    assert choose({"library": 1.0, "mine": 0.99, "other": 0.98}, "mine") == "mine"
    assert choose({"library": 1.0, "mine": 0.99, "other": 0.5}, "mine") == "other"
    assert choose({"library": 1.0, "mine": None}, "mine") == "library"


def test_candidates_are_timed_in_turns():
    order: list[str] = []
    measure({n: lambda: None for n in "abc"}, CPU, lambda name, run, device: order.append(name) or 1.0)
    assert "".join(order[:9]) == "abcbcacab"


def test_a_slow_measurement_ends_early(monkeypatch):
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr("zeroblock._plan_measure.time.perf_counter", lambda: next(clock))
    calls: list[str] = []
    measure({n: lambda: None for n in "ab"}, CPU, lambda name, run, device: calls.append(name) or 1.0)
    assert len(calls) == 2 * 3


def test_a_failing_way_is_left_out_and_said(op):
    op.add("broken", lambda x, work: 1 / 0)
    with _plan.use(timer=FakeTimer(library=1.0, fast=0.9, picky=0.8)):
        with pytest.warns(UserWarning, match="does not use the plan broken: division by zero"):
            assert chosen(op, x4) == "picky"
        assert op.explain(x4, BIG).milliseconds["broken"] is None


def test_the_librarys_own_error_is_the_callers():
    def fail():
        raise ValueError("bad argument")

    with pytest.raises(ValueError, match="bad argument"):
        measure({"library": fail, "other": lambda: None}, CPU)


# ---- what makes another situation ----------------------------------------------------------------------------------


def test_situations_are_told_apart(op):
    timer = FakeTimer()
    rounds = lambda: timer.calls.count("library") // 7  # noqa: E731
    with _plan.use(timer=timer):
        op(x4, BIG)
        op(torch.ones(4), BIG)
        assert rounds() == 1
        op(torch.ones(20), BIG)
        op(torch.ones(19), BIG)  # one bucket with 20, but 19 is odd: other candidates
        op(torch.ones(18), BIG)  # as 20
        assert rounds() == 3
        op(x4.double(), BIG)
        op(torch.ones(8)[::2], BIG)
        assert rounds() == 5
        _plan.state.training = True
        try:
            op(x4, BIG)
        finally:
            _plan.state.training = False
        assert rounds() == 6
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            op(x4, BIG)
        finally:
            torch.set_num_threads(threads)
        assert rounds() == 7
        op(x4, BIG)
        assert rounds() == 7


def test_buckets_are_at_most_a_quarter_wide():
    for n in range(1, 3000):
        assert n <= bucket(n) <= max(n, n * 1.25) and bucket(bucket(n)) == bucket(n)


def test_reduced_precision_needs_permission(op):
    timer = FakeTimer(library=1.0, fast=0.9, picky=0.9, coarse=0.1)
    with _plan.use(timer=timer):
        assert chosen(op, x4) in ("fast", "picky")
        assert op.explain(x4, BIG).not_taken["coarse"] == "needs reduced float32 precision"
        with _plan.allow_reduced():
            assert chosen(op, x4) == "coarse"
        assert chosen(op, x4) in ("fast", "picky")
        torch.set_float32_matmul_precision("high")
        try:
            assert chosen(op, x4) == "coarse"
        finally:
            torch.set_float32_matmul_precision("highest")
        assert "coarse" in timer.calls and chosen(op, x4) in ("fast", "picky")


def test_training_is_marked_around_a_differentiable_op():
    seen = []
    planned = _conv.CONV
    before = planned.candidates["library"]
    spy = lambda *args: (seen.append(_plan.state.training), before.run(*args))[1]  # noqa: E731
    with _plan.use("fixed"):
        planned.library = planned.candidates["library"] = _plan.Candidate("library", spy, before.why_not)
        try:
            h, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
            zb.conv_residual(h, w, None, None)
            zb.conv_residual(h, w.requires_grad_(), None, None).sum().backward()
            with torch.no_grad():
                zb.conv_residual(h, w, None, None)
        finally:
            planned.library = planned.candidates["library"] = before
            _plan.forget()
    assert seen == [False, True, False] and not _plan.state.training


# ---- the fixed rule -------------------------------------------------------------------------------------------------


@pytest.fixture
def ruled(op):
    op.rule = lambda x, work: "picky"
    return op


def never(name, run, device):
    raise AssertionError("nothing may be measured here")


def test_small_work_is_not_measured(ruled):
    with _plan.use(timer=never):
        assert chosen(ruled, x4, BIG - 1) == "picky"
        assert chosen(ruled, x3, BIG - 1) == "library"  # the rule's way takes no part
        assert "too small" in ruled.explain(x4, BIG - 1).why


def test_deterministic_algorithms_fix_the_choice(ruled):
    with _plan.use(timer=FakeTimer(fast=0.1)):
        assert chosen(ruled, x4) == "fast"
        torch.use_deterministic_algorithms(True)
        try:
            assert chosen(ruled, x4) == "picky" and "deterministic" in ruled.explain(x4, BIG).why
        finally:
            torch.use_deterministic_algorithms(False)
        assert chosen(ruled, x4) == "fast"


def test_the_policy_fixes_the_choice(ruled):
    with _plan.use("fixed", timer=never):
        assert chosen(ruled, x4) == "picky" and "ZEROBLOCK_PLAN=fixed" in ruled.explain(x4, BIG).why


def test_capture_measures_nothing_and_remembers_nothing(ruled, monkeypatch):
    timer = FakeTimer(fast=0.1)
    with _plan.use(timer=timer):
        with monkeypatch.context() as capture:
            capture.setattr(_plan, "_capturing", lambda device: True)
            assert chosen(ruled, x4) == "picky" and not timer.calls
        assert chosen(ruled, x4) == "fast" and timer.calls
        monkeypatch.setattr(_plan, "_capturing", lambda device: True)
        assert chosen(ruled, x4) == "fast", "what was measured before holds in capture too"


def test_nobody_waits_for_a_measurement(ruled):
    """Another thread's call in the same situation goes by the rule while the first is measuring."""
    import threading

    others = []

    def timer(name, run, device):
        if not others:
            thread = threading.Thread(target=lambda: others.append(chosen(ruled, x4)))
            thread.start()
            thread.join(60)
        return {"fast": 0.1}.get(name, 1.0)

    with _plan.use(timer=timer):
        assert chosen(ruled, x4) == "fast"
    assert others == ["picky"]


@pytest.mark.parametrize("way", ["dispatcher", "compile"])
def test_calls_through_the_dispatcher_go_by_the_rule(way):
    h, w = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 5, 5)
    pad = [2, 2]
    function = lambda h, w: torch.ops.zeroblock.conv_residual.default(h, w, None, None, pad, False)[0]  # noqa: E731
    if way == "compile":
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with _plan.use(timer=never):
        y = function(h, w)
    testing.assert_bitwise_equal(y, torch.conv2d(h, w, padding=2))


# ---- the store ------------------------------------------------------------------------------------------------------


def test_a_later_process_reads_what_was_measured(op, tmp_path):
    with _plan.use(timer=FakeTimer(fast=0.5), directory=tmp_path):
        assert chosen(op, x4) == "fast"
    with _plan.use(timer=never, directory=tmp_path):
        assert "fastest as measured" in op.explain(x4, BIG).why
        assert op.explain(x4, BIG).milliseconds["fast"] == 500.0
        assert chosen(op, x4) == "fast"
    assert [p.suffix for p in sorted(tmp_path.iterdir())] == [".json", ".lock"], "no temporary file stays"


@pytest.mark.parametrize("what", ["torch", "zeroblock", "source", "format"])
def test_another_version_is_another_file(tmp_path, what):
    header = _plan_store.environment()
    assert set(header) == {"format", "torch", "zeroblock", "source"}
    Store(tmp_path, header).add("key", Entry("library", {"library": 1.0}))
    assert Store(tmp_path, header).entries == {"key": Entry("library", {"library": 1.0})}
    assert Store(tmp_path, {**header, what: "other"}).entries == {}


def test_a_new_candidate_is_measured_beside_the_old(op, tmp_path):
    with _plan.use(timer=FakeTimer(fast=0.5), directory=tmp_path):
        assert chosen(op, x4) == "fast"
    op.add("newest", lambda x, work: (op.ran.append("newest"), x * 2)[1])
    with _plan.use(timer=FakeTimer(fast=0.5, newest=0.1), directory=tmp_path):
        assert chosen(op, x4) == "newest"


BROKEN = {
    "empty": "",
    "no json": "{",
    "a list": "[]",
    "foreign header": json.dumps({"header": {}, "entries": {}}),
    "no entries": None,
    "binary": "\x00\x01",
    "malformed entry": None,
    "entry of another kind": None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_ignored_with_a_warning_and_replaced(op, tmp_path, name):
    header = _plan_store.environment()
    path = Store(tmp_path, header).path
    entries = {"no entries": None, "malformed entry": {"k": {"choice": 3, "times": {}}}}.get(name, {"k": 7})
    content = {"header": header} if entries is None else {"header": header, "entries": entries}
    path.write_text(json.dumps(content) if BROKEN[name] is None else BROKEN[name])
    with pytest.warns(UserWarning, match="ignores the plan cache"):
        store = Store(tmp_path, header)
    assert store.entries == {}
    with pytest.warns(UserWarning, match="ignores the plan cache"):
        store.add("key", Entry("library", {"library": 1.0, "fast": None}))
    assert Store(tmp_path, header).entries == {"key": Entry("library", {"library": 1.0, "fast": None})}


def test_a_directory_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="ignores|keeps its plans in memory"):
        store = Store(tmp_path / "file" / "below", {"format": 0})
        store.add("key", Entry("library", {"library": 1.0}))
    store.add("other", Entry("library", {"library": 1.0}))
    assert set(store.entries) == {"key", "other"}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    store = Store(tmp_path, {"format": 0})
    store.add("key", Entry("library", {"library": 1.0}))

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(_plan_store.json, "dump", full)
    with pytest.warns(UserWarning, match="no space left"):
        store.add("other", Entry("library", {"library": 1.0}))
    monkeypatch.undo()
    assert set(Store(tmp_path, {"format": 0}).entries) == {"key"}
    assert not list(tmp_path.glob("*.tmp"))


def test_processes_write_at_the_same_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from zeroblock._plan_store import Entry, Store\n"
        "for i in range(20):\n"
        "    Store(Path(sys.argv[1]), {'format': 0}).add(f'{sys.argv[2]}-{i}', Entry('library', {'library': 1.0}))\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(n)]) for n in range(3)]
    assert [p.wait(120) for p in processes] == [0, 0, 0]
    entries = Store(tmp_path, {"format": 0}).entries
    assert set(entries) == {f"{n}-{i}" for n in range(3) for i in range(20)}


def test_where_the_cache_is(tmp_path):
    code = "from zeroblock import _plan_store; print(_plan_store.DIRECTORY)"
    clean = {k: v for k, v in os.environ.items() if k not in ("ZEROBLOCK_CACHE_DIR", "XDG_CACHE_HOME")}

    def directory(**variables):
        return subprocess.check_output([sys.executable, "-c", code], env={**clean, **variables}, text=True).strip()

    assert directory(ZEROBLOCK_CACHE_DIR=str(tmp_path)) == str(tmp_path)
    assert directory(XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "zeroblock")
    assert directory(ZEROBLOCK_CACHE_DIR="") == "None"


def test_an_unknown_policy_is_refused():
    result = subprocess.run(
        [sys.executable, "-c", "import zeroblock"],
        env={**os.environ, "ZEROBLOCK_PLAN": "guess"}, capture_output=True, text=True,
    )  # fmt: skip
    assert "ZEROBLOCK_PLAN must be one of measure, fixed, got 'guess'" in result.stderr


def test_a_measured_call_reads_no_environment(op, monkeypatch):
    with _plan.use(timer=FakeTimer(fast=0.5)):
        op(x4, BIG)

        class Closed(dict):
            def _refuse(self, *args):
                raise AssertionError("environment read on the call path")

            __getitem__ = get = __contains__ = _refuse

        monkeypatch.setattr(os, "environ", Closed())
        op(x4, BIG)
        assert op.ran[-1] == "fast"


# ---- the candidates there are --------------------------------------------------------------------------------------

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def primitives():
    return _backends.select("conv_residual", torch.zeros(1))


def conv_arguments(layout, weight_layout, dtype, with_residual):
    g = torch.Generator().manual_seed(5)
    draw = lambda *s, scale=1.0: (torch.randn(*s, generator=g) * scale).to(DTYPES[dtype])  # noqa: E731
    h = draw(2, 17, 7, 11).to(memory_format=LAYOUTS[layout])
    weight = draw(13, 17, 3, 3, scale=0.1).to(memory_format=LAYOUTS[weight_layout])
    out = LAYOUTS["nhwc" if "nhwc" in (layout, weight_layout) else "nchw"]
    residual = draw(2, 13, 7, 11).to(memory_format=out) if with_residual else None
    return h, weight, draw(26)[::2], residual


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_a_convolution_is_right(layout, weight_layout, dtype, with_residual):
    h, weight, bias, residual = conv_arguments(layout, weight_layout, dtype, with_residual)
    kept = None if residual is None else residual.clone()
    args = (primitives(), h, weight, bias, residual, _conv.unit_geometry([1, 1]))
    eager = torch.conv2d(h, weight, bias, padding=1)
    exact = torch.conv2d(h.double(), weight.double(), bias.double(), padding=1)
    eager, exact = (eager, exact) if residual is None else (residual + eager, residual.double() + exact)
    takers = _conv.CONV._takers(args)
    expected = {"library", "other layout"}
    if layout == "nhwc" and with_residual and _conv.ONEDNN:
        expected.add("oneDNN residual")
    if dtype == "fp32" and primitives().NAME == "cpu":
        expected.add("winograd 2x2")
    assert set(takers) == expected
    for name, candidate in takers.items():
        got = candidate.run(*args)
        testing.assert_error_budget(got, eager, exact, name)
        assert got.stride() == eager.stride(), name
    if residual is not None:
        testing.assert_bitwise_equal(residual, kept, "residual")


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, False], [False, False, True]])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_a_convolutions_backward_is_right(layout, weight_layout, dtype, mask):
    h, weight, _, dy = conv_arguments(layout, weight_layout, dtype, True)
    args = (primitives(), dy, h, weight, True, [1, 1], mask)
    eager = _conv.conv_grads(*args[1:])
    exact = _conv.conv_grads(dy.double(), h.double(), weight.double(), True, [1, 1], mask)
    takers = _conv.CONV_BWD._takers(args)
    worse = mask[0] if layout == "nchw" else mask[1]
    assert ("other layout" in takers) == (dtype == "bf16" or not worse)
    for name, candidate in takers.items():
        results = zip(("dh", "dweight", "dbias"), mask, candidate.run(*args), eager, exact, strict=True)
        for what, asked, got, e, x in results:
            if asked:
                testing.assert_error_budget(got, e, x, f"{name} {what}")
                # A parameter's gradient may also be laid out as the parameter.
                assert got.stride() == e.stride() or (what == "dweight" and got.stride() == weight.stride()), name


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu", "silu"])
@pytest.mark.parametrize("features", [96, 1536])
def test_every_way_of_a_linear_layer_is_right(features, activation):
    from zeroblock.reference import apply_activation

    g = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((3, 41, features), (67, features), (67,)))
    weight /= features**0.5
    P = primitives()
    args = (P, x, weight, bias, activation)
    eager = apply_activation(torch.nn.functional.linear(x, weight, bias), activation)
    exact = apply_activation(torch.nn.functional.linear(x.double(), weight.double(), bias.double()), activation)
    takers = _linear.LINEAR._takers(args)
    assert set(takers) == ({"library", "oneDNN"} if _linear.ONEDNN else {"library"})
    for name, candidate in takers.items():
        testing.assert_error_budget(candidate.run(*args), eager, exact, name)


def test_float32_stays_with_the_more_exact_layout():
    """oneDNN's channels-last kernels add long float32 chains up with more error; the user may allow it."""
    h, w = torch.randn(1, 64, 8, 8), torch.randn(64, 64, 3, 3)
    P, geometry = primitives(), _conv.unit_geometry([1, 1])
    there = lambda h, w: "other layout" in _conv.CONV._takers((P, h, w, None, None, geometry))  # noqa: E731
    assert not there(h, w)
    assert there(h.to(memory_format=torch.channels_last), w) and there(h.bfloat16(), w.bfloat16())
    assert there(h, w[:, :16]), "a short chain"
    with _plan.allow_reduced():
        assert there(h, w)


@pytest.mark.parametrize("dtype, layout", [("fp32", "nhwc"), ("bf16", "nchw")])
def test_measured_plans_of_a_whole_step_are_right(dtype, layout):
    """A ResBlock's half at a size that is measured: every step plans for itself, results and gradients as eager's."""
    g = torch.Generator().manual_seed(7)
    shapes = ((1, 64, 32, 32), (64,), (64,), (64, 64, 3, 3), (64,), (1, 64, 32, 32))
    draws = [torch.randn(*s, generator=g) * (0.05 if len(s) == 4 and s[2] == 3 else 1) for s in shapes]

    rounded = [t.to(DTYPES[dtype]) for t in draws]

    def grads(function, dtype):
        tensors = [t.to(dtype) for t in rounded]
        tensors = [t.to(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t for t in tensors]
        tensors = [t.detach().requires_grad_() for t in tensors]
        x, nw, nb, w, b, r = tensors
        y = function(x, 32, nw, nb, w, b, r)
        return [y.detach(), *torch.autograd.grad(y, tensors, torch.ones_like(y) / 64)]

    timer = FakeTimer(other_layout=0.1, library=0.5)
    with _plan.use(timer=timer):
        got = grads(zb.group_norm_silu_conv_residual, DTYPES[dtype])
        entries = dict(_plan._open_store().entries)
    from zeroblock import reference

    eager = grads(reference.group_norm_silu_conv_residual, DTYPES[dtype])
    exact = grads(reference.group_norm_silu_conv_residual, torch.float64)
    choices = {key.split()[0]: e.choice for key, e in entries.items()}
    expected = {"conv": "other layout", "conv_bwd": "other layout"}
    if dtype == "fp32" and primitives().NAME == "cpu":
        expected = {"norm_conv": "library", "conv": "other layout", "norm_conv_bwd": "library", "conv_bwd": "library"}
    assert choices == expected and any("training" in key for key in entries)
    names = ("y", "dx", "dnorm_weight", "dnorm_bias", "dweight", "dbias", "dresidual")
    for name, a, e, x in zip(names, got, eager, exact, strict=True):
        testing.assert_error_budget(a, e, x, name)


def test_explain_shows_candidates_and_times():
    h, w = torch.randn(1, 64, 32, 32).to(memory_format=torch.channels_last), torch.randn(64, 64, 3, 3)
    with _plan.use(timer=FakeTimer(library=0.002, other_layout=0.001)):
        before = zb.explain("conv_residual", h, w, None, h)
        assert "the first call will measure" in str(before)
        zb.conv_residual(h, w, None, h)
        after = zb.explain("conv_residual", h, w, None, h)
    assert after.plans[0].choice == "other layout" and after.plans[0].milliseconds["library"] == 2.0
    assert "plan conv: other layout (the fastest as measured)" in str(after) and "other layout: 1 ms" in str(after)
    assert "packed does not take it: the weight is not frozen, or not packed" in str(after)
    fused = zb.explain("group_norm_silu_conv_residual", h, 32, None, None, w)
    assert [p.step for p in fused.plans] == ["norm_conv", "conv"]
