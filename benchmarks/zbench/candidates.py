"""What is timed in a case: zeroblock, eager PyTorch, torch.compile in several settings, and the floor."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from .case import HIGH, Case, Side, Work, as_tuple

COMPILED = {
    "compile": {},
    "max_autotune": {"mode": "max-autotune"},
    "freezing": {"options": {"freezing": True}},  # weights become constants, laid out at compile time
    "max_autotune_freezing": {"options": {"freezing": True, "max_autotune": True}},
}
# Of --baselines: the keys of COMPILED that are tried beside eager.
BASELINES: dict[str, tuple[str, ...]] = {"eager": (), "default": ("compile",), "all": tuple(COMPILED)}
COMPILED_TOO = ("models", "whole")  # groups in which zeroblock is timed under torch.compile as well
BOTH_LAYOUTS = ("dense", "frozen")  # groups in which --baselines all tries images in both memory formats
AGREEMENT = {"fp32": 1e-4, HIGH: 1e-4, "bf16": 5e-2}  # of all results together; a guard, not a test


@dataclass(frozen=True)
class Candidate:
    """One of the ways that are timed in turns."""

    name: str  # "eager", a key of COMPILED, "zeroblock", "zeroblock_compile" or "floor"
    step: Callable[[], object]
    other_layout: bool = False  # a baseline with images and weights in the other memory format

    @property
    def label(self) -> str:
        """Unlike any other of its case; as in the results' column best_all."""
        return f"{self.name} other layout" if self.other_layout else self.name

    @property
    def is_baseline(self) -> bool:
        return self.name not in ("zeroblock", "zeroblock_compile", "floor")


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in the block after so long, where the system has timers."""

    def stop(*_) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled_candidates(
    case: Case, side: Side, baselines: tuple[str, ...], limit: float, other_layout: bool = False
) -> list[Candidate]:
    """A compiled and warm step for each of `baselines`.

    One that fails to compile, or takes longer than `limit` seconds, is left out with a message.
    """
    found = []
    for name in baselines:
        if "freezing" in name and case.mode == "training":
            continue
        try:
            with at_most(limit):
                step = side.compiled(**COMPILED[name]).step(case.mode)
                step()
            found.append(Candidate(name, step, other_layout))
        except Exception as error:
            print(f"{name} failed: {str(error).splitlines()[0]}  ", end="", flush=True)
    return found


def baseline_candidates(case: Case, side: Side, baselines: tuple[str, ...], limit: float) -> list[Candidate]:
    """What zeroblock is compared with; with all baselines, whole blocks of images in both layouts."""
    found = [Candidate("eager", side.step(case.mode)), *compiled_candidates(case, side, baselines, limit)]
    if baselines == BASELINES["all"] and case.group in BOTH_LAYOUTS and side.has_layouts():
        other = side.in_other_layout()
        found.append(Candidate("eager", other.step(case.mode), other_layout=True))
        found += compiled_candidates(case, other, baselines, limit, other_layout=True)
    return found


def candidates(case: Case, work: Work, baselines: tuple[str, ...], limit: float) -> list[Candidate]:
    """All that is timed of a case, its results checked first."""
    own = Candidate("zeroblock", work.own.step(case.mode))
    if case.same_work:
        check_agreement(case, work.eager.step(case.mode), own.step)
        found = [own, *baseline_candidates(case, work.eager, baselines, limit)]
        if case.group in COMPILED_TOO and any(candidate.name == "compile" for candidate in found):
            both = compiled_candidates(case, work.own, ("compile",), limit)
            found += [replace(candidate, name="zeroblock_compile") for candidate in both]
    else:
        found = [own, Candidate("eager", work.eager.step(case.mode))]
    if work.floor is not None:
        found.append(Candidate("floor", work.floor))
    return found


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    """The case's float32 precision in the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.dtype == HIGH else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_agreement(
    case: Case, eager: Callable[[], object], own: Callable[[], object], limit: float | None = None
) -> None:
    """Raises RuntimeError if the two steps differ: by the relative L2 distance of all their results together."""

    def flat(result) -> torch.Tensor:
        return torch.cat([tensor.detach().double().flatten() for tensor in as_tuple(result)])

    expected, actual = flat(eager()), flat(own())
    distance = ((actual - expected).norm() / expected.norm()).item()
    if not distance <= (AGREEMENT[case.dtype] if limit is None else limit):
        raise RuntimeError(f"results differ from eager by {distance:.2g} (relative L2), so no time is taken")
