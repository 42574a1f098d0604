"""The registered ops: one file each, with schema, fake, forward and backward; how they are registered: `register.py`.

`ops.layer_norm_modulate` and the like are functions (the files of the same names hold them).
"""

from ..steps import taps as _taps  # noqa: F401  (with `winograd`: adds its ways to the planned convolutions)
from .channel_rms_norm_silu import channel_rms_norm_silu, channel_rms_norm_silu_bwd
from .conv_residual import conv_residual, conv_residual_bwd
from .gate_residual import gate_residual, gate_residual_bwd
from .gate_residual_layer_norm_modulate import gate_residual_layer_norm_modulate, gate_residual_layer_norm_modulate_bwd
from .group_norm_silu import group_norm_silu, group_norm_silu_bwd
from .group_norm_silu_conv_residual import group_norm_silu_conv_residual, group_norm_silu_conv_residual_bwd
from .is_zero import is_zero
from .layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_bwd
from .layer_norm_modulate_linear import layer_norm_modulate_linear, layer_norm_modulate_linear_bwd
from .linear_gate_residual import linear_gate_residual, linear_gate_residual_bwd
from .norm_modulate_two import norm_modulate_two, norm_modulate_two_bwd
from .residual_norm_modulate import residual_norm_modulate, residual_norm_modulate_bwd
from .rms_norm_modulate import rms_norm_modulate, rms_norm_modulate_bwd

__all__ = [
    "channel_rms_norm_silu",
    "channel_rms_norm_silu_bwd",
    "conv_residual",
    "conv_residual_bwd",
    "gate_residual",
    "gate_residual_bwd",
    "gate_residual_layer_norm_modulate",
    "gate_residual_layer_norm_modulate_bwd",
    "group_norm_silu",
    "group_norm_silu_bwd",
    "group_norm_silu_conv_residual",
    "group_norm_silu_conv_residual_bwd",
    "is_zero",
    "layer_norm_modulate",
    "layer_norm_modulate_bwd",
    "layer_norm_modulate_linear",
    "layer_norm_modulate_linear_bwd",
    "linear_gate_residual",
    "linear_gate_residual_bwd",
    "norm_modulate_two",
    "norm_modulate_two_bwd",
    "residual_norm_modulate",
    "residual_norm_modulate_bwd",
    "rms_norm_modulate",
    "rms_norm_modulate_bwd",
]
