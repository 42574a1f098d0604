"""What the tests of the modules share: every module beside its eager counterpart, and how the two are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.testing import eager


class EagerZeroLayer(nn.Module):
    def forward(self, x, residual=None):
        y = super().forward(x)
        return y if residual is None else residual + y


def _eager_zero_layer(kind: type) -> Callable[..., nn.Module]:
    layer = type(kind.__name__, (EagerZeroLayer, kind), {})
    return lambda *args, **kwargs: eager.zero_module(layer(*args, **kwargs))


EAGER = SimpleNamespace(
    **vars(eager),
    ZeroConv1d=_eager_zero_layer(nn.Conv1d),
    ZeroConv2d=_eager_zero_layer(nn.Conv2d),
    ZeroConv3d=_eager_zero_layer(nn.Conv3d),
    ZeroLinear=_eager_zero_layer(nn.Linear),
)


class Case(NamedTuple):
    build: Callable[[Any], nn.Module]  # takes zb.nn or EAGER
    shapes: tuple[tuple[int, ...], ...]
    zero: tuple[tuple[str, slice], ...]  # the rows of parameters that are zero in the zero phase
    half: bool = True  # PyTorch can run the eager block in bf16 and fp16 on a CPU


ALL = slice(None)


def _resblock(dims: int = 2, half: bool = True, **options: Any) -> Case:
    # Odd volumes: of others PyTorch's bf16 conv3d takes weight gradients from memory it never wrote (2.14.1, oneDNN).
    size = {1: (10,), 2: (6, 4), 3: (3, 5, 7)}[dims]
    arguments = {"dropout": 0.0, "dims": dims, **options}
    return Case(
        lambda ns: ns.ResBlock(64, 24, **arguments), ((2, 64, *size), (2, 24)), (("out_layers.3.weight", ALL),), half
    )


def _dit(dim: int, tokens: int) -> Case:
    gates = (slice(2 * dim, 3 * dim), slice(5 * dim, 6 * dim))
    zero = tuple((f"adaLN_modulation.1.{p}", rows) for p in ("weight", "bias") for rows in gates)
    return Case(lambda ns: ns.DiTBlock(dim, 4, mlp_ratio=2.5), ((3, tokens, dim), (3, dim)), zero)


def _zero_layer(name: str, shape: tuple[int, ...], out: tuple[int, ...] | None, *args: Any, **options: Any) -> Case:
    shapes = (shape,) if out is None else (shape, out)
    return Case(lambda ns: getattr(ns, name)(*args, **options), shapes, (("weight", ALL),))


def _fixup(name: str, channels: int, planes: int, stride: int = 1, downsample: str | None = None) -> Case:
    def build(ns):
        kind, width = getattr(ns, name), planes * (4 if name == "FixupBottleneck" else 1)
        shortcut = None if downsample is None else nn.AvgPool2d(1, stride)
        if downsample == "conv":
            shortcut = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
        return kind(channels, planes, stride, shortcut)

    last = "conv3.weight" if name == "FixupBottleneck" else "conv2.weight"
    return Case(build, ((2, channels, 6, 4),), ((last, ALL),))


def tokens_body(width: int = 12, out: int = 12) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out), nn.SiLU())


def _image_body() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())


def _branch(body, tail, gate, shortcut, shape, zero: str) -> Case:
    build = lambda ns: ns.ResidualBranch(  # noqa: E731
        body(), tail(), None if gate is None else nn.Parameter(gate.clone()), None if shortcut is None else shortcut()
    )
    return Case(build, (shape,), ((zero, ALL),))


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
    "FinalLayer": Case(lambda ns: ns.FinalLayer(48, 2, 3), ((3, 7, 48), (3, 48)), (("linear.weight", ALL),)),
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
    "ZeroLinear": _zero_layer("ZeroLinear", (2, 5, 12), (2, 5, 10), 12, 10),
    "ZeroLinear-2d": _zero_layer("ZeroLinear", (5, 12), None, 12, 10, bias=False),
    "FixupBasicBlock": _fixup("FixupBasicBlock", 8, 8),
    "FixupBasicBlock-conv": _fixup("FixupBasicBlock", 8, 12, 2, "conv"),
    "FixupBasicBlock-pool": _fixup("FixupBasicBlock", 8, 16, 2, "pool"),
    "FixupBottleneck": _fixup("FixupBottleneck", 16, 4),
    "FixupBottleneck-conv": _fixup("FixupBottleneck", 8, 4, 2, "conv"),
    "FixupBottleneck-pool": _fixup("FixupBottleneck", 8, 4, 2, "pool"),
    "ReZero-tokens": Case(lambda ns: ns.ReZero(tokens_body()), ((2, 5, 12),), (("resweight", ALL),)),
    "ReZero-images": Case(lambda ns: ns.ReZero(_image_body()), ((2, 8, 6, 4),), (("resweight", ALL),)),
    "ResidualBranch-conv": _branch(_image_body, _CONV, None, None, (2, 8, 6, 4), "tail.weight"),
    "ResidualBranch-conv-gate": _branch(_image_body, _CONV, torch.ones(8), None, (2, 8, 6, 4), "gate"),
    "ResidualBranch-shortcut": _branch(
        lambda: nn.Sequential(_image_body(), nn.AvgPool2d(2)),
        _CONV,
        torch.ones(1),
        lambda: nn.Conv2d(8, 8, 2, 2),
        (2, 8, 6, 4),
        "tail.weight",
    ),  # fmt: skip
    "ResidualBranch-linear": _branch(tokens_body, _LINEAR, torch.ones(12), None, (2, 5, 12), "tail.weight"),
    "ResidualBranch-linear-gate": _branch(tokens_body, _LINEAR, torch.ones(12), None, (2, 5, 12), "gate"),
    "ResidualBranch-token-gate": _branch(tokens_body, _LINEAR, torch.ones(2, 5, 12), None, (2, 5, 12), "gate"),
}
# A padding mode other than zeros is PyTorch's alone to compute: never skipped.
NEVER_SKIPPED = ("ZeroConv2d-reflect",)
PHASES = ("zero", "dense")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pair(name: str, phase: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    """(zeroblock's block, the eager one, inputs): the same weights, none of them special but the zero ones."""
    case = CASES[name]
    torch.manual_seed(7)
    block, oracle = case.build(zb.nn), case.build(EAGER)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if phase == "zero":
            parameters = dict(block.named_parameters())
            for i, (key, rows) in enumerate(case.zero):
                parameters[key][rows] = -0.0 if i % 2 else 0.0
    block.to(dtype)
    oracle.to(dtype).load_state_dict(block.state_dict())
    return block, oracle, [torch.randn(s).to(dtype) for s in case.shapes]


def run(block: nn.Module, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """{"y": output, name: gradient of that input or parameter}; raises when one of them gets no gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    torch.manual_seed(3)
    y = block(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    wanted = {**{f"input {i}": t for i, t in enumerate(leaves)}, **dict(block.named_parameters())}
    grads = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def redrawn(inputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Other values in tensors of the same shapes, dtypes and layouts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator)) for t in inputs]


Results = dict[str, torch.Tensor]


def assert_within_budget(sample: Callable[[int], tuple[Results, Results, Results]]) -> None:
    """sample(seed) -> (ours, eager's, fp64): every tensor of ours is within twice eager's error.

    The error of a single draw is itself a chance: a miss is judged again, on eight further draws together.
    """
    for draws in (range(1), range(1, 9)):
        results = [sample(seed) for seed in draws]
        assert all(got.keys() == plain.keys() == exact.keys() for got, plain, exact in results)
        try:
            for key in results[0][2]:
                tensors = (torch.stack([result[i][key] for result in results]) for i in range(3))
                testing.assert_error_budget(*tensors, key, draws=True)
            return
        except AssertionError:
            if len(draws) > 1:
                raise


def check(block: nn.Module, oracle: nn.Module, inputs: list[torch.Tensor]) -> None:
    """Forward and every gradient within the budget; the memory format of the output is eager's."""
    exact_oracle = copy.deepcopy(oracle).double()

    def sample(seed):
        tensors = redrawn(inputs, seed)
        got, plain = run(block, tensors), run(oracle, tensors)
        strides = got["y"].stride(), plain["y"].stride()
        assert strides[0] == strides[1], f"y: strides {strides[0]}, eager gives {strides[1]}"
        return got, plain, run(exact_oracle, [t.double() for t in tensors])

    assert_within_budget(sample)
