"""DiT's blocks with adaLN-Zero. Source: Peebles & Xie 2023, facebookresearch/DiT `models.py`, timm `Attention`,
`Mlp`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import adaln, tiny
from ..blocks.adaln import CHUNKS, GATES
from ..blocks.broadcast import add_gated, tokens_and_condition
from ..blocks.decision import bypassable
from ..blocks.layers import is_plain_linear, is_plain_norm
from ..blocks.one_pass import copy_if_gates_are_zero
from .init import zero_parameters


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


_ADD = functools.partial(add_gated, tokens=True)
_ATTENTION, _MLP, _GELU = Attention.forward, Mlp.forward, nn.GELU.forward


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
        modulation = zero_parameters(nn.Linear(hidden_size, 6 * hidden_size))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        name, policy, modules = "DiTBlock", self.zero_skip, self._modules
        x, c = tokens_and_condition(x, c)
        y = copy_if_gates_are_zero(name, policy, x, self._modulation_linear(), modules.values(), CHUNKS, GATES)
        if y is not None:
            return y
        vectors = self.adaLN_modulation(c).chunk(CHUNKS, dim=1)
        # The fused forward says what is wrong with other sizes.
        if tiny.is_tiny(x, tiny.TOKENS) and x.dim() == 3 and x.size(2) == vectors[0].size(-1):
            holders = (vectors[GATES[0]], vectors[GATES[1]], *self._last_weights())
            if tiny.runs_as_written(name, policy, x, *holders, branches=len(GATES)):
                return self._unfused(_add_gated, x, *vectors)
        halves = self._halves()
        if halves is None:
            return self._unfused(_ADD, x, *vectors)
        return adaln.forward(name, policy, x, vectors, *halves)

    def _unfused(
        self,
        add: Callable[[Tensor, Tensor, Tensor], Tensor],
        x: Tensor,
        shift_msa: Tensor,
        scale_msa: Tensor,
        gate_msa: Tensor,
        shift_mlp: Tensor,
        scale_mlp: Tensor,
        gate_mlp: Tensor,
    ) -> Tensor:
        """The same block through its submodules, so that their hooks run."""
        x = add(x, gate_msa, self.attn(_modulate(self.norm1(x), shift_msa, scale_msa)))
        return add(x, gate_mlp, self.mlp(_modulate(self.norm2(x), shift_mlp, scale_mlp)))

    def _last_weights(self) -> list[Tensor | None]:
        """Those that hold the branches at zero; None where they are not parameters."""
        modules: dict[str, Any] = self._modules
        proj, fc2 = modules["attn"]._modules.get("proj"), modules["mlp"]._modules.get("fc2")
        return (
            [None] if proj is None or fc2 is None else [proj._parameters.get("weight"), fc2._parameters.get("weight")]
        )

    def _modulation_linear(self) -> Any:
        """The layer that gives all of adaLN_modulation's result; None where it was replaced by something else."""
        modulation: Any = self._modules["adaLN_modulation"]
        if type(modulation).forward is not nn.Sequential.forward:
            return None
        *_, last = modulation._modules.values()
        return last

    def _halves(self) -> tuple[adaln.Half, adaln.Half] | None:
        """Both halves for the fused ops; None where layers were replaced or are watched by hooks."""
        modules: dict[str, Any] = self._modules
        norm1, attn, norm2, mlp = modules["norm1"], modules["attn"], modules["norm2"], modules["mlp"]
        if type(attn) is not Attention or type(mlp) is not Mlp or not (is_plain_norm(norm1) and is_plain_norm(norm2)):
            return None
        act: Any = mlp._modules["act"]
        if Attention.forward is not _ATTENTION or Mlp.forward is not _MLP or type(act).forward is not _GELU:
            return None  # patched, or another activation
        if act.approximate != "tanh":
            return None
        qkv, proj, fc1, fc2 = attn.qkv, attn.proj, mlp.fc1, mlp.fc2
        if not (is_plain_linear(qkv) and is_plain_linear(proj) and is_plain_linear(fc1) and is_plain_linear(fc2)):
            return None
        if not bypassable((norm1, attn, norm2, mlp)):
            return None
        return adaln.Half(norm1.eps, qkv, attn.attend, proj), adaln.Half(norm2.eps, fc1, "gelu_tanh", fc2)


def _modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _add_gated(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """`add_gated` by torch's operators; of the layout of the branch."""
    return gate.unsqueeze(1) * branch + residual


class FinalLayer(nn.Module):
    """linear(modulate(norm x)), modulation and linear zero at the start. x [B, T, D], c [B, D] -> [B, T, p * p * C].

    While the linear is exactly zero the result is its bias, and norm, modulation and linear do not run.
    """

    zero_skip = "auto"

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = zero_parameters(nn.Linear(hidden_size, patch_size * patch_size * out_channels))
        modulation = zero_parameters(nn.Linear(hidden_size, 2 * hidden_size))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modules: dict[str, Any] = self._modules
        linear, norm = modules["linear"], modules["norm_final"]
        x, c = tokens_and_condition(x, c)
        if not (is_plain_linear(linear) and is_plain_norm(norm) and bypassable((norm, linear))):
            return linear(_modulate(norm(x), *self._vectors(c)))
        parts = (modules["adaLN_modulation"],)
        return adaln.final_layer("FinalLayer", self.zero_skip, (x, c), norm.eps, self._vectors, linear, parts)

    def _vectors(self, c: Tensor) -> tuple[Tensor, ...]:
        """(shift, scale)"""
        return self.adaLN_modulation(c).chunk(2, dim=1)
