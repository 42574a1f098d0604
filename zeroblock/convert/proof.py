"""The proof that a family's forward computes what the block's own does, on a copy with random parameters.

Both run in training mode, with gradients, and in eval mode, without; with few pixels or tokens and with many; with
operands of one sample beside others of two; with each optional argument; and once more with zero branches where the
family left dense ones to the original. Where blocks are to round as eager does, both run in bfloat16 too, and give the
same bits. A block that differs anywhere is left alone, an optional argument that does is left to the original
(`family.py`).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import zero
from ..plan import mode as _mode
from .accelerated import accelerated_class, takes
from .family import SMALL, Family
from .random_copy import random_copy
from .report import Obstacle, Reason
from .trial import as_bfloat16, close, run

# The side of the large examples (`Family.example`): neither it nor its square fits into a window of attention, or is a
# multiple of one.
LARGE = 17


class Verdict(NamedTuple):
    """Why the block is to be left alone (None: both forwards agree), and the optional arguments about which they agree
    too (None: nothing had to be proved); tried: whether the block was like the family's, so that both ran."""

    obstacle: Obstacle | None
    options: frozenset[str] | None = None
    tried: bool = False


_proved: dict[tuple, Verdict] = {}


def verdict(block: nn.Module, family: Family) -> Verdict:
    """Whether both forwards agree; remembered by fingerprint."""
    key = (type(family), family.rounding, *_fingerprint(block, family))
    if key not in _proved:
        _proved[key] = _compare(block, family)
    return _proved[key]


def _fingerprint(block: nn.Module, family: Family) -> tuple:
    """What a block's forward can depend on but its tensors' values: classes, functions, shapes, plain attributes. Not
    whether it is in training: both are proved."""
    entry = family.entry(type(block))
    code = tuple((type(m), type(m).forward, getattr(type(m), entry, None)) for m in block.modules())
    plain = tuple(
        (path, name, str(value))
        for path, m in block.named_modules()
        for name, value in sorted(vars(m).items())
        if name != "training"
        and (isinstance(value, (bool, int, float, str, tuple, list, type(None))) or callable(value))
    )
    return code, repr(block), plain, tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


def _compare(block: nn.Module, family: Family) -> Verdict:
    with _neutral():
        torch.default_generator.manual_seed(0)  # the CPU's alone: others are not restored
        try:
            example = family.example(block, SMALL)
            if example is None:
                return Verdict(None)
            large, given = family.example(block, LARGE), family.options(block)
            pair = _Pair(random_copy(block), family)
        except Exception as error:  # whatever foreign attributes raise
            return Verdict(Obstacle(Reason.UNTRIED, f"it cannot be copied for the proof: {_said(error)}"))
        assert large is not None
        obstacle = pair.obstacle(example, large)
        options = frozenset[str]() if obstacle is not None else pair.proved_options(example, given)
        if obstacle is None and pair.asked_original and pair.zero_branches():
            obstacle = pair.obstacle(example, large)
        if obstacle is None and family.rounding == "eager":
            obstacle = pair.other_bits(example) or pair.other_bits(_first(large))
        return Verdict(obstacle, options)


class _Pair:
    """A block's own forward and the family's, of the same parameters."""

    def __init__(self, twin: nn.Module, family: Family):
        self.twin, self.family, self.original = twin, family, type(twin)
        self.accelerated: Any = accelerated_class(self.original, type(family)("sync", rounding=family.rounding))
        self.asked_original = False  # whether the family's forward has called it
        self.method = family.entry(self.original)

    def obstacle(self, example: tuple, large: tuple) -> Obstacle | None:
        """The first difference that there is, optional arguments aside."""
        found = self.differ(example, {}, True, True, Reason.NAMESAKE)
        if found is None and not takes(self.family, self.original, example):
            return Obstacle(Reason.NAMESAKE, f"its {self.method} takes other arguments than {self.family.name}")
        for training in (True, False):
            found = found or self.differ(_first(large), {}, training)
        for operands in _with_one_sample(example):
            if found is None:
                found = self.differ(operands, {}, False)
                if found is not None and found.reason is Reason.UNTRIED:  # eager does not take them either
                    found = None
        return found

    def other_bits(self, args: tuple) -> Obstacle | None:
        """How the bits of the results differ in bfloat16, if they do."""
        twin, parameters = self.twin, copy.deepcopy(self.twin.state_dict())
        self.twin = twin.bfloat16()
        args = tuple(as_bfloat16(t) for t in args)
        found = None
        try:
            for zero_branch in (None, *self.family.branches(twin)):
                for t in self.family.branches(twin)[zero_branch] if zero_branch is not None else ():
                    t.detach().zero_()
                found = found or self.differ(args, {}, False, same=torch.equal)
                twin.load_state_dict(parameters)
        finally:
            self.twin = twin.float()
            self.twin.load_state_dict(parameters)
        return found and Obstacle(Reason.ROUNDING, f"in bfloat16 {found.found}")

    def zero_branches(self) -> bool:
        """Makes every branch zero; False where there is none."""
        tensors = [t for branch in self.family.branches(self.twin).values() for t in branch if not t.is_meta]
        for t in tensors:
            t.detach().zero_()
        return bool(tensors)

    def differ(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        training: bool,
        gradients: bool = False,
        where_theirs_fails: Reason = Reason.UNTRIED,
        same: Callable[[Tensor, Tensor], bool] | None = None,
    ) -> Obstacle | None:
        """How the results differ, if they do; same: what equal tensors are, None: close ones."""
        self.twin.train(training)
        results = []
        for kind in (self.original, self.accelerated):
            self.twin.__class__ = kind
            torch.default_generator.manual_seed(1)
            before = torch.default_generator.get_state()
            self.family.forget(self.twin)
            try:
                with self._watched():
                    results.append(run(getattr(self.twin, self.method), args, kwargs, gradients))
            except Exception as error:  # whatever foreign code raises on our example
                said = f"forward fails on the example of {self.family.name}: {_said(error)}"
                if kind is self.original:
                    return Obstacle(where_theirs_fails, f"its own {said}")
                return Obstacle(Reason.NAMESAKE, f"zeroblock's {said}")
            finally:
                self.twin.__class__ = self.original
        theirs, ours = results
        if not training and not torch.equal(theirs.stream, before):
            return Obstacle(Reason.RANDOM, "its forward draws random numbers in eval mode")
        if theirs.structure != ours.structure:
            return Obstacle(Reason.FORK, f"its forward returns something else than {self.family.name}")
        if not all(map(same or close, theirs.tensors, ours.tensors)):
            return Obstacle(Reason.FORK, f"its forward does not compute what {self.family.name} does")
        if not torch.equal(theirs.stream, ours.stream):
            return Obstacle(Reason.RANDOM, f"its forward draws other random numbers than {self.family.name}")
        return None

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Notes whether the family's forward asks for the original's."""
        family = self.accelerated._zeroblock.family
        eager = family.eager

        def asked(*args: Any, **kwargs: Any) -> Any:
            self.asked_original = True
            return eager(*args, **kwargs)

        family.eager = asked
        try:
            yield
        finally:
            del family.eager

    def proved_options(self, example: tuple, options: dict[str, tuple]) -> frozenset[str]:
        """The optional arguments that the example passes, and of the others those about which both forwards agree."""
        names = _parameters(self.family.forward)
        theirs = _parameters(getattr(self.original, self.method))
        proved = {name for name, value in zip(names, example, strict=False) if value is not None}
        for name, values in options.items():
            first = names.index(name)
            rest = dict(zip(names[first:], example[first:], strict=False))
            if all(n in theirs for n in (name, *rest)):
                found = [self.differ(example[:first], rest | {name: value}, False) for value in values]
                taken = [obstacle for obstacle in found if obstacle is None or obstacle.reason is not Reason.UNTRIED]
                proved = proved | {name} if taken and not any(taken) else proved - {name}
        return frozenset(proved)


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    """Random stream, gradients, autocast and defaults of dtype and device as the proof needs them, then as before; no
    plan is measured for sizes that do not come again, and nothing is counted."""
    dtype = torch.get_default_dtype()
    counts = [(table, dict(table)) for table in (zero.executed, zero.skipped)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(_mode.fixed_rule())
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            for table, before in counts:
                table.clear()
                table.update(before)


def _first(args: tuple) -> tuple:
    """One of two samples."""
    return tuple(t[:1] if _has_two_samples(t) else t for t in args)


def _with_one_sample(args: tuple) -> Iterator[tuple]:
    """The arguments, one of them with one sample."""
    batched = [i for i, t in enumerate(args) if _has_two_samples(t)]
    for i in batched if len(batched) > 1 else ():
        yield *args[:i], args[i][:1], *args[i + 1 :]


def _has_two_samples(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == 2


def _parameters(function: Any) -> list[str]:
    """The names of its parameters, but for the first (self, block)."""
    return list(inspect.signature(function).parameters)[1:]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
