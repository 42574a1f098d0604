"""The first README's table of numbers and its picture, from the stored results: `python benchmarks/plot.py --front`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from zeroblock.testing.timing import geometric_mean

from . import report, store

MACHINE = store.RESULTS / "amd-epyc-family-25-model-17-2-cores"
PICTURE = store.RESULTS / "front.png"
FUSED, SKIPPED, LOST, INK = "#3b6fb6", "#58a55c", "#c0392b", "#333333"


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
    boxes = (
        ("x", 9.1, INK, "saved (the caller has it anyway)"),
        ("group norm, SiLU, convolution", 7.6, FUSED, "fused, forward and backward"),
        ("h", 6.1, INK, "saved, with mean and rstd; norm and SiLU\nare recomputed in backward"),
        (
            "group norm, FiLM, SiLU, dropout",
            4.6,
            SKIPPED,
            "while the last convolution is exactly zero\nthis is not executed",
        ),
        ("convolution, + bias, + x", 3.1, SKIPPED, "then y = x + bias, gradients as eager's"),
        ("y", 1.6, INK, ""),
    )
    for text, y, color, note in boxes:
        box = {"boxstyle": "round,pad=0.5", "facecolor": color, "edgecolor": "none"}
        axis.text(2.6, y, text, ha="center", va="center", color="white", fontsize=9, bbox=box)
        axis.text(5.3, y, note, va="center", fontsize=8, color=INK)
    for (_, above, *_), (_, below, *_) in zip(boxes, boxes[1:], strict=False):
        axis.annotate("", (2.6, below + 0.45), (2.6, above - 0.45), arrowprops={"arrowstyle": "->", "color": INK})
    axis.set(xlim=(0, 10.5), ylim=(1, 9.8))
    axis.axis("off")
    axis.set_title("a ResBlock", fontsize=10, color=INK)


def _models(axis, folder: Path) -> None:
    models = [line for line in LINES if line.group in ("whole", "models")][::-1]
    for place, line in enumerate(models):
        for step, mode in ((0.19, "inference"), (-0.19, "training")):
            value = ratio(line, mode, folder)
            color = LOST if value < 0.995 else FUSED if mode == "inference" else "#8fb0dc"
            axis.barh(place + step, value, 0.34, color=color)
            axis.text(value + 0.01, place + step, f"{value:.2f}", va="center", fontsize=7, color=INK)
    axis.axvline(1, color=INK, lw=0.8, ls=":")
    axis.set_xlim(0, 1.08 * max(ratio(line, mode, folder) for line in models for mode in report.MODES))
    axis.set_yticks(range(len(models)), [line.title for line in models], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        "models, against the better of eager and torch.compile\n(above inference, below training)", fontsize=9
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
    figure.supxlabel(f"{newest['machine']}, two threads, torch {newest['torch']}; red: slower", fontsize=8, color=INK)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
