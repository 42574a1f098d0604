"""Models for the doctor's tests: the real architectures in small, and planted mistakes."""

import torch
import torch.nn.functional as F
from torch import nn

from zeroblock.testing import eager
from zeroblock.testing.eager import zero_module
from zeroblock.tools import models


def constant(module, value):
    for p in module.parameters():
        nn.init.constant_(p, value)
    return module


def diffusion_batch(size=16):
    return torch.randn(3, 1, size, size), torch.randint(0, 1000, (3,)), torch.randint(0, 10, (3,))


def unet():
    """ADM-style: guided-diffusion's blocks, zero_module on every last conv, projection and the output."""
    return models.UNet(eager, model_channels=32, channel_mult=(1, 2), num_heads=2), diffusion_batch()


def dit():
    return models.DiT(eager, hidden_size=48, depth=2, num_heads=2), diffusion_batch()


class Fixup(nn.Module):
    """Fixup's CIFAR network: zero last convs, zero classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bias1 = nn.Parameter(torch.zeros(1))
        down = eager.FixupBasicBlock(8, 16, 2, nn.AvgPool2d(1, 2))
        self.layers = nn.Sequential(eager.FixupBasicBlock(8, 8), down, eager.FixupBasicBlock(16, 16))
        self.bias2 = nn.Parameter(torch.zeros(1))
        self.fc = zero_module(nn.Linear(16, 10))

    def forward(self, x):
        x = self.layers(F.relu(self.conv1(x) + self.bias1))
        return self.fc(x.mean((2, 3)) + self.bias2)


def fixup():
    return Fixup(), (torch.randn(4, 3, 12, 12),)


def rezero():
    def body():
        return nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))

    return nn.Sequential(nn.Linear(8, 8), eager.ReZero(body()), eager.ReZero(body()), nn.Linear(8, 3)), token_batch()


def token_batch():
    return (torch.randn(16, 8),)


class EDMBlock(nn.Module):
    """EDM's UNetBlock: parameters through F.conv2d with the bias added after, x * skip_scale at the end."""

    def __init__(self, channels, emb, init):
        super().__init__()
        self.norm0, self.norm1 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.affine = nn.Linear(emb, 2 * channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        # EDM initialises as rand * init: with init = 0 some zeros are -0.0.
        self.conv1.weight.data.mul_(init)
        self.conv1.bias.data.mul_(0)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        h = F.conv2d(h, self.conv1.weight, padding=1).add_(self.conv1.bias[:, None, None])
        return h.add_(x) * 1.0


class EDM(nn.Module):
    """Two blocks between a stem and an output conv, in EDM's ADM (init 0) or SongUNet (init 1e-5) manner."""

    def __init__(self, init):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block0, self.block1 = EDMBlock(16, 8, init), EDMBlock(16, 8, init)
        self.out_norm = nn.GroupNorm(4, 16)
        self.out_conv = nn.Conv2d(16, 3, 3, padding=1)
        self.out_conv.weight.data.mul_(init)
        self.out_conv.bias.data.mul_(0)

    def forward(self, x, emb):
        return self.out_conv(F.silu(self.out_norm(self.block1(self.block0(self.stem(x), emb), emb))))


def edm(init):
    return EDM(init), (torch.randn(2, 3, 8, 8), torch.randn(2, 8))


class ControlNet(nn.Module):
    """A trained, frozen encoder and decoder; a trainable copy of the encoder, joined by zero convs, with a hint."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)).requires_grad_(False)
        self.decoder = nn.Conv2d(8, 3, 3, padding=1).requires_grad_(False)
        self.copy = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.hint = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), zero_module(nn.Conv2d(8, 8, 3, padding=1)))
        self.zero_convs = nn.ModuleList(zero_module(nn.Conv2d(8, 8, 1)) for _ in range(2))

    def forward(self, x, hint):
        with torch.no_grad():
            skips, h = [], x
            for layer in self.encoder:
                h = F.silu(layer(h))
                skips.append(h)
        h, controls = x + self.hint(hint), []
        for layer, zero in zip(self.copy, self.zero_convs, strict=True):
            h = F.silu(layer(h))
            controls.append(zero(h))
        y = skips[-1].clone()
        y += controls.pop()
        return self.decoder(y + skips[0] + controls.pop())


def controlnet():
    return ControlNet(), (torch.randn(2, 8, 8, 8), torch.randn(2, 3, 8, 8))


class LoRA(nn.Module):
    """base(x) + B(A(x)), base frozen, B zero."""

    def __init__(self, i, o, r):
        super().__init__()
        self.base = nn.Linear(i, o).requires_grad_(False)
        self.lora_A = nn.Linear(i, r, bias=False)
        self.lora_B = zero_module(nn.Linear(r, o, bias=False))

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x)) * 2.0


def lora():
    return nn.Sequential(LoRA(8, 16, 4), nn.GELU(), LoRA(16, 3, 4)), token_batch()


# ---- planted mistakes: (model, batch), the parameters that are dead or symmetric -----------------------------------


def two_zero_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), zero_module(nn.Linear(8, 8)), zero_module(nn.Linear(8, 3)))
    return model, token_batch()


def zero_hidden_relu():
    return nn.Sequential(zero_module(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 3)), token_batch()


def constant_hidden():
    return constant(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), 0.1), token_batch()


def all_zero(activation):
    return constant(nn.Sequential(nn.Linear(8, 16), activation, nn.Linear(16, 3)), 0.0), token_batch()


class GatedBranch(nn.Module):
    def __init__(self, body, gate):
        super().__init__()
        self.body, self.gate = body, nn.Parameter(torch.full((1,), gate))

    def forward(self, x):
        return x + self.gate * self.body(x)


def zero_conv_behind_zero_gate():
    body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), zero_module(nn.Conv2d(8, 8, 3, padding=1)))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), GatedBranch(body, 0.0), nn.Conv2d(8, 3, 1))
    return model, (torch.randn(2, 3, 6, 6),)


def zero_conv_with_dead_inputs():
    """The conv's input is a zero, bias-free conv behind a SiLU: both wait for each other."""
    body = nn.Sequential(
        zero_module(nn.Conv2d(8, 8, 3, padding=1, bias=False)), nn.SiLU(), zero_module(nn.Conv2d(8, 8, 3, padding=1))
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 1), GatedBranch(body, 1.0), nn.Conv2d(8, 3, 1))
    return model, (torch.randn(2, 3, 6, 6),)


class DeadByValue(nn.Module):
    """The zero conv's input is zero because of signs, which the structure of zeros does not show."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.zero = zero_module(nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.zero(F.relu(-F.relu(h))))


def dead_by_value():
    return DeadByValue(), (torch.randn(2, 3, 6, 6),)
