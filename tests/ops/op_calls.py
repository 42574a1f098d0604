"""Example calls of every registered op, in any dtype and layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zeroblock.zero import HOST, NEVER

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {"fp32": F32, "bf16": BF16, "fp16": F16, "fp64": F64}
LAYOUTS = ("contiguous", "channels-last", "strided")

Make = Callable[..., torch.Tensor]


def registered(op: str) -> torch._ops.OpOverload:
    """The op as the dispatcher knows it: what a compiler, a mode or a tensor subclass calls."""
    return getattr(torch.ops.zeroblock, op).default


def differentiable(op: str, args: tuple) -> list[int]:
    """Places of the inputs that may want a gradient; a gate only where the linear's output is kept (save_branch)."""
    places = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return [i for i in places if not (op == "linear_gate_residual" and i == 3 and not args[-1])]


def maker(dtype: torch.dtype, layout: str) -> Make:
    """make(*size): random values. channels-last: dense in another dimension order; strided: a slice of a larger one."""
    generator = torch.Generator().manual_seed(0)

    def make(*size: int) -> torch.Tensor:
        if layout == "contiguous":
            return torch.randn(size, generator=generator).to(dtype)
        if layout == "strided":
            t = torch.randn([n + 1 for n in size], generator=generator).to(dtype)
            return t[tuple(slice(1, None) for _ in size)]
        t = torch.randn(size[:1] + size[2:] + size[1:2], generator=generator).to(dtype)
        return t.movedim(-1, 1) if len(size) > 1 else t

    return make


_NO_GATE = (None, None, False, False, None, 1e-6)


def _residual_norm(residual: torch.Tensor, *operands: object, index: bool = False) -> tuple:
    rows = torch.tensor([[0, 2, 2, 0, 0], [2, 0, 0, 0, 2]], dtype=torch.int32) if index else None  # of three
    return (residual, *operands, rows, 1e-6, residual.dtype, residual.dtype)


def forward_calls(make: Make) -> dict[str, list[tuple]]:
    """Arguments of every forward op: everything given, the least given, zero paths, per-token operands."""
    n = make
    zero = lambda *size: torch.zeros_like(n(*size))  # noqa: E731
    x, t, u, v = n(2, 8, 5, 3), n(2, 5, 8), n(2, 8), n(8)
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) > 0.3

    def fused(weight):
        return (x, 4, v, n(8), 1e-5, u, n(2, 8), keep, 0.3, weight, n(6), n(2, 6, 5, 3), [1, 1], HOST)

    return {
        "group_norm_silu": [
            (x, 4, v, n(8), 1e-5, u, n(2, 8), True),
            (n(2, 8, 7), 2, None, None, 1e-3, None, None, False),
            (n(2, 8, 3, 5, 3), 4, v, n(8), 1e-5, u, n(2, 8), True, True),
        ],
        "channel_rms_norm_silu": [
            (x, v, n(8), 1e-12, False, u, n(2, 8), True),
            (n(1, 8, 2, 5, 3), v, None, 2.5, False, None, None, True),  # below eps, and above
            (n(2, 8, 7), None, None, 1e-3, True, None, None, False),
        ],
        "layer_norm_modulate": [
            (t, u, n(2, 8), v, n(8), 1e-6),
            (t, n(2, 5, 8), n(2, 5, 8), None, None, 1e-6),
            (t, None, None, None, None, 1e-6),
        ],
        "rms_norm_modulate": [
            (t, u, n(2, 8), v, 1e-6),
            (t, n(2, 5, 8), n(2, 5, 8), None, 1e-6),
            (t, None, None, None, 1e-6),
        ],
        "norm_modulate_two": [
            (t, u, n(2, 8), n(2, 8), n(2, 8), 1e-6, False),
            (t, u, None, None, n(2, 8), 1e-6, True),
            (t, None, None, None, None, 1e-6, False),
        ],
        "gate_residual": [(t, g, n(2, 5, 8)) for g in (u, v, n(2, 5, 8), n(1))] + [(x, n(1), n(2, 8, 5, 3))],
        "gate_residual_layer_norm_modulate": [
            (t, u, n(2, 5, 8), n(2, 8), n(2, 8), 1e-6),
            (t, n(2, 5, 8), n(2, 5, 8), n(2, 5, 8), n(2, 5, 8), 1e-6),
            (t, n(1), n(2, 5, 8), n(2, 8), n(2, 8), 1e-6),
            (t, v, n(2, 5, 8), n(2, 8), n(2, 8), 1e-6),
        ],
        "residual_norm_modulate": [
            # gate, table, tanh, branch norm, weight, eps; norm, weight, bias, shift, table, scale, table; index, eps
            _residual_norm(t, n(2, 5, 8), u, v, True, True, n(8), 1e-6, 1, n(8), n(8), n(2, 8), n(8), n(2, 8), n(8)),
            _residual_norm(t, n(2, 5, 8), *_NO_GATE, 2, n(8), None, n(2, 3, 8), None, v, n(8), index=True),
            _residual_norm(t, None, *_NO_GATE, 1, None, n(8), n(2, 5, 8), n(8), n(2, 5, 8), n(8)),
            _residual_norm(t, n(2, 5, 8), n(2, 3, 8), n(8), False, False, n(8), 1e-6, 0, *[None] * 6, index=True),
        ],
        "conv_residual": [
            (x, n(6, 8, 3, 3), n(6), n(2, 6, 5, 3), [1, 1], HOST),
            (x, n(6, 8, 1, 1), None, None, [0, 0], NEVER),
            (x, zero(6, 8, 3, 3), n(6), n(2, 6, 5, 3), [1, 1], HOST),
            (x, zero(6, 8, 3, 3), None, None, [1, 1], HOST),
            (n(2, 8, 7), n(6, 8, 3), n(6), n(2, 6, 7), [1], HOST),
            (n(1, 4, 3, 3, 3), n(2, 4, 3, 3, 3), n(2), n(1, 2, 3, 3, 3), [1, 1, 1], HOST),
            (n(2, 4, 4, 3, 3), n(2, 4, 3, 3, 3), n(2), n(2, 2, 4, 3, 3), [2, 0, 1, 1, 1, 0, 1, 1, 0], HOST),
            (n(2, 4, 1, 3, 3), n(2, 4, 3, 3, 3), n(2), None, [2, 0, 0, 1, 1, 1, 1, 1, 1], HOST),
            (n(2, 4, 4, 3, 3), zero(2, 4, 3, 3, 3), n(2), n(2, 2, 4, 3, 3), [2, 0, 0, 1, 1, 0, 1, 1, 0], HOST),
            (x, n(6, 8, 3, 3), n(6), n(2, 6, 5, 3), [2, 0, 1, 0, 2, 0], HOST),
        ],
        "group_norm_silu_conv_residual": [
            fused(n(6, 8, 3, 3)),
            fused(zero(6, 8, 3, 3)),
            (*fused(n(6, 8, 3, 3))[:-2], [1, 1, 1, 2, 0, 0], HOST),
            (x, 2, None, None, 1e-5, None, None, None, 0.0, n(6, 8, 1, 1), None, None, [0, 0], NEVER),
        ],
        "layer_norm_modulate_linear": [
            (t, u, n(2, 8), n(6, 8), n(6), 1e-6),
            (t, None, None, n(6, 8), None, 1e-6),
            (t, n(2, 5, 8), n(2, 5, 8), n(6, 8), n(6), 1e-6),
        ],
        "linear_gate_residual": [
            (t, n(6, 8), n(6), n(2, 6), n(2, 5, 6), "gelu_tanh", HOST, True),
            (t, n(6, 8), n(6), None, n(2, 5, 6), "silu", HOST, False),
            (t, n(6, 8), None, n(6), None, None, HOST, True),
            (t, n(6, 8), None, None, None, "gelu", HOST, False),
            (t, zero(6, 8), n(6), n(2, 6), n(2, 5, 6), "gelu_tanh", HOST, True),
            (t, zero(6, 8), n(6), n(1), n(2, 5, 6), None, HOST, False),
            (t, n(6, 8), n(6), zero(2, 6), n(2, 5, 6), None, HOST, False),
            (t, zero(6, 8), n(6), None, None, None, HOST, False),
        ],
    }


def backward_calls(op: str, args: tuple, out: tuple, like: Make) -> list[tuple]:
    """The calls of `op`_bwd that the backward of the op makes after op(*args) gave out."""
    dy = like(*out[0].shape).to(out[0].dtype)
    if op == "group_norm_silu":
        x, groups, w, b, _, scale, shift, *rest = args
        return [(dy, x, *out[1:], w, b, scale, shift, groups, *rest)]
    if op == "channel_rms_norm_silu":
        x, w, b, _, _, scale, shift, silu = args
        return [(dy, x, out[1], w, b, scale, shift, silu)]
    if op == "layer_norm_modulate":
        x, shift, scale, w, b, _ = args
        return [(dy, x, *out[1:], shift, scale, w, b)]
    if op == "rms_norm_modulate":
        x, shift, scale, w, _ = args
        return [(dy, x, out[1], shift, scale, w)]
    if op == "norm_modulate_two":
        rest = (args[0], *out[2:], *args[1:5], args[6])
        dy2 = like(*out[1].shape)
        return [(dy, dy2, *rest), (dy, None, *rest), (None, dy2, *rest)]
    if op == "gate_residual":
        return [(dy, args[1], args[2], True, True), (dy, args[1], args[2], False, True), (dy, *args[1:], True, False)]
    if op == "gate_residual_layer_norm_modulate":
        _, gate, branch, shift, scale, _ = args
        rest = (like(*out[1].shape), out[0], *out[2:], gate, branch, shift, scale)
        return [(dy, *rest), (None, *rest)]
    if op == "residual_norm_modulate":
        x = args[0] if args[1] is None else out[0]
        saved = (x if args[8] else None, *out[2:])
        given = [isinstance(args[i], torch.Tensor) for i in (0, 1, 2, 3, 6, 9, 10, 11, 12, 13, 14)]
        grads = (dy if args[1] is not None else None, like(*out[1].shape) if args[8] else None)
        rest, alone = (*saved, *args[1:], args[0].dtype), [False, *given[1:]]  # of dx_new alone: it is the residual's
        both = [(*grads, *rest, given if args[8] else alone)]
        return (
            both
            if args[1] is None or not args[8]
            else [*both, (grads[0], None, *rest, alone), (None, grads[1], *rest, given)]
        )
    if op == "conv_residual":
        h, w, b, _, padding, skip = args
        masks = ([True, True, b is not None], [True, False, False])
        return [(dy, h, w, out[1], skip, padding, b is not None, mask) for mask in masks]
    if op == "group_norm_silu_conv_residual":
        x, groups, nw, nb, eps, scale, shift, keep, p, w, b, _, padding, skip = args
        masks = ([True, True, b is not None], [False, True, False], [True, False, False])
        return [
            (
                dy,
                x,
                *out[1:3],
                groups,
                nw,
                nb,
                eps,
                scale,
                shift,
                keep,
                p,
                w,
                out[3],
                skip,
                padding,
                b is not None,
                mask,
            )
            for mask in masks
        ]
    if op == "layer_norm_modulate_linear":
        x, shift, scale, w, b, eps = args
        masks = ([True, True, b is not None], [False, True, False], [True, False, False])
        return [(dy, x, *out[1:], shift, scale, w, eps, b is not None, mask) for mask in masks]
    h, w, b, gate, _, activation, skip, saved = args
    masks = ([True, True, b is not None, saved], [False, True, False, False], [True, False, False, False])
    return [(dy, h, w, gate, out[1], out[2], skip, activation, b is not None, mask) for mask in masks]


def public_call(op: str, dtype: torch.dtype) -> tuple[tuple, dict]:
    x, t, w = torch.randn(2, 8, 5, 3, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype), torch.randn(2, 8, dtype=dtype)
    conv, linear = torch.randn(8, 8, 3, 3, dtype=dtype), torch.randn(8, 8, dtype=dtype)
    return {
        "group_norm_silu": ((x, 4), {}),
        "group_norm_silu_conv_residual": ((x, 4, None, None, conv, None, x), {}),
        "conv_residual": ((x, conv, None, x), {}),
        "channel_rms_norm_silu": ((x,), {}),
        "layer_norm_modulate": ((t, w, w), {}),
        "rms_norm_modulate": ((t, w, w), {}),
        "gate_residual": ((t, w, t), {}),
        "gate_residual_layer_norm_modulate": ((t, w, t, w, w), {}),
        "layer_norm_modulate_linear": ((t, w, w, linear), {}),
        "residual_norm_modulate": ((t, t), {"gate": w, "shift": w, "scale": w}),
        "linear_gate_residual": ((t, linear, None, w, t), {"activation": "silu"}),
    }[op]
