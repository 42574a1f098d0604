"""Finds writes to frozen weights that no sample sees: all bits of all of them are compared, a piece at a time.

Reading a whole weight at every use would cost as much as many products. So whoever uses a frozen weight walks on by one
piece, once the last one is long enough ago: the walk takes SHARE of the time, whatever the sizes of weights and calls.
A round through W bytes takes W / (SHARE * the speed of zlib.crc32) of running time.
"""

from __future__ import annotations

import threading
import time
import weakref
import zlib
from collections.abc import Iterable
from typing import Protocol

PIECE = 1 << 16  # bytes: long beside the call of crc32, short beside the use of a weight
SHARE = 1 / 500


def checksums(memory: memoryview[int]) -> list[int]:
    """Of each piece. A change of one element always shows, any other but for one in 2**32."""
    return [zlib.crc32(memory[i : i + PIECE]) for i in range(0, len(memory), PIECE)]


class Watched(Protocol):
    """Memory that must stay as it is."""

    memory: memoryview[int] | None  # bytes; None: not to be read
    checksums: list[int]

    def changed(self) -> str | None:
        """Why it may not be read any more, or None."""

    def condemn(self) -> None:
        """Its bits have changed."""


class Patrol:
    """Walks through `found`, round after round; holds nothing alive."""

    def __init__(self, found: Iterable[Watched]):
        self.found = found
        self.due = 0.0  # of time.perf_counter: when the next piece is to be compared
        self._waiting: list[weakref.ref[Watched]] = []
        self._piece = 0
        self._lock = threading.Lock()

    def walk(self) -> None:
        """Compares one piece; at once if another thread is here."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            begin = time.perf_counter()
            self._compare_next()
            end = time.perf_counter()
            self.due = end + (end - begin) / SHARE
        finally:
            self._lock.release()

    def _compare_next(self) -> None:
        if not self._waiting:
            self._waiting = [weakref.ref(w) for w in tuple(self.found)]
        while self._waiting:
            watched = self._waiting[-1]()
            memory = None if watched is None else watched.memory
            start = self._piece * PIECE
            if watched is None or memory is None or start >= len(memory) or watched.changed() is not None:
                self._waiting.pop()
                self._piece = 0
                continue
            if zlib.crc32(memory[start : start + PIECE]) != watched.checksums[self._piece]:
                watched.condemn()
            self._piece += 1
            return
