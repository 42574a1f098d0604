"""Which of two plans a call takes whose weight is tested by a flag on the device: a hint, never a verdict.

Both are exact for any weight. The dense plan takes the fastest ways as measured, mostly the library's, and tests
nothing; the flagged plan takes our kernels, which leave early while the flag is set. The flagged one runs while the
weight was last seen zero. The flag of a call is copied to pinned memory of the host, which nobody waits for: a later
call reads the word, and where the copy has not arrived it goes on as before. So a wrong hint costs time alone.

A dense weight is looked at in one call of EVERY, and its other calls launch nothing; a zero one at every call whose
last look has arrived. Nothing is known of a weight at first: it takes the dense plan, and is looked at. A tensor that
is no parameter may be made anew for every call; it is looked at when it comes back.

When a copy arrives depends on the moment, and the plans round differently, so that the last bits of the few calls
after a change do too. Where bits must not depend on the moment (deterministic algorithms, ZEROBLOCK_PLAN=fixed, more
than one rank) the dense plan runs. A CUDA graph keeps the plan that the hint says at its capture, and looks at nothing.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from ..plan.mode import capturing
from ..plan.planned import bits_are_free

# What a call does: the dense plan; the same, and a look at the weight; the flagged plan.
DENSE, LOOK, FLAGGED = 0, 1, 2
EVERY = 64  # dense calls of a weight between two looks at it
_PENDING = -1
_SLAB = 1024  # words that are pinned at once


class Word(Protocol):
    """Where the flag of one weight goes."""

    def copy(self, flag: Tensor) -> None:
        """Enqueues a copy of the flag, int32 [1] on a device, behind the kernel that writes it. Waits for nothing."""

    def ready(self) -> bool:
        """Whether the last copy has arrived. Asks no device."""

    def value(self) -> int:
        """What has arrived."""


class PinnedWord:
    """An int32 in pinned memory. A copy writes all of it at once, and 0 or 1, so that the word itself tells whether one
    has arrived: no event is asked, which a capture in another thread would not allow."""

    def __init__(self) -> None:
        self._memory = next(_words)
        self._word = ctypes.c_int32.from_address(self._memory.data_ptr())

    def copy(self, flag: Tensor) -> None:
        self._word.value = _PENDING
        self._memory.copy_(flag, non_blocking=True)

    def ready(self) -> bool:
        return self._word.value != _PENDING

    def value(self) -> int:
        return self._word.value


def _pinned_words() -> Iterator[Tensor]:
    """No word is given twice, so that a late copy can reach its own weight alone; those of dead weights are lost."""
    while True:
        with torch.inference_mode(False):  # words are written in any mode
            slab = torch.empty(_SLAB, dtype=torch.int32, pin_memory=torch.cuda.is_available())
        yield from slab.split(1)


_words = _pinned_words()
new_word: type[Word] = PinnedWord


class Hint:
    """What was last seen of one weight. Threads may share one: what they count twice is a look more or less."""

    __slots__ = ("_left", "_waits", "_word", "zero")

    def __init__(self, after: int) -> None:
        self.zero: bool | None = None  # as last seen
        self._left = after  # calls until there is something to do
        self._word: Word | None = None
        self._waits = False

    def turn(self) -> int:
        """What this call does, by what has arrived."""
        self._left -= 1
        if self._left > 0:
            return DENSE
        word = self._word
        if self._waits and word is not None:
            if word.ready():
                self.zero, self._waits = word.value() != 0, False
                if not self.zero:
                    self._left = EVERY
                    return DENSE
            elif not self.zero:
                return DENSE  # the next call asks again
        return FLAGGED if self.zero else LOOK

    def look(self, flag: Tensor) -> None:
        """At the flag of this call, unless an earlier one is still on its way."""
        if self._waits:
            return
        if self._word is None:
            self._word = new_word()
        self._word.copy(flag)
        self._waits = True

    def rest(self) -> None:
        """There is nothing to see: no kernel of this call reads a flag."""
        self._left = EVERY


# By the identity of the weight, which is not kept alive.
_hints: dict[int, tuple[weakref.ref[Tensor], Hint]] = {}


def _enter(weight: Tensor, hint: Hint) -> Hint:
    key = id(weight)

    def gone(ref: weakref.ref[Tensor]) -> None:
        if (entry := _hints.get(key)) is not None and entry[0] is ref:
            del _hints[key]

    _hints[key] = weakref.ref(weight, gone), hint
    return hint


def hint_of(weight: Tensor) -> Hint:
    entry = _hints.get(id(weight))
    if entry is not None and entry[0]() is weight:
        return entry[1]
    return _enter(weight, Hint(1 if isinstance(weight, nn.Parameter) else 2))


def follow(copy: Tensor, weight: Tensor) -> None:
    """The copy of a weight in another dtype, made for one call, has the weight's hint."""
    _enter(copy, hint_of(weight))


def plan_of(weight: Tensor) -> tuple[bool, Hint | None]:
    """(whether this call takes the flagged plan, the hint that is to be shown its flag)"""
    hint = hint_of(weight)
    turn = hint.turn()
    if turn == DENSE:
        return False, None
    if not bits_are_free():
        hint.rest()
        return False, None
    return turn == FLAGGED, None if capturing(weight.device) else hint


def seen_zero(weight: Tensor) -> bool | None:
    """Whether the weight was last seen zero; None: it was not seen yet. Counts as no call."""
    entry = _hints.get(id(weight))
    return entry[1].zero if entry is not None and entry[0]() is weight else None


def describe(weight: Tensor) -> str:
    """For `explain`."""
    if not bits_are_free():
        return (
            "deterministic algorithms, ZEROBLOCK_PLAN=fixed or several ranks want the same bits always: the dense plan"
        )
    seen = seen_zero(weight)
    if seen is None:
        return "the weight was not seen yet: the dense plan"
    return "the weight was last seen zero: our kernels" if seen else "the weight was last seen not zero: the dense plan"
