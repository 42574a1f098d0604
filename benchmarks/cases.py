"""What a case is, and the memory-bound ops: each case builds the same work as users write it and with zeroblock."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeroblock as zb

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HIGH = "fp32_high"  # float32 after torch.set_float32_matmul_precision("high"): the user's word that it may round more
MODES = ("inference", "training")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# U-Net activations [N, C, H, W]: ADM (128, 256, 512 channels) and Stable Diffusion (320, 1280).
IMAGES = ((2, 128, 64, 64), (2, 256, 32, 32), (2, 512, 16, 16), (1, 320, 64, 64), (1, 1280, 16, 16))
# Transformer activations [B, T, D]: DiT-S, DiT-B, DiT-XL at 256 px, DiT-XL at 512 px and at 1024 px.
TOKENS = ((8, 256, 384), (4, 256, 768), (2, 256, 1152), (1, 1024, 1152), (1, 4096, 1152))
QUICK_IMAGES, QUICK_TOKENS = ((1, 32, 4, 4),), ((2, 4, 64),)


@dataclass(frozen=True)
class Side:
    """One way to do the work: `function(*inputs)`, with gradients for `wrt` in training."""

    function: Callable
    inputs: tuple[Tensor, ...]
    wrt: tuple[Tensor, ...]

    def compiled(self, **options) -> "Side":
        return replace(self, function=torch.compile(self.function, fullgraph=True, dynamic=False, **options))

    def has_layouts(self) -> bool:
        return isinstance(self.function, nn.Module) and self.inputs[0].dim() == 4

    def in_other_layout(self) -> "Side":
        """This module with images and weights channels-last instead of contiguous, or the reverse: a copy."""
        x, *others = self.inputs
        layout = LAYOUTS["nhwc" if x.is_contiguous() else "nchw"]
        inputs = (x.detach().to(memory_format=layout).requires_grad_(x.requires_grad), *others)
        module = copy.deepcopy(self.function).to(memory_format=layout)
        return Side(module, inputs, (*inputs, *module.parameters()))

    def step(self, mode: str) -> Callable[[], object]:
        """The timed call: the forward, or forward and backward with all gradients (no optimizer)."""
        function, inputs, wrt = self.function, self.inputs, self.wrt
        if mode == "inference":
            return lambda: function(*inputs)
        generator = torch.Generator().manual_seed(1)
        # In the layout of the output, as a convolution's backward hands it on.
        grads = [torch.randn_like(y, generator=generator) for y in _as_tuple(function(*inputs))]

        def train() -> tuple:
            outputs = _as_tuple(function(*inputs))
            return *outputs, *torch.autograd.grad(outputs, wrt, grads)

        return train


@dataclass(frozen=True)
class Work:
    """Both sides of a case and the floor: the least memory traffic the result needs, as a measurable call."""

    eager: Side
    own: Side
    floor: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    group: str
    op: str
    shape: str
    layout: str
    dtype: str
    mode: str
    build: Callable[["Case"], Work]

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == HIGH else DTYPES[self.dtype]

    @property
    def id(self) -> str:
        parts = (self.op, self.shape, self.layout, self.dtype, self.mode)
        return f"{self.group}/" + "-".join(part for part in parts if part)

    def work(self) -> Work:
        torch.manual_seed(0)
        return self.build(self)


def _as_tuple(y) -> tuple:
    return y if isinstance(y, tuple) else (y,)


def text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def copy_of(elements: float, dtype: torch.dtype) -> Callable[[], object]:
    """A copy that moves `elements` elements of `dtype` in all, half of them read and half written."""
    words = max(1, int(elements * dtype.itemsize / 2 / 4))
    source, target = torch.ones(words), torch.empty(words)
    return lambda: target.copy_(source)


def _eager_group_norm_silu(x, weight, bias):
    return F.silu(F.group_norm(x, 32, weight, bias))


def _own_group_norm_silu(x, weight, bias):
    return zb.group_norm_silu(x, 32, weight, bias)


def _eager_group_norm_film_silu(x, weight, bias, modulation):
    scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
    return F.silu(F.group_norm(x, 32, weight, bias) * (1 + scale) + shift)


def _own_group_norm_film_silu(x, weight, bias, modulation):
    scale, shift = modulation.chunk(2, dim=1)
    return zb.group_norm_silu(x, 32, weight, bias, scale=scale, shift=shift)


def _modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _eager_layer_norm_modulate(x, modulation):
    return _modulate(x, *modulation.chunk(2, dim=1))


def _own_layer_norm_modulate(x, modulation):
    return zb.layer_norm_modulate(x, *modulation.chunk(2, dim=1), eps=1e-6)


def _eager_gate_residual(residual, gate, branch):
    return residual + gate[:, None] * branch


def _eager_gate_residual_layer_norm_modulate(residual, branch, modulation):
    gate, shift, scale = modulation.chunk(3, dim=1)
    x = residual + gate[:, None] * branch
    return x, _modulate(x, shift, scale)


def _own_gate_residual_layer_norm_modulate(residual, branch, modulation):
    gate, shift, scale = modulation.chunk(3, dim=1)
    return zb.gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps=1e-6)


def _op_case(shape: tuple[int, ...], eager_function, own_function, passes, make_inputs) -> Callable[[Case], Work]:
    """`passes`: how often one activation is read or written at least, in inference and in a training step."""

    def build(case: Case) -> Work:
        dtype = DTYPES[case.dtype]
        inputs = tuple(make_inputs(shape, dtype))
        if case.layout:
            inputs = (inputs[0].to(memory_format=LAYOUTS[case.layout]), *inputs[1:])
        for tensor in inputs:
            tensor.requires_grad_(case.mode == "training")
        floor = copy_of(passes[MODES.index(case.mode)] * inputs[0].numel(), dtype)
        return Work(Side(eager_function, inputs, inputs), Side(own_function, inputs, inputs), floor)

    return build


def _norm_inputs(shape, dtype, modulation=False):
    n, c = shape[:2]
    yield torch.randn(shape).to(dtype)
    yield (1 + 0.1 * torch.randn(c)).to(dtype)
    yield (0.1 * torch.randn(c)).to(dtype)
    if modulation:
        yield (0.1 * torch.randn(n, 2 * c)).to(dtype)


def _token_inputs(shape, dtype, tensors, chunks):
    for _ in range(tensors):
        yield torch.randn(shape).to(dtype)
    yield (0.1 * torch.randn(shape[0], chunks * shape[2])).to(dtype)


def _gate_inputs(shape, dtype):
    residual, branch, gate = _token_inputs(shape, dtype, 2, 1)
    return residual, gate, branch


# op: (eager, zeroblock, activations moved at least (inference, training step), inputs)
IMAGE_OPS = {
    "group_norm_silu": (_eager_group_norm_silu, _own_group_norm_silu, (2, 5), _norm_inputs),
    "group_norm_silu_film": (
        _eager_group_norm_film_silu, _own_group_norm_film_silu, (2, 5), lambda s, d: _norm_inputs(s, d, True)
    ),
}  # fmt: skip
TOKEN_OPS = {
    "layer_norm_modulate": (
        _eager_layer_norm_modulate, _own_layer_norm_modulate, (2, 5), lambda s, d: _token_inputs(s, d, 1, 2)
    ),
    "gate_residual": (_eager_gate_residual, zb.gate_residual, (3, 6), _gate_inputs),
    "gate_residual_layer_norm_modulate": (
        _eager_gate_residual_layer_norm_modulate, _own_gate_residual_layer_norm_modulate, (4, 10),
        lambda s, d: _token_inputs(s, d, 2, 3),
    ),
}  # fmt: skip


def memory_bound(quick: bool, group: str = "memory_bound") -> Iterator[Case]:
    for ops, shapes, layouts in (
        (IMAGE_OPS, QUICK_IMAGES if quick else IMAGES, tuple(LAYOUTS)),
        (TOKEN_OPS, QUICK_TOKENS if quick else TOKENS, ("",)),
    ):
        for op, (eager_function, own_function, passes, make_inputs) in ops.items():
            for shape in shapes:
                build = _op_case(shape, eager_function, own_function, passes, make_inputs)
                for layout in layouts:
                    for dtype in DTYPES:
                        for mode in MODES:
                            yield Case(group, op, text(shape), layout, dtype, mode, build)
