"""The pictures of the stored results, a function for each group."""

import statistics
from pathlib import Path

from zeroblock.testing.timing import geometric_mean

from . import report, store

COLORS = {"fp32": "#3b6fb6", "bf16": "#e08a3c", "fp32_high": "#58a55c"}
INK, GRID, TARGET = "#333333", "#dddddd", "#c0392b"
FASTER = "times faster than the better of eager and torch.compile"
OP_LABELS = (
    "group_norm_\nsilu",
    "group_norm_\nsilu + FiLM",
    "layer_norm_\nmodulate",
    "gate_\nresidual",
    "gate_residual_\nlayer_norm_\nmodulate",
    "residual_norm_\nmodulate,\nindex",
    "residual_norm_\nmodulate,\ntanh",
)
BLOCKS = {
    "resblock": "ResBlock",
    "resblock_1x1": "ResBlock, 1x1 skip",
    "dit_block": "DiT block",
    "unet": "UNet2DModel",
    "controlnet": "U-Net + ControlNet",
    "dit": "DiTTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "flux": "FluxTransformer2DModel",
    "vae_decoder": "VAE decoder",
    "adm_unet": "ADM U-Net",
    "dit_s2": "DiT-S/2",
    "unet2d": "UNet2DModel",
    "dit_s2_diffusers": "DiT-S/2 of diffusers",
}


def _axes(plt, columns: int, width: float, height: float, title: str):
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=12, color=INK)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
        axis.set_axisbelow(True)
    return figure, axes[0]


def _op_label(op: str) -> str:
    states = {"_zero": " while zero", "_frozen": ", frozen"}
    suffix = next((suffix for suffix in states if op.endswith(suffix)), "")
    return BLOCKS[op.removesuffix(suffix)] + states.get(suffix, "")


def _case_label(row: dict) -> str:
    return " ".join(part for part in (row["shape"], row["layout"], row["dtype"]) if part)


def memory_bound(plt, rows: list[dict], title: str):
    """Bars: geometric mean by op and dtype, with the median share of the copy bandwidth; dots: the single cases."""
    figure, axes = _axes(plt, 2, 12, 4.8, title)
    for axis, mode in zip(axes, report.MODES, strict=True):
        for i, (op, targets) in enumerate(report.OP_TARGETS.items()):
            for j, dtype in enumerate(("fp32", "bf16")):
                chosen = [r for r in rows if (r["op"], r["mode"], r["dtype"]) == (op, mode, dtype)]
                if not chosen:
                    continue
                place, ratios = i + (j - 0.5) * 0.38, [r["ratio"] for r in chosen]
                mean = geometric_mean(ratios)
                axis.bar(place, mean, 0.36, color=COLORS[dtype], label=dtype if i == 0 else None)
                share = statistics.median(r["floor_percent"] for r in chosen)
                numbers = f"{mean:.2f}x\n{share:.0f} %"
                axis.text(place, 0.03 * mean, numbers, ha="center", va="bottom", fontsize=8, color="white")
                axis.scatter([place] * len(ratios), ratios, s=9, color=INK, alpha=0.55, linewidths=0, zorder=3)
            target = targets[report.MODES.index(mode)]
            label = "target of the mean" if i == 0 else None
            axis.hlines(target, i - 0.42, i + 0.42, color=TARGET, lw=1.8, label=label)
        axis.axhline(1, color=INK, lw=0.8, ls=":")
        axis.set_xticks(range(len(OP_LABELS)), OP_LABELS)
        axis.set_title("forward" if mode == "inference" else "forward + backward", fontsize=10)
        axis.grid(axis="y", color=GRID)
    axes[0].set_ylabel("times faster than the better of\neager and torch.compile", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    figure.supxlabel("in the bars: geometric mean, and median share of the copy bandwidth", fontsize=9)
    return figure


def zero(plt, rows: list[dict], title: str):
    """Inference on a log scale with the floor's ratio as a tick; training step against its limit."""
    count = max(sum(row["mode"] == mode for row in rows) for mode in report.MODES)
    figure, axes = _axes(plt, 2, 13, 1.6 + 0.19 * count, title)
    for axis, mode in zip(axes, report.MODES, strict=True):
        chosen = [row for row in rows if row["mode"] == mode][::-1]
        places = range(len(chosen))
        for dtype, color in COLORS.items():
            bars = [(i, row["ratio"]) for i, row in enumerate(chosen) if row["dtype"] == dtype]
            if not bars:
                continue
            axis.barh([i for i, _ in bars], [ratio for _, ratio in bars], 0.72, color=color, label=dtype)
        axis.set_yticks(places, [f"{BLOCKS[row['op']]} {_case_label(row)}" for row in chosen], fontsize=7)
        axis.set_ylim(-0.6, len(chosen) - 0.4)
        axis.set_xlabel(FASTER, fontsize=9)
        axis.grid(axis="x", color=GRID)
        if mode == "inference":
            axis.set_xscale("log")
            axis.set_xlim(left=1)
            floor = [row[row["best"]] / row["floor"] for row in chosen]
            axis.plot(floor, places, "|", color=INK, ms=8, mew=1.6, label="floor: read W, form the residual")
        target = report.ZERO_INFERENCE if mode == "inference" else report.ZERO_TRAINING
        axis.axvline(target, color=TARGET, lw=1.5, label=f"target of the mean: {target:g}x")
        axis.set_title("inference" if mode == "inference" else "training step (forward + backward)", fontsize=10)
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.03), ncols=4, frameon=False)
    return figure


def dense(plt, rows: list[dict], title: str, limit: float | None = report.DENSE_LOWER_BOUND):
    """One interval per case: the 95 % bootstrap interval of the median ratio."""
    count = max(sum(row["mode"] == mode for row in rows) for mode in report.MODES)
    figure, axes = _axes(plt, 2, 13, 1.6 + 0.19 * count, title)
    for axis, mode in zip(axes, report.MODES, strict=True):
        chosen = [row for row in rows if row["mode"] == mode][::-1]
        labels = {row["dtype"]: place for place, row in enumerate(chosen)}  # the legend names each once
        for place, row in enumerate(chosen):
            label = row["dtype"] if labels[row["dtype"]] == place else None
            axis.plot([row["lo"], row["hi"]], [place] * 2, color=COLORS[row["dtype"]], lw=3, label=label)
            axis.plot(row["ratio"], place, "o", color=INK, ms=3.5)
        axis.set_yticks(
            range(len(chosen)), [f"{_op_label(row['op'])} {_case_label(row)}" for row in chosen], fontsize=7
        )
        axis.set_ylim(-0.6, len(chosen) - 0.4)
        axis.axvline(1, color=INK, lw=0.8, ls=":")
        if limit is not None:
            axis.axvline(limit, color=TARGET, lw=1.5)
        axis.set_xlabel(FASTER if limit is None else f"{FASTER}\n(red: limit of the lower bound)", fontsize=9)
        axis.set_title("inference" if mode == "inference" else "training step (forward + backward)", fontsize=10)
        axis.grid(axis="x", color=GRID)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def overhead(plt, rows: list[dict], title: str):
    """Microseconds per call on tiny tensors."""
    rows = [row for row in rows if not row["op"].startswith("zero_check")]
    figure, axes = _axes(plt, 2, 12, 4.2, title)
    for axis, mode in zip(axes, report.MODES, strict=True):
        chosen = [row for row in rows if row["mode"] == mode][::-1]
        for j, (name, color) in enumerate((("zeroblock", "#2e8b57"), ("compile", "#999999"), ("eager", "#555555"))):
            places = [i + (j - 1) * 0.27 for i in range(len(chosen))]
            axis.barh(places, [row[name] for row in chosen], 0.25, color=color, label=name)
        axis.set_yticks(range(len(chosen)), [row["op"] for row in chosen], fontsize=8)
        axis.set_xlabel("us per call", fontsize=9)
        axis.set_title("forward" if mode == "inference" else "forward + backward", fontsize=10)
        axis.grid(axis="x", color=GRID)
    axes[0].legend(fontsize=8, loc="lower right")
    return figure


def _shares(plt, values: dict[str, float], colors: list[str], title: str, label: str, targets: dict[str, float]):
    figure, (axis,) = _axes(plt, 1, 8, 1.4 + 0.26 * len(values), title)
    for place, (name, value) in enumerate(values.items()):
        axis.barh(place, value, 0.72, color=colors[place])
        axis.text(value + 0.01, place, f"{value:.3f}", va="center", fontsize=8)
        if name in targets:
            axis.plot([targets[name]] * 2, [place - 0.45, place + 0.45], color=TARGET, lw=1.8)
    axis.set_yticks(range(len(values)), list(values), fontsize=8)
    axis.set_xlim(0, 1.02 * max(1, *values.values()))
    axis.set_xlabel(label, fontsize=9)
    axis.grid(axis="x", color=GRID)
    return figure


def saved(plt, rows: list[dict], title: str):
    """Bytes kept for backward, as a share of eager's: the worst shape and layout of each block and dtype."""
    worst, colors, targets = {}, {}, {}
    for row in rows[::-1]:
        name = f"{_op_label(row['op'])} {row['dtype']}"
        worst[name] = max(worst.get(name, 0), row["zeroblock"] / row["eager"])
        colors[name] = COLORS[row["dtype"]]
        if row["op"] in report.SAVED:
            targets[name] = report.SAVED[row["op"]]
    label = "bytes saved for backward, share of eager's, worst shape (red: target)"
    return _shares(plt, worst, list(colors.values()), title, label, targets)


def peak(plt, rows: list[dict], title: str):
    """The most memory of a process, as a share of eager's."""
    shares = {f"{_op_label(row['op'])}, {row['mode']}": row["zeroblock"] / row["eager"] for row in rows[::-1]}
    return _shares(
        plt, shares, [COLORS["fp32"]] * len(shares), title, "most memory of the process, share of eager's", {}
    )


def models(plt, rows: list[dict], title: str):
    return dense(plt, rows, title, limit=None)


PLOTS = {
    "memory_bound": memory_bound,
    "zero": zero,
    "dense": dense,
    "frozen": dense,
    "overhead": overhead,
    "saved": saved,
    "models": models,
    "whole": models,
    "peak": peak,
}


def draw(folder: Path) -> list[Path]:
    """One PNG per group, thread count and allocator setting; says so and draws nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("plot: matplotlib is not installed, so no pictures are drawn")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    rows = store.read_all(folder)
    for setting, chosen in report.by_setting(rows):
        group, threads, allocator = setting
        name = f"{group}-t{threads}" + ("" if allocator == "pinned" else f"-{allocator}-malloc")
        newest = max(chosen, key=lambda row: row["date"])
        count = f"{threads} thread" + ("" if threads == "1" else "s")
        title = f"{group.replace('_', '-')}: {newest['machine']}, {count}, torch {newest['torch']}"
        figure = PLOTS[group](plt, chosen, title)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written
