"""conv_residual: y = residual + conv(h, weight) + bias, channels-last, as one implicit GEMM (2-D, stride 1).

math    y[m, o] = residual[m, o] + bias[o] + sum over taps t and channels c of h[pixel(m) + t, c] * weight[o, t, c];
        fp32 accumulation, one rounding. A tap outside the image contributes 0.
grid    one program per tile of BM output pixels x BN output channels (times `splits` when the tiles are too few); the
        nine taps of a tile read the same pixels again from L2, so DRAM sees h once.
order   channels of a tap, taps row by row; splits are added first to last (`_gemm.sum_splits`).
zero    flag != 0: the loop over taps runs no iteration, what is left is residual + bias (+0 where there is neither).
norm    with `fold` the tile loader applies act(h * a[n, c] + b[n, c]) before the product, padding stays 0; with
        `partial` the epilogue also writes the mean and the centred squares of y per tile and channel, from which
        `group_norm_silu_conv_residual.statistics` makes those of the next GroupNorm.

Backward: dh is the same kernel on dy with the taps mirrored (`conv_dgrad`); dweight is `_conv_wgrad`, one program per
tile of (output channels x input channels) of one tap and a range of pixels, the ranges added first to last; dbias is
the library's sum of dy.

Launchers, for tensors on one device: `conv_residual`, `conv_dgrad`, `conv_wgrad` (half precision alone); `why_not` says
which calls they do not take. Formats other than channels-last are copied first.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _gemm
from ._dtypes import DTYPES, NAMES
from ._gemm import GROUP, Config, epilogue, tile_of
from ._launch import launch
from ._rows import cdiv, is_skipped
from ._torch import conv_precision

NHWC = torch.channels_last
# conv_wgrad: programs per SM that splitting the pixels aims at, steps of a range at least, ranges at most. (guess)
WGRAD_PER_SM, WGRAD_LEAST_STEPS, WGRAD_MOST_SPLITS = 2, 8, 32


@triton.jit
def _conv_residual(
    x,
    weight,
    bias,
    residual,
    flag,
    y,
    fold,
    partial,
    workspace,
    images,
    H,
    W,
    P,
    Q,
    CIN,
    COUT,
    split_steps,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    SILU: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    image_tiles = tl.cdiv(P * Q, BM)
    tiles_m = images * image_tiles if PER_IMAGE else tl.cdiv(images * P * Q, BM)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(COUT, BN), GROUP)
    if PER_IMAGE:  # no tile reaches into the next image: `fold` and `partial` belong to one
        pixels = tile_m % image_tiles * BM + tl.arange(0, BM)
        row_mask = pixels < P * Q
        first = tile_m // image_tiles * (P * Q) + tile_m % image_tiles * BM
    else:
        first = tile_m * BM
        row_mask = first + tl.arange(0, BM) < images * P * Q
    rows = first + tl.arange(0, BM)
    image, within = rows // (P * Q), rows % (P * Q)
    p, q = within // Q - PAD_H, within % Q - PAD_W
    source = ((image * H + p).to(tl.int64) * W + q) * CIN
    cols = tile_n * BN + tl.arange(0, BN)
    w_rows = cols.to(tl.int64) * (KH * KW * CIN)

    steps_per_tap = tl.cdiv(CIN, BK)
    start = tl.program_id(1) * split_steps
    skipped = is_skipped(flag)
    stop = tl.minimum(start + split_steps, KH * KW * steps_per_tap) * (1 - skipped)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(start, stop):
        tap = step // steps_per_tap
        c = step % steps_per_tap * BK + tl.arange(0, BK)
        r, s = tap // KW, tap % KW
        inside = row_mask & (p + r >= 0) & (p + r < H) & (q + s >= 0) & (q + s < W)
        at = source + (r * W + s) * CIN
        a_mask = inside[:, None] & (c < CIN)[None, :]
        a = tl.load(x + at[:, None] + c[None, :], mask=a_mask, other=0.0)
        if fold is not None:
            ab = fold + tile_m // image_tiles * 2 * CIN + c
            h = a.to(tl.float32) * tl.load(ab, mask=c < CIN, other=0.0)[None, :]
            h += tl.load(ab + CIN, mask=c < CIN, other=0.0)[None, :]
            if SILU:
                h *= tl.sigmoid(h)
            a = tl.where(a_mask, h, 0.0).to(weight.dtype.element_ty)
        b = tl.load(
            weight + w_rows[None, :] + (tap * CIN + c)[:, None],
            mask=(c < CIN)[:, None] & (cols < COUT)[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if workspace is not None:
        part = workspace + tl.program_id(1).to(tl.int64) * images * P * Q * COUT
        mask = row_mask[:, None] & (cols < COUT)[None, :] & (not skipped)
        tl.store(part + rows.to(tl.int64)[:, None] * COUT + cols[None, :], acc, mask=mask)
    else:
        v = epilogue(acc, first, row_mask, cols, COUT, bias, None, 0, 0, 0, 1, residual, None, y)
        if partial is not None:
            count = tl.sum(row_mask.to(tl.float32), 0)
            mean = tl.sum(tl.where(row_mask[:, None], v, 0.0), 0) / count
            centred = tl.where(row_mask[:, None], v - mean[None, :], 0.0)
            at = partial + tile_m.to(tl.int64) * 2 * COUT + cols
            tl.store(at, mean, mask=cols < COUT)
            tl.store(at + COUT, tl.sum(centred * centred, 0), mask=cols < COUT)


@triton.jit
def _conv_wgrad(
    dy,
    x,
    workspace,
    images,
    H,
    W,
    P,
    Q,
    CIN,
    COUT,
    split_pixels,
    KW: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """workspace[split, o, tap, c] = sum over this split's pixels m of dy[m, o] * x[pixel(m) + tap, c]."""
    tiles_n = tl.cdiv(CIN, BN)
    o = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    c = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    tap, split = tl.program_id(1), tl.program_id(2)
    first = split * split_pixels
    last = tl.minimum(first + split_pixels, images * P * Q)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(first, last, BK):
        m = start + tl.arange(0, BK)
        image, within = m // (P * Q), m % (P * Q)
        p, q = within // Q + tap // KW - PAD_H, within % Q + tap % KW - PAD_W
        inside = (m < last) & (p >= 0) & (p < H) & (q >= 0) & (q < W)
        source = ((image * H + p).to(tl.int64) * W + q) * CIN
        g = tl.load(
            dy + m.to(tl.int64)[None, :] * COUT + o[:, None], mask=(m < last)[None, :] & (o < COUT)[:, None], other=0.0
        )
        h = tl.load(x + source[:, None] + c[None, :], mask=inside[:, None] & (c < CIN)[None, :], other=0.0)
        acc = tl.dot(g, h, acc, input_precision=PRECISION)
    taps = tl.num_programs(1)
    row = (split * COUT + o).to(tl.int64) * taps + tap
    tl.store(workspace + row[:, None] * CIN + c[None, :], acc, mask=(o < COUT)[:, None] & (c < CIN)[None, :])


def why_not(h: Tensor, weight: Tensor, residual: Tensor | None = None) -> str | None:
    """None when these kernels take the call, else the reason."""
    if weight.dim() != 4:
        return f"the kernel is 2-D, the convolution has {weight.dim() - 2} dimensions"
    if weight.shape[1] != h.shape[1]:
        return "the kernel has no groups"
    if weight.dtype not in DTYPES or h.dtype != weight.dtype:
        return f"the kernel takes one dtype of fp32, bf16 and fp16, got {h.dtype} and {weight.dtype}"
    if residual is not None and residual.dtype not in DTYPES:
        return f"no kernel for a residual of {residual.dtype}"
    return None


def _precision(dtype: torch.dtype) -> str:
    return _gemm.precision(dtype, conv_precision())


def output_size(h: Tensor, weight: Tensor, padding: list[int]) -> tuple[int, int, int, int]:
    (n, _, H, W), (o, _, kh, kw) = h.shape, weight.shape
    return n, o, H + 2 * padding[0] - kh + 1, W + 2 * padding[1] - kw + 1


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: list[int],
    flag: Tensor | None = None,
    fold: Tensor | None = None,
    silu: bool = False,
    want_partial: bool = False,
    plan: tuple[Config, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, partial); fold [N, 2, Cin] fp32; partial [N, tiles, 2, Cout] fp32, or None. plan: (configuration, splits)."""
    size = output_size(x, weight, padding)
    (images, COUT, P, Q), (_, CIN, KH, KW), (H, W) = size, weight.shape, x.shape[2:]
    _gemm.check_size("conv_residual", max(images * P * Q, images * H * W), COUT)
    x, weight = x.contiguous(memory_format=NHWC), weight.contiguous(memory_format=NHWC)
    bias = None if bias is None else bias.contiguous()
    dtype = weight.dtype if residual is None else torch.promote_types(residual.dtype, weight.dtype)
    residual = None if residual is None else residual.expand(size).contiguous(memory_format=NHWC)
    y = torch.empty(size, dtype=dtype, device=x.device, memory_format=NHWC)
    if y.numel() == 0:
        return y, None
    if plan is None:
        shipped = _gemm.configs(x.dtype) if fold is None else _gemm.folding_configs(x.dtype)
        plan = _gemm.choose(images * P * Q, COUT, KH * KW * CIN, shipped, x.device)
    config, splits = plan
    per_image = fold is not None or want_partial
    tiles = cdiv(P * Q, config.BM)
    partial = workspace = None
    if want_partial:
        partial, splits = x.new_empty((images, tiles, 2, COUT), dtype=torch.float32), 1
    steps = KH * KW * cdiv(CIN, config.BK)
    split_steps = cdiv(steps, splits)
    splits = cdiv(steps, split_steps)
    if splits > 1:
        workspace = x.new_empty((splits, images * P * Q, COUT), dtype=torch.float32)
    tiles_m = images * tiles if per_image else cdiv(images * P * Q, config.BM)
    launch(
        _conv_residual,
        (tiles_m * cdiv(COUT, config.BN), splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        x=x,
        weight=weight,
        bias=bias,
        residual=residual,
        flag=flag,
        y=y,
        fold=fold,
        partial=partial,
        workspace=workspace,
        images=images,
        H=H,
        W=W,
        P=P,
        Q=Q,
        CIN=CIN,
        COUT=COUT,
        split_steps=split_steps,
        KH=KH,
        KW=KW,
        PAD_H=padding[0],
        PAD_W=padding[1],
        SILU=silu,
        PER_IMAGE=per_image,
        PRECISION=_precision(weight.dtype),
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
        GROUP=GROUP,
    )
    if workspace is not None:
        _gemm.sum_splits(workspace, bias, None, (0, 0, 0), 1, residual, flag, None, y)
    return y, partial


def conv_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: list[int],
    flag: Tensor | None = None,
    plan: tuple[Config, int] | None = None,
) -> Tensor:
    """residual + conv(h) + bias, [N, Cout, P, Q] channels-last; flag: one element, not 0 when weight is all zero."""
    return run(h, weight, bias, residual, padding, flag, plan=plan)[0]


def conv_dgrad(
    dy: Tensor, weight: Tensor, padding: list[int], flag: Tensor | None = None, plan: tuple[Config, int] | None = None
) -> Tensor:
    """The gradient of conv(h) by h: the convolution of dy with the mirrored, transposed taps (a copy of the weight)."""
    mirrored = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=NHWC)
    kh, kw = weight.shape[2:]
    return run(dy.to(weight.dtype), mirrored, None, None, [kh - 1 - padding[0], kw - 1 - padding[1]], flag, plan=plan)[
        0
    ]


def wgrad_configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """The largest tiles and the smallest; those between spill on sm_100 (python -m tests.triton.static)."""
    return () if dtype == torch.float32 else (_gemm.configs(dtype)[0], _gemm.configs(dtype)[-1])


def conv_wgrad(
    dy: Tensor, h: Tensor, weight_size: torch.Size, padding: list[int], config: Config | None = None
) -> Tensor:
    """The gradient of conv(h) by its weight, channels-last, in half precision; pixel ranges are added in order.

    fp32 is the library's: pixels run along the rows of neither operand, and tf32 tensor cores take only rows, so that
    every element would be copied to shared memory on its own.
    """
    if dy.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"conv_wgrad: dtype must be bf16 or fp16, got {dy.dtype}")
    (COUT, CIN, KH, KW), (images, _, H, W), (P, Q) = weight_size, h.shape, dy.shape[2:]
    _gemm.check_size("conv_wgrad", max(images * P * Q, images * H * W), KH * KW * CIN)
    dy, h = dy.contiguous(memory_format=NHWC), h.contiguous(memory_format=NHWC)
    config = wgrad_configs(dy.dtype)[-1] if config is None else config
    tiles = cdiv(COUT, config.BM) * cdiv(CIN, config.BN)
    pixels = images * P * Q
    wanted = WGRAD_PER_SM * _gemm.sms(dy.device) // (tiles * KH * KW)
    splits = max(1, min(wanted, cdiv(pixels, WGRAD_LEAST_STEPS * config.BK), WGRAD_MOST_SPLITS))
    split_pixels = cdiv(cdiv(pixels, splits), config.BK) * config.BK
    splits = cdiv(pixels, split_pixels) if pixels else 0
    workspace = h.new_empty((splits, COUT, KH, KW, CIN), dtype=torch.float32)
    if splits == 0:
        return h.new_zeros(weight_size).contiguous(memory_format=NHWC)
    launch(
        _conv_wgrad,
        (tiles, KH * KW, splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        dy=dy,
        x=h,
        workspace=workspace,
        images=images,
        H=H,
        W=W,
        P=P,
        Q=Q,
        CIN=CIN,
        COUT=COUT,
        split_pixels=split_pixels,
        KW=KW,
        PAD_H=padding[0],
        PAD_W=padding[1],
        PRECISION=_precision(dy.dtype),
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
    )
    dweight = torch.empty(weight_size, dtype=dy.dtype, device=dy.device, memory_format=NHWC)
    rows = workspace.view(splits, COUT, -1)
    _gemm.sum_splits(rows, None, None, (0, 0, 0), 1, None, None, None, dweight)
    return dweight


def _case(dtype: torch.dtype, N: int, C: int, size: int, O: int, k: int, config: Config, splits: int = 1, **options):  # noqa: E741
    def case() -> object:
        x, w = (torch.empty(s, dtype=dtype, device="meta") for s in ((N, C, size, size), (O, C, k, k)))
        residual = torch.empty(N, O, size, size, dtype=dtype, device="meta")
        flag = torch.empty(1, dtype=torch.bool, device="meta")
        return run(x, w, w[:, 0, 0, 0], residual, [k // 2] * 2, flag, plan=(config, splits), **options)

    return case


def _compile_cases():
    for dtype in DTYPES:
        name = NAMES[dtype]
        for config in _gemm.configs(dtype):
            for k in (3, 1):
                name_of = f"conv_residual-{k}x{k}-{config.BM}x{config.BN}-{name}"
                yield name_of, _case(dtype, 2, 320, 64, 640 if k == 1 else 320, k, config)
        yield f"conv_residual-1x1-split-{name}", _case(dtype, 2, 1280, 8, 1280, 1, config, 2)
        yield f"conv_residual-split-{name}", _case(dtype, 2, 1280, 8, 1280, 3, config, 4)
        yield f"conv_residual-partial-{name}", _case(dtype, 2, 320, 64, 320, 3, config, want_partial=True)

        if dtype == torch.float32:
            continue

        def wgrad(dtype, config):
            x, dy = (torch.empty(2, c, 32, 32, dtype=dtype, device="meta") for c in (320, 640))
            return conv_wgrad(dy, x, torch.Size((640, 320, 3, 3)), [1, 1], config)

        for config in wgrad_configs(dtype):
            yield f"conv_residual-wgrad-{config.BM}x{config.BN}-{name}", partial(wgrad, dtype, config)


COMPILE_CASES = dict(_compile_cases())
