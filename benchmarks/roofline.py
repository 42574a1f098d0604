"""A lower bound of every kernel's time on several GPUs: `python benchmarks/roofline.py` writes results/roofline.md.

No clock runs: bytes are the compulsory ones of an op at a real shape, times the ratio of moved to compulsory bytes that
the interpreter counts exactly (tests/triton/traffic.csv); FLOPs are those of the products; rates are the data sheets'.
"""

import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TRAFFIC = ROOT / "tests/triton/traffic.csv"
PAGE = Path(__file__).parent / "results/roofline.md"


class GPU(NamedTuple):
    """Data-sheet rates: memory in GB/s, dense bf16 matrix products in TFLOP/s."""

    name: str
    gb_s: float
    bf16_tflop_s: float


GPUS = (
    GPU("A100 SXM 80 GB", 2039, 312),
    GPU("H100 SXM", 3350, 989),
    GPU("H200 SXM", 4800, 989),
    GPU("B200", 8000, 2250),
    GPU("MI300X", 5300, 1307),
)
SIZE = 2  # bf16
IMAGES = ((8, 320, 64, 64), (8, 640, 32, 32), (8, 1280, 16, 16), (8, 1280, 8, 8))
TOKENS = ((32, 256, 384), (32, 256, 1152), (4, 4096, 1152))


class Kernel(NamedTuple):
    """A row of the page: the op, the traffic row that has its ratio, passes over one activation, and its shapes."""

    op: str
    traffic: str
    passes: float
    shapes: tuple[tuple[int, ...], ...]
    product: str = ""  # "", "3x3", "1x1" (C -> C) or "linear" (4D -> D)


KERNELS = (
    Kernel("group_norm_silu, one read", "group_norm_silu-1280x8-bf16-nhwc", 2, IMAGES),
    Kernel("group_norm_silu, split", "group_norm_silu-640x32-bf16-nhwc-split", 2, IMAGES),
    Kernel("group_norm_silu backward, one read", "group_norm_silu_bwd-1280x8-bf16-nhwc", 3, IMAGES),
    Kernel("group_norm_silu backward, split", "group_norm_silu_bwd-640x32-bf16-nhwc-split", 3, IMAGES),
    Kernel("layer_norm_modulate", "layer_norm_modulate-1152", 2, TOKENS),
    Kernel("layer_norm_modulate backward", "layer_norm_modulate_bwd-1152", 3, TOKENS),
    Kernel("gate_residual", "gate_residual-sample", 3, TOKENS),
    Kernel("gate_residual backward", "gate_residual_bwd-sample", 3, TOKENS),
    Kernel("gate_residual_layer_norm_modulate", "gate_residual_layer_norm_modulate-1152", 4, TOKENS),
    Kernel("gate_residual_layer_norm_modulate backward", "gate_residual_layer_norm_modulate_bwd-1152", 6, TOKENS),
    Kernel("conv_residual 3x3", "conv_residual-3x3-0", 3, IMAGES, "3x3"),
    Kernel("conv_residual 3x3, weight zero", "conv_residual-3x3-zero", 2, IMAGES),
    Kernel("conv_residual 1x1", "conv_residual-1x1", 3, IMAGES, "1x1"),
    Kernel("group_norm_silu_conv_residual 1x1", "group_norm_silu_conv_residual-1x1", 3, IMAGES, "1x1"),
    Kernel("linear_gate_residual", "linear_gate_residual-0", 6, TOKENS, "linear"),
    Kernel("linear_gate_residual, zero", "linear_gate_residual-zero", 2, TOKENS),
)


def work(kernel: Kernel, shape: tuple[int, ...]) -> tuple[float, float]:
    """(compulsory bytes, FLOPs) in bf16: activations and weights, per-channel operands left out."""
    n, width = math.prod(shape), shape[1] if len(shape) == 4 else shape[2]
    weight = {"": 0, "3x3": 9 * width * width, "1x1": width * width, "linear": 4 * width * width}[kernel.product]
    return SIZE * (kernel.passes * n + weight), 2 * weight * n / width


def bound(moved: float, flops: float, gpu: GPU) -> tuple[float, str]:
    """(microseconds, what binds): no kernel that moves these bytes and does these FLOPs is faster."""
    memory, products = moved / gpu.gb_s / 1e3, flops / gpu.bf16_tflop_s / 1e6
    return (memory, "memory") if memory >= products else (products, "products")


def ratios() -> dict[str, float]:
    with TRAFFIC.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["case"]: (int(row["moved"]) - int(row["partials"])) / int(row["compulsory"]) for row in rows}


def render() -> str:
    measured = ratios()
    lines = [
        "# Lower bounds of the Triton kernels",
        "",
        "**Model, not measured.** Microseconds that no kernel can beat which moves these bytes and executes these",
        "FLOPs, at data-sheet rates, bf16. Launches, latency, tails and clocks are left out: real times are longer.",
        "`moved` is the exact ratio of moved to compulsory bytes in `tests/triton/traffic.csv`, workspaces left out",
        "(their share depends on the shape). Regenerate with `python benchmarks/roofline.py`.",
        "",
        "| GPU | GB/s | bf16 TFLOP/s |",
        "| --- | ---: | ---: |",
        *(f"| {gpu.name} | {gpu.gb_s:g} | {gpu.bf16_tflop_s:g} |" for gpu in GPUS),
    ]
    for kernel in KERNELS:
        ratio = measured[kernel.traffic]
        lines += [
            "",
            f"## {kernel.op}",
            "",
            f"moved {ratio:.3f}",
            "",
            "| shape | MB | GFLOP | " + " | ".join(gpu.name for gpu in GPUS) + " | bound by |",
            "| --- |" + " ---: |" * (len(GPUS) + 2) + " --- |",
        ]
        for shape in kernel.shapes:
            compulsory, flops = work(kernel, shape)
            bounds = [bound(compulsory * ratio, flops, gpu) for gpu in GPUS]
            binding = sorted({by for _, by in bounds})
            times = " | ".join(f"{time:.1f}" for time, _ in bounds)
            size = f"{compulsory * ratio / 1e6:.1f} | {flops / 1e9:.2f}"
            lines.append(f"| {'x'.join(map(str, shape))} | {size} | {times} | {', '.join(binding)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"wrote {PAGE}", file=sys.stderr)
