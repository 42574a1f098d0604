"""What the tests of the hint share: words that arrive when the test says so, and calls of ops with a zero path."""

from __future__ import annotations

import pytest
import torch

import zeroblock as zb
from zeroblock.plan import planned as _plan
from zeroblock.steps import hint

from .cases import FakeTimer
from .gpu_cases import OPTIONS, inputs


class FakeWord:
    """Arrives `late` calls of `ready` after it was sent; None: never."""

    late: int | None = 0
    sent = 0

    def copy(self, flag):
        type(self).sent += 1
        self._value, self._left = int(flag), self.late

    def ready(self):
        if self._left is None:
            return False
        self._left -= 1
        return self._left < 0

    def value(self):
        return self._value


@pytest.fixture(name="words", autouse=True)
def words_fixture(monkeypatch):
    class Words(FakeWord):
        pass

    monkeypatch.setattr(hint, "new_word", Words)
    monkeypatch.setattr(hint, "_hints", {})
    with _plan.use(timer=FakeTimer()):
        yield Words


def parameters(op, is_zero=False, **kwargs):
    given = inputs(op, **kwargs)
    given["weight"] = torch.nn.Parameter(given["weight"].detach(), requires_grad=kwargs.get("grad", False))
    if is_zero:
        given["weight"].data.zero_()
    return given


def call(op, given, **kwargs):
    return getattr(zb, op)(**given, **OPTIONS[op], **kwargs)


def bare(given):
    step = given["bias"] if given["weight"].dim() == 2 else given["bias"][:, None, None]
    return given["residual"] + (given["gate"][:, None] * step if "gate" in given else step)


def looks(backends) -> int:
    return sum(b.calls.count("zero_flag") for b in backends.values())
