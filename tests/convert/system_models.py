"""Small models, a family of blocks in each, for the tests of what surrounds a model."""

import importlib.util

import torch
from torch import nn

from zeroblock.testing import eager

from . import oracles_edm as oracles


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.res = eager.ResBlock(32, 16, 0.0, use_scale_shift_norm=True)
        self.edm = oracles.UNetBlock(32, 32, 16)
        self.out = eager.zero_module(nn.Conv2d(32, 3, 3, padding=1))

    def forward(self, x, emb):
        return self.out(self.edm(self.res(self.first(x), emb), emb))


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.final_layer = eager.DiTBlock(16, 2), eager.FinalLayer(16, 1, 4)

    def forward(self, x, c):
        return self.final_layer(self.block(x, c), c)


class Diffusers(nn.Module):
    """A block of diffusers' U-Nets."""

    def __init__(self):
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        self.block = ResnetBlock2D(in_channels=16, groups=4, temb_channels=16, time_embedding_norm="scale_shift")
        self.first, self.out = nn.Conv2d(3, 16, 3, padding=1), eager.zero_module(nn.Conv2d(16, 3, 3, padding=1))
        eager.zero_module(self.block.conv2)

    def forward(self, x, emb):
        return self.out(self.block(self.first(x), emb))


class LoRA(nn.Module):
    """A frozen layer with an adapter of peft, before a trained one."""

    def __init__(self):
        import peft

        super().__init__()
        self.block, self.out = nn.Linear(16, 16), eager.zero_module(nn.Linear(16, 4))
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["block"]), self)
        self.out.requires_grad_(True)

    def forward(self, x, c):
        return self.out(self.block(x + c[:, None]))


MODELS = {
    "unet": (UNet, lambda: (torch.randn(2, 3, 4, 4), torch.randn(2, 16))),
    "dit": (DiT, lambda: (torch.randn(2, 5, 16), torch.randn(2, 16))),
    "diffusers": (Diffusers, lambda: (torch.randn(2, 3, 4, 4), torch.randn(2, 16))),
    "lora": (LoRA, lambda: (torch.randn(2, 5, 16), torch.randn(2, 16))),
}
for name, package in (("diffusers", "diffusers"), ("lora", "peft")):
    if not importlib.util.find_spec(package):
        del MODELS[name]
# The family whose blocks are zero in the first two steps of training.
COUNTED = {"unet": "ResBlock", "dit": "DiTBlock", "diffusers": "ResnetBlock2D", "lora": "LoRA"}
