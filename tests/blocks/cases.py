"""Every module of zb.nn, in the variants that its tests run."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..twins import Case, assert_within_budget, redrawn, results


def _resblock(dims: int = 2, half: bool = True, **options: Any) -> Case:
    # Odd volumes: of others PyTorch's bf16 conv3d takes weight gradients from memory it never wrote (2.14.1, oneDNN).
    size = {1: (10,), 2: (6, 4), 3: (3, 5, 7)}[dims]
    arguments = {"dropout": 0.0, "dims": dims, **options}
    return Case(
        lambda ns: ns.ResBlock(64, 24, **arguments),
        ((2, 64, *size), (2, 24)),
        "out_layers.3.weight",
        "ResBlock",
        half=half,
    )


def _dit(dim: int, tokens: int) -> Case:
    return Case(
        lambda ns: ns.DiTBlock(dim, 4, mlp_ratio=2.5),
        ((3, tokens, dim), (3, dim)),
        "adaLN_modulation.1.weight",
        "DiTBlock",
        rows=(2, 5),
    )


def _zero_layer(name: str, shape: tuple[int, ...], out: tuple[int, ...] | None, *args: Any, **options: Any) -> Case:
    shapes = (shape,) if out is None else (shape, out)
    return Case(lambda ns: getattr(ns, name)(*args, **options), shapes, "weight", name)


def _fixup(name: str, channels: int, planes: int, stride: int = 1, downsample: str | None = None) -> Case:
    def build(ns):
        kind, width = getattr(ns, name), planes * (4 if name == "FixupBottleneck" else 1)
        shortcut = None if downsample is None else nn.AvgPool2d(1, stride)
        if downsample == "conv":
            shortcut = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
        return kind(channels, planes, stride, shortcut)

    last = "conv3.weight" if name == "FixupBottleneck" else "conv2.weight"
    return Case(build, ((2, channels, 6, 4),), last, name)


def tokens_body(width: int = 12, out: int = 12) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out), nn.SiLU())


def _image_body() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())


def _branch(body, layer, gate, shortcut, shape, tail: str) -> Case:
    build = lambda ns: ns.ResidualBranch(  # noqa: E731
        body(), layer(), None if gate is None else nn.Parameter(gate.clone()), None if shortcut is None else shortcut()
    )
    return Case(build, (shape,), tail, "ResidualBranch")


def _video(*channels: int, **options) -> Case:
    build = lambda ns: ns.VideoResBlock(*channels, **options)  # noqa: E731
    return Case(build, ((2, channels[0], 3, 5, 4),), "conv2.weight", "conv_residual")


_LINEAR, _CONV = lambda: nn.Linear(12, 12), lambda: nn.Conv2d(8, 8, 3, padding=1)  # noqa: E731

CASES = {
    "ResBlock-2d-add": _resblock(),
    "ResBlock-2d-film": _resblock(use_scale_shift_norm=True),
    "ResBlock-1d-film": _resblock(1, use_scale_shift_norm=True),
    "ResBlock-1d-add": _resblock(1),
    "ResBlock-3d-film": _resblock(3, use_scale_shift_norm=True),
    "ResBlock-2d-add-up": _resblock(up=True),
    "ResBlock-2d-film-down": _resblock(use_scale_shift_norm=True, down=True, out_channels=96),
    "ResBlock-1d-film-up": _resblock(1, use_scale_shift_norm=True, up=True),
    "ResBlock-1d-add-down": _resblock(1, down=True),
    "ResBlock-3d-add-up": _resblock(3, up=True),
    "ResBlock-3d-add-down": _resblock(3, down=True, half=False),
    "ResBlock-2d-add-1x1": _resblock(out_channels=96),
    "ResBlock-2d-film-1x1-up": _resblock(out_channels=128, use_scale_shift_norm=True, up=True),
    "ResBlock-2d-film-3x3": _resblock(out_channels=96, use_conv=True, use_scale_shift_norm=True),
    "ResBlock-2d-film-dropout": _resblock(use_scale_shift_norm=True, dropout=0.3),
    "ResBlock-1d-add-dropout": _resblock(1, dropout=0.3),
    "ResBlock-2d-film-checkpoint": _resblock(use_scale_shift_norm=True, use_checkpoint=True),
    "ResBlock-2d-add-checkpoint-dropout": _resblock(use_checkpoint=True, dropout=0.3),
    "DiTBlock": _dit(48, 7),
    "DiTBlock-one-token": _dit(40, 1),
    "FinalLayer": Case(lambda ns: ns.FinalLayer(48, 2, 3), ((3, 7, 48), (3, 48)), "linear.weight", "FinalLayer"),
    "ZeroConv1d": _zero_layer("ZeroConv1d", (2, 6, 9), (2, 8, 9), 6, 8, 3, padding=1),
    "ZeroConv1d-same": _zero_layer("ZeroConv1d", (2, 6, 9), None, 6, 8, 4, padding="same"),
    "ZeroConv2d": _zero_layer("ZeroConv2d", (2, 6, 5, 7), (2, 8, 5, 7), 6, 8, 1),
    "ZeroConv2d-alone": _zero_layer("ZeroConv2d", (2, 6, 5, 7), None, 6, 8, 3, padding=1, bias=False),
    "ZeroConv2d-stride": _zero_layer("ZeroConv2d", (2, 6, 5, 7), (2, 8, 3, 4), 6, 8, 3, stride=2, padding=1),
    "ZeroConv2d-dilation": _zero_layer("ZeroConv2d", (2, 6, 7, 8), (2, 8, 5, 6), 6, 8, 3, dilation=2, padding=1),
    "ZeroConv2d-groups": _zero_layer("ZeroConv2d", (2, 6, 5, 7), None, 6, 9, 3, groups=3),
    "ZeroConv2d-same": _zero_layer("ZeroConv2d", (2, 6, 5, 7), (2, 8, 5, 7), 6, 8, (3, 2), padding="same"),
    "ZeroConv2d-reflect": _zero_layer(
        "ZeroConv2d", (2, 6, 5, 7), (2, 8, 5, 7), 6, 8, 3, padding=1, padding_mode="reflect"
    ),
    "ZeroConv3d": _zero_layer("ZeroConv3d", (2, 6, 3, 5, 4), (2, 8, 3, 3, 2), 6, 8, 3, stride=(1, 2, 2), padding=1),
    "CausalConv3d": Case(lambda ns: ns.CausalConv3d(6, 8, 3), ((2, 6, 3, 5, 4),), "weight", "CausalConv3d"),
    "CausalConv3d-first-frame": Case(
        lambda ns: ns.CausalConv3d(6, 8, (3, 1, 3), padding=(1, 0, 1), padding_mode=("replicate", "zeros", "zeros")),
        ((2, 6, 3, 5, 4),),
        "weight",
        "CausalConv3d",
    ),
    "CausalConv3d-stride": Case(
        lambda ns: ns.CausalConv3d(6, 8, 3, stride=(2, 1, 2), padding_mode="replicate", bias=False),
        ((2, 6, 3, 5, 4),),
        "weight",
        "CausalConv3d",
    ),
    "ChannelRMSNorm": Case(lambda ns: ns.ChannelRMSNorm(6, True), ((2, 6, 3, 5, 4),), "gamma", "ChannelRMSNorm"),
    "VideoResBlock": _video(8),
    "VideoResBlock-wider-dropout": _video(8, 12, dropout=0.3),
    "VideoResBlock-repeated": _video(8, 12, norm="group", num_groups=4, padding_mode="replicate"),
    "VideoResBlock-frames": _video(
        8, norm="frame_group", num_groups=4, padding_mode=("replicate", "zeros", "zeros"), dropout=0.2
    ),
    "ZeroLinear": _zero_layer("ZeroLinear", (2, 5, 12), (2, 5, 10), 12, 10),
    "ZeroLinear-2d": _zero_layer("ZeroLinear", (5, 12), None, 12, 10, bias=False),
    "FixupBasicBlock": _fixup("FixupBasicBlock", 8, 8),
    "FixupBasicBlock-conv": _fixup("FixupBasicBlock", 8, 12, 2, "conv"),
    "FixupBasicBlock-pool": _fixup("FixupBasicBlock", 8, 16, 2, "pool"),
    "FixupBottleneck": _fixup("FixupBottleneck", 16, 4),
    "FixupBottleneck-conv": _fixup("FixupBottleneck", 8, 4, 2, "conv"),
    "FixupBottleneck-pool": _fixup("FixupBottleneck", 8, 4, 2, "pool"),
    "ReZero-tokens": Case(lambda ns: ns.ReZero(tokens_body()), ((2, 5, 12),), "resweight", "ReZero"),
    "ReZero-images": Case(lambda ns: ns.ReZero(_image_body()), ((2, 8, 6, 4),), "resweight", "ReZero"),
    "ResidualBranch-conv": _branch(_image_body, _CONV, None, None, (2, 8, 6, 4), "tail.weight"),
    "ResidualBranch-conv-gate": _branch(_image_body, _CONV, torch.ones(8), None, (2, 8, 6, 4), "gate"),
    "ResidualBranch-shortcut": _branch(
        lambda: nn.Sequential(_image_body(), nn.AvgPool2d(2)),
        _CONV,
        torch.ones(1),
        lambda: nn.Conv2d(8, 8, 2, 2),
        (2, 8, 6, 4),
        "tail.weight",
    ),
    "ResidualBranch-linear": _branch(tokens_body, _LINEAR, torch.ones(12), None, (2, 5, 12), "tail.weight"),
    "ResidualBranch-linear-gate": _branch(tokens_body, _LINEAR, torch.ones(12), None, (2, 5, 12), "gate"),
    "ResidualBranch-token-gate": _branch(tokens_body, _LINEAR, torch.ones(2, 5, 12), None, (2, 5, 12), "gate"),
}
# A padding mode other than zeros is PyTorch's alone to compute: never skipped.
NEVER_SKIPPED = (
    "ZeroConv2d-reflect",
    "CausalConv3d",
    "CausalConv3d-first-frame",
    "CausalConv3d-stride",
    "ChannelRMSNorm",
)
PHASES = ("zero", "dense")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pair(name: str, phase: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    """(zeroblock's block, the eager one, inputs) of a case."""
    case = CASES[name]
    return *case.pair(dtype, phase), [t.detach() for t in case.example(dtype)]


def check(block: nn.Module, oracle: nn.Module, inputs: list[torch.Tensor]) -> None:
    """Forward and every gradient within the budget; the memory format of the output is eager's."""
    exact_oracle = copy.deepcopy(oracle).double()

    def sample(seed):
        tensors = redrawn(inputs, seed)
        got, plain = results(block, tensors), results(oracle, tensors)
        strides = got["y"].stride(), plain["y"].stride()
        assert strides[0] == strides[1], f"y: strides {strides[0]}, eager gives {strides[1]}"
        return got, plain, results(exact_oracle, [t.double() for t in tensors])

    assert_within_budget(sample)
