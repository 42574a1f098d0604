"""Where measured plans are kept between processes: one JSON file per environment in the cache directory.

`$ZEROBLOCK_CACHE_DIR`, else `$XDG_CACHE_HOME/zeroblock`, else `~/.cache/zeroblock`, read once at import; an empty
ZEROBLOCK_CACHE_DIR keeps plans in memory alone. The file's name and header carry the versions of torch and zeroblock
and a hash of the sources, so that an entry never outlives the code it was measured on. A file that cannot be read,
or that says something else than its name, is ignored with a warning and replaced at the next measurement.
Writers hold a lock, merge what others wrote meanwhile, and replace the file in one step: readers see a whole file or
none.

No fault of the cache reaches a call: what cannot be read is ignored, what cannot be written is kept in memory, each
with a warning. Anyone may have written to the directory. So only regular files of bounded size are opened, never
through a symlink and never emptied; the lock is waited for no longer than `WAIT`; what is read can only choose among
the ways that take a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .._version import __version__

try:
    import fcntl
except ImportError:  # not POSIX: the last writer wins, files stay whole
    fcntl = None  # type: ignore[assignment]
    GUARDED = 0
else:
    GUARDED = os.O_NOFOLLOW | os.O_NONBLOCK  # a symlink is refused, a fifo does not wait for its other end

FORMAT = 1
WAIT = 5.0  # seconds; a writer holds the lock for some milliseconds, one that was stopped for ever
MOST_BYTES = 1 << 25  # 50,000 entries; what is larger was not written here


def _default_directory() -> Path | None:
    own = os.environ.get("ZEROBLOCK_CACHE_DIR")
    if own == "":
        return None
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "zeroblock" if own is None else Path(own)
    with contextlib.suppress(RuntimeError):  # there is no such home: said by the store, an import does not fail for it
        return path.expanduser()
    return path


DIRECTORY = _default_directory()


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measurement: least seconds per candidate (None: it failed), and the candidate that was chosen."""

    choice: str
    times: dict[str, float | None]


def source_hash() -> str:
    """Of everything a plan's time can depend on: the package's Python and native code."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for folder in (package, package.parent / "kernels"):  # a checkout has the kernels beside the package
        for pattern in ("*.py", "_C*.so"):
            for path in sorted(folder.rglob(pattern)):
                digest.update(os.fsencode(path.relative_to(folder).as_posix()) + b"\0")
                with contextlib.suppress(OSError):  # an editor's lock file, a link to nothing
                    digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    return {"format": FORMAT, "torch": torch.__version__, "zeroblock": __version__, "source": source_hash()}


def _parsed(text: str, header: dict[str, Any]) -> dict[str, Entry]:
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("header") != header:
        raise ValueError("it was written by another version")
    entries = {}
    for key, value in content["entries"].items():
        choice, times = value["choice"], value["times"]
        if not isinstance(choice, str) or not all(isinstance(t, (int, float, type(None))) for t in times.values()):
            raise ValueError(f"entry {key!r} is malformed")
        entries[key] = Entry(choice, {name: None if t is None else float(t) for name, t in times.items()})
    return entries


class Store:
    """Entries by key, loaded once and written through. `directory` None keeps them in memory."""

    def __init__(self, directory: Path | None, header: dict[str, Any] | None = None):
        self.header = environment() if header is None else header
        name = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None
        try:
            self.path = None if directory is None else directory.expanduser() / f"plans-{name}.json"
        except RuntimeError as error:
            warnings.warn(f"zeroblock keeps its plans in memory, not in {directory}: {error}", stacklevel=2)
        self.entries = self._read()

    def _read(self) -> dict[str, Entry]:
        if self.path is None:
            return {}
        try:
            return _parsed(_text(self.path), self.header)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            warnings.warn(f"zeroblock ignores the plan cache {self.path}: {error}", stacklevel=2)
            return {}

    def add(self, key: str, entry: Entry) -> None:
        self.entries[key] = entry
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                self.entries = {**self._read(), **self.entries}
                self._write()
        except OSError as error:
            warnings.warn(f"zeroblock keeps its plans in memory: {self.path} cannot be written: {error}", stacklevel=2)
            self.path = None

    def _write(self) -> None:
        assert self.path is not None
        content = {"header": self.header, "entries": {k: dataclasses.asdict(e) for k, e in self.entries.items()}}
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, sort_keys=True)
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def _open(path: Path, flags: int) -> int:
    """A descriptor of a regular file; OSError for anything else."""
    handle = os.open(path, flags | GUARDED, 0o666)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise OSError(f"{path} is not a regular file")


def _text(path: Path) -> str:
    with os.fdopen(_open(path, os.O_RDONLY), encoding="utf-8") as file:
        if os.fstat(file.fileno()).st_size > MOST_BYTES:
            raise OSError(f"it has more than {MOST_BYTES} bytes")
        return file.read()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file. TimeoutError (an OSError) where another process keeps it."""
    with os.fdopen(_open(path, os.O_RDWR | os.O_CREAT), "rb") as file:
        if fcntl is not None:
            deadline = time.monotonic() + WAIT
            while not _taken(file.fileno()):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has kept {path} locked for {WAIT:g} s")
                time.sleep(0.005)
        yield


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
