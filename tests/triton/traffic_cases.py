"""The committed table of bytes: `python -m tests.triton.traffic_cases` writes traffic.csv (some minutes, no GPU).

With arguments, only the rows whose name contains one of them, and those that are missing.

compulsory  every input of the op read once, every result written once
moved       bytes to and from DRAM as `traffic.Launch.moved` counts them, over all launches of the op
partials    the part of `moved` that goes to workspaces: the price of deterministic two-stage sums
requested   what the load and store instructions ask for: the traffic of L1 and L2
sectors     the same in whole 32-byte sectors
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import traffic

traffic.install()

from zeroblock.kernels import (  # noqa: E402
    _gemm,
    activation,
    add_bias,
    channel_rms_norm_silu,
    conv_residual,
    gate_residual,
    gate_residual_layer_norm_modulate,
    group_norm_silu,
    group_norm_silu_bwd,
    group_norm_silu_conv_residual,
    layer_norm_modulate,
    linear_gate_residual,
    zero_flag,
)

from .traffic_rows import BF16, F32, Case, new, residual_norm  # noqa: E402

TABLE = Path(__file__).with_name("traffic.csv")
COLUMNS = ("case", "compulsory", "moved", "partials", "ratio", "requested", "sectors", "dot_flops")
NHWC = torch.channels_last


def image(*size: int, dtype: torch.dtype = BF16, last: bool = False) -> Tensor:
    return new(*size, dtype=dtype).to(memory_format=NHWC if last else torch.contiguous_format)


def _group_norm(C: int, side: int, dtype: torch.dtype, last: bool, split: bool, backward: bool) -> Case:
    """Without `split`, groups that fit are held, however few programs that gives."""

    def case():
        x, dy = (image(1, C, side, side, dtype=dtype, last=last) for _ in range(2))
        weight, bias, film = new(C, dtype=dtype), new(C, dtype=dtype), new(1, 2 * C, dtype=dtype)
        scale, shift = film.chunk(2, dim=1)
        norm = [weight, bias, scale, shift]
        if not backward:
            forward = group_norm_silu.forward
            return [x, *norm], lambda: forward(x, 32, weight, bias, 1e-5, scale, shift, True, last, split=split)
        mean, rstd = torch.zeros(1, 32), torch.ones(1, 32)
        back = group_norm_silu_bwd.backward
        return [x, dy, mean, rstd, *norm], lambda: back(dy, x, mean, rstd, *norm, 32, True, last, split=split)

    return case


def _channel_norm(C: int, side: int, dtype: torch.dtype, last: bool, backward: bool) -> Case:
    def case():
        x, dy = (image(1, C, side, side, dtype=dtype, last=last) for _ in range(2))
        weight, rstd = new(C, dtype=dtype), torch.ones(1, side, side)
        op = channel_rms_norm_silu
        if not backward:
            return [x, weight], lambda: op.forward(x, weight, None, 1e-12, False, None, None, True, last)
        return [x, dy, rstd, weight], lambda: op.backward(dy, x, rstd, weight, None, None, None, True, last)

    return case


def _layer_norm(D: int, kind: str, rms: bool, backward: bool, B: int = 2, T: int = 256) -> Case:
    def case():
        x, dy = new(B, T, D), new(B, T, D)
        per_token = kind == "token"
        shift, scale = [new(B, T, D) for _ in range(2)] if per_token else new(B, 6 * D).chunk(6, dim=1)[:2]
        if not backward:
            forward = layer_norm_modulate.forward
            return [x, shift, scale], lambda: forward(x, shift, scale, None, None, 1e-6, rms)
        mean, rstd = None if rms else torch.zeros(B, T), torch.ones(B, T)
        back = layer_norm_modulate.backward
        inputs = [x, dy, *([] if rms else [mean]), rstd, scale]
        return inputs, lambda: back(dy, x, mean, rstd, shift, scale, None, None, rms)

    return case


def _gate(kind: str, backward: bool, B: int = 2, T: int = 256, D: int = 1152) -> Case:
    def case():
        residual, branch, dy = (new(B, T, D) for _ in range(3))
        gates = {"sample": lambda: new(B, 6 * D)[:, :D], "token": lambda: new(B, T, D), "channel": lambda: new(D)}
        gate = gates[kind]()
        if not backward:
            return [residual, gate, branch], lambda: gate_residual.forward(residual, gate, branch, BF16)
        return [dy, gate, branch], lambda: gate_residual.backward(dy, gate, branch, True, True)

    return case


def _gate_norm(backward: bool, B: int = 2, T: int = 256, D: int = 1152) -> Case:
    def case():
        residual, branch, dx, dy = (new(B, T, D) for _ in range(4))
        gate, shift, scale = new(B, 6 * D).chunk(6, dim=1)[:3]
        op = gate_residual_layer_norm_modulate
        if not backward:
            return [residual, gate, branch, shift, scale], lambda: op.forward(
                residual, gate, branch, shift, scale, 1e-6
            )
        mean, rstd = torch.zeros(B, T), torch.ones(B, T)
        arguments = (dx, dy, residual, mean, rstd, gate, branch, shift, scale)
        return [t for t in arguments if t is not shift], lambda: op.backward(*arguments)

    return case


def _conv(k: int, plan: int, splits: int = 1, zero: bool = False, N: int = 2, C: int = 128, O: int = 128):  # noqa: E741
    def case():
        x, residual = image(N, C, 16, 16, last=True), image(N, O, 16, 16, last=True)
        weight, bias = image(O, C, k, k, last=True), new(O)
        flag = torch.full((1,), int(zero), dtype=torch.int32)
        choice = (_gemm.configs(BF16)[plan], splits)
        inputs = [bias, residual, flag] if zero else [x, weight, bias, residual, flag]
        call = conv_residual.conv_residual
        return inputs, lambda: call(x, weight, bias, residual, [k // 2] * 2, flag, choice)

    return case


def _conv_gradient(wgrad: bool) -> Case:
    def case():
        x, dy, weight = (
            image(2, 128, 16, 16, last=True),
            image(2, 64, 16, 16, last=True),
            image(64, 128, 3, 3, last=True),
        )
        if wgrad:
            return [x, dy], lambda: conv_residual.conv_wgrad(dy, x, weight.shape, [1, 1])
        return [weight, dy], lambda: conv_residual.conv_dgrad(dy, weight, [1, 1])

    return case


def _folded(from_partial: bool) -> Case:
    def case():
        x, residual = image(2, 128, 32, 32, last=True), image(2, 128, 32, 32, last=True)
        weight, bias, norm_weight, norm_bias = image(128, 128, 1, 1, last=True), new(128), new(128), new(128)
        moments = group_norm_silu_conv_residual.tile_moments(x)
        partial = (moments, group_norm_silu_conv_residual.TILE_PIXELS) if from_partial else None
        inputs = [x, residual, weight, bias, norm_weight, norm_bias, *([moments] if from_partial else [])]
        arguments = (x, 32, norm_weight, norm_bias, 1e-5, None, None, weight, bias, residual, [0, 0])
        call = group_norm_silu_conv_residual.group_norm_silu_conv_residual
        return inputs, lambda: call(*arguments, partial=partial)

    return case


def _elementwise(op: str) -> Case:
    def case():
        x, dy = image(2, 320, 16, 16), image(2, 320, 16, 16)
        if op == "activation":
            return [x], lambda: activation.forward(x, "silu")
        if op == "activation_bwd":
            return [x, dy], lambda: activation.backward(dy, x, "silu", True)
        if op == "add_bias":
            bias = new(320)
            return [x, bias], lambda: add_bias.add_bias(x, bias, 256, False)
        weights = [torch.zeros(320, 320, 3, 3, dtype=BF16) for _ in range(2)]
        if op == "zero_flag-dense":
            weights = [w + 1 for w in weights]
        return weights, lambda: zero_flag.zero_flag(weights)

    return case


def _linear(plan: int, splits: int = 1, zero: bool = False) -> Case:
    def case():
        B, T, D, K = 2, 256, 256, 512
        h, residual, weight, bias, gate = new(B, T, K), new(B, T, D), new(D, K), new(D), new(B, 6 * D)[:, :D]
        flag = torch.full((1,), int(zero), dtype=torch.int32)
        inputs = [bias, gate, residual, flag] if zero else [h, weight, bias, gate, residual, flag]
        choice = (_gemm.configs(BF16)[plan], splits)
        call = linear_gate_residual.linear_gate_residual
        return inputs, lambda: call(h, weight, bias, gate, residual, flag, plan=choice)

    return case


CASES: dict[str, Case] = {}
for _C, _side, _dtype, _last in (
    *((C, side, BF16, last) for C, side in ((320, 64), (640, 32), (1280, 16), (1280, 8)) for last in (False, True)),
    *((C, side, BF16, True) for C, side in ((2560, 16), (96, 64))),
    (640, 16, F32, False),
):
    _name = f"{_C}x{_side}-{'bf16' if _dtype == BF16 else 'fp32'}-{'nhwc' if _last else 'nchw'}"
    CASES[f"group_norm_silu-{_name}"] = _group_norm(_C, _side, _dtype, _last, False, False)
    CASES[f"group_norm_silu_bwd-{_name}"] = _group_norm(_C, _side, _dtype, _last, False, True)
for _last in (False, True):
    _name = f"640x32-bf16-{'nhwc' if _last else 'nchw'}-split"
    CASES[f"group_norm_silu-{_name}"] = _group_norm(640, 32, BF16, _last, True, False)
    CASES[f"group_norm_silu_bwd-{_name}"] = _group_norm(640, 32, BF16, _last, True, True)
for _C, _side, _dtype, _last in ((96, 64, BF16, False), (96, 64, BF16, True), (384, 32, F32, False)):
    _name = f"{_C}x{_side}-{'bf16' if _dtype == BF16 else 'fp32'}-{'nhwc' if _last else 'nchw'}"
    CASES[f"channel_rms_norm_silu-{_name}"] = _channel_norm(_C, _side, _dtype, _last, False)
    CASES[f"channel_rms_norm_silu_bwd-{_name}"] = _channel_norm(_C, _side, _dtype, _last, True)
for _D in (384, 1152):
    CASES[f"layer_norm_modulate-{_D}"] = _layer_norm(_D, "sample", False, False)
    CASES[f"layer_norm_modulate_bwd-{_D}"] = _layer_norm(_D, "sample", False, True)
CASES |= {
    "layer_norm_modulate-3072": _layer_norm(3072, "sample", False, False, T=64),
    "layer_norm_modulate-384-ragged": _layer_norm(384, "sample", False, False, T=61),
    "gate_residual_layer_norm_modulate-1152-ragged": _gate_norm(False, T=61),
    "layer_norm_modulate-1152-token": _layer_norm(1152, "token", False, False),
    "rms_norm_modulate-1152": _layer_norm(1152, "sample", True, False),
    "rms_norm_modulate_bwd-1152": _layer_norm(1152, "sample", True, True),
    "gate_residual_layer_norm_modulate-1152": _gate_norm(False),
    "gate_residual_layer_norm_modulate_bwd-1152": _gate_norm(True),
    **{f"residual_norm_modulate-{rows}": residual_norm(rows, False) for rows in ("sample", "token", "indexed", "rms")},
    **{
        f"residual_norm_modulate_bwd-{rows}": residual_norm(rows, True)
        for rows in ("sample", "token", "indexed", "rms")
    },
    **{f"gate_residual-{kind}": _gate(kind, False) for kind in ("sample", "token", "channel")},
    **{f"gate_residual_bwd-{kind}": _gate(kind, True) for kind in ("sample", "token", "channel")},
    **{f"conv_residual-3x3-{plan}": _conv(3, plan) for plan in range(3)},
    "conv_residual-3x3-split": _conv(3, 2, splits=4),
    "conv_residual-3x3-zero": _conv(3, 0, zero=True),
    "conv_residual-3x3-split-zero": _conv(3, 2, splits=4, zero=True),
    **{
        op: _elementwise(op) for op in ("add_bias", "activation", "activation_bwd", "zero_flag-dense", "zero_flag-zero")
    },
    "conv_residual-1x1": _conv(1, 0),
    "conv_dgrad-3x3": _conv_gradient(False),
    "conv_wgrad-3x3": _conv_gradient(True),
    "group_norm_silu_conv_residual-1x1": _folded(False),
    "group_norm_silu_conv_residual-1x1-partial": _folded(True),
    **{f"linear_gate_residual-{plan}": _linear(plan) for plan in range(3)},
    "linear_gate_residual-split": _linear(2, splits=4),
    "linear_gate_residual-zero": _linear(0, zero=True),
}


def _results(value) -> list[Tensor]:
    items = value if isinstance(value, tuple) else (value,)
    return [t for t in items if isinstance(t, Tensor)]


def row(name: str) -> dict[str, object]:
    """One line of the table; a kernel that leaves its bounds or races with itself has none."""
    inputs, call = CASES[name]()
    with traffic.record() as recorded:
        outputs = _results(call())
    if recorded.problems:
        raise AssertionError("\n".join([f"{name}: {len(recorded.problems)} problems", *recorded.problems[:5]]))
    known = {t.untyped_storage().data_ptr() for t in [*inputs, *outputs]}
    compulsory = sum(t.numel() * t.element_size() for t in [*inputs, *outputs])
    moved = recorded.moved()
    return {
        "case": name,
        "compulsory": compulsory,
        "moved": moved,
        "partials": moved - recorded.moved(known),
        "ratio": f"{moved / compulsory:.3f}",
        "requested": recorded.total("requested"),
        "sectors": recorded.total("sectors"),
        "dot_flops": recorded.dot_flops,
    }


def committed() -> dict[str, dict[str, str]]:
    with TABLE.open(newline="") as file:
        return {line["case"]: line for line in csv.DictReader(file)}


def main(parts: list[str]) -> None:
    rows = {name: line for name, line in committed().items() if name in CASES} if TABLE.exists() else {}
    chosen = [name for name in CASES if name not in rows or not parts or any(part in name for part in parts)]
    for i, name in enumerate(chosen, 1):
        rows[name] = row(name)
        print(f"[{i:2d}/{len(chosen)}] {name}: {rows[name]['ratio']}", file=sys.stderr, flush=True)
        with TABLE.open("w", newline="") as file:  # what is done is kept when the run is interrupted
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[name] for name in CASES if name in rows)
    print(f"wrote {TABLE}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
