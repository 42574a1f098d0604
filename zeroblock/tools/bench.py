"""`python -m zeroblock bench`: a user's model as it is, compiled, accelerated, both, and frozen: which to use.

Times are taken in interleaved rounds (testing/timing.py), saved bytes are counted exactly, and the peak is the most
that one step allocates through torch. Loss and gradients of the accelerated model must agree with eager's; their
relative differences (L2) are shown, since fused ops round otherwise and are not bit-equal.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._freeze import freeze
from ..convert import accelerate
from ..doctor.measure import Loss, call_loss
from ..doctor.snapshot import preserved
from ..testing import saved_activation_bytes
from ..testing.timing import measure

EAGER, COMPILE, ACCELERATE, BOTH, FREEZE = WAYS = (
    "eager",
    "torch.compile",
    "accelerate",
    "accelerate + torch.compile",
    "accelerate + freeze",
)
MODES = ("inference", "training")
# What `bench` calls equal: the relative difference that rounding may add up to over a model, forward and backward.
EQUAL = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


class Time(NamedTuple):
    """Of one way in one mode: milliseconds, and how many times faster than eager with its 95 % interval."""

    ms: float
    ratio: float
    lo: float
    hi: float


@dataclasses.dataclass
class Comparison:
    """What was measured of a model; str() is the table."""

    report: str  # accelerate's
    times: dict[str, dict[str, Time]]  # by mode and way
    saved_bytes: dict[str, int]  # for backward, by way: of eager and accelerate
    peak_bytes: dict[str, int]  # of a training step, gradients included, by way
    differences: dict[str, float]  # relative, of the loss and of all gradients together
    equal: bool  # no difference is larger than rounding explains
    left_out: dict[str, str]  # ways that did not run, and why

    @property
    def advice(self) -> str:
        """Which way to use: the fastest in each mode, eager unless another is faster beyond the noise."""
        found = []
        for mode in MODES:
            times = self.times[mode]
            best = max(times, key=lambda way: times[way].lo if way != EAGER else 1.0)
            found.append(
                f"for {mode} {best} ({'nothing beats it' if best == EAGER else f'{times[best].ratio:.2f}x eager'})"
            )
        text = "Use " + ", ".join(found) + "."
        before, after = (self.saved_bytes.get(way, 0) for way in (EAGER, ACCELERATE))
        return text + (f" accelerate keeps {after / before:.2f}x of eager's bytes for backward." if before else "")

    def to_json(self) -> str:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["times"] = {m: {way: t._asdict() for way, t in times.items()} for m, times in self.times.items()}
        return json.dumps({**fields, "advice": self.advice}, indent=2)

    def __str__(self) -> str:
        heads = ("", *(f"{mode}, ms   x eager" for mode in MODES), "kept for backward, MiB", "peak, MiB")
        rows = [heads, *(self._row(way) for way in WAYS if any(way in self.times[mode] for mode in MODES))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        table = ["  ".join(f"{cell:{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows]
        missing = [f"{way} is left out: {why}" for way, why in self.left_out.items()]
        found = ", ".join(f"{what} {d:.1e}" for what, d in self.differences.items())
        equality = f"equality: {'ok' if self.equal else 'DIFFERENT'} (largest relative difference: {found})"
        return "\n".join([self.report, "", *table, *missing, equality, self.advice])

    def _row(self, way: str) -> tuple[str, ...]:
        cells = [way]
        for mode in MODES:
            time = self.times[mode].get(way)
            text = "" if time is None else f"{time.ms:.2f}   {time.ratio:.2f}x"
            cells.append(text + ("" if time is None or way == EAGER else f" [{time.lo:.2f}, {time.hi:.2f}]"))
        for found in (self.saved_bytes, self.peak_bytes):
            cells.append(f"{found[way] / 2**20:.2f}" if way in found else "")
        return tuple(cells)


def bench(model: nn.Module, batch: Any, loss: Loss, seconds: float, compiled: bool = True) -> Comparison:
    """Compares a model with an accelerated copy of it, each as it is and compiled, and with a frozen one.

    model: any nn.Module with parameters.
    batch: what `loss` calls it with, as in `zeroblock.doctor`.
    loss: loss(model, batch) -> Tensor of one element that depends on a parameter.
    seconds: of timing, for inference and for training each.
    compiled: with torch.compile too.

    The model, the batch and the random streams are put back. Raises as `zeroblock.doctor` does where model or loss fail
    on the batch, and what `accelerate` raises. A way that fails is left out.
    """
    with preserved(model, batch):
        after = copy.deepcopy(model)
        report = accelerate(after)
        return compare(model, after, batch, loss, seconds, str(report), compiled)


def compare(
    before: nn.Module, after: nn.Module, batch: Any, loss: Loss, seconds: float, report: str, compiled: bool = False
) -> Comparison:
    """Compares two models with the same parameters, the second accelerated; arguments as in `bench`."""
    models: dict[str, Any] = {EAGER: before, ACCELERATE: after}
    results = [_results(model, batch, loss) for model in models.values()]
    differences = _differences(*results)
    first = next(before.parameters())
    saved = {
        way: saved_activation_bytes(partial(loss, m, batch), exclude=[*m.parameters(), *m.buffers(), *_tensors(batch)])
        for way, m in models.items()
    }
    if compiled:
        models |= {COMPILE: torch.compile(before), BOTH: torch.compile(after)}
    left_out: dict[str, str] = {}
    times: dict[str, dict[str, Time]] = {}
    peak: dict[str, int] = {}
    for mode in MODES:
        ways = dict(models)
        if mode == "inference" and first.is_cpu:
            ways[FREEZE] = copy.deepcopy(after).eval()
            freeze(ways[FREEZE])
        steps: dict[str, Callable[[], object]] = {}
        for way, m in ways.items():
            if way != FREEZE:  # train() unfreezes
                m.train(mode == "training")
            step = partial(_step, mode, m, batch, loss, first.device)
            try:
                step()
            except Exception as error:
                if way in (EAGER, ACCELERATE):
                    raise
                left_out[way] = str(error).splitlines()[0]
                continue
            steps[way] = step
        timing = measure(steps, seconds)
        ratios = {way: timing.ratio(EAGER, way) for way in steps}
        times[mode] = {
            way: Time(timing.median(way) / 1e3, ratio.median, ratio.lo, ratio.hi) for way, ratio in ratios.items()
        }
        if mode == "training":
            peak = {way: _peak_bytes(step, ways[way], first.device) for way, step in steps.items()}
    equal = all(d <= EQUAL.get(first.dtype, 1e-3) for d in differences.values())
    return Comparison(report, times, saved, peak, differences, equal, left_out)


def _step(mode: str, model: nn.Module, batch: Any, loss: Loss, device: torch.device) -> None:
    if mode == "inference":
        with torch.no_grad():
            loss(model, batch)
    else:
        model.zero_grad()
        loss(model, batch).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(step: Callable[[], object], model: nn.Module, device: torch.device) -> int:
    """The most that a training step allocates beyond the model and the batch, gradients included."""
    model.zero_grad()  # else the step begins with giving memory back
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _tensors(batch: Any) -> list[Tensor]:
    return [t for t in tree_leaves(batch) if isinstance(t, Tensor)]


def _results(model: nn.Module, batch: Any, loss: Loss) -> dict[str, Tensor]:
    """Loss and gradients with the same random numbers for every model."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    value = call_loss(model, batch, loss)
    value.sum().backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"": value.detach().reshape(1), **grads}


def _differences(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 distances: of the loss, and of all gradients together."""
    if before.keys() != after.keys():
        return {"gradients (not of the same parameters)": float("inf")}
    found = {}
    for what, names in (("loss", [""]), ("gradients", [n for n in before if n])):
        distance = sum(float((after[n].double() - before[n].double()).square().sum()) for n in names)
        size = sum(float(before[n].double().square().sum()) for n in names)
        found[what] = (distance / size) ** 0.5 if size else float(distance > 0)
    return found


def draw(comparison: Comparison, path: str) -> None:
    """The table as bars, in PNG, SVG or PDF by the path's ending. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
    for axis, mode in zip(axes, MODES, strict=True):
        ways: Sequence[str] = list(comparison.times[mode])[::-1]
        values = [comparison.times[mode][way].ratio for way in ways]
        axis.barh(range(len(ways)), values, color=["#c0392b" if v < 0.995 else "#3b6fb6" for v in values])
        axis.set_yticks(range(len(ways)), ways if axis is axes[0] else [""] * len(ways))
        axis.axvline(1, color="#333333", lw=0.8, ls=":")
        axis.set_title(f"{mode}: times faster than eager", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
