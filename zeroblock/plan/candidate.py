"""A way that a planned step can be done in, and what is said of it unless it says otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from .mode import reduced_allowed

P = ParamSpec("P")
R = TypeVar("R")


def takes_all(*args: object, **kwargs: object) -> None:
    return None


def no(*args: object, **kwargs: object) -> bool:
    return False


def the_library(*args: object, **kwargs: object) -> str:
    return "library"


@dataclasses.dataclass(frozen=True)
class Candidate(Generic[P, R]):
    """One way. why_not(*args) is the reason it does not take them, or None; reduced(*args) whether it takes them in
    reduced float32 precision; rule(*args) whether it is to run where nothing is measured. All read metadata only."""

    name: str
    run: Callable[P, R]
    why_not: Callable[P, str | None] = takes_all
    reduced: Callable[P, bool] = no
    rule: Callable[P, bool] | None = None

    def usable(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        return self.why_not(*args, **kwargs) is None and (not self.reduced(*args, **kwargs) or reduced_allowed())
