"""The kernels of `roofline.py`: their tables' rows, their shapes, what a call of each starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from . import kernel_calls as calls

SIZE = 2  # bf16
IMAGES = ((8, 320, 64, 64), (8, 640, 32, 32), (8, 1280, 16, 16), (8, 1280, 8, 8))
VIDEO_IMAGES = ((4, 384, 120, 208), (4, 192, 240, 416))
TOKENS = ((32, 256, 1152), (32, 256, 384), (4, 4096, 1152))
VIDEO_TOKENS = ((1, 4096, 3072),)
WEIGHTS = ((1, 1152, 4608),)


class Cuda(NamedTuple):
    """The CUDA kernel of an op: its rows, 16-byte loads of a thread in flight, and the launches of the op."""

    kernel: str
    traffic: str
    loads: int
    launches: int
    ahead: bool = False
    sums: int = 0  # per column of a block, of so many blocks
    blocks: int = 0


class Kernel(NamedTuple):
    """An op: the traffic row that has its ratio, passes over one activation and how many of them are reads, its shapes,
    the first of which static.csv has; case and kernel there; the call on meta tensors. tile: the numbers that a program
    asks for at once, by its arguments. cuda: by target where it is not the same for all."""

    op: str
    traffic: str
    passes: float
    reads: float
    shapes: tuple[tuple[int, ...], ...]
    static: tuple[str, str]
    call: Callable[[tuple[int, ...]], Any]
    tile: Callable[[dict[str, Any]], int]
    cuda: Cuda | dict[str, Cuda] | None = None
    product: str = ""  # "", "3x3", "1x1" (C -> C) or "linear" (4D -> D)


class Started(NamedTuple):
    """What a call of Triton's starts: the launch of the kernel in question, and how many in all."""

    launch: Any
    count: int
    block_kb: float
    ahead: bool
    programs: int
    partials: int  # bytes, written and read

    def warps(self, target: str) -> int:
        return self.launch.options_for(64 if target.startswith("gfx") else 32)["num_warps"]


def started(kernel: Kernel) -> Started:
    from zeroblock.kernels._launch import recording

    with recording(run=False) as launches:
        kernel.call(kernel.shapes[0])
    launch = next(launch for launch in launches if launch.kernel.__name__ == kernel.static[1])
    ahead = max(0, launch.arguments.get("STAGES", 1) - 1)
    named = {name: v for found in launches for name, v in found.arguments.items() if isinstance(v, Tensor)}
    parts = {v.data_ptr() or id(v): v for name, v in named.items() if name.startswith("part") or name == "workspace"}
    return Started(
        launch,
        len(launches),
        kernel.tile(launch.arguments) * SIZE * max(1, ahead) / 1000,
        ahead > 0,
        math.prod(launch.grid),
        sum(2 * v.numel() * v.element_size() for v in parts.values()),
    )


def _held(tensors: int) -> Callable[[dict[str, Any]], int]:
    return lambda a: tensors * a["GROUPS"] * a["CPG"] * a["HW"]


def _lanes(tensors: int) -> Callable[[dict[str, Any]], int]:
    return lambda a: tensors * a["LANES"] * a["PIXELS"]


def _tokens(tensors: int) -> Callable[[dict[str, Any]], int]:
    return lambda a: tensors * a["ROWS"] * (a["D"] if "BLOCK_D" in a else a["COLS"])


def _pixels(tensors: int) -> Callable[[dict[str, Any]], int]:
    return lambda a: tensors * a["C"] * a["PIXELS"]


def _tile(a: dict[str, Any]) -> int:
    return a["BM"] * a["BN"]


GN, GNB = "group_norm_silu_fwd_kernel<bf16,8,{}>", "group_norm_silu_bwd_kernel<bf16,8,{}>"
NHWC, NHWC_BWD = "group_norm_silu-320x64-bf16-nhwc", "group_norm_silu_bwd-320x64-bf16-nhwc"
CLUSTER = Cuda(GN.format("true,3"), f"{NHWC}-cluster", 2, 1)
CLUSTER_BWD = Cuda(GNB.format("true,3"), f"{NHWC_BWD}-cluster", 4, 2)
PASSES, PASSES_BWD = Cuda(GN.format("true,2"), NHWC, 2, 2), Cuda(GNB.format("true,2"), NHWC_BWD, 4, 4)
RESIDUAL = "residual_norm_modulate-3072-bfloat16-sample-float32-full"
FUSED = "gate_residual_layer_norm_modulate"

KERNELS = (
    Kernel(
        "group_norm_silu, contiguous", "group_norm_silu-320x64-bf16-nchw", 2, 1, IMAGES,
        ("group_norm_silu-320x64-bfloat16-nchw", "_one_read"), calls.group_norm(False, False), _held(1),
        Cuda(GN.format("false,0"), "group_norm_silu-1280x8-bf16-nchw", 2, 1),
    ),
    Kernel(
        "group_norm_silu, channels-last, large image", NHWC, 2, 1, IMAGES[:2],
        ("group_norm_silu-320x64-bfloat16-nhwc", "_apply"), calls.group_norm(True, False), _lanes(1),
        {"sm_80": PASSES, "sm_90": CLUSTER, "sm_100": CLUSTER, "sm_120": CLUSTER},
    ),
    Kernel(
        "group_norm_silu, channels-last, small image", "group_norm_silu-1280x16-bf16-nhwc", 2, 1, IMAGES[2:],
        ("group_norm_silu-1280x16-bfloat16-nhwc", "_one_read"), calls.group_norm(True, False), _held(1),
        Cuda(GN.format("true,0"), "group_norm_silu-1280x8-bf16-nhwc", 2, 1),
    ),
    Kernel(
        "group_norm_silu backward, contiguous, largest image", "group_norm_silu_bwd-320x64-bf16-nchw", 3, 2, IMAGES[:1],
        ("group_norm_silu_bwd-320x64-bfloat16-nchw", "_apply"), calls.group_norm(False, True), _lanes(2),
    ),
    Kernel(
        "group_norm_silu backward, contiguous", "group_norm_silu_bwd-640x32-bf16-nchw", 3, 2, IMAGES[1:],
        ("group_norm_silu_bwd-640x32-bfloat16-nchw", "_one_read"), calls.group_norm(False, True), _held(2),
        Cuda(GNB.format("false,0"), "group_norm_silu_bwd-1280x8-bf16-nchw", 4, 2),
    ),
    Kernel(
        "group_norm_silu backward, channels-last", NHWC_BWD, 3, 2, IMAGES[:3],
        ("group_norm_silu_bwd-320x64-bfloat16-nhwc", "_apply"), calls.group_norm(True, True), _lanes(2),
        {"sm_80": PASSES_BWD, "sm_90": CLUSTER_BWD, "sm_100": CLUSTER_BWD, "sm_120": PASSES_BWD},
    ),
    Kernel(
        "channel_rms_norm_silu, channels-last", "channel_rms_norm_silu-96x64-bf16-nhwc", 2, 1, VIDEO_IMAGES,
        ("channel_rms_norm_silu-384x64-bfloat16-nhwc", "_forward"), calls.channel_norm(False), _pixels(1),
        Cuda("channel_rms_norm_silu_fwd_kernel<bf16,8,true>", "channel_rms_norm_silu-96x64-bf16-nhwc", 4, 1),
    ),
    Kernel(
        "channel_rms_norm_silu backward, channels-last",
        "channel_rms_norm_silu_bwd-96x64-bf16-nhwc", 3, 2, VIDEO_IMAGES,
        ("channel_rms_norm_silu-384x64-bfloat16-nhwc", "_backward"), calls.channel_norm(True), _pixels(2),
        Cuda("channel_rms_norm_silu_bwd_kernel<bf16,8,true>", "channel_rms_norm_silu_bwd-96x64-bf16-nhwc", 4, 2),
    ),
    Kernel(
        "layer_norm_modulate", "layer_norm_modulate-1152", 2, 1, TOKENS,
        ("layer_norm_modulate-1152-bfloat16-sample", "_forward"), calls.rows("norm", False), _tokens(1),
        Cuda("row_norm_fwd_kernel<bf16,8,false>", "layer_norm_modulate-1152", 1, 1),
    ),
    Kernel(
        "layer_norm_modulate backward", "layer_norm_modulate_bwd-1152", 3, 2, TOKENS,
        ("layer_norm_modulate-1152-bfloat16-sample", "_backward"), calls.rows("norm", True), _tokens(2),
        Cuda("row_norm_bwd_kernel<bf16,8,false>", "layer_norm_modulate_bwd-1152", 4, 2, True, 2, 448),
    ),
    Kernel(
        "gate_residual", "gate_residual-sample", 3, 2, TOKENS,
        ("gate_residual-1152-bfloat16-sample", "_forward"), calls.rows("gate", False), _tokens(2),
        Cuda("gate_residual_fwd_kernel<bf16,8>", "gate_residual-sample", 2, 1),
    ),
    Kernel(
        "gate_residual backward", "gate_residual_bwd-sample", 3, 2, TOKENS,
        ("gate_residual-1152-bfloat16-sample", "_backward"), calls.rows("gate", True), _tokens(2),
        Cuda("gate_residual_bwd_kernel<bf16,8>", "gate_residual_bwd-sample", 2, 2, False, 1, 512),
    ),
    Kernel(
        FUSED, f"{FUSED}-1152", 4, 2, TOKENS,
        (f"{FUSED}-1152-bfloat16-sample", "_forward"), calls.rows("fused", False), _tokens(2),
        Cuda("row_norm_fwd_kernel<bf16,8,true>", f"{FUSED}-1152", 2, 1),
    ),
    Kernel(
        f"{FUSED} backward", f"{FUSED}_bwd-1152", 6, 4, TOKENS,
        (f"{FUSED}-1152-bfloat16-sample", "_backward"), calls.rows("fused", True), _tokens(4),
        Cuda("row_norm_bwd_kernel<bf16,8,true>", f"{FUSED}_bwd-1152", 4, 2, True, 3, 448),
    ),
    Kernel(
        "residual_norm_modulate", "residual_norm_modulate-sample", 4, 2, VIDEO_TOKENS,
        (RESIDUAL, "_forward"), calls.residual_norm(False), _tokens(2),
        Cuda("residual_norm_fwd_kernel<bf16,8>", "residual_norm_modulate-sample", 4, 1),
    ),
    Kernel(
        "residual_norm_modulate backward", "residual_norm_modulate_bwd-sample", 6, 4, VIDEO_TOKENS,
        (RESIDUAL.replace("-", "_bwd-", 1), "_backward"), calls.residual_norm(True), _tokens(4),
        Cuda("residual_norm_bwd_kernel<bf16,8>", "residual_norm_modulate_bwd-sample", 8, 3, False, 3, 256),
    ),
    Kernel(
        "conv_residual 3x3", "conv_residual-3x3-0", 3, 2, IMAGES,
        ("conv_residual-3x3-128x128-bf16", "_conv_residual"), calls.conv(3), _tile,
        Cuda("conv_residual_kernel<bf16,128,false>", "conv_residual-3x3", 0, 1), "3x3",
    ),
    Kernel(
        "conv_residual 3x3, weight zero", "conv_residual-3x3-zero", 2, 1, IMAGES,
        ("conv_residual-3x3-128x128-bf16", "_conv_residual"), calls.conv(3), _tile,
        Cuda("conv_residual_kernel<bf16,128,false>", "conv_residual-3x3-zero", 2, 1),
    ),
    Kernel(
        "conv_residual 1x1", "conv_residual-1x1", 3, 2, IMAGES,
        ("conv_residual-1x1-128x128-bf16", "_conv_residual"), calls.conv(1), _tile,
        Cuda("conv_residual_kernel<bf16,128,false>", "conv_residual-1x1", 2, 1), "1x1",
    ),
    Kernel(
        "group_norm_silu_conv_residual 1x1", "group_norm_silu_conv_residual-1x1", 3, 2, IMAGES,
        ("group_norm_silu_conv_residual-128x128-bf16", "_conv_residual"), calls.conv(1, fold=True), _tile,
        Cuda("conv_residual_kernel<bf16,128,true>", "group_norm_silu_conv_residual-1x1", 2, 1), "1x1",
    ),
    Kernel(
        "linear_gate_residual", "linear_gate_residual-0", 6, 5, TOKENS,
        ("linear_gate_residual-128x128-bf16", "_linear_gate_residual"), calls.linear, _tile, None, "linear",
    ),
    Kernel(
        "linear_gate_residual, zero", "linear_gate_residual-zero", 2, 1, TOKENS,
        ("linear_gate_residual-128x128-bf16", "_linear_gate_residual"), calls.linear, _tile,
    ),
    Kernel(
        "zero_flag of a zero weight", "zero_flag-zero", 1, 1, WEIGHTS,
        ("zero_flag-bfloat16", "_scan"), calls.flag, lambda a: a["BLOCK"],
        Cuda("zero_flag_kernel", "zero_flag-zero", 1, 1),
    ),
)  # fmt: skip
