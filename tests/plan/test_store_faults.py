"""Plans: no fault of the cache's directory reaches a call. Each costs a warning, and plans are kept in memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zeroblock.plan import planned as _plan
from zeroblock.plan import store as _plan_store
from zeroblock.plan.store import Entry, Store

from ..support import HANG
from .cases import FakeTimer, chosen, double, x4

fcntl = pytest.importorskip("fcntl", reason="locks are POSIX's")

HEADER = {"format": 0}
ENTRY = Entry("library", {"library": 1.0})
NAME = Store(Path("."), HEADER).path.name


def lock_of(directory: Path) -> Path:
    return (directory / NAME).with_suffix(".lock")


def assert_kept_in_memory(directory: Path, match: str) -> None:
    """A new choice is kept by the process, with one warning, and no later one."""
    store = Store(directory, HEADER)
    with pytest.warns(UserWarning, match=f"keeps its plans in memory.*{match}") as warned:
        store.add("key", ENTRY)
        store.add("other", ENTRY)
    assert len(warned) == 1 and set(store.entries) == {"key", "other"}


# ---- the lock ------------------------------------------------------------------------------------------------------


def test_a_lock_that_is_a_symlink_is_not_followed(tmp_path):
    directory, victim = tmp_path / "cache", tmp_path / "victim"
    directory.mkdir()
    victim.write_text("precious")
    lock_of(directory).symlink_to(victim)
    assert_kept_in_memory(directory, "symbolic link")
    assert victim.read_text() == "precious"


def test_a_lock_file_is_not_emptied(tmp_path):
    lock_of(tmp_path).write_text("precious")
    Store(tmp_path, HEADER).add("key", ENTRY)
    assert lock_of(tmp_path).read_text() == "precious" and Store(tmp_path, HEADER).entries == {"key": ENTRY}


def test_a_lock_that_is_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(lock_of(tmp_path))
    assert_kept_in_memory(tmp_path, "not a regular file")


def test_a_lock_that_is_a_directory(tmp_path):
    lock_of(tmp_path).mkdir()
    assert_kept_in_memory(tmp_path, "directory")


def test_a_lock_whose_holder_stands_still_is_waited_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(_plan_store, "WAIT", 0.1)
    with open(lock_of(tmp_path), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        begin = time.monotonic()
        assert_kept_in_memory(tmp_path, "locked for 0.1 s")
        assert time.monotonic() - begin >= 0.1
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOLCK, errno.EIO])
@pytest.mark.parametrize("where", ["os.open", "os.replace", "tempfile.mkstemp", "fcntl.flock"])
def test_a_full_disk_and_another_users_files(tmp_path, monkeypatch, where, code):
    """Wherever the system says no: the warning has its words, and the old file is whole."""
    Store(tmp_path, HEADER).add("before", ENTRY)
    store = Store(tmp_path, HEADER)

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as system:
        module, name = where.split(".")
        system.setattr(getattr(_plan_store, module), name, refuse)
        with pytest.warns(UserWarning, match=f"keeps its plans in memory.*{os.strerror(code)}"):
            store.add("key", ENTRY)
    assert set(store.entries) == {"before", "key"}
    assert set(Store(tmp_path, HEADER).entries) == {"before"} and not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_fills_while_it_is_written(tmp_path, monkeypatch):
    """The bytes are refused when the file is closed, not when they are written."""
    real = os.fdopen

    def full(handle, *args, **kwargs):
        if args[0] == "w":
            os.close(handle)
            handle = os.open("/dev/full", os.O_WRONLY)
        return real(handle, *args, **kwargs)

    store = Store(tmp_path, HEADER)
    monkeypatch.setattr(_plan_store.os, "fdopen", full)
    with pytest.warns(UserWarning, match=os.strerror(errno.ENOSPC)):
        store.add("key", ENTRY)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


# ---- the file ------------------------------------------------------------------------------------------------------

TEXTS = {
    "nested": '{"header": ' + "[" * 100_000,
    "a number of many digits": json.dumps(
        {"header": HEADER, "entries": {"k": {"choice": "a", "times": {"a": 7}}}}
    ).replace("7", "1" + "0" * 400),
    "times are a list": json.dumps({"header": HEADER, "entries": {"k": {"choice": "a", "times": [1]}}}),
    "entries are a list": json.dumps({"header": HEADER, "entries": [1]}),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_json_stumbles_over(tmp_path, name):
    (tmp_path / NAME).write_text(TEXTS[name])
    with pytest.warns(UserWarning, match="ignores the plan cache"):
        store = Store(tmp_path, HEADER)
    with pytest.warns(UserWarning, match="ignores the plan cache"):
        store.add("key", ENTRY)
    assert Store(tmp_path, HEADER).entries == {"key": ENTRY}, "replaced"


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / NAME, "wb") as file:
        file.truncate(1 << 36)  # sparse; read whole it would not fit into memory
    with pytest.warns(UserWarning, match="more than 33554432 bytes"):
        assert Store(tmp_path, HEADER).entries == {}


@pytest.mark.parametrize("kind", ["fifo", "symlink", "directory"])
def test_a_file_that_is_none(tmp_path, kind):
    path, target = tmp_path / NAME, tmp_path / "target"
    target.write_text("precious")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "symlink":
        path.symlink_to(target)
    else:
        path.mkdir()
    with pytest.warns(UserWarning, match="ignores the plan cache"):
        store = Store(tmp_path, HEADER)
    with pytest.warns(UserWarning, match="ignores the plan cache") as warned:
        store.add("key", ENTRY)
    assert len(warned) == (2 if kind == "directory" else 1), "a folder cannot be replaced: kept in memory"
    assert store.entries == {"key": ENTRY} and target.read_text() == "precious"
    if kind != "directory":
        assert Store(tmp_path, HEADER).entries == {"key": ENTRY}, "replaced"


def test_a_stored_choice_of_no_way_is_measured_anew(tmp_path):
    with double() as op:
        with _plan.use(timer=FakeTimer(fast=0.5), directory=tmp_path):
            assert chosen(op, x4) == "fast"
        (path,) = tmp_path.glob("*.json")
        path.write_text(path.read_text().replace('"choice": "fast"', '"choice": "__class__"'))
        with _plan.use(timer=FakeTimer(picky=0.5), directory=tmp_path):
            assert chosen(op, x4) == "picky"


def test_sources_that_cannot_be_read_are_passed_over(tmp_path, monkeypatch):
    """An editor's lock file is a link to nothing; a name may be no text."""
    (tmp_path / "plan").mkdir()
    (tmp_path / os.fsdecode(b"\xff.py")).touch()
    (tmp_path / "plan" / ".#store.py").symlink_to("user@host.123")
    monkeypatch.setattr(_plan_store, "__file__", str(tmp_path / "plan" / "store.py"))
    assert len(_plan_store.source_hash()) == 16


# ---- the environment -----------------------------------------------------------------------------------------------

MEASURES = """
import warnings
import torch
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import zeroblock as zb
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    zb.conv_residual(torch.randn(2, 64, 32, 32), torch.randn(64, 64, 3, 3), None, None)
print(*(w.message for w in warned))
"""


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"ZEROBLOCK_CACHE_DIR": "~nosuchuser/plans"}, "in memory, not in ~nosuchuser/plans"),
        ({"XDG_CACHE_HOME": "~nosuchuser"}, "in memory, not in ~nosuchuser/zeroblock"),
        ({"HOME": "/dev/null"}, "/dev/null/.cache"),
        ({"ZEROBLOCK_CACHE_DIR": "x" * 300}, "File name too long"),
    ],
    ids=["cache dir", "xdg", "home", "long"],
)
def test_a_place_that_is_none_stops_neither_the_import_nor_a_call(tmp_path, variables, said):
    names = ("ZEROBLOCK_CACHE_DIR", "XDG_CACHE_HOME", "ZEROBLOCK_PLAN")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", MEASURES],
        env={**rest, "PYTHONSAFEPATH": "1", "ZEROBLOCK_PLAN": "", **variables},  # an empty policy is the default one
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
    assert not list(tmp_path.iterdir()), "nothing is written beside the caller's files"
