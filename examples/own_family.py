"""A block of your own, that no family of zeroblock's knows: described in a few lines, proved, and accelerated.

The description says which submodule is which branch and which vector is which gate. accelerate runs it beside your
forward on a copy with random weights first; a description that is wrong leaves the block alone and says so.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from _example import Progress, options, seconds
from torch import nn

import zeroblock as zb

args = options(__doc__, dim=(384, "width of the block"), tokens=(256, "tokens of a sample"))
dim, tokens = (64, 16) if args.quick else (args.dim, args.tokens)


class Mixer(nn.Module):
    """Mixes tokens where other blocks have attention."""

    def __init__(self, dim):
        super().__init__()
        self.inner, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, h):
        a, b = self.inner(h).chunk(2, dim=-1)
        return self.out(a.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None] * b.sigmoid())


class MixerBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.mixer = Mixer(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.mixer(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


torch.manual_seed(0)
model = nn.ModuleList(MixerBlock(dim) for _ in range(3))
x, c = torch.randn(2, tokens, dim), torch.randn(2, dim)


def run(blocks, x):
    for block in blocks:
        x = block(x, c)
    return x


def results(blocks):
    leaf = x.clone().requires_grad_()
    y = run(blocks, leaf)
    return [y, *torch.autograd.grad(y.square().mean(), [leaf, *blocks.parameters()])]


print("without a family:\n", zb.accelerate(copy.deepcopy(model)), "\n", sep="")
description = zb.convert.GatedBlock(
    "MixerBlock",
    branches=(
        zb.convert.GatedBranch("mixer", norm="norm1", shift=0, scale=1, gate=2),
        zb.convert.GatedBranch("mlp", norm="norm2", shift=3, scale=4, gate=5),
    ),
    rows=lambda block, c: block.modulation(F.silu(c)).chunk(6, dim=-1),
    example=lambda block, side: (torch.randn(2, side**2, block.dim), torch.randn(2, block.dim)),
    linear="modulation",  # whose rows are the gates: the report can say which are zero
)

gates = (2, 4)  # of the second branch the scale for the gate
wrong = tuple(dataclasses.replace(b, gate=g) for b, g in zip(description.branches, gates, strict=True))
zb.register_family(dataclasses.replace(description, branches=wrong))
report = zb.accelerate(copy.deepcopy(model))
assert report.blocks == 0 and len(report.left_alone) == len(model)
print("with a wrong description:\n", report, "\n", sep="")

zb.register_family(description)  # in the place of the wrong one
ours = copy.deepcopy(model)
report = zb.accelerate(ours, strict=True)
print("with the right one:\n", report, "\n", sep="")
for got, expected in zip(results(ours), results(model), strict=True):
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5 * float(expected.detach().abs().max()) + 1e-6)
progress, times = Progress(), []
for number, blocks in enumerate((model, ours), 1):
    progress("time", number, 2, "forward and backward")
    times.append(seconds(lambda blocks=blocks: results(blocks), 1 if args.quick else 5))
progress.close()
before, after = times
print(f"forward and backward: {before * 1e3:.1f} ms, accelerated {after * 1e3:.1f} ms; results agree")
