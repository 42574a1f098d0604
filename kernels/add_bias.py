"""add_bias: y = x + bias along the channels of a dense x, which is what is left of a zero branch. With a residual
x += bias + residual, which finishes a library's convolution in one pass.

math    x is seen as [rows, columns]; its channels are the columns (linear layers, channels-last images) or the rows
        modulo C (contiguous images). Without a bias x + 0, which turns -0 into +0 as the sum of a branch would.
        With a residual the sum is rounded once.
grid    (row blocks, column blocks). 2ns bytes, 3ns with a residual.
order   no sums.
zero    none, this kernel is the zero path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import long_name
from ._launch import launch
from ._rows import cdiv, power_of_2

# Elements and warps of a program: 16 per thread, in 16-byte accesses (access widths: python -m tests.triton.static).
ELEMENTS, WARPS = 2048, 4


@triton.jit
def _add_bias(
    x, bias, residual, y, rows, columns, C, COLUMN_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if bias is None:
        v = tl.where(v == 0.0, 0.0, v)
    elif COLUMN_BIAS:
        v += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    else:
        v += tl.load(bias + row % C, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        v += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, v, mask=mask)


def add_bias(x: Tensor, bias: Tensor | None, columns: int, column_bias: bool, residual: Tensor | None = None) -> Tensor:
    """`columns` is the length of a row in memory: C when channels are innermost, else the pixels of an image. A
    residual has the strides of x, which is written."""
    y = torch.empty_like(x) if residual is None else x
    n = x.numel()
    rows = n // max(1, columns)
    block = min(ELEMENTS, power_of_2(columns))
    height = max(1, ELEMENTS // block)
    launch(
        _add_bias,
        (cdiv(rows, height), cdiv(columns, block)),
        num_warps=WARPS,
        x=x,
        bias=bias,
        residual=residual,
        y=y,
        rows=rows,
        columns=columns,
        C=1 if bias is None else bias.numel(),
        COLUMN_BIAS=column_bias,
        ROWS=height,
        COLS=block,
    )
    return y


def _compile(C: int, pixels: int, dtype: torch.dtype) -> None:
    x, bias = (torch.empty(size, dtype=dtype, device="meta") for size in ((2, C, pixels), (C,)))
    for b in (bias, None):
        add_bias(x, b, pixels, False)
        add_bias(x, b, C, True)
    for columns in (pixels, C):
        add_bias(x, bias, columns, columns == C, torch.empty_like(x))


COMPILE_CASES = {
    f"add_bias-{C}-{long_name(dtype)}": lambda C=C, dtype=dtype: _compile(C, 4096, dtype)
    for C, dtype in ((320, torch.bfloat16), (320, torch.float16), (320, torch.float32), (1152, torch.bfloat16))
}
