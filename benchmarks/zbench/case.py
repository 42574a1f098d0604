"""What a case is: the same work as users write it and with zeroblock, built when it is measured."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HIGH = "fp32_high"  # float32 after torch.set_float32_matmul_precision("high"), which lets products round more
MODES = ("inference", "training")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# U-Net activations [N, C, H, W]: ADM (128, 256, 512 channels) and Stable Diffusion (320, 1280).
IMAGES = ((2, 128, 64, 64), (2, 256, 32, 32), (2, 512, 16, 16), (1, 320, 64, 64), (1, 1280, 16, 16))
# Transformer activations [B, T, D]: DiT-S, DiT-B, DiT-XL at 256 px, DiT-XL at 512 px and at 1024 px.
TOKENS = ((8, 256, 384), (4, 256, 768), (2, 256, 1152), (1, 1024, 1152), (1, 4096, 1152))
QUICK_IMAGES, QUICK_TOKENS = ((1, 32, 4, 4),), ((2, 4, 64),)


@dataclass(frozen=True)
class Side:
    """One way to do the work of a case."""

    function: Callable  # called as function(*inputs)
    inputs: tuple[Tensor, ...]
    wrt: tuple[Tensor, ...]  # get gradients in training: inputs and parameters

    def compiled(self, **options) -> "Side":
        """The same through torch.compile, which compiles at the first call."""
        return replace(self, function=torch.compile(self.function, fullgraph=True, dynamic=False, **options))

    def has_layouts(self) -> bool:
        """Whether it is a module of images, which can run contiguous and channels-last."""
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
        grads = [torch.randn_like(y, generator=generator) for y in as_tuple(function(*inputs))]

        def train() -> tuple:
            outputs = as_tuple(function(*inputs))
            return *outputs, *torch.autograd.grad(outputs, wrt, grads)

        return train


@dataclass(frozen=True)
class Work:
    """What is timed of a case."""

    eager: Side
    own: Side  # zeroblock's
    floor: Callable[[], object] | None = None  # a call with the least memory traffic that the result needs


@dataclass(frozen=True)
class Case:
    """One row of the results; the first six fields are its columns of these names."""

    group: str
    op: str  # op, block or model
    shape: str  # of the input, or ""
    layout: str  # a key of LAYOUTS, or ""
    dtype: str  # a key of DTYPES, or HIGH
    mode: str  # one of MODES
    build: Callable[["Case"], Work]
    same_work: bool = True  # both sides compute the same; not so where a zero check stands beside its block

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == HIGH else DTYPES[self.dtype]

    @property
    def id(self) -> str:
        parts = (self.op, self.shape, self.layout, self.dtype, self.mode)
        return f"{self.group}/" + "-".join(part for part in parts if part)

    def work(self) -> Work:
        """Both sides, with seeded weights and inputs."""
        torch.manual_seed(0)
        return self.build(self)


def as_tuple(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def shape_text(shape: tuple[int, ...]) -> str:
    """(2, 128, 64, 64) -> "2x128x64x64", as in a case's id."""
    return "x".join(map(str, shape))


def module_work(
    eager_block: nn.Module,
    own_block: nn.Module,
    inputs: tuple[Tensor, ...],
    mode: str,
    floor: Callable[[], object] | None = None,
) -> Work:
    """Two modules on the same inputs; in training with the gradients of inputs and parameters."""
    for tensor in inputs:
        tensor.requires_grad_(mode == "training")
    sides = [Side(block, inputs, (*inputs, *block.parameters())) for block in (eager_block, own_block)]
    return Work(*sides, floor)
