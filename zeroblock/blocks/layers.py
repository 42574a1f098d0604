"""What the modules share: zero initialisation and the question whether a layer is the plain one it looks like."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import zero
from ..backends.select import select
from . import skip as _branch

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def zero_parameters(module: nn.Module) -> nn.Module:
    """Sets every parameter of module to zero, in place, and returns it."""
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return module


def is_plain_conv(module: nn.Module) -> bool:
    """A convolution whose forward is torch.convolution of its weight: no subclass of unknown making, zero padding."""
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and type(module).forward in _CONV_FORWARDS
        and module._parameters.get("weight") is not None  # parametrized and pruned weights live elsewhere
        and module.padding_mode == "zeros"
    )


def is_plain_linear(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear)
        and type(module).forward in _LINEAR_FORWARDS
        and module._parameters.get("weight") is not None
    )


def linear(module: nn.Linear, h: Tensor, activation: str | None = None) -> Tensor:
    """act(module(h)) of a plain linear layer, for inference: by the fastest way of its backend."""
    h = h.to(module.weight.dtype)
    return select("linear_gate_residual", h).linear(h, module.weight, module.bias, activation)


# Filled with the forwards of zeroblock's own subclasses by zero_layers.py.
_CONV_FORWARDS = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
_LINEAR_FORWARDS = {nn.Linear.forward}


def parameters_of(*modules: nn.Module) -> list[_branch.Owned]:
    """Every parameter of the modules; none while gradients are off, when nobody asks for theirs."""
    if not torch.is_grad_enabled():
        return []
    found: dict[int, _branch.Owned] = {}
    for top in modules:
        for m in top.modules():
            for name, p in m._parameters.items():
                if p is not None:
                    found.setdefault(id(p), (m, name, p))
    return list(found.values())


# Modules of torch.nn that never draw random numbers, by the file that defines them.
_DETERMINISTIC = {
    f"torch.nn.modules.{name}"
    for name in "activation batchnorm container conv flatten instancenorm linear normalization padding pixelshuffle "
    "pooling upsampling".split()
}
_RANDOM = (nn.RReLU, nn.MultiheadAttention, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def may_draw(module: nn.Module) -> bool:
    """Whether a call of module may consume random numbers: in training, anything but the layers known not to."""
    return any(m.training and not _is_deterministic(m) for m in module.modules())


def _is_deterministic(m: nn.Module) -> bool:
    declared = getattr(m, "draws_random_numbers", None)
    if declared is not None:
        return not declared
    if isinstance(m, nn.modules.dropout._DropoutNd):
        return m.p in (0.0, 1.0)
    home = type(m).__module__
    return (home in _DETERMINISTIC or home.startswith("zeroblock.nn.")) and not isinstance(m, _RANDOM)


def fits_fused(conv: nn.Module) -> bool:
    """A convolution that the fused ops take: plain, stride 1, dilation 1, one group."""
    if not is_plain_conv(conv) or isinstance(conv.padding, str):
        return False
    return conv.groups == 1 and max(conv.stride) == 1 and max(conv.dilation) == 1


def decide(name: str, tail: _branch.Tail, gate: Tensor | None = None) -> str | None:
    """ "weight" or "gate" when the branch is zero by it (the caller has made sure that a skip is allowed), else
    None."""
    found = None
    if gate is not None and zero.is_exactly_zero(gate):
        found = "gate"
    elif tail.weight is not None and zero.is_exactly_zero(tail.weight):
        found = "weight"
    zero.count(name, found is not None)
    return found
