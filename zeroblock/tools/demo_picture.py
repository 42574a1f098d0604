"""The picture that `python -m zeroblock demo` writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

if TYPE_CHECKING:
    from .demo import Case, Run

COLORS = {"eager": "#9aa3ad", "zeroblock": "#d1495b"}
INK, EMPTY = "#30343b", "#e9ebee"


def draw(results: list[tuple[Case, dict[str, Run]]], path: str) -> None:
    """One row per model: loss curves, step times, saved memory, zero phase, samples. results: (case, {name: run})."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
    colors = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with plt.rc_context(style | colors):
        figure = plt.figure(figsize=(16, 3.7 * len(results)), layout="constrained")
        grid = figure.add_gridspec(len(results), 5, width_ratios=(2.6, 1.7, 0.8, 2.0, 3.1))
        for row, (case, runs) in enumerate(results):
            loss, times, memory, phase, digits = (figure.add_subplot(grid[row, column]) for column in range(5))
            _curves(loss, case.name, runs)
            medians = [
                [1e3 * statistics.median(getattr(run, k)) for run in runs.values()] for k in ("zero_seconds", "seconds")
            ]
            _bars(times, medians, ("while zero\n(fwd + bwd)", "after\n(whole step)"), "{:.0f}")
            times.set_title("step time (ms)")
            _bars(memory, [[run.saved_bytes / 2**20 for run in runs.values()]], ("",), "{:.1f}")
            memory.set_title("saved for\nbackward (MiB)")
            _zero_phase(phase, runs["zeroblock"].zero_steps)
            _samples(digits, runs)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _curves(axis: Any, title: str, runs: Mapping[str, Run]) -> None:
    for name, run in runs.items():
        window = max(1, len(run.losses) // 25)
        curve = [statistics.fmean(run.losses[max(0, i - window) : i + 1]) for i in range(len(run.losses))]
        wide: dict[str, float] = {"lw": 5, "alpha": 0.5} if name == "eager" else {"lw": 1.3}
        axis.plot(range(1, len(curve) + 1), curve, color=COLORS[name], label=name, solid_capstyle="round", **wide)
    axis.set(xlabel="step", ylim=(0, None))
    axis.set_title(title, fontsize=14, fontweight="bold", loc="left")
    axis.set_title("loss, moving mean")
    axis.grid(axis="y", color=EMPTY)
    axis.legend(frameon=False)


def _bars(axis: Any, groups: Sequence[Sequence[float]], labels: Sequence[str], number: str) -> None:
    """Groups of an eager and a zeroblock bar, each with its value, and how many times less zeroblock needs."""
    for i, group in enumerate(groups):
        for offset, name, value in zip((-0.21, 0.21), COLORS, group, strict=True):
            bar = axis.bar(i + offset, value, 0.38, color=COLORS[name])
            axis.bar_label(bar, [number.format(value)], padding=2)
        ratio = f"{group[0] / group[1]:.2f}x"
        axis.text(i + 0.21, group[1] / 2, ratio, ha="center", va="center", color="white", fontweight="bold", fontsize=8)
    axis.set_xticks(range(len(labels)), labels)
    axis.tick_params(length=0)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.margins(x=0.08, y=0.1)


def _zero_phase(axis: Any, zero_steps: Mapping[str, list[int]]) -> None:
    """A row per branch, a column per step up to the second in which no branch is zero."""
    import matplotlib.pyplot as plt

    last = max((max(steps, default=0) for steps in zero_steps.values()), default=0) + 2
    for i, steps in enumerate(zero_steps.values()):
        for step in range(1, last + 1):
            color = COLORS["zeroblock"] if step in steps else EMPTY
            axis.add_patch(plt.Rectangle((step - 0.47, i - 0.43), 0.94, 0.86, color=color, lw=0))
    axis.set(title="zero phase (filled: branch exactly zero)", xlabel="step", xlim=(0.4, last + 0.6))
    axis.set(ylim=(len(zero_steps) - 0.4, -0.6), xticks=range(1, last + 1))
    axis.set_yticks(range(len(zero_steps)), zero_steps, fontsize=7)
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)


def _samples(axis: Any, runs: Mapping[str, Run]) -> None:
    """Ten digits per run, in two lines of five, apart by a frame of NaN, which is drawn as background."""
    axis.set_title("samples, classes 0 to 9")
    axis.axis("off")
    for i, (name, run) in enumerate(runs.items()):
        assert run.samples is not None
        framed = F.pad(run.samples.squeeze(1), (0, 1, 0, 1), value=float("nan"))
        lines = framed.unflatten(0, (2, 5)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        image = axis.inset_axes((0.03, 0.51 - 0.5 * i, 0.97, 0.48))
        image.imshow(lines.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        image.set(xticks=[], yticks=[])
        image.spines[:].set_visible(False)
        image.set_ylabel(name, color=COLORS[name], fontweight="bold")
