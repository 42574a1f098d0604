"""Argument checks: one message grammar, `op: arg must <requirement>, got <value>`, before anything is computed.

TypeError for the wrong kind of thing, ValueError for a wrong value. The checks read metadata only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import SymInt, Tensor

from ._dtypes import FLOATING, FLOATING_NAMES

ACTIVATIONS = (None, "silu", "gelu", "gelu_tanh")


def fail(op: str, arg: str, requirement: str, got: Any) -> ValueError:
    return ValueError(f"{op}: {arg} must {requirement}, got {got}")


def floating(op: str, required: int, **tensors: Any) -> bool:
    """Tensors of a floating dtype, all on one device; None is let through after the first `required`. Whether there is
    more than one dtype."""
    device = dtype = None
    mixed = False
    for arg, t in tensors.items():
        required -= 1
        if t is None and required < 0:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {arg} must be a Tensor, got {type(t).__name__}")
        if t.dtype is not dtype:
            if t.dtype not in FLOATING:
                raise TypeError(f"{op}: {arg} must be {FLOATING_NAMES}, got {t.dtype}")
            mixed, dtype = dtype is not None, t.dtype
        if device is None:
            device, first = t.device, arg
        elif t.device != device:
            raise fail(op, arg, f"be on the device of {first} ({device})", t.device)
    return mixed


def mixed(*tensors: Tensor | None) -> bool:
    """What `floating` answers, for a compiler. It traces checks instruction by instruction, which takes longer than all
    the rest of a call; so compiled calls leave them to the fakes of the ops, which run as they are."""
    dtype = None
    for t in tensors:
        if t is not None:
            if dtype is None:
                dtype = t.dtype
            elif t.dtype is not dtype:
                return True
    return False


def eps_value(op: str, eps: Any) -> None:
    if type(eps) is not float:
        if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat, SymInt)):
            raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not 0.0 <= eps < inf:
        raise fail(op, "eps", "be finite and >= 0", eps)


def shapes(op: str, size: tuple, notation: str, **tensors: Tensor | None) -> None:
    for arg, t in tensors.items():
        if t is not None and t.shape != size:
            raise fail(op, arg, f"have shape {notation} = {list(size)}", list(t.shape))


def images(
    op: str, x: Tensor, num_groups: Any, scale: Tensor | None, shift: Tensor | None, **affine: Tensor | None
) -> None:
    """x [N, C, *S], the two norm parameters [C], scale/shift [N, C], C divisible by num_groups."""
    if isinstance(num_groups, bool) or not isinstance(num_groups, (int, SymInt)):
        raise TypeError(f"{op}: num_groups must be an int, got {type(num_groups).__name__}")
    if x.dim() < 2:
        raise fail(op, "x", "have shape [N, C, *S]", list(x.shape))
    N, C = x.shape[:2]
    if C == 0:
        raise fail(op, "x", "have at least one channel in [N, C, *S]", list(x.shape))
    if num_groups <= 0 or C % num_groups != 0:
        raise fail(op, "num_groups", f"be positive and divide C = {C}", num_groups)
    shapes(op, (C,), "[C]", **affine)
    if scale is not None or shift is not None:
        shapes(op, (N, C), "[N, C]", scale=scale, shift=shift)


def channel_vector(v: Tensor | None) -> Tensor | None:
    """[C] of a parameter [C, 1, 1] or [C, 1, 1, 1], which broadcasts against [C, *S]; any other shape as it is."""
    if v is None or v.dim() <= 1 or v.shape[1:].numel() != 1:
        return v
    return v.reshape(v.shape[0])


def video(op: str, x: Tensor) -> None:
    if x.dim() != 5:
        raise fail(op, "x", "have shape [N, C, T, H, W] with per_frame", list(x.shape))


def tokens(op: str, arg: str, t: Tensor) -> None:
    if t.dim() != 3:
        raise fail(op, arg, "have shape [B, T, D]", list(t.shape))
    if t.shape[2] == 0:
        raise fail(op, arg, "have at least one feature in [B, T, D]", list(t.shape))


def rows(op: str, arg: str, v: Tensor, size: Sequence[int]) -> None:
    """For tokens [B, T, D]: one row [D], a row for each sample [B, D], [B, F, D] where F divides T; B may be 1."""
    B, T, D = size
    shape = tuple(v.shape)
    fits = 1 <= len(shape) <= 3 and shape[-1] == D
    if fits and len(shape) > 1:
        fits = shape[0] in (1, B) and (len(shape) == 2 or shape[1] == T or (shape[1] > 0 and T % shape[1] == 0))
    if not fits:
        forms = f"[D] = [{D}], [B, D] = {[B, D]}, [B, T, D] = {[B, T, D]} or [B, F, D] where F divides T"
        raise fail(op, arg, f"have shape {forms}", list(v.shape))


def modulated(op: str, x: Tensor, eps: Any, **vectors: Tensor | None) -> None:
    """Tokens x [B, T, D] of a norm, and rows for them."""
    tokens(op, "x", x)
    eps_value(op, eps)
    for arg, v in vectors.items():
        if v is not None:
            rows(op, arg, v, x.shape)


def indexed_rows(op: str, arg: str, v: Tensor, size: Sequence[int]) -> None:
    """Beside an index: one row [D], or rows [K, D] or [B, K, D] to choose from; B may be 1."""
    B, _, D = size
    shape = tuple(v.shape)
    fits = 1 <= len(shape) <= 3 and shape[-1] == D and (len(shape) < 3 or shape[0] in (1, B))
    if not fits or (len(shape) > 1 and shape[-2] == 0):
        raise fail(op, arg, f"have shape [D] = [{D}], [K, D] or [B, K, D] beside an index", list(v.shape))


def index(op: str, t: Any, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: index must be a Tensor, got {type(t).__name__}")
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: index must be int32 or int64, got {t.dtype}")
    if t.device != x.device:
        raise fail(op, "index", f"be on the device of the tokens ({x.device})", t.device)
    B, T = x.shape[:2]
    if tuple(t.shape) not in ((T,), (1, T), (B, T)):
        raise fail(op, "index", f"have shape [T] = [{T}] or [B, T] = {[B, T]}", list(t.shape))


def gate(op: str, gate: Tensor, size: Sequence[int]) -> None:
    """[1] for a branch of any size; rows for one of [B, T, D]."""
    if len(size) == 0:
        raise fail(op, "branch", "have at least one dimension", list(size))
    if gate.dim() == 1 and gate.shape[0] == 1:
        return
    if len(size) != 3:
        raise fail(op, "gate", "have shape [1] unless branch is [B, T, D]", list(gate.shape))
    rows(op, "gate", gate, size)


def same_shape(op: str, arg: str, t: Tensor, other: str, size: tuple) -> None:
    if tuple(t.shape) != tuple(size):
        raise fail(op, arg, f"have the shape of {other}, {list(size)}", list(t.shape))


def convolution(
    op: str,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: Any,
    padding_mode: Any = "zeros",
) -> list[int]:
    """Checks a stride-1 convolution of [N, C, *S] and its residual; returns the padding as ops take it: a number for
    each dimension, zeros on both sides; where it is something else three: in front, behind, 1 for repeated edges."""
    _weight_of_convolution(op, h, weight, bias)
    dims = weight.dim() - 2
    if not isinstance(padding, (int, list, tuple)):
        raise _not_padding(op, dims, padding)
    pad = [padding] * dims if isinstance(padding, int) else list(padding)
    pairs = False
    for p in pad:
        if not isinstance(p, (int, SymInt)):
            pairs = isinstance(p, (list, tuple)) and [isinstance(n, (int, SymInt)) for n in p] == [True, True]
            if not pairs:
                raise _not_padding(op, dims, padding)
    if len(pad) != dims or (min(map(_least, pad)) if pairs else min(pad)) < 0:
        raise fail(op, "padding", f"be >= 0, one number or {dims}", padding)
    plain = not pairs and padding_mode == "zeros"
    sides = pad if plain else _sides(op, dims, pad, padding_mode)
    _size_of_convolution(op, h, weight, residual, sides)
    if not plain and all(a == b and not (repeated and a) for a, b, repeated in zip(*[iter(sides)] * 3, strict=True)):
        return sides[::3]
    if not plain and not all(h.shape[2:]):
        raise fail(op, "h", "have at least one element in each dimension that is padded", list(h.shape))
    return sides


def taken_convolution(
    op: str, h: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, padding: Sequence[int]
) -> None:
    """`convolution` of operands in the form of the ops."""
    _weight_of_convolution(op, h, weight, bias)
    if len(padding) not in (weight.dim() - 2, 3 * (weight.dim() - 2)) or min(padding) < 0:
        raise fail(op, "padding", f"be >= 0, one number or {weight.dim() - 2}", padding)
    _size_of_convolution(op, h, weight, residual, padding)


def traced_padding(
    op: str, h: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, padding: Any, padding_mode: Any
) -> list[int]:
    """What `convolution` returns, for a compiler: the usual padding as it is."""
    if padding_mode == "zeros":
        dims = weight.dim() - 2
        if isinstance(padding, int):
            return [padding] * dims
        pad = list(padding)
        if pad and isinstance(pad[0], int) and pad == pad[:1] * dims:
            return pad
    return convolution(op, h, weight, bias, residual, padding, padding_mode)


def _weight_of_convolution(op: str, h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    images, filters = h.shape, weight.shape
    if not 3 <= len(images) <= 5 or len(filters) != len(images):
        raise fail(op, "weight", f"have shape [Cout, Cin, *K] with as many dimensions as {list(images)}", list(filters))
    if filters[1] != images[1]:
        raise fail(op, "weight", f"take {images[1]} input channels (groups are not supported)", list(filters))
    if bias is not None:
        shapes(op, (filters[0],), "[Cout]", bias=bias)


def _size_of_convolution(op: str, h: Tensor, weight: Tensor, residual: Tensor | None, sides: Sequence[int]) -> None:
    """sides: in either form of padding."""
    images, filters = h.shape, weight.shape
    size = list(images[2:])
    plain = len(sides) == len(size)
    for i in range(len(size)):
        size[i] += (2 * sides[i] if plain else sides[3 * i] + sides[3 * i + 1]) - filters[2 + i] + 1
        if size[i] <= 0:
            raise fail(op, "weight", f"fit into the padded input {list(images)}", list(filters))
    if residual is not None:
        same_shape(op, "residual", residual, "the convolution's output", (images[0], filters[0], *size))


def _least(p: Any) -> Any:
    return min(p) if isinstance(p, (list, tuple)) else p


def _not_padding(op: str, dims: int, padding: Any) -> TypeError:
    return TypeError(f"{op}: padding must be an int or {dims} of them, or of pairs (front, back), got {padding!r}")


def _sides(op: str, dims: int, pad: list[Any], padding_mode: Any) -> list[int]:
    """(in front, behind, 1 where the edge is repeated) of each dimension, one after the other."""
    modes = [padding_mode] * dims if isinstance(padding_mode, str) else padding_mode
    if not isinstance(modes, (list, tuple)) or len(modes) != dims:
        raise fail(op, "padding_mode", f"be 'zeros' or 'replicate', or {dims} of them", repr(padding_mode))
    for mode in modes:
        choice(op, "padding_mode", mode, ("zeros", "replicate"))
    sides = [tuple(p) if isinstance(p, (list, tuple)) else (p, p) for p in pad]
    return [n for side, mode in zip(sides, modes, strict=True) for n in (*side, int(mode == "replicate"))]


def linear(op: str, features: int, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != features:
        raise fail(op, "weight", f"have shape [out, {features}]", list(weight.shape))
    shapes(op, (weight.shape[0],), "[out]", bias=bias)


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Convolutions and GEMMs take operands of one dtype."""
    dtype = None
    for t in tensors.values():
        if t is not None and t.dtype != (dtype or t.dtype):
            given = {arg: str(t.dtype) for arg, t in tensors.items() if t is not None}
            raise TypeError(f"{op}: {', '.join(given)} must have one dtype, got {', '.join(given.values())}")
        dtype = dtype if t is None else t.dtype


def choice(op: str, arg: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise fail(op, arg, f"be one of {', '.join(map(repr, allowed))}", repr(value))


def probability(op: str, p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{op}: dropout_p must be a number, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise fail(op, "dropout_p", "be in [0, 1]", p)
