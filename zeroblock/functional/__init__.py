"""The public functions: check the arguments, apply the autocast policy, call the op.

Autocast: activations and the weights of convolutions and linears go to the autocast dtype where eager would send them;
norm parameters and residuals stay as they are; statistics are fp32. The result has the dtype eager gives.
Under torch.func transforms and forward-mode AD every function is its definition in reference.py.
"""

from .gates import gate_residual, gate_residual_layer_norm_modulate, residual_norm_modulate
from .images import conv_residual, group_norm_silu, group_norm_silu_conv_residual
from .linears import layer_norm_modulate_linear, linear_gate_residual
from .tokens import layer_norm_modulate, rms_norm_modulate
from .zeros import is_zero

__all__ = [
    "conv_residual",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "group_norm_silu",
    "group_norm_silu_conv_residual",
    "is_zero",
    "layer_norm_modulate",
    "layer_norm_modulate_linear",
    "linear_gate_residual",
    "residual_norm_modulate",
    "rms_norm_modulate",
]
