"""The seam between a block and the one that is called next: the block's last gate and the next one's first norm in one
pass, while the model hands over what the block returned as it is.

Whether it does is learned from the calls. A block leaves a note on what it returns; the next block of its class finds
it there, on the very tensors, unchanged, and sees which of its arguments they are and that all others are those of the
first block. From then on the first block computes the next one's first norm as well, by that one's modulation, and
leaves it on the note. It is used if everything arrives as expected again, and dropped otherwise: where something stands
in between (what a ControlNet adds, a hook that returns another tensor, a cache that leaves blocks out) a block computes
its own norm, and the seam rests for a while.

Without gradients alone: to add into a block's result in place is right in eager training, and would destroy what the
norm saves. Not for inference tensors, which do not tell that they were changed (and a change through `.data` tells
nobody), nor while the next block has hooks of its own (FSDP, offloading, caches) or a compiler looks on.
"""

from __future__ import annotations

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import zero
from .._autocast import is_autocast
from ..blocks.decision import is_watched, runs_eagerly
from ..plan.mode import rounds_as_eager

# Of a tensor: (the note, which of the results it is).
_ATTRIBUTE = "_zeroblock_note"
# So many calls a seam rests that led nowhere, and so many notes in a row may stay unread: threads may be under way.
_REST, _UNREAD = 32, 4


class Prepared(NamedTuple):
    """What a block computed for the next one: its rows, and the first norm of each stream, as far as they are one."""

    rows: Any
    normed: Sequence[Tensor]
    streams: Sequence[Callable[[], Tensor | None]]  # what they are the norms of


class _Link:
    """What came of a block's results so far."""

    __slots__ = ("next", "places", "rest", "unread")

    def __init__(self) -> None:
        self.next: weakref.ref[nn.Module] | None = None
        self.places: dict[int, int] = {}  # of the next block's arguments: which of the results they are
        self.rest = self.unread = 0

    def stop(self) -> None:
        self.next, self.rest, self.unread = None, _REST, 0


class _Note:
    __slots__ = ("condition", "kind", "link", "names", "prepared", "values", "versions")

    link: _Link
    kind: type  # of the block that left it
    values: list[Any]  # what the block was called with, the last ones by these names
    names: tuple[str, ...]
    versions: list[int]  # of the results
    condition: int  # the versions of the values
    prepared: Prepared | None

    def __reduce__(self) -> Any:
        return collections.OrderedDict, ()  # tensors are saved with their attributes; torch.load takes this one

    def __deepcopy__(self, memo: Any) -> None:
        return None


_links: weakref.WeakKeyDictionary[nn.Module, _Link] = weakref.WeakKeyDictionary()
_paused = 0


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Blocks run for themselves."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


def possible(x: Any) -> bool:
    """Whether a call may have a seam, of which the others are asked then: without gradients, with nobody watching."""
    return not (
        _paused
        or torch.is_grad_enabled()
        or type(x) not in zero.PLAIN_TYPES
        or not runs_eagerly()
        or torch.is_inference_mode_enabled()
        or rounds_as_eager()
        or is_autocast(x.device)
    )


def taken(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared | None:
    """What the block before prepared for this call, if anything."""
    x: Any = args[0] if args else next(iter(kwargs.values()), None)
    mark = getattr(x, _ATTRIBUTE, None)
    if mark is None:
        return None
    note = mark[0]
    if type(note) is not _Note:  # x is a copy, or was loaded
        return None
    link, prepared, theirs = note.link, note.prepared, note.values
    values = (*args, *kwargs.values()) if kwargs else args
    fits = type(block) is note.kind and len(values) == len(theirs) and tuple(kwargs) == note.names
    places: dict[int, int] = {}
    condition = 0
    for i, value in enumerate(values) if fits else ():
        mark = getattr(value, _ATTRIBUTE, None)
        if mark is not None and mark[0] is note:
            del value._zeroblock_note
            places[i] = mark[1]
            fits = fits and value._version == note.versions[mark[1]]
        else:
            if isinstance(value, Tensor):
                condition += _version(value)
            fits = fits and (value is theirs[i] or _is_the_same(value, theirs[i]))
    if not fits:
        link.stop()
        return None
    link.unread = 0
    if prepared is None:
        link.next, link.places = weakref.ref(block), places
        return None
    if link.next is None or link.next() is not block or places != link.places or condition != note.condition:
        link.stop()
        return None
    return prepared


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _is_the_same(value: Any, theirs: Any) -> bool:
    """What two blocks were called with, where it is not one object."""
    if type(theirs) is weakref.ref:
        return theirs() is value
    if type(value) is not type(theirs):
        return False
    if isinstance(value, (tuple, list)):
        return len(value) == len(theirs) and all(a is b for a, b in zip(value, theirs, strict=True))
    return isinstance(value, (bool, int, float, str)) and value == theirs


def following(block: nn.Module) -> Any:
    """The block that is called next, if what this one returns has gone to it as it was, and it may be prepared."""
    link = _links.get(block)
    if link is None or link.next is None:
        return None
    found = link.next()
    if found is None or type(found) is not type(block) or is_watched(found):
        link.stop()
        return None
    return found


def leave(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], results: tuple[Any, ...], prepared: Prepared | None
) -> None:
    """A note for the next block on what this one returns."""
    for r in results:
        if type(r) is not Tensor:
            return
    link = _links.get(block)
    if link is None:
        link = _links[block] = _Link()
    if link.rest:
        link.rest -= 1
        return
    if link.unread >= _UNREAD:
        link.stop()
        return
    link.unread += 1
    note = _Note()
    note.link, note.kind, note.prepared, note.names = link, type(block), prepared, tuple(kwargs)
    note.values = values = [*args, *kwargs.values()]
    note.condition, note.versions = 0, []
    if prepared is None:
        note.values = list(map(_weakly, values))
    else:
        for i in link.places:
            values[i] = None  # it need not live on
        for value in values:
            if isinstance(value, Tensor):
                note.condition += _version(value)
    for i, r in enumerate(results):
        note.versions.append(r._version)
        r._zeroblock_note = note, i


def _weakly(value: Any) -> Any:
    return weakref.ref(value) if isinstance(value, Tensor) else value
