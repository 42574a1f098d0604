"""Group overhead: what a call costs apart from its arithmetic, on tiny tensors; and the zero check of a block."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from zeroblock.blocks.decision import Answer, decide

from . import ops
from .blocks import DITS, QUICK_DITS, Pair, conv_tail, dit_blocks, gate_rows, resblocks
from .case import DTYPES, IMAGES, MODES, QUICK_IMAGES, Case, Side, Work, module_work, shape_text

TINY_IMAGE, TINY_TOKENS = (1, 32, 4, 4), (1, 4, 64)


def _tiny_resblocks(zero_tail: bool, dtype: torch.dtype) -> Pair:
    return resblocks(TINY_IMAGE, TINY_IMAGE[1], dtype, "nchw", zero_tail)


def _tiny_dit_blocks(zero_tail: bool, dtype: torch.dtype) -> Pair:
    return dit_blocks(TINY_TOKENS, dtype, zero_tail)


def _tiny_module(make_blocks: Callable[[torch.dtype], Pair]) -> Callable[[Case], Work]:
    def build(case: Case) -> Work:
        return module_work(*make_blocks(DTYPES[case.dtype]), case.mode)

    return build


def calls() -> Iterator[Case]:
    """Whole modules with non-zero and with zero tails, and every fused op, on tensors of a few hundred elements."""
    for state, is_zero in (("", False), ("_zero", True)):
        for block, shape, make_blocks in (
            ("resblock", TINY_IMAGE, _tiny_resblocks),
            ("dit_block", TINY_TOKENS, _tiny_dit_blocks),
        ):
            build = _tiny_module(partial(make_blocks, is_zero))
            for mode in MODES:
                yield Case("overhead", block + state, shape_text(shape), "", "fp32", mode, build)
    for case in ops.cases(quick=True, group="overhead"):
        if case.dtype == "fp32" and case.layout != "nhwc":
            yield case


def _resblocks(shape: tuple[int, ...], dtype: torch.dtype) -> Pair:
    return resblocks(shape, shape[1], dtype, "nchw", zero=False)


def late(tensors: list[Tensor]) -> list[Tensor]:
    """The weights whose check takes longest: zero but for the very last element."""
    zeros = [torch.zeros_like(tensor) for tensor in tensors]
    zeros[-1][(-1,) * zeros[-1].dim()] = 1.0
    return zeros


def _check_case(
    make_blocks: Callable[[torch.dtype], Pair], tail: Callable[[nn.Module], list[Tensor]], worst: bool
) -> Callable[[Case], Work]:
    """The dense eager block (as `eager`) beside the one decision of its module (as `zeroblock`)."""

    def build(case: Case) -> Work:
        pair = make_blocks(DTYPES[case.dtype])
        tensors = tuple(late(tail(pair.own)) if worst else tail(pair.own))

        def decision() -> Answer:  # policy, values and, while zero, hooks: all that a module looks at
            return decide("zero_check", "auto", tensors, bypassed=pair.own.children())

        return Work(Side(pair.eager, pair.inputs, ()), Side(decision, (), ()))

    return build


def checks(quick: bool) -> Iterator[Case]:
    """The zero check of dense weights, and of the worst ones ("late"), against one dense inference of their block."""
    builds = []  # (name, shape, make_blocks, what has to be zero)
    for shape in QUICK_IMAGES if quick else IMAGES:
        builds.append(("resblock", shape, partial(_resblocks, shape), conv_tail))
    for shape in QUICK_DITS if quick else DITS:
        builds.append(("dit_block", shape, partial(dit_blocks, shape, zero=False), gate_rows))
    for name, shape, make_blocks, tail in builds:
        for suffix, worst in (("", False), ("_late", True)):
            for dtype in DTYPES:
                build = _check_case(make_blocks, tail, worst)
                op = f"zero_check{suffix}_{name}"
                yield Case("overhead", op, shape_text(shape), "", dtype, "inference", build, same_work=False)


def cases(quick: bool) -> Iterator[Case]:
    yield from calls()
    yield from checks(quick)
