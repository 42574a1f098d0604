"""How the modules are built: convolutions by dimension, layers that start at zero."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def zero_parameters(module: Module) -> Module:
    """Sets every parameter of module to zero, in place, and returns it."""
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return module
