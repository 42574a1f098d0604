"""zeroblock: fused, zero-aware residual blocks for diffusion models.

GroupNorm-SiLU-conv-residual (U-Net ResBlocks) and adaLN modulation (DiT blocks), forward and backward, as drop-in
modules; while the last weight (or gate) of a residual branch is exactly zero, the branch's matmuls are not executed.
"""

# ruff: noqa: E402
import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# In a checkout kernels/ stands beside this folder, in an installation in it.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))

from .kernels import _torch as _torch  # first: says so where torch is too old

# isort: split
from ._version import __version__ as __version__
from .doctor import doctor
from .functional import (
    channel_rms_norm_silu,
    conv_residual,
    gate_residual,
    gate_residual_layer_norm_modulate,
    group_norm_silu,
    group_norm_silu_conv_residual,
    is_zero,
    layer_norm_modulate,
    layer_norm_modulate_linear,
    linear_gate_residual,
    residual_norm_modulate,
    rms_norm_modulate,
)
from .plan.share import share_plans

if _TYPE_CHECKING:
    from . import nn
    from ._explain import explain, info
    from ._freeze import FreezeReport, freeze, unfreeze
    from .convert import accelerate, coverage, register_family, restore

__all__ = [
    "accelerate",
    "coverage",
    "FreezeReport",
    "channel_rms_norm_silu",
    "conv_residual",
    "doctor",
    "explain",
    "freeze",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "group_norm_silu",
    "group_norm_silu_conv_residual",
    "info",
    "is_zero",
    "layer_norm_modulate",
    "layer_norm_modulate_linear",
    "linear_gate_residual",
    "nn",
    "register_family",
    "residual_norm_modulate",
    "restore",
    "rms_norm_modulate",
    "share_plans",
    "unfreeze",
]

# Modules, and what models are prepared and looked at with, are imported when first wanted: a third of the import's time
# (python -X importtime -c "import zeroblock").
_LATER = {
    "nn": ".nn",
    **dict.fromkeys(("explain", "info"), "._explain"),
    **dict.fromkeys(("FreezeReport", "freeze", "unfreeze"), "._freeze"),
    **dict.fromkeys(("accelerate", "convert", "coverage", "register_family", "restore"), ".convert"),
}


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module(_LATER[name], __name__)
    globals()[name] = value = module if name in ("convert", "nn") else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
