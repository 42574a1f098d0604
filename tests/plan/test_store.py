"""Plans: where what was measured is kept between processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from zeroblock.plan import planned as _plan
from zeroblock.plan import store as _plan_store
from zeroblock.plan.store import Entry, Store

from ..support import HANG
from .cases import BIG, FakeTimer, chosen, double, never, x4


@pytest.fixture
def op():
    with double() as planned:
        yield planned


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


WRITERS = """
import os, sys
from pathlib import Path
from zeroblock.plan.store import Entry, Store

def write(n):
    for i in range(20):
        Store(Path(sys.argv[1]), {'format': 0}).add(f'{n}-{i}', Entry('library', {'library': 1.0}))

for n in range(3):
    if os.fork() == 0:
        write(n)
        os._exit(0)
assert [os.wait()[1] for _ in range(3)] == [0, 0, 0]
"""


def test_processes_write_at_the_same_time(tmp_path):
    """Three processes, forked where torch is imported once and no thread runs yet."""
    command = [sys.executable, "-W", "error", "-c", WRITERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0 and not done.stderr, done.stderr
    entries = Store(tmp_path, {"format": 0}).entries
    assert set(entries) == {f"{n}-{i}" for n in range(3) for i in range(20)}


def imported_again(module, monkeypatch):
    """A second copy of the module: what it reads once, at import, it reads from the environment of now."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_again", module.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    return again


def test_where_the_cache_is(tmp_path, monkeypatch):
    def directory(**variables):
        with monkeypatch.context() as environment:
            for name in ("ZEROBLOCK_CACHE_DIR", "XDG_CACHE_HOME"):
                environment.delenv(name, raising=False)
            for name, value in variables.items():
                environment.setenv(name, value)
            return imported_again(_plan_store, environment).DIRECTORY

    assert directory(ZEROBLOCK_CACHE_DIR=str(tmp_path)) == tmp_path
    assert directory(XDG_CACHE_HOME=str(tmp_path)) == tmp_path / "zeroblock"
    assert directory(HOME=str(tmp_path)) == tmp_path / ".cache" / "zeroblock"
    assert directory(ZEROBLOCK_CACHE_DIR="") is None


def test_an_unknown_policy_is_refused(monkeypatch):
    monkeypatch.setenv("ZEROBLOCK_PLAN", "guess")
    with pytest.raises(ValueError, match="ZEROBLOCK_PLAN must be one of measure, fixed, got 'guess'"):
        imported_again(_plan, monkeypatch)


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
