"""Small models whose blocks are called one after the other, and counts of what they run."""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

import zeroblock as zb
from zeroblock import ops
from zeroblock.convert import seam
from zeroblock.testing import eager

from . import diffusers_blocks
from .cases import randomize_

D, T, LAYERS = 16, 5, 4


class Loop(nn.Module):
    """Blocks, each given what the one before returned; `between` stands after the second."""

    def __init__(self, blocks, between=lambda x: x):
        super().__init__()
        self.blocks, self.between = nn.ModuleList(blocks), between

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, *others)
            if i == 1:
                x = self.between(x)
        return x


class TwoStreams(Loop):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> Tensor:
        x, context = hidden_states, encoder_hidden_states
        for block in self.blocks:
            context, x = block(hidden_states=x, encoder_hidden_states=context, temb=temb)
        return torch.cat([context, x], dim=1)


def dit(**options):
    blocks = [randomize_(eager.DiTBlock(D, 2)) for _ in range(LAYERS)]
    return Loop(blocks, **options).eval(), (torch.randn(2, T, D), torch.randn(2, D))


def flux(kind):
    built = diffusers_blocks.Built("transformer_flux", kind, (D, 2, 8))
    model = TwoStreams([randomize_(built.make()) for _ in range(LAYERS)]).eval()
    return model, (torch.randn(2, T, D), torch.randn(2, 3, D), torch.randn(2, D))


def wan():
    built = diffusers_blocks.BLOCKS["WanTransformerBlock"]
    model = Loop([randomize_(built.make()) for _ in range(LAYERS)]).eval()
    return model, tuple(built.inputs(torch.Generator()).values())


def qwen():
    built = diffusers_blocks.BLOCKS["QwenImageTransformerBlock"]

    class Qwen(Loop):
        def forward(self, x, context, mask, temb):
            for block in self.blocks:
                context, x = block(x, context, mask, temb)
            return torch.cat([context, x], dim=1)

    model = Qwen([randomize_(built.make()) for _ in range(LAYERS)]).eval()
    return model, tuple(built.inputs(torch.Generator()).values())


# How many streams a block has, and how many ops of norms and gates it runs by itself.
MODELS = {
    "dit": (dit, 1, 3),
    "flux": (lambda: flux("FluxTransformerBlock"), 2, 6),
    "flux-single": (lambda: flux("FluxSingleTransformerBlock"), 1, 2),
    "wan": (wan, 1, 4),
    "qwen": (qwen, 2, 6),
}
COUNTED = (
    "layer_norm_modulate",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "residual_norm_modulate",
    "linear_gate_residual",
)
CODES = {getattr(ops, name).__code__ for name in COUNTED}


def counted(model: nn.Module, inputs: tuple) -> tuple[Tensor, int]:
    """The result, and how many ops of norms and gates ran."""
    found: list[int] = []
    sys.setprofile(lambda frame, event, arg: event == "call" and frame.f_code in CODES and found.append(1))
    try:
        y = model(*inputs)
    finally:
        sys.setprofile(None)
    return y, len(found)


def accelerated(made) -> tuple[Loop, tuple, Tensor]:
    """A model, its inputs, and what it returns without a seam."""
    torch.manual_seed(0)
    model, inputs = made()
    plain = copy.deepcopy(model)
    assert not zb.accelerate(model, strict=True).left_alone
    with torch.no_grad(), seam.paused():
        alone = model(*inputs)
        torch.testing.assert_close(alone, plain(*inputs), rtol=1e-4, atol=1e-4)
    return model, inputs, alone
