"""activation: y = act(x) and dx = dy * act'(x) on dense tensors; silu, gelu (erf) and gelu_tanh.

math    act(x) = x * s(x) in fp32. gelu_tanh is x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3): the same number
        without a tanh. Backward recomputes y = act(x) as well where it is needed.
grid    blocks of elements. 2ns bytes; backward 3ns, 4ns with y.
order   no sums.
zero    flag != 0 (the branch is zero): forward reads and writes nothing, y is undefined. Backward takes no flag.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import long_name
from ._launch import launch
from ._rows import cdiv, is_skipped

KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
# Elements and warps of a program: 16 per thread, in 16-byte accesses (access widths: python -m tests.triton.static).
BLOCK, WARPS = 2048, 4


@triton.jit
def factor(x, KIND: tl.constexpr):
    """(s, s') with act(x) = x * s(x)."""
    if KIND == 0:
        s = tl.sigmoid(x)
        return s, s * (1.0 - s)
    elif KIND == 1:
        u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        s = tl.sigmoid(u)
        # sigmoid(-u) and not 1 - s, which would lose what x multiplies.
        return s, s * tl.sigmoid(-u) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476), 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _forward(x, y, flag, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    if flag is not None:
        if is_skipped(flag):
            return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    s, _ = factor(value, KIND)
    tl.store(y + at, value * s, mask=at < n)


@triton.jit
def _backward(dy, x, dx, y, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    grad = tl.load(dy + at, mask=at < n, other=0.0).to(tl.float32)
    s, slope = factor(value, KIND)
    tl.store(dx + at, grad * (s + value * slope), mask=at < n)
    if y is not None:
        tl.store(y + at, value * s, mask=at < n)


def forward(x: Tensor, name: str, flag: Tensor | None = None) -> Tensor:
    """act(x); nothing is read or written, and y undefined, where `flag` says that its branch is zero."""
    y = torch.empty_like(x)
    n = x.numel()
    launch(_forward, (cdiv(n, BLOCK),), num_warps=WARPS, x=x, y=y, flag=flag, n=n, KIND=KINDS[name], BLOCK=BLOCK)
    return y


def backward(dy: Tensor, x: Tensor, name: str, need_y: bool) -> tuple[Tensor, Tensor | None]:
    """(dx, y or None); dy and x dense in one order."""
    dx, y = torch.empty_like(x), torch.empty_like(x) if need_y else None
    n = x.numel()
    launch(_backward, (cdiv(n, BLOCK),), num_warps=WARPS, dy=dy, x=x, dx=dx, y=y, n=n, KIND=KINDS[name], BLOCK=BLOCK)
    return dx, y


def _compile(name: str, dtype: torch.dtype) -> None:
    x = torch.empty(8, 256, 4608, dtype=dtype, device="meta")
    forward(x, name)
    backward(x, x, name, False)
    backward(x, x, name, True)


COMPILE_CASES = {
    f"activation-{name}-{long_name(dtype)}": lambda name=name, dtype=dtype: _compile(name, dtype)
    for name, dtype in (*((name, torch.bfloat16) for name in KINDS), ("silu", torch.float32), ("silu", torch.float16))
}
