"""linear_gate_residual: y = residual + gate * (h @ weight.T + bias), one GEMM with everything else in its epilogue.

math    rows m = (b, t): y[m, d] = residual[m, d] + gate[b, t, d] * (bias[d] + sum over k of h[m, k] * weight[d, k]);
        fp32 accumulation, one rounding. `branch` = h @ weight.T + bias is written beside y where the gate's gradient
        will need it.
grid    one program per tile of BM rows x BN features (times `splits` when the tiles are too few).
order   k ascending; splits are added first to last (`_gemm.sum_splits`).
zero    flag != 0 (the weight or the gate is zero): the loop over k runs no iteration, what is left is
        residual + gate * bias.

The activation is a kernel of its own: in the tile loader it would be evaluated once per tile column, D / BN times per
element, and cost more than the 2ns bytes it saves (tanh and exp run at a sixty-fourth of the tensor cores' rate).
Backward has no kernel here: the library's GEMMs, and those of gate_residual.

Launcher: `linear_gate_residual`, for tensors on one device; `why_not` says which calls it does not take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _gemm
from ._dtypes import DTYPES, NAMES
from ._gemm import GROUP, Config, epilogue, tile_at, tile_of
from ._launch import launch
from ._rows import cdiv, is_skipped
from ._torch import matmul_precision


@triton.jit
def _linear_gate_residual(
    h,
    weight,
    bias,
    gate,
    residual,
    flag,
    branch,
    y,
    workspace,
    M,
    N,
    K,
    h_row,
    w_row,
    gate_b,
    gate_t,
    gate_d,
    T,
    split_k,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    first, cols = tile_m * BM, tile_n * BN + tl.arange(0, BN)
    rows = first + tl.arange(0, BM)
    a_at = rows.to(tl.int64)[:, None] * h_row
    b_at = cols.to(tl.int64)[None, :] * w_row
    start = tl.program_id(1) * split_k
    skipped = is_skipped(flag)
    stop = tl.minimum(start + split_k, K) * (1 - skipped)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(start, stop, BK):
        k = step + tl.arange(0, BK)
        a = tl.load(h + a_at + k[None, :], mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(weight + b_at + k[:, None], mask=(k < K)[:, None] & (cols < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if workspace is not None:
        part = workspace + tl.program_id(1).to(tl.int64) * M * N
        mask = (rows < M)[:, None] & (cols < N)[None, :] & (not skipped)
        tl.store(tile_at(part, first, cols, N, BM), acc, mask=mask)
    else:
        epilogue(acc, first, rows < M, cols, N, bias, gate, gate_b, gate_t, gate_d, T, residual, branch, y)


def why_not(h: Tensor, weight: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> str | None:
    """None when the kernel takes the call, else the reason."""
    if weight.dtype not in DTYPES or h.dtype != weight.dtype:
        return f"the kernel takes one dtype of fp32, bf16 and fp16, got {h.dtype} and {weight.dtype}"
    for name, t in (("gate", gate), ("residual", residual)):
        if t is not None and t.dtype not in DTYPES:
            return f"no kernel for a {name} of {t.dtype}"
    if gate is not None and gate.dim() > 1 and h.dim() != 3:
        return f"a gate of {gate.dim()} dimensions needs tokens [B, T, K], got {list(h.shape)}"
    return None


def _gate_strides(gate: Tensor | None) -> tuple[int, int, int | None]:
    """Strides over (sample, token, feature), 0 where the gate is shared; a feature stride of None: one number."""
    if gate is None or gate.numel() == 1:
        return 0, 0, None
    if gate.dim() == 1:
        return 0, 0, gate.stride(0)
    return gate.stride(0), gate.stride(1) if gate.dim() == 3 else 0, gate.stride(-1)


def _rows(t: Tensor) -> Tensor:
    """[M, K] with dense rows, a view wherever the strides allow one."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def linear_gate_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    flag: Tensor | None = None,
    save_branch: bool = False,
    plan: tuple[Config, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, branch): h [..., K], weight [D, K], gate [B, D], [B, T, D], [D] or [1]; y contiguous, in the promoted dtype.

    flag: one element, not 0 when the branch is zero. plan: (configuration, splits), else chosen by size.
    """
    size = (*h.shape[:-1], weight.shape[0])
    T = h.shape[1] if h.dim() == 3 else 1
    h, weight = _rows(h), _rows(weight)
    (M, K), N = h.shape, weight.shape[0]
    _gemm.check_size("linear_gate_residual", M, N)
    dtype = weight.dtype
    for operand in (gate, residual):
        dtype = dtype if operand is None else torch.promote_types(dtype, operand.dtype)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.expand(size).contiguous()
    y = torch.empty(size, dtype=dtype, device=h.device)
    branch = torch.empty(size, dtype=weight.dtype, device=h.device) if save_branch else None
    if y.numel() == 0:
        return y, branch
    config, splits = _gemm.choose(M, N, K, _gemm.configs(h.dtype), h.device) if plan is None else plan
    split_k = cdiv(cdiv(K, splits), config.BK) * config.BK
    splits = max(1, cdiv(K, split_k)) if split_k else 1
    workspace = None if splits == 1 else h.new_empty((splits, M, N), dtype=torch.float32)
    strides = gate_b, gate_t, gate_d = _gate_strides(gate)
    launch(
        _linear_gate_residual,
        (cdiv(M, config.BM) * cdiv(N, config.BN), splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        h=h,
        weight=weight,
        bias=bias,
        gate=gate,
        residual=residual,
        flag=flag,
        branch=branch,
        y=y,
        workspace=workspace,
        M=M,
        N=N,
        K=K,
        h_row=h.stride(0),
        w_row=weight.stride(0),
        gate_b=gate_b,
        gate_t=gate_t,
        gate_d=gate_d,
        T=T,
        split_k=split_k,
        PRECISION=_gemm.precision(weight.dtype, matmul_precision()),
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
        GROUP=GROUP,
    )
    if workspace is not None:
        _gemm.sum_splits(workspace, bias, gate, strides, T, residual, flag, branch, y)
    return y, branch


def _case(dtype: torch.dtype, config: Config, splits: int = 1, gate: str = "bd", save_branch: bool = False):
    def case() -> object:
        B, T, D, K = 2, 256, 1152, 4608
        empty = lambda *size: torch.empty(size, dtype=dtype, device="meta")  # noqa: E731
        modulation = empty(B, 6 * D).chunk(6, dim=1)
        gates = {"bd": modulation[2], "btd": empty(B, T, D), "d": empty(D), "one": empty(1), "none": None}
        flag = torch.empty(1, dtype=torch.bool, device="meta")
        h, residual = empty(B, T, K), empty(B, T, D)
        return linear_gate_residual(
            h, empty(D, K), empty(D), gates[gate], residual, flag, save_branch, (config, splits)
        )

    return case


def _compile_cases():
    for dtype in DTYPES:
        name = NAMES[dtype]
        for config in _gemm.configs(dtype):
            yield f"linear_gate_residual-{config.BM}x{config.BN}-{name}", _case(dtype, config)
        for gate in ("btd", "d", "one", "none"):
            yield f"linear_gate_residual-gate_{gate}-{name}", _case(dtype, config, gate=gate)
        yield f"linear_gate_residual-split-{name}", _case(dtype, config, splits=4)
        yield f"linear_gate_residual-branch-{name}", _case(dtype, config, save_branch=True)


COMPILE_CASES = dict(_compile_cases())
