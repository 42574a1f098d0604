"""`python -m zeroblock demo`: a small U-Net and a small DiT trained on real digits, with eager blocks and zeroblock's.

Both versions start from the same seed and see the same images, timesteps and noise, step by step in turn. The program
prints step times, the memory saved for backward and the steps in which each residual branch was exactly zero, draws
digits with both, writes one picture, and fails if one of these is not so:

* both versions start from identical weights; while a branch is zero zeroblock skips it, every time; each branch leaves
  zero in the same step in both versions;
* the loss curves agree: their distance is at most twice the distance between eager and eager whose weights are moved
  by up to one unit in the last place before every step, a disturbance as small as rounding itself;
* trained weights go from zeroblock to eager and back, strictly, and give the same output up to rounding.

Times are medians. "While zero" repeats forward and backward before the first optimizer step, as micro-batches do.
"""

from __future__ import annotations

import copy
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeroblock.nn as fused

from ..testing import assert_error_budget, counters, eager, reset_counters, rounding, saved_activation_bytes
from . import demo_picture, models
from .progress import Progress

QUICK_STEPS = 6
SAMPLING_STEPS = 25
ZERO_REPEATS = 7
FUSED_BRANCHES = {fused.ResBlock: 1, fused.DiTBlock: 2, fused.FinalLayer: 1}
Check = Callable[[bool, str], None]


@dataclass
class Case:
    """A model and how it is trained; `build` takes the namespace of blocks, as tools/models.py does."""

    name: str
    build: Callable[[Any], nn.Module]
    learning_rate: float  # at the start; it falls linearly to 0 in the second half
    batch: int
    steps: int


CASES = [
    Case("U-Net", lambda blocks: models.UNet(blocks, channel_mult=(1, 1)), 2e-3, 32, 220),
    Case("DiT", lambda blocks: models.DiT(blocks, hidden_size=96, depth=3, num_heads=3), 3e-3, 32, 500),
]


@dataclass
class Run:
    """A model in training and what was seen of it."""

    model: Any
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of forward, backward and optimizer step
    zero_seconds: list[float] = field(default_factory=list)  # of forward and backward before the first optimizer step
    zero_steps: dict[str, list[int]] = field(default_factory=dict)
    saved_bytes: int = 0
    samples: Tensor | None = None

    @classmethod
    def start(cls, case: Case, blocks: Any, seed: int) -> Run:
        torch.manual_seed(seed)
        model = case.build(blocks)
        return cls(model, torch.optim.Adam(model.parameters(), lr=case.learning_rate, betas=(0.9, 0.99)))

    def backward(self, batch: tuple[Tensor, ...]) -> float:
        self.optimizer.zero_grad()
        loss = models.noise_loss(self.model, batch)
        loss.backward()
        return loss.item()

    def step(self, batch: tuple[Tensor, ...], learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        start = time.perf_counter()
        self.losses.append(self.backward(batch))
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    def note_zero_branches(self, step: int) -> None:
        for name, tail in self.model.zero_tails().items():
            steps = self.zero_steps.setdefault(name, [])
            if not any(t.any() for t in tail):
                steps.append(step)

    @torch.no_grad()
    def move_weights(self, generator: torch.Generator) -> None:
        """Every weight that is not zero goes up, goes down or stays, by one unit in the last place."""
        for parameter in self.model.parameters():
            ulps = torch.randint(-1, 2, parameter.shape, generator=generator, dtype=torch.int32)
            parameter.view(torch.int32).add_(ulps * (parameter != 0))


def need(module: str) -> Any:
    """A package of the demo extra. Raises ImportError that says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}; install it with: pip install zeroblock[demo]") from error


def load_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 scanned digits: images [N, 1, 16, 16] in [-1, 1] (interpolated from 8x8) and labels [N]."""
    digits = need("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=16, mode="bilinear", align_corners=False), torch.tensor(digits.target)


def distance(losses: list[float], reference: list[float]) -> float:
    """Relative L2 distance of two loss curves."""
    a, b = torch.tensor(losses, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    return ((a - b).norm() / b.norm()).item()


def time_zero_phase(case: Case, runs: dict[str, Run], batch: tuple[Tensor, ...], check: Check) -> None:
    reset_counters()
    for _ in range(ZERO_REPEATS):
        for run in runs.values():
            start = time.perf_counter()
            run.backward(batch)
            run.zero_seconds.append(time.perf_counter() - start)
    skipped = sum(count for _, count in counters().values())
    branches = sum(FUSED_BRANCHES.get(type(module), 0) for module in runs["zeroblock"].model.modules())
    every = ZERO_REPEATS * branches
    check(skipped == every, f"{case.name}: {skipped} of {every} fused branches skipped while zero")


def train(case: Case, data: tuple[Tensor, Tensor], steps: int, seed: int, check: Check) -> dict[str, Run]:
    """Train eager, zeroblock and eager with moved weights in turn; returns the first two."""
    runs = {"eager": Run.start(case, eager, seed), "zeroblock": Run.start(case, fused, seed)}
    plain, ours = runs.values()
    moved = Run.start(case, eager, seed)
    weights, others = plain.model.state_dict(), ours.model.state_dict()
    same = weights.keys() == others.keys() and all(torch.equal(w, others[k]) for k, w in weights.items())
    check(same, f"{case.name}: {len(weights)} tensors start identical")

    generator, moves = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    batch = models.draw_batch(*data, case.batch, generator)
    time_zero_phase(case, runs, batch, check)
    progress = Progress(lines=10)
    for step in range(1, steps + 1):
        batch = models.draw_batch(*data, case.batch, generator)
        learning_rate = case.learning_rate * min(1.0, 2 - 2 * (step - 1) / steps)
        for run in (plain, ours) if step % 2 else (ours, plain):
            run.note_zero_branches(step)
            run.step(batch, learning_rate)
        moved.move_weights(moves)
        moved.step(batch, learning_rate)
        progress(case.name, step, steps, f"loss {statistics.fmean(ours.losses[-20:]):.3f}")
    progress.close()

    for run in runs.values():
        known = (*run.model.parameters(), *run.model.buffers(), *batch)
        run.saved_bytes = saved_activation_bytes(partial(models.noise_loss, run.model, batch), known)
    check(plain.zero_steps == ours.zero_steps, f"{case.name}: each branch leaves zero in the same step as in eager")
    found, drift = (distance(run.losses, plain.losses) for run in (ours, moved))
    limit = 2 * (drift + rounding(torch.float32))  # two losses may be rounded apart even when nothing else differs
    check(found <= limit, f"{case.name}: loss curves agree: distance {found:.1e}, allowed {limit:.1e}")
    return runs


@torch.no_grad()
def check_round_trip(case: Case, trained: nn.Module, batch: tuple[Tensor, ...], check: Check) -> None:
    """The trained weights into eager and back."""
    x, t, y, _ = batch
    there, back = case.build(eager), case.build(fused)
    there.load_state_dict(trained.state_dict(), strict=True)
    back.load_state_dict(there.state_dict(), strict=True)
    expected, exact = there(x, t, y), copy.deepcopy(there).double()(x.double(), t, y)
    failure = ""
    try:
        for model in (trained, back):
            assert_error_budget(model(x, t, y), expected, exact, "output")
    except AssertionError as error:
        failure = f": {error}"
    check(not failure, f"{case.name}: the weights give the same output in eager and back in zeroblock{failure}")


def summary(case: Case, runs: dict[str, Run]) -> list[str]:
    """The lines of the table, and the zero phase in words."""
    rows = [
        ("step while zero (ms)", [1e3 * statistics.median(run.zero_seconds) for run in runs.values()]),
        ("step after (ms)", [1e3 * statistics.median(run.seconds) for run in runs.values()]),
        ("saved for backward (MiB)", [run.saved_bytes / 2**20 for run in runs.values()]),
    ]
    lines = ["", f"{case.name:<28}{'eager':>10}{'zeroblock':>12}{'ratio':>9}"]
    lines += [f"  {label:<26}{a:>10.1f}{b:>12.1f}{a / b:>8.2f}x" for label, (a, b) in rows]
    losses = [statistics.fmean(run.losses[-20:]) for run in runs.values()]
    lines.append(f"  {'loss, last 20 steps':<26}{losses[0]:>10.5f}{losses[1]:>12.5f}")
    phases: dict[tuple[int, ...], list[str]] = {}
    for name, zero_steps in runs["zeroblock"].zero_steps.items():
        phases.setdefault(tuple(zero_steps), []).append(name)
    for steps, names in phases.items():
        text = f"exactly zero in steps {', '.join(map(str, steps)) or 'none'}: {' '.join(names)}"
        lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="    ")
    return lines


def run(out: str, steps: int | None = None, seed: int = 0, quick: bool = False) -> bool:
    """Trains, compares, prints and draws; True if all checks passed.

    out: the picture to write.
    steps: optimizer steps of each model; None: each case's own, or QUICK_STEPS if `quick`.
    seed: of weights, batches and samples.
    quick: few steps, which only shows that everything runs.

    Raises ImportError where scikit-learn or matplotlib is missing.
    """
    need("matplotlib")
    data = load_digits()
    start = time.perf_counter()
    failures = []

    def check(passed: bool, what: str) -> None:
        print(f"{'ok    ' if passed else 'FAILED'} {what}", flush=True)
        if not passed:
            failures.append(what)

    results, lines = [], []
    for case in CASES:
        runs = train(case, data, steps or (QUICK_STEPS if quick else case.steps), seed, check)
        generator = torch.Generator().manual_seed(seed)
        check_round_trip(case, runs["zeroblock"].model, models.draw_batch(*data, 10, generator), check)
        noise = torch.randn(10, 1, 16, 16, generator=generator)
        for trained in runs.values():
            evaluations = QUICK_STEPS if quick else SAMPLING_STEPS
            trained.samples = models.sample(trained.model, noise, torch.arange(10), evaluations)
        results.append((case, runs))
        lines += summary(case, runs)
    demo_picture.draw(results, out)
    print("\n".join(lines))
    print(f"\n{time.perf_counter() - start:.0f} s with {torch.get_num_threads()} threads; picture: {out}")
    print(f"{len(failures)} checks failed" if failures else "all checks passed")
    return not failures
