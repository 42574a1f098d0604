"""Group memory_bound: the fused ops against what users write, each call beside a copy that moves as many bytes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import zeroblock as zb
from zeroblock.testing import eager_ops

from .case import DTYPES, IMAGES, LAYOUTS, MODES, QUICK_IMAGES, QUICK_TOKENS, TOKENS, Case, Side, Work, shape_text
from .op import Op, Shape, normal
from .seams import SEAMS

GROUPS = 32  # of the group norms
# Each of these makes, of an op (eager's or zeroblock's), a function of the inputs below.


def _norm(op: Callable) -> Callable:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return op(x, GROUPS, weight, bias)

    return call


def _film_norm(op: Callable) -> Callable:
    def call(x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=1)
        return op(x, GROUPS, weight, bias, scale=scale, shift=shift)

    return call


def _frame_norm(op: Callable) -> Callable:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return op(x, GROUPS, weight, bias, per_frame=True)

    return call


def _modulate(op: Callable) -> Callable:
    def call(x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=1)
        return op(x, shift, scale, eps=1e-6)

    return call


def _gate_modulate(op: Callable) -> Callable:
    def call(residual: Tensor, branch: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        gate, shift, scale = modulation.chunk(3, dim=1)
        return op(residual, gate, branch, shift, scale, eps=1e-6)

    return call


def _norm_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias"""
    channels = shape[1:2]
    return normal(shape, dtype), normal(channels, dtype, 1.0, 0.1), normal(channels, dtype, std=0.1)


def _film_norm_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return *_norm_inputs(shape, dtype), normal((shape[0], 2 * shape[1]), dtype, std=0.1)


def _modulate_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return normal(shape, dtype), normal((shape[0], 2 * shape[2]), dtype, std=0.1)


def _gate_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """residual, gate, branch"""
    residual, branch = normal(shape, dtype), normal(shape, dtype)
    return residual, normal((shape[0], shape[2]), dtype, std=0.1), branch


def _gate_modulate_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return normal(shape, dtype), normal(shape, dtype), normal((shape[0], 3 * shape[2]), dtype, std=0.1)


IMAGE_OPS = {
    "group_norm_silu": Op(
        _norm(eager_ops.group_norm_silu),
        _norm(zb.group_norm_silu),
        _norm_inputs,
        {"inference": 2, "training": 5},
    ),
    "group_norm_silu_film": Op(
        _film_norm(eager_ops.group_norm_silu),
        _film_norm(zb.group_norm_silu),
        _film_norm_inputs,
        {"inference": 2, "training": 5},
    ),
    "channel_rms_norm_silu": Op(
        eager_ops.channel_rms_norm_silu,
        zb.channel_rms_norm_silu,
        lambda shape, dtype: _norm_inputs(shape, dtype)[:2],
        {"inference": 2, "training": 5},
    ),
}
TOKEN_OPS = {
    "layer_norm_modulate": Op(
        _modulate(eager_ops.layer_norm_modulate),
        _modulate(zb.layer_norm_modulate),
        _modulate_inputs,
        {"inference": 2, "training": 5},
    ),
    "gate_residual": Op(
        eager_ops.gate_residual,
        zb.gate_residual,
        _gate_inputs,
        {"inference": 3, "training": 6},
    ),
    "gate_residual_layer_norm_modulate": Op(
        _gate_modulate(eager_ops.gate_residual_layer_norm_modulate),
        _gate_modulate(zb.gate_residual_layer_norm_modulate),
        _gate_modulate_inputs,
        {"inference": 4, "training": 10},
    ),
    **SEAMS,
}
VIDEO_OPS = {
    "channel_rms_norm_silu": IMAGE_OPS["channel_rms_norm_silu"],
    "group_norm_silu_per_frame": Op(
        _frame_norm(eager_ops.group_norm_silu),
        _frame_norm(zb.group_norm_silu),
        _norm_inputs,
        {"inference": 2, "training": 5},
    ),
}
OPS = {**IMAGE_OPS, **TOKEN_OPS, **VIDEO_OPS}


def _copy_of(elements: float, dtype: torch.dtype) -> Callable[[], object]:
    """A copy that moves `elements` elements of `dtype` in all, half of them read and half written."""
    words = max(1, int(elements * dtype.itemsize / 2 / 4))
    source, target = torch.ones(words), torch.empty(words)
    return lambda: target.copy_(source)


def _build(op: Op, shape: Shape) -> Callable[[Case], Work]:
    def build(case: Case) -> Work:
        dtype = DTYPES[case.dtype]
        inputs = op.inputs(shape, dtype)
        if case.layout:
            inputs = (inputs[0].to(memory_format=LAYOUTS[case.layout]), *inputs[1:])
        for tensor in inputs:
            tensor.requires_grad_(case.mode == "training")
        floor = _copy_of(op.passes[case.mode] * inputs[0].numel(), dtype)
        return Work(Side(op.eager, inputs, inputs), Side(op.own, inputs, inputs), floor)

    return build


def op_case(name: str, op: Op, shape: Shape, layout: str, dtype: str, mode: str, group: str = "memory_bound") -> Case:
    return Case(group, name, shape_text(shape), layout, dtype, mode, _build(op, shape))


def cases(quick: bool, group: str = "memory_bound") -> Iterator[Case]:
    for ops, shapes, layouts in (
        (IMAGE_OPS, QUICK_IMAGES if quick else IMAGES, tuple(LAYOUTS)),
        (TOKEN_OPS, QUICK_TOKENS if quick else TOKENS, ("",)),
    ):
        for name, op in ops.items():
            for shape in shapes:
                for layout in layouts:
                    for dtype in DTYPES:
                        for mode in MODES:
                            yield op_case(name, op, shape, layout, dtype, mode, group)


# FLUX.1 at 1024 x 1024, and Wan 2.2 TI2V at 704 x 1280 x 121: for a GPU.
LARGE_TOKENS = ((1, 4608, 3072), (1, 27280, 3072))


def large_token_cases() -> Iterator[Case]:
    for name, op in TOKEN_OPS.items():
        for shape in LARGE_TOKENS:
            for mode in MODES:
                yield op_case(name, op, shape, "", "bf16", mode)
