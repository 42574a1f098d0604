"""Whole ResBlocks and DiT blocks: the last weight of their branches zero, not zero, or frozen for inference."""

from collections.abc import Callable, Iterator

import torch
from cases import DTYPES, HIGH, IMAGES, LAYOUTS, MODES, QUICK_IMAGES, QUICK_TOKENS, Case, Side, Work, text
from torch import Tensor, nn

import zeroblock as zb
from zeroblock.testing import eager

# ResBlocks that change the channel count: two of the encoder, one of the decoder (after the concatenation).
SKIPS = (((2, 128, 32, 32), 256), ((2, 256, 16, 16), 512), ((2, 512, 32, 32), 256))
# What the dense groups measure too, one layout each: the other blocks of ADM-64 (192 channels at 64 x 64, to 768 at
# 8 x 8, and what its decoder concatenates) and of Stable Diffusion 1.5.
MORE_IMAGES = ((1, 192, 64, 64), (1, 384, 32, 32), (1, 576, 16, 16), (1, 768, 8, 8), (1, 640, 32, 32), (1, 1280, 8, 8))
MORE_SKIPS = (((1, 768, 32, 32), 384), ((1, 1536, 8, 8), 768), ((1, 960, 64, 64), 320), ((1, 2560, 16, 16), 1280))
DITS = ((8, 256, 384), (4, 256, 768), (2, 256, 1152))
QUICK_SKIPS, QUICK_DITS = (((1, 32, 4, 4), 64),), QUICK_TOKENS


def fill_tail(tail: nn.Module, zero: bool) -> None:
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter.zero_() if zero else parameter.normal_(std=0.02)


def resblocks(shape: tuple[int, ...], out_channels: int, dtype: torch.dtype, layout: str, zero: bool):
    """(eager block, zeroblock block, inputs): FiLM as in ADM, or the plain addition of Stable Diffusion."""
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
    return *blocks, (x, torch.randn(shape[0], emb_channels))


def dit_blocks(shape: tuple[int, ...], dtype: torch.dtype, zero: bool):
    """(eager block, zeroblock block, inputs): heads of 64 features (72 at 1152), as in DiT-S, -B and -XL."""
    batch, _, width = shape
    heads = 16 if width == 1152 else width // 64
    blocks = [DiTBlock(width, heads, mlp_ratio=4.0).to(dtype) for DiTBlock in (eager.DiTBlock, zb.nn.DiTBlock)]
    fill_tail(blocks[0].adaLN_modulation[-1], zero)
    blocks[1].load_state_dict(blocks[0].state_dict())
    return *blocks, (torch.randn(shape).to(dtype), torch.randn(batch, width).to(dtype))


def module_work(
    eager_block: nn.Module, own_block: nn.Module, inputs: tuple[Tensor, ...], mode: str, floor: Callable | None = None
) -> Work:
    for tensor in inputs:
        tensor.requires_grad_(mode == "training")
    sides = [Side(block, inputs, (*inputs, *block.parameters())) for block in (eager_block, own_block)]
    return Work(*sides, floor)


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


def _resblock_case(shape: tuple[int, ...], out_channels: int, zero: bool) -> Callable[[Case], Work]:
    def build(case: Case) -> Work:
        eager_block, own_block, inputs = resblocks(shape, out_channels, case.torch_dtype, case.layout, zero)
        floor = None
        if zero and case.mode == "inference":
            skip, x = eager_block.skip_connection, inputs[0]
            residual = x.clone if isinstance(skip, nn.Identity) else lambda: skip(x)
            floor = _zero_floor(conv_tail(eager_block), residual)
        return module_work(eager_block, own_block, inputs, case.mode, floor)

    return build


def _dit_case(shape: tuple[int, ...], zero: bool) -> Callable[[Case], Work]:
    def build(case: Case) -> Work:
        eager_block, own_block, inputs = dit_blocks(shape, case.torch_dtype, zero)
        floor = None
        if zero and case.mode == "inference":
            floor = _zero_floor(gate_rows(eager_block), inputs[0].clone)
        return module_work(eager_block, own_block, inputs, case.mode, floor)

    return build


def block_builds(quick: bool, zero: bool) -> Iterator[tuple[str, str, tuple[str, ...], Callable[[Case], Work]]]:
    """(op, shape, layouts, build) of every whole block, the last weight of its branches zero or not."""
    for shape in QUICK_IMAGES if quick else IMAGES:
        yield "resblock", text(shape), tuple(LAYOUTS), _resblock_case(shape, shape[1], zero)
    for shape, out_channels in QUICK_SKIPS if quick else SKIPS:
        yield "resblock_1x1", f"{text(shape)}to{out_channels}", ("nchw",), _resblock_case(shape, out_channels, zero)
    for shape in QUICK_DITS if quick else DITS:
        yield "dit_block", text(shape), ("",), _dit_case(shape, zero)


def _frozen(build: Callable[[Case], Work]) -> Callable[[Case], Work]:
    """The same work, zeroblock's block frozen. eval() is what torch.compile's freezing asks for."""

    def build_frozen(case: Case) -> Work:
        work = build(case)
        work.eager.function.eval()
        zb.freeze(work.own.function.eval())
        return work

    return build_frozen


def more_builds() -> Iterator[tuple[str, str, tuple[str, ...], Callable[[Case], Work]]]:
    """The rest of the inventory of ADM-64 and Stable Diffusion 1.5, not zero."""
    for shape in MORE_IMAGES:
        yield "resblock", text(shape), ("nchw",), _resblock_case(shape, shape[1], False)
    for shape, out_channels in MORE_SKIPS:
        yield "resblock_1x1", f"{text(shape)}to{out_channels}", ("nchw",), _resblock_case(shape, out_channels, False)


def whole_blocks(group: str, quick: bool) -> Iterator[Case]:
    """Group "zero": the last weight of each branch is zero; "dense": it is not; "frozen": nor here, and `zb.freeze`.

    The dense groups have ResBlocks in float32 twice, as it is and where more rounding is allowed (HIGH).
    """
    zero, frozen = group == "zero", group == "frozen"
    for op, shape, layouts, build in (*block_builds(quick, zero), *(() if zero or quick else more_builds())):
        for layout in layouts:
            for dtype in DTYPES if zero or op == "dit_block" else (*DTYPES, HIGH):
                for mode in ("inference",) if frozen else MODES:
                    yield Case(group, op, shape, layout, dtype, mode, _frozen(build) if frozen else build)
