"""Of `eager.py`: the blocks without norms (Fixup's, ReZero, any residual branch) and the zero initialisation of all."""

import torch
from torch import nn


def zero_module(module):
    """Set every parameter of `module` to zero, in place, and return it."""
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def _scalar(value):
    return nn.Parameter(torch.full((1,), value))


class _FixupBlock(nn.Module):
    """The end of both Fixup blocks: relu(out + shortcut), where a downsampling shortcut sees x + bias1a."""

    def _add_shortcut(self, x, out):
        identity = x
        if self.downsample is not None:
            identity = self.downsample(x + self.bias1a)
            # The CIFAR networks downsample by pooling alone and fill the new channels with zeros.
            if identity.shape[1] < out.shape[1]:
                identity = torch.cat((identity, torch.zeros_like(identity)), dim=1)
        out += identity
        return self.relu(out)


class FixupBasicBlock(_FixupBlock):
    """Two 3x3 convs with scalar biases in place of norms; the last conv starts at zero. x [N, C, H, W].

    `downsample` is a strided 1x1 conv (ImageNet) or AvgPool2d(1, stride) (CIFAR, which doubles the channels).
    """

    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.bias1a = _scalar(0.0)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bias1b = _scalar(0.0)
        self.relu = nn.ReLU(inplace=True)
        self.bias2a = _scalar(0.0)
        self.conv2 = zero_module(nn.Conv2d(planes, planes, 3, padding=1, bias=False))
        self.scale = _scalar(1.0)
        self.bias2b = _scalar(0.0)
        self.downsample = downsample

    def forward(self, x):
        out = self.relu(self.conv1(x + self.bias1a) + self.bias1b)
        out = self.conv2(out + self.bias2a) * self.scale + self.bias2b
        return self._add_shortcut(x, out)


class FixupBottleneck(_FixupBlock):
    """1x1, 3x3 (strided) and 1x1 convs, four times as wide at the end; otherwise as FixupBasicBlock."""

    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.bias1a = _scalar(0.0)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bias1b = _scalar(0.0)
        self.bias2a = _scalar(0.0)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bias2b = _scalar(0.0)
        self.bias3a = _scalar(0.0)
        self.conv3 = zero_module(nn.Conv2d(planes, planes * self.expansion, 1, bias=False))
        self.scale = _scalar(1.0)
        self.bias3b = _scalar(0.0)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        out = self.relu(self.conv1(x + self.bias1a) + self.bias1b)
        out = self.relu(self.conv2(out + self.bias2a) + self.bias2b)
        out = self.conv3(out + self.bias3a) * self.scale + self.bias3b
        return self._add_shortcut(x, out)


class ReZero(nn.Module):
    """y = x + resweight * body(x, ...), resweight [1] zero at the start."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.resweight = _scalar(0.0)

    def forward(self, x, *args):
        return x + self.resweight * self.body(x, *args)


class ResidualBranch(nn.Module):
    """y = shortcut(x) + gate * tail(body(x, *args)); no gate means 1, no shortcut the identity.

    `gate`: a tensor or a module of *args, [1]; for images also [C], [N, C]; for tokens [D], [B, D], [B, T, D].
    """

    def __init__(self, body, tail, gate=None, shortcut=None):
        super().__init__()
        self.body = body
        self.tail = tail
        self.gate = gate
        self.shortcut = shortcut

    def forward(self, x, *args):
        residual = x if self.shortcut is None else self.shortcut(x)
        branch = self.tail(self.body(x, *args))
        if self.gate is None:
            return residual + branch
        gate = self.gate(*args) if isinstance(self.gate, nn.Module) else self.gate
        if not isinstance(self.tail, nn.Linear) and gate.numel() > 1:
            gate = gate.reshape(gate.shape + (1,) * (branch.dim() - 2))
        elif gate.dim() == 2 and branch.dim() == 3:
            gate = gate.unsqueeze(1)
        return residual + gate * branch
