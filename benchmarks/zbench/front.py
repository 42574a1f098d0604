"""The first README's table of numbers and its picture, from the stored results: `python benchmarks/plot.py --front`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from zeroblock.testing.timing import geometric_mean

from . import report, store

MACHINE = store.RESULTS / "amd-epyc-family-25-model-17-2-cores"
PICTURE = store.RESULTS / "front.png"
FUSED, SKIPPED, LOST, INK = "#3b6fb6", "#58a55c", "#c0392b", "#333333"
NOT_RUN = (
    "while the last convolution is exactly\nzero this is not executed: y = x + bias,\n"
    "gradients are eager's (where none are\nneeded, the box above is left out too)"
)


class Line(NamedTuple):
    """A line of the table: rows of one group, two threads; several of a mode count by their geometric mean."""

    title: str
    group: str
    ops: tuple[str, ...]
    dtype: str = "fp32"


LINES = (
    Line("small ADM U-Net", "whole", ("adm_unet",)),
    Line("diffusers' UNet2DModel", "whole", ("unet2d",)),
    Line("diffusers' DiT-S/2", "whole", ("dit_s2_diffusers",)),
    Line("diffusers' SD3, small", "models", ("sd3",)),
    Line("diffusers' Flux, small", "models", ("flux",)),
    Line("U-Net and dense ControlNet", "models", ("controlnet",)),
    Line("U-Net and zero ControlNet", "models", ("controlnet_zero",)),
    Line("ResBlocks", "dense", ("resblock", "resblock_1x1")),
    Line("ResBlocks, bfloat16", "dense", ("resblock", "resblock_1x1"), "bf16"),
    Line("DiT blocks", "dense", ("dit_block",)),
    Line("ResBlocks while zero", "zero", ("resblock",)),
    Line("DiT blocks while zero", "zero", ("dit_block",)),
)


def _rows(line: Line, mode: str, folder: Path) -> list[dict]:
    return [
        row
        for row in store.read(folder / f"{line.group}.csv")
        if (row["op"] in line.ops and row["dtype"] == line.dtype and row["mode"] == mode)
        and (row["threads"], row["allocator"]) == ("2", "pinned")
    ]


def ratio(line: Line, mode: str, folder: Path = MACHINE) -> float:
    """How many times faster than the better of eager and torch.compile; KeyError where nothing is stored."""
    rows = _rows(line, mode, folder)
    if not rows:
        raise KeyError(f"no row of {line} in {mode}")
    return geometric_mean([row["ratio"] for row in rows])


def _text(value: float) -> str:
    text = f"{value:.2f}x" if value < 20 else f"{value:.0f}x"
    return text if value >= 0.995 else f"**{text}**"


def table(folder: Path = MACHINE) -> str:
    """Markdown; what is slower stands in bold."""
    lines = ["| | inference | training step | `benchmarks/run.py` |", "| --- | --- | --- | --- |"]
    for line in LINES:
        numbers = " | ".join(_text(ratio(line, mode, folder)) for mode in report.MODES)
        lines.append(f"| {line.title} | {numbers} | `--group {line.group}` |")
    return "\n".join(lines)


def _block(axis) -> None:
    """A residual block as boxes: what one kernel does, what is saved, what a zero last layer leaves out."""
    from matplotlib.patches import FancyBboxPatch

    def box(left, bottom, width, height, face, edge="none", style="-"):
        shape = FancyBboxPatch((left, bottom), width, height, "round,pad=0.1", fc=face, ec=edge, ls=style, lw=1.5)
        axis.add_patch(shape)

    def arrow(*points):
        for start, end in zip(points, points[1:-1], strict=False):
            axis.plot(*zip(start, end, strict=True), color=INK, lw=1)
        axis.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "->", "color": INK})

    box(0.1, 1.25, 11.2, 2.5, "#e9f5e8", SKIPPED, "--")
    axis.text(6.1, 2.5, NOT_RUN, va="center", fontsize=8, color="#2f6b30")
    for bottom, height, words, note in (
        (
            5.6,
            1.2,
            "group norm, SiLU,\nconvolution",
            "one kernel; backward recomputes norm and\nSiLU, which are not saved",
        ),
        (1.5, 2.0, "group norm, FiLM, SiLU,\ndropout, convolution,\n+ bias, + x", ""),
    ):
        box(1.5, bottom, 4.2, height, FUSED)
        axis.text(3.6, bottom + height / 2, words, ha="center", va="center", color="white", fontsize=9)
        axis.text(6.1, bottom + height / 2, note, va="center", fontsize=8, color=INK)
    for middle, word, note in (
        (7.9, "x", "saved; the caller has it anyway"),
        (4.6, "h", "saved, with mean and rstd"),
        (0.4, "y", ""),
    ):
        box(3.4, middle - 0.2, 0.4, 0.4, INK)
        axis.text(3.6, middle, word, ha="center", va="center", color="white", fontsize=9)
        axis.text(6.1, middle, note, va="center", fontsize=8, color=INK)
    for start, end in ((7.6, 6.9), (5.5, 4.9), (4.3, 3.6), (1.4, 0.7)):
        arrow((3.6, start), (3.6, end))
    arrow((3.3, 7.9), (0.7, 7.9), (0.7, 2.0), (1.4, 2.0))
    axis.set(xlim=(0, 11.5), ylim=(0, 8.3))
    axis.axis("off")
    axis.set_title(
        "a ResBlock in float32: a blue box is one kernel, after its norm's statistics", fontsize=9, color=INK
    )


def _models(axis, folder: Path) -> None:
    models = [line for line in LINES if line.group in ("whole", "models")][::-1]
    for place, line in enumerate(models):
        for step, mode in ((0.19, "inference"), (-0.19, "training")):
            value = ratio(line, mode, folder)
            color = LOST if value < 0.995 else FUSED if mode == "inference" else "#8fb0dc"
            axis.barh(place + step, value, 0.34, color=color)
            axis.text(value + 0.01, place + step, f"{value:.2f}", va="center", fontsize=7, color=INK)
            if place == len(models) - 1:
                axis.text(0.02, place + step, mode, va="center", fontsize=7, color="white")
    axis.axvline(1, color=INK, lw=0.8, ls=":")
    axis.set_xlim(0, 1.08 * max(ratio(line, mode, folder) for line in models for mode in report.MODES))
    axis.set_yticks(range(len(models)), [line.title for line in models], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(
        "models: times faster than the better of eager and torch.compile; red: slower", fontsize=9, color=INK
    )


def draw(path: Path = PICTURE, folder: Path = MACHINE) -> Path:
    """Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=(1.1, 1))
    _block(left)
    _models(right, folder)
    newest = max((row for line in LINES for row in _rows(line, "training", folder)), key=lambda row: row["date"])
    figure.supxlabel(f"{newest['machine']}, two threads, torch {newest['torch']}", fontsize=8, color=INK)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
