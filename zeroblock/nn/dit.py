"""DiT's blocks with adaLN-Zero. Source: Peebles & Xie 2023, facebookresearch/DiT `models.py`, timm `Attention`,
`Mlp`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, zero
from ..blocks import layers as _common
from ..blocks.one_pass import residual_if_zero
from ..blocks.skip import Branch, Tail, skipped_branch
from ..ops.residual_alone import residual_alone as bare_residual
from ..reference import apply_activation
from ..steps import packed as _packed
from .residual import residual_branch


class Attention(nn.Module):
    """Multi-head self-attention of [B, T, D]: the qkv and output projections, and what lies between them."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Attention: num_heads must divide dim = {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def attend(self, qkv: Tensor) -> Tensor:
        """[B, T, 3D] -> [B, T, D]"""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self.qkv(x)))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), GELU in its tanh form."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """y = x + gate_msa * attn(modulate(norm1 x)), then y + gate_mlp * mlp(modulate(norm2 y)).

    The six vectors are Linear(silu(c)), zero at the start. x [B, T, D], c [B, D] -> [B, T, D]. While a gate is exactly
    zero its half of the block runs at most once, without a graph; without gradients not at all (zeroblock/zero.py).
    """

    zero_skip = "auto"

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, *, qkv_bias: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        modulation = _common.zero_parameters(nn.Linear(hidden_size, 6 * hidden_size))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self._bare(x)
        if y is not None:
            zero.count("DiTBlock", True)
            return y
        fused = self._fusable()
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        if fused and self._plain_inference(modulation):
            return self._both_halves(x, *modulation)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = self._half(x, shift_msa, scale_msa, gate_msa, self.norm1, self.attn, fused)
        return self._half(x, shift_mlp, scale_mlp, gate_mlp, self.norm2, self.mlp, fused)

    def _bare(self, x: Tensor) -> Tensor | None:
        """Without gradients, zero gate rows of the modulation's weight and bias decide before anything is computed: a
        copy of x, or None."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        modulation = self._modules["adaLN_modulation"]
        if type(modulation).forward is not nn.Sequential.forward:  # type: ignore[comparison-overlap]
            return None
        *_, linear = modulation._modules.values()  # type: ignore[union-attr]
        if not _common.is_plain_linear(linear) or linear._parameters.get("bias") is None:
            return None
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        if weight.shape[0] % 6:
            return None
        if not zero.may_skip_branch("DiTBlock", self.zero_skip, weight) or not zero.bypassable(self._modules.values()):
            return None
        y = residual_if_zero(linear, x, 6, 1 << 2 | 1 << 5)
        if y is not NotImplemented:
            return y
        rows = (t.detach().unflatten(0, (6, -1))[i] for i in (2, 5) for t in (weight, bias))
        zeros = _packed.decide_once("gate rows", (weight, bias), lambda: all(map(zero.is_exactly_zero, rows)))
        return bare_residual(x, None, None, -1, x.dtype, None) if zeros else None

    def _plain_inference(self, modulation: tuple[Tensor, ...]) -> bool:
        """No gradients, no autocast, nothing that watches the dispatcher, and no half that is zero."""
        tail = self.attn.proj.weight
        if torch.is_grad_enabled() or not zero.runs_eagerly() or torch.is_autocast_enabled(tail.device.type):
            return False
        test = zero.test_of("DiTBlock", self.zero_skip, tail)
        if test == zero.DEVICE:
            return False  # the ops' kernels read the device's flag
        judged = (modulation[2], modulation[5], tail, self.mlp.fc2.weight)
        return test != zero.HOST or not any(map(zero.is_exactly_zero, judged))

    def _both_halves(
        self,
        x: Tensor,
        shift_msa: Tensor,
        scale_msa: Tensor,
        gate_msa: Tensor,
        shift_mlp: Tensor,
        scale_mlp: Tensor,
        gate_mlp: Tensor,
    ) -> Tensor:
        """The block as one sequence: gate, residual and the next norm in one pass, GELU at the end of fc1's GEMM."""
        for _ in range(2):
            zero.count("DiTBlock", False)
        attn, mlp = self.attn, self.mlp
        h = functional.layer_norm_modulate(x, shift_msa, scale_msa, eps=self.norm1.eps)
        branch = _common.linear(attn.proj, attn.attend(_common.linear(attn.qkv, h)))
        x, h = functional.gate_residual_layer_norm_modulate(
            x, gate_msa, branch, shift_mlp, scale_mlp, eps=self.norm2.eps
        )
        branch = _common.linear(mlp.fc2, _common.linear(mlp.fc1, h, "gelu_tanh"))
        return functional.gate_residual(x, gate_mlp, branch)

    def _fusable(self) -> bool:
        linears = (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2)
        return (
            type(self.attn) is Attention
            and type(self.mlp) is Mlp
            and all(map(_common.is_plain_linear, linears))
            and zero.bypassable((self.norm1, self.attn, self.norm2, self.mlp))
        )

    def _half(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, norm: nn.LayerNorm, layer: nn.Module, fused: bool
    ) -> Tensor:
        """x + gate * layer(modulate(norm x))"""
        if not fused:
            return functional.gate_residual(x, gate, layer(norm(x) * (1 + scale[:, None]) + shift[:, None]))
        vectors = (shift, scale, gate)
        if layer is self.attn:
            return fused_half("DiTBlock", self.zero_skip, x, vectors, norm.eps, layer.qkv, layer.attend, layer.proj)
        return fused_half("DiTBlock", self.zero_skip, x, vectors, norm.eps, layer.fc1, "gelu_tanh", layer.fc2)


class FinalLayer(nn.Module):
    """linear(modulate(norm x)), modulation and linear zero at the start. x [B, T, D], c [B, D] -> [B, T, p * p * C].

    While the linear is exactly zero the result is its bias, and norm, modulation and linear do not run.
    """

    zero_skip = "auto"

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = _common.zero_parameters(nn.Linear(hidden_size, patch_size * patch_size * out_channels))
        modulation = _common.zero_parameters(nn.Linear(hidden_size, 2 * hidden_size))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        linear, norm = self.linear, self.norm_final
        if not (_common.is_plain_linear(linear) and zero.bypassable((norm, linear))):
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
            return linear(norm(x) * (1 + scale[:, None]) + shift[:, None])
        modulation = self.adaLN_modulation
        return fused_final("FinalLayer", self.zero_skip, (x, c), norm.eps, modulation, linear, (modulation,))


def fused_half(
    name: str,
    policy: str,
    x: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor],
    eps: float,
    first: nn.Linear,
    between: Callable[[Tensor], Tensor] | str,
    tail: nn.Linear,
    modules: tuple[nn.Module, ...] = (),
) -> Tensor:
    """x + gate * tail(between(first(modulate(norm x)))), vectors (shift, scale, gate) [B, D], norm without parameters.

    `between` is an activation's name, or a function with the parameters of `modules`. Skipped while gate or tail is
    zero.
    """
    shift, scale, gate = vectors
    activation = between if isinstance(between, str) else None

    def hidden(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        h = functional.layer_norm_modulate_linear(x, shift, scale, first.weight, first.bias, eps=eps)
        return h if isinstance(between, str) else between(h)

    def before_tail(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return apply_activation(hidden(x, shift, scale), activation)

    modules = (first, *modules)
    y = residual_branch(name, policy, x, before_tail, tail, gate, (x, shift, scale), modules=modules)
    if y is not None:
        return y
    return functional.linear_gate_residual(
        hidden(x, shift, scale), tail.weight, tail.bias, gate, x, activation=activation, zero_skip=policy
    )


def fused_final(
    name: str,
    policy: str,
    activations: tuple[Tensor, ...],
    eps: float,
    modulation: Callable[..., Tensor],
    linear: nn.Linear,
    modules: tuple[nn.Module, ...] = (),
) -> Tensor:
    """linear(modulate(norm x)) for activations (x, ...); modulation(...) [B, 2D] or [B, 2, D] is shift and scale.

    While linear is zero the result is its bias; `modules` are those of modulation.
    """

    def vectors(x: Tensor, *conditions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale = modulation(*conditions).flatten(1).chunk(2, dim=1)
        return x, shift, scale

    if zero.may_skip_branch(name, policy, linear.weight) and zero.bypassable(modules):
        tail = Tail(linear)
        if _common.decide(name, tail):
            hidden = functools.partial(functional.layer_norm_modulate, eps=eps)
            parameters = _common.parameters_of(*modules)
            return skipped_branch(Branch(tail, activations, parameters, vectors, hidden, activations[0]), None)
    x, shift, scale = vectors(*activations)
    return functional.layer_norm_modulate_linear(x, shift, scale, linear.weight, linear.bias, eps=eps)
