"""What a call costs apart from its arithmetic: whole modules and ops on tiny tensors, and the zero check."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from blocks import DITS, QUICK_DITS, conv_tail, dit_blocks, gate_rows, module_work, resblocks
from cases import DTYPES, IMAGES, MODES, QUICK_IMAGES, Case, Side, Work, memory_bound, text
from torch import Tensor

from zeroblock.blocks.decision import Answer, decide

TINY_IMAGE, TINY_TOKENS = (1, 32, 4, 4), (1, 4, 64)


def _tiny_module(make_blocks: Callable) -> Callable[[Case], Work]:
    def build(case: Case) -> Work:
        eager_block, own_block, inputs = make_blocks(DTYPES[case.dtype])
        return module_work(eager_block, own_block, inputs, case.mode)

    return build


def calls() -> Iterator[Case]:
    """Whole modules with non-zero and with zero tails, and every fused op, on tensors of a few hundred elements."""
    for state, is_zero in (("", False), ("_zero", True)):
        builds = (
            (f"resblock{state}", TINY_IMAGE, lambda d, z=is_zero: resblocks(TINY_IMAGE, 32, d, "nchw", z)),
            (f"dit_block{state}", TINY_TOKENS, lambda d, z=is_zero: dit_blocks(TINY_TOKENS, d, z)),
        )
        for op, shape, make_blocks in builds:
            for mode in MODES:
                yield Case("overhead", op, text(shape), "", "fp32", mode, _tiny_module(make_blocks))
    for case in memory_bound(quick=True, group="overhead"):
        if case.dtype == "fp32" and case.layout != "nhwc":
            yield case


def _resblocks(shape: tuple[int, ...], dtype: torch.dtype):
    return resblocks(shape, shape[1], dtype, "nchw", zero=False)


def late(tensors: list[Tensor]) -> list[Tensor]:
    """The weights whose check takes longest: zero but for the very last element."""
    zeros = [torch.zeros_like(tensor) for tensor in tensors]
    zeros[-1][(-1,) * zeros[-1].dim()] = 1.0
    return zeros


def _check_case(make_blocks: Callable, tail: Callable, worst: bool) -> Callable[[Case], Work]:
    """The dense eager block (as `eager`) beside the one decision of its module (as `zeroblock`)."""

    def build(case: Case) -> Work:
        eager_block, own_block, inputs = make_blocks(DTYPES[case.dtype])
        tensors = tuple(late(tail(own_block)) if worst else tail(own_block))

        def decision() -> Answer:  # policy, values and, while zero, hooks: all that a module looks at
            return decide("zero_check", "auto", tensors, bypassed=own_block.children())

        return Work(Side(eager_block, inputs, ()), Side(decision, (), ()))

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
                yield Case("overhead", f"zero_check{suffix}_{name}", text(shape), "", dtype, "inference", build)


def cases(quick: bool) -> Iterator[Case]:
    yield from calls()
    yield from checks(quick)
