"""The only timer: candidates interleaved in random order, compared by paired ratios.

A slow spell of the machine hits every candidate of the same round, so the ratio of two times of one round is far
steadier than either time. Samples during which a thread of this process was preempted are dropped where enough
others remain.
"""

import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

SAMPLE_SECONDS = 5e-3  # shorter calls are repeated within one sample: what is timed is a loop in its steady state
MIN_CLEAN = 5  # where fewer rounds are undisturbed, the disturbed ones count too


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios, its bootstrap 95 % interval, and the 20th and 80th percentile of the ratios."""

    median: float
    lo: float
    hi: float
    p20: float
    p80: float
    rounds: int


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between order statistics: percentile([1, 2, 3], 0.5) == 2."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")


def bootstrap_interval(values: Sequence[float], level: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap interval of the median; the same values always give the same interval."""
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (resamples, len(values)), generator=generator)
    medians = sample[index].quantile(0.5, dim=1)  # [resamples]
    tail = (1 - level) / 2
    lo, hi = torch.quantile(medians, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return lo, hi


def paired_ratio(base: Sequence[float], own: Sequence[float]) -> Ratio:
    """How many times faster `own` is than `base`: base[i] / own[i] were taken in the same round."""
    ratios = [b / o for b, o in zip(base, own, strict=True)]
    lo, hi = bootstrap_interval(ratios)
    return Ratio(statistics.median(ratios), lo, hi, percentile(ratios, 0.2), percentile(ratios, 0.8), len(ratios))


@dataclass
class Timing:
    """Microseconds per call, one entry per candidate and round, and whether the sample was undisturbed."""

    times: dict[str, list[float]] = field(default_factory=dict)
    clean: dict[str, list[bool]] = field(default_factory=dict)

    def kept(self, *names: str) -> list[int]:
        """Rounds in which none of `names` was preempted; all rounds if too few are left."""
        rounds = range(len(self.times[names[0]]))
        undisturbed = [i for i in rounds if all(self.clean[name][i] for name in names)]
        return undisturbed if len(undisturbed) >= MIN_CLEAN else list(rounds)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name][i] for i in self.kept(name))

    def fastest(self, names: Sequence[str]) -> str:
        return min(names, key=self.median)

    def ratio(self, base: str, own: str) -> Ratio:
        rounds = self.kept(base, own)
        return paired_ratio([self.times[base][i] for i in rounds], [self.times[own][i] for i in rounds])

    def dropped(self, base: str, own: str) -> int:
        return len(self.times[base]) - len(self.kept(base, own))


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw  # of all threads of this process


def _sample(call: Callable[[], object], repeats: int) -> tuple[float, bool]:
    before = _preemptions()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - start
    return elapsed / repeats * 1e6, _preemptions() == before


def _repeats(call: Callable[[], object], sample_seconds: float) -> int:
    call()  # warm: compilation, lazy initialisation, the allocator's free lists
    fastest_us = min(_sample(call, 1)[0] for _ in range(2))
    return max(1, int(sample_seconds * 1e6 / fastest_us))


def measure(
    candidates: dict[str, Callable[[], object]],
    seconds: float,
    min_rounds: int = 7,
    max_rounds: int = 300,
    seed: int = 0,
    sample_seconds: float = SAMPLE_SECONDS,
) -> Timing:
    """Times every candidate once a round, in a new random order.

    candidates: {name: a call without arguments}.
    seconds: how long, about; at least `min_rounds` and at most `max_rounds` rounds.
    seed: of the orders.
    sample_seconds: shorter calls are repeated within one sample; 0: every sample is one call.
    """
    repeats = {name: _repeats(call, sample_seconds) for name, call in candidates.items()}
    timing = Timing({name: [] for name in candidates}, {name: [] for name in candidates})
    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection inside one sample would be charged to that candidate
    try:
        start = time.perf_counter()
        rounds = 0
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - start < seconds):
            shuffle(order)
            for name in order:
                elapsed, clean = _sample(candidates[name], repeats[name])
                timing.times[name].append(elapsed)
                timing.clean[name].append(clean)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return timing
