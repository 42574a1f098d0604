"""Train a small U-Net and a small DiT on real digits, once with eager blocks and once with zeroblock's, and compare.

Both versions start from the same seed and see the same images, timesteps and noise, step by step in turn. The program
prints step times, the memory saved for backward and the steps in which each residual branch was exactly zero, draws
digits with both, writes one picture, and exits with status 1 if a check fails:

* both versions start from identical weights and leave the zero phase in the same step, branch by branch;
* the loss curves agree: their distance is at most twice that between eager and eager started from weights moved by one
  unit in the last place, a disturbance as small as rounding itself;
* trained weights go from zeroblock to eager and back, and give the same output up to rounding.

The timed work is forward, backward and the Adam step of one batch; the time shown is the median over all steps.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import zeroblock.nn
from zeroblock import models
from zeroblock.testing import (
    assert_error_budget,
    counters,
    eager,
    reset_counters,
    rounding,
    saved_activation_bytes,
)

ZERO_STEPS_TIMED = 6
QUICK_STEPS = 6
COLORS = {"eager": "#9aa3ad", "zeroblock": "#d1495b"}


@dataclass
class Case:
    name: str
    build: object
    learning_rate: float
    batch: int
    steps: int


CASES = [
    Case("U-Net", lambda blocks: models.UNet(blocks, channel_mult=(1, 1)), 2e-3, 16, 300),
    Case("DiT", lambda blocks: models.DiT(blocks, hidden_size=96, depth=3, num_heads=3), 3e-3, 32, 500),
]


@dataclass
class Run:
    """One model in training and what was seen of it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    zero_seconds: list = field(default_factory=list)
    zero_steps: dict = field(default_factory=dict)
    saved_bytes: int = 0
    samples: torch.Tensor = None

    def backward(self, batch):
        self.optimizer.zero_grad()
        loss = models.noise_loss(self.model, batch)
        loss.backward()
        return loss.item()

    def note_zero_branches(self, step):
        """Record the branches that are exactly zero in `step` (from 1)."""
        for name, tail in self.model.zero_tails().items():
            steps = self.zero_steps.setdefault(name, [])
            if all(not t.any() for t in tail):
                steps.append(step)

    def step(self, batch):
        start = time.perf_counter()
        self.losses.append(self.backward(batch))
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)


class Progress:
    """A bar on a terminal, a line per tenth elsewhere."""

    def __init__(self, label, total):
        self.label, self.total, self.start = label, total, time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def update(self, done, note):
        tenth = max(1, self.total // 10)
        if not self.terminal and done % tenth and done != self.total:
            return
        bar = "#" * (24 * done // self.total)
        seconds = time.perf_counter() - self.start
        line = f"{self.label:6s} [{bar:24s}] {done}/{self.total} {seconds:5.1f} s  {note}"
        end = "\n" if not self.terminal or done == self.total else ""
        print(("\r" if self.terminal else "") + line, end=end, file=sys.stderr, flush=True)


def need(module):
    """Import a package of the demo extra, or end with a message that says how to get it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise SystemExit(f"zeroblock demo: needs {error.name}; install it with: pip install zeroblock[demo]") from error


def load_digits():
    """scikit-learn's 1797 scanned digits: images [N, 1, 16, 16] in [-1, 1] (8x8, interpolated) and labels [N]."""
    digits = need("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=16, mode="bilinear", align_corners=False), torch.tensor(digits.target)


@torch.no_grad()
def move_by_one_ulp(model, seed):
    """Every weight that is not zero goes up, goes down or stays, by one unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        direction = torch.randint(-1, 2, parameter.shape, generator=generator) * math.inf
        moved = torch.nextafter(parameter, torch.where(direction.isnan(), parameter, direction))
        parameter.copy_(torch.where(parameter == 0, parameter, moved))


def distance(losses, reference):
    """Relative L2 distance of two loss curves."""
    a, b = torch.tensor(losses, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    return ((a - b).norm() / b.norm()).item()


def start_run(case, blocks, seed):
    torch.manual_seed(seed)
    model = case.build(blocks)
    return Run(model, torch.optim.Adam(model.parameters(), lr=case.learning_rate, betas=(0.9, 0.99)))


def train(case, data, steps, seed, check):
    """Train eager, zeroblock and the disturbed eager run in turn; returns the first two."""
    runs = {"eager": start_run(case, eager, seed), "zeroblock": start_run(case, zeroblock.nn, seed)}
    timed = list(runs.values())
    weights = [run.model.state_dict() for run in timed]
    same = weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    check(same, f"{case.name}: same seed, same {len(weights[0])} tensors")
    disturbed = start_run(case, eager, seed)
    move_by_one_ulp(disturbed.model, seed)

    generator = torch.Generator().manual_seed(seed)
    batch = models.draw_batch(*data, case.batch, generator)
    reset_counters()
    for repeat in range(
        ZERO_STEPS_TIMED + 1
    ):  # as micro-batches before the first optimizer step; the first one warms up
        for run in timed:
            start = time.perf_counter()
            run.backward(batch)
            if repeat:
                run.zero_seconds.append(time.perf_counter() - start)
    skipped = sum(count for _, count in counters().values())
    check(skipped > 0, f"{case.name}: {skipped} branches skipped while zero")

    progress = Progress(case.name, steps)
    for step in range(1, steps + 1):
        batch = models.draw_batch(*data, case.batch, generator)
        for run in (*timed[:: 1 if step % 2 else -1], disturbed):
            for group in run.optimizer.param_groups:
                group["lr"] = case.learning_rate * min(1.0, 2 * (1 - (step - 1) / steps))
            run.note_zero_branches(step)
            run.step(batch)
        progress.update(step, f"loss {statistics.fmean(timed[1].losses[-20:]):.3f}")

    for run in timed:
        tensors = (*run.model.parameters(), *run.model.buffers(), *batch)
        run.saved_bytes = saved_activation_bytes(lambda model=run.model: models.noise_loss(model, batch), tensors)
    check(timed[0].zero_steps == timed[1].zero_steps, f"{case.name}: every branch zero in the same steps as in eager")
    drift = distance(disturbed.losses, timed[0].losses)
    found = distance(timed[1].losses, timed[0].losses)
    check(
        found <= 2 * drift + rounding(torch.float32),
        f"{case.name}: loss curves agree to {found:.1e} (eager moved by one ulp: {drift:.1e})",
    )
    return runs


def check_round_trip(case, runs, batch, check):
    """zeroblock's weights into eager and back; each way every key must match."""
    x, t, y, _ = batch
    trained = runs["zeroblock"].model
    there = case.build(eager)
    there.load_state_dict(trained.state_dict(), strict=True)
    back = case.build(zeroblock.nn)
    back.load_state_dict(there.state_dict(), strict=True)
    try:
        with torch.no_grad():
            exact = copy.deepcopy(there).double()(x.double(), t, y)
            for model in (trained, back):
                assert_error_budget(model(x, t, y), there(x, t, y), exact, "output")
    except AssertionError as error:
        check(False, f"{case.name}: weights moved to eager and back: {error}")
    else:
        check(True, f"{case.name}: weights moved to eager and back give the same output")


def summary(case, runs):
    """The lines of the table, and the zero phase in words."""
    rows = [
        ("step, branches zero (ms)", [1e3 * statistics.median(r.zero_seconds) for r in runs.values()]),
        ("step, dense (ms)", [1e3 * statistics.median(r.seconds) for r in runs.values()]),
        ("saved for backward (MiB)", [r.saved_bytes / 2**20 for r in runs.values()]),
        ("loss, mean of the last 20", [statistics.fmean(r.losses[-20:]) for r in runs.values()]),
    ]
    lines = [f"{case.name:<28}{'eager':>10}{'zeroblock':>12}{'ratio':>9}"]
    lines += [f"  {label:<26}{a:>10.3f}{b:>12.3f}{a / b:>8.2f}x" for label, (a, b) in rows]
    phases = {}
    for name, steps in runs["zeroblock"].zero_steps.items():
        phases.setdefault(tuple(steps), []).append(name)
    for steps, names in phases.items():
        when = f"in step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}" if steps else "never"
        lines.append(f"  exactly zero {when}: {', '.join(names)}")
    return lines


def draw(results, path):
    """One row per model: loss curves, step time, saved memory, zero phase, samples."""
    need("matplotlib").use("Agg")
    plt = need("matplotlib.pyplot")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10})
    figure = plt.figure(figsize=(16, 3.5 * len(results)), layout="constrained")
    grid = figure.add_gridspec(len(results), 5, width_ratios=(2.3, 1.5, 0.8, 1.9, 2.9))
    for row, (case, runs) in enumerate(results):
        loss, times, memory, phase, digits = (figure.add_subplot(grid[row, column]) for column in range(5))
        for name, run in runs.items():
            style = {"lw": 4.5, "alpha": 0.45} if name == "eager" else {"lw": 1.2}
            width = max(1, len(run.losses) // 40)
            curve = [statistics.fmean(run.losses[max(0, i - width) : i + 1]) for i in range(len(run.losses))]
            loss.plot(range(1, len(curve) + 1), curve, color=COLORS[name], label=name, **style)
        loss.set(title=f"{case.name}: loss (moving mean)", xlabel="step", yscale="log")
        loss.legend(frameon=False)

        groups = [[statistics.median(getattr(r, k)) * 1e3 for r in runs.values()] for k in ("zero_seconds", "seconds")]
        draw_bars(times, groups, ("branches zero\n(fwd + bwd)", "dense\n(whole step)"), "{:.0f}")
        times.set_title("step time (ms)")
        draw_bars(memory, [[r.saved_bytes / 2**20 for r in runs.values()]], ("",), "{:.1f}")
        memory.set_title("saved for\nbackward (MiB)")

        zero_steps = runs["zeroblock"].zero_steps
        last = max((max(steps, default=0) for steps in zero_steps.values()), default=0) + 2
        for i, steps in enumerate(zero_steps.values()):
            for step in range(1, last + 1):
                color = COLORS["zeroblock"] if step in steps else "#e6e8eb"
                phase.add_patch(plt.Rectangle((step - 0.46, i - 0.42), 0.92, 0.84, color=color, lw=0))
        phase.set(title="zero phase (filled: branch exactly zero)", xlabel="step", xlim=(0.4, last + 0.6))
        phase.set(xticks=range(1, last + 1), yticks=range(len(zero_steps)), ylim=(len(zero_steps) - 0.4, -0.6))
        phase.set_yticklabels(zero_steps, fontsize=7)
        phase.tick_params(length=0)
        phase.spines[["left", "bottom"]].set_visible(False)

        strips = [run.samples.clamp(-1, 1).squeeze(1).permute(1, 0, 2).flatten(1) for run in runs.values()]
        for i, (name, strip) in enumerate(zip(runs, strips, strict=True)):
            halves = torch.cat(strip.chunk(2, dim=1), dim=0)
            axis = digits.inset_axes((0.0, 0.52 - 0.5 * i, 1.0, 0.46))
            axis.imshow(halves, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_ylabel(name, color=COLORS[name])
        digits.set(title="samples of the classes 0 to 9")
        digits.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_bars(axis, groups, labels, number):
    """Groups of an eager and a zeroblock bar, each with its value."""
    for i, group in enumerate(groups):
        for offset, (name, value) in zip((-0.21, 0.21), zip(COLORS, group, strict=True), strict=True):
            bar = axis.bar(i + offset, value, 0.38, color=COLORS[name])
            axis.bar_label(bar, [number.format(value)], padding=2, fontsize=9)
    axis.set_xticks(range(len(labels)), labels)
    axis.tick_params(length=0)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.margins(y=0.15)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m zeroblock demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, help="optimizer steps of each model (default: 300 U-Net, 500 DiT)")
    parser.add_argument("--out", default="demo.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps only: checks that everything runs")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    need("matplotlib")
    data = load_digits()
    start = time.perf_counter()
    failures = []

    def check(passed, what):
        print(f"{'ok    ' if passed else 'FAILED'} {what}", flush=True)
        if not passed:
            failures.append(what)

    results, lines = [], []
    for case in CASES:
        steps = options.steps or (QUICK_STEPS if options.quick else case.steps)
        runs = train(case, data, steps, options.seed, check)
        check_round_trip(case, runs, models.draw_batch(*data, 10, torch.Generator().manual_seed(options.seed)), check)
        for run in runs.values():
            noise = torch.randn(10, 1, 16, 16, generator=torch.Generator().manual_seed(options.seed))
            run.samples = models.sample(run.model, noise, torch.arange(10), QUICK_STEPS if options.quick else 25)
        results.append((case, runs))
        lines += ["", *summary(case, runs)]
    draw(results, options.out)
    print("\n".join(lines))
    print(f"\n{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads; picture: {options.out}")
    print(f"{len(failures)} checks failed" if failures else "all checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
