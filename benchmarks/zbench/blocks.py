"""Groups zero, dense and frozen: whole ResBlocks and DiT blocks, the last weight of their branches zero or not."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import zeroblock as zb
from zeroblock.testing import eager

from .case import (
    DTYPES,
    HIGH,
    IMAGES,
    LAYOUTS,
    MODES,
    QUICK_IMAGES,
    QUICK_TOKENS,
    Case,
    Work,
    module_work,
    shape_text,
)

# ResBlocks that change the channel count: two of the encoder, one of the decoder (after the concatenation).
SKIPS = (((2, 128, 32, 32), 256), ((2, 256, 16, 16), 512), ((2, 512, 32, 32), 256))
# What the groups dense and frozen measure beside these, in one layout each: the other blocks of ADM-64 (192 channels at
# 64 x 64, to 768 at 8 x 8, and what its decoder concatenates) and of Stable Diffusion 1.5.
MORE_IMAGES = ((1, 192, 64, 64), (1, 384, 32, 32), (1, 576, 16, 16), (1, 768, 8, 8), (1, 640, 32, 32), (1, 1280, 8, 8))
MORE_SKIPS = (((1, 768, 32, 32), 384), ((1, 1536, 8, 8), 768), ((1, 960, 64, 64), 320), ((1, 2560, 16, 16), 1280))
DITS = ((8, 256, 384), (4, 256, 768), (2, 256, 1152))
QUICK_SKIPS, QUICK_DITS = (((1, 32, 4, 4), 64),), QUICK_TOKENS


class Pair(NamedTuple):
    """The same block twice, with the same weights, and what it is called with."""

    eager: nn.Module
    own: nn.Module  # zeroblock's
    inputs: tuple[Tensor, ...]


class Build(NamedTuple):
    """How the cases of one block and shape are built."""

    op: str
    shape: str
    layouts: tuple[str, ...]
    build: Callable[[Case], Work]


def fill_tail(tail: nn.Module, zero: bool) -> None:
    with torch.no_grad():
        for parameter in tail.parameters():
            if zero:
                parameter.zero_()
            else:
                parameter.normal_(std=0.02)


def resblocks(shape: tuple[int, ...], out_channels: int, dtype: torch.dtype, layout: str, zero: bool) -> Pair:
    """ResBlocks with FiLM as in ADM or, where the channels are multiples of 320, the addition of Stable Diffusion."""
    channels = shape[1]
    film = channels % 320 != 0
    emb_channels = 512 if film else 1280
    blocks = []
    for ResBlock in (eager.ResBlock, zb.nn.ResBlock):
        block = ResBlock(channels, emb_channels, 0.0, out_channels=out_channels, use_scale_shift_norm=film)
        block.to(memory_format=LAYOUTS[layout])
        for module in block.modules():  # half precision as guided-diffusion has it: convolutions only
            if isinstance(module, nn.Conv2d):
                module.to(dtype)
        blocks.append(block)
    fill_tail(blocks[0].out_layers[-1], zero)
    blocks[1].load_state_dict(blocks[0].state_dict())
    x = torch.randn(shape).to(dtype, memory_format=LAYOUTS[layout])
    return Pair(*blocks, (x, torch.randn(shape[0], emb_channels)))


def dit_blocks(shape: tuple[int, ...], dtype: torch.dtype, zero: bool) -> Pair:
    """DiT blocks with heads of 64 features (72 at 1152), as in DiT-S, -B and -XL."""
    batch, _, width = shape
    heads = 16 if width == 1152 else width // 64
    blocks = [DiTBlock(width, heads, mlp_ratio=4.0).to(dtype) for DiTBlock in (eager.DiTBlock, zb.nn.DiTBlock)]
    fill_tail(blocks[0].adaLN_modulation[-1], zero)
    blocks[1].load_state_dict(blocks[0].state_dict())
    return Pair(*blocks, (torch.randn(shape).to(dtype), torch.randn(batch, width).to(dtype)))


def conv_tail(block: nn.Module) -> list[Tensor]:
    """What has to be zero for the branch of a ResBlock to be zero."""
    return [block.out_layers[-1].weight.detach()]


def gate_rows(block: nn.Module) -> list[Tensor]:
    """What has to be zero for both branches of a DiT block to be zero: the gates' rows of the adaLN linear."""
    linear = block.adaLN_modulation[-1]
    return [t.detach().unflatten(0, (6, -1))[i] for i in (2, 5) for t in (linear.weight, linear.bias)]


def _zero_floor(zeros: list[Tensor], make_residual: Callable[[], object]) -> Callable[[], object]:
    """Read the zero weights once and form the residual; sum() of all-zero bits is a plain read at any dtype."""
    flat = [t.permute(0, 2, 3, 1) if t.dim() == 4 and not t.is_contiguous() else t for t in zeros]
    words = [t.flatten().view(torch.float32) for t in flat]

    def floor() -> None:
        for word in words:
            word.sum()
        make_residual()

    return floor


def resblock_case(shape: tuple[int, ...], out_channels: int, zero: bool) -> Callable[[Case], Work]:
    def build(case: Case) -> Work:
        pair = resblocks(shape, out_channels, case.torch_dtype, case.layout, zero)
        floor = None
        if zero and case.mode == "inference":
            skip, x = pair.eager.skip_connection, pair.inputs[0]
            residual = x.clone if isinstance(skip, nn.Identity) else lambda: skip(x)
            floor = _zero_floor(conv_tail(pair.eager), residual)
        return module_work(*pair, case.mode, floor)

    return build


def dit_case(shape: tuple[int, ...], zero: bool) -> Callable[[Case], Work]:
    def build(case: Case) -> Work:
        pair = dit_blocks(shape, case.torch_dtype, zero)
        floor = None
        if zero and case.mode == "inference":
            floor = _zero_floor(gate_rows(pair.eager), pair.inputs[0].clone)
        return module_work(*pair, case.mode, floor)

    return build


def block_builds(quick: bool, zero: bool) -> Iterator[Build]:
    """Every whole block, the last weight of its branches zero or not."""
    for shape in QUICK_IMAGES if quick else IMAGES:
        yield Build("resblock", shape_text(shape), tuple(LAYOUTS), resblock_case(shape, shape[1], zero))
    for shape, out_channels in QUICK_SKIPS if quick else SKIPS:
        yield _with_skip(shape, out_channels, zero)
    for shape in QUICK_DITS if quick else DITS:
        yield Build("dit_block", shape_text(shape), ("",), dit_case(shape, zero))


def more_builds() -> Iterator[Build]:
    """The rest of the inventory of ADM-64 and Stable Diffusion 1.5, not zero."""
    for shape in MORE_IMAGES:
        yield Build("resblock", shape_text(shape), ("nchw",), resblock_case(shape, shape[1], False))
    for shape, out_channels in MORE_SKIPS:
        yield _with_skip(shape, out_channels, False)


def _with_skip(shape: tuple[int, ...], out_channels: int, zero: bool) -> Build:
    """A ResBlock that changes the number of channels, with a 1x1 convolution as its skip."""
    name = f"{shape_text(shape)}to{out_channels}"
    return Build("resblock_1x1", name, ("nchw",), resblock_case(shape, out_channels, zero))


def _frozen(build: Callable[[Case], Work]) -> Callable[[Case], Work]:
    """The same work, zeroblock's block frozen. eval() is what torch.compile's freezing asks for."""

    def build_frozen(case: Case) -> Work:
        work = build(case)
        work.eager.function.eval()
        zb.freeze(work.own.function.eval())
        return work

    return build_frozen


def cases(quick: bool, group: str) -> Iterator[Case]:
    """Group "zero": the last weight of each branch is zero; "dense": it is not; "frozen": nor here, and `zb.freeze`.

    dense and frozen have ResBlocks in float32 twice: as it is, and where more rounding is allowed (HIGH).
    """
    zero = group == "zero"
    builds = list(block_builds(quick, zero))
    if not zero and not quick:
        builds += more_builds()
    modes = ("inference",) if group == "frozen" else MODES
    for op, shape, layouts, build in builds:
        dtypes = tuple(DTYPES) if zero or op == "dit_block" else (*DTYPES, HIGH)
        if group == "frozen":
            build = _frozen(build)
        for layout in layouts:
            for dtype in dtypes:
                for mode in modes:
                    yield Case(group, op, shape, layout, dtype, mode, build)
