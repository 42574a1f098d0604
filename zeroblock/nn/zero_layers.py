"""Convolutions and linears that start at zero, and are skipped while they are.

Source: `zero_module` of openai/guided-diffusion, the zero convolutions of lllyasviel/ControlNet.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..blocks.layers import is_plain_conv, is_plain_linear, plain_forward
from ..blocks.residual import skip_zero_layer
from .init import zero_parameters


class _ZeroLayer(nn.Module):
    """forward(x, residual=None) = residual + layer(x); weight and bias are zero at the start.

    While the weight is exactly zero the result is residual + bias and the layer does not run; its weight still gets its
    gradient. Constructor arguments, parameter names and state_dict are those of the torch layer.
    """

    zero_skip = "auto"

    def reset_parameters(self) -> None:
        zero_parameters(self)

    def _is_plain(self, x: Tensor) -> bool:
        raise NotImplementedError

    def _dense(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = super().forward(x)
        return y if residual is None else residual + y

    @plain_forward
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = None
        if self._is_plain(x):
            y = skip_zero_layer(type(self).__name__, self.zero_skip, self, x, residual)
        return self._dense(x, residual) if y is None else y


class _ZeroConv(_ZeroLayer):
    def _is_plain(self, x: Tensor) -> bool:
        return is_plain_conv(self)


class ZeroConv1d(_ZeroConv, nn.Conv1d):
    """nn.Conv1d that starts at zero: forward(x, residual=None) = residual + conv(x), skipped while zero."""


class ZeroConv2d(_ZeroConv, nn.Conv2d):
    """nn.Conv2d that starts at zero: forward(x, residual=None) = residual + conv(x), skipped while zero."""


class ZeroConv3d(_ZeroConv, nn.Conv3d):
    """nn.Conv3d that starts at zero: forward(x, residual=None) = residual + conv(x), skipped while zero."""


class ZeroLinear(_ZeroLayer, nn.Linear):
    """nn.Linear that starts at zero: forward(x, residual=None) = residual + linear(x), skipped while zero."""

    def _is_plain(self, x: Tensor) -> bool:
        return is_plain_linear(self)
