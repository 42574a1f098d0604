"""`freeze` and `unfreeze`: weights prepared for inference, on the user's word that they stay as they are.

A frozen convolution or linear layer becomes an instance of a subclass made for it; parameters, state_dict and
isinstance stay. The copies live beside the weight (`steps/packed.py`), where the ops of zeroblock.nn find them too.
"""

from __future__ import annotations

import copyreg
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import zero
from .backends.select import select
from .blocks.layers import is_plain_layer, plain_forward
from .blocks.skip import conv_padding
from .ops.residual_alone import residual_alone
from .steps import packed
from .steps.conv import CONV, ConvCall, conv_size, empty_conv_output
from .steps.packed import Geometry


@dataclasses.dataclass
class FreezeReport:
    """What `freeze` did: the layers whose weights were packed, those folded because they are zero, those left alone
    (and why), and the memory that the copies take beside the weights."""

    packed: list[str] = dataclasses.field(default_factory=list)
    folded: list[str] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    nbytes: int = 0
    check: bool = False

    def __str__(self) -> str:
        lines = [f"{len(self.packed)} layers packed, {self.nbytes / 2**20:.1f} MiB of copies beside the weights"]
        if self.check:
            lines.append("every copy is compared with its weight at each use")
        lines += [f"folded, its weight is zero: {name}" for name in self.folded]
        lines += [f"left alone: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


class _Frozen(nn.Module):
    """What every frozen layer adds: anything that may change its parameters, or take it elsewhere, unfreezes it."""

    _zeroblock_original: type[nn.Module]

    def train(self, mode: bool = True) -> Any:
        if not mode:
            return super().train(mode)
        _thaw(self)
        return self.train(mode)  # the original class's, now

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _thaw(self)
        return self._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _thaw(self)
        return self._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *state = reduced
        return copyreg._reconstructor, (type(self)._zeroblock_original, object, None), *state  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen"


def _usable(x: Any, weight: Tensor, bias: Tensor | None) -> packed.Copy | None:
    """What freeze keeps for the weight where this call may use it: plain inference on x, else None."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or type(x) not in (Tensor, nn.Parameter):
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or zero.transforms_active():
        return None
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None  # the library's layer knows its backward
    if any(t.dtype != weight.dtype or t.device != weight.device for t in tensors):
        return None  # the library's layer says what is wrong
    return None if torch.is_autocast_enabled(x.device.type) else packed.find(weight)


class FrozenConv(_Frozen):
    """Overrides what nn.ConvNd.forward computes with, so that subclasses keep their own forward."""

    @plain_forward
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        copy = _usable(x, weight, bias)
        geometry = _geometry(self)
        if copy is None or geometry is None or x.dim() != weight.dim() or x.shape[1] != self.in_channels:
            return super()._conv_forward(x, weight, bias)
        zero.count("frozen_conv", copy.zero)
        if copy.zero:
            stride, padding, dilation, _ = geometry
            size = conv_size((x.shape[0], *x.shape[2:]), weight, padding, stride, dilation)
            empty = lambda: empty_conv_output(x, weight, size, weight.dtype)  # noqa: E731
            return residual_alone(None, bias, None, 1, weight.dtype, empty)
        return CONV(ConvCall(select("conv_residual", x), x, weight, bias, None, geometry))


class FrozenLinear(_Frozen, nn.Linear):
    @plain_forward
    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name: callers pass it by keyword
        x, weight, bias = input, self.weight, self.bias
        copy = _usable(x, weight, bias)
        if copy is None or x.dim() < 2 or x.shape[-1] != self.in_features:
            return super().forward(x)
        zero.count("frozen_linear", copy.zero)
        if copy.zero:
            empty = lambda: x.new_empty(*x.shape[:-1], self.out_features)  # noqa: E731
            return residual_alone(None, bias, None, -1, weight.dtype, empty)
        return select("linear_gate_residual", x).linear(x, weight, bias)


_classes: dict[type, type] = {}


def _frozen_class(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _classes:
        if not issubclass(original, nn.Linear):
            bases: tuple[type, ...] = (FrozenConv, original)
        elif original.forward is nn.Linear.forward:
            bases = (FrozenLinear, original)
        else:  # its forward ends in nn.Linear's, in front of which FrozenLinear goes
            bases = (original, FrozenLinear)
        members = {
            "_zeroblock_original": original,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        _classes[original] = type(original.__name__, bases, members)
    return _classes[original]


def _geometry(conv: nn.Module) -> Geometry | None:
    padding, overhang = conv_padding(conv)
    return None if any(overhang) else Geometry(tuple(conv.stride), padding, tuple(conv.dilation), conv.groups)


def _why_not(module: nn.Module) -> str | None:
    """None when the layer can be frozen, else the reason."""
    if not is_plain_layer(module):
        return "its weight is computed, or it is not a plain layer (a subclass, or padding other than zeros)"
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or weight.device.type == "meta":
        return "its weight is not a plain strided parameter"
    if zero.is_exactly_zero(weight):
        return None
    if isinstance(module, nn.Linear):
        return "its weight is empty" if weight.numel() == 0 else packed.why_not_packed(weight)
    if weight.dim() not in (4, 5):
        return "oneDNN packs convolutions in two and three dimensions"
    if _geometry(module) is None:
        return "padding on one side only"
    return packed.why_not_packed(weight)


def freeze(model: nn.Module, check: bool = False) -> FreezeReport:
    """Prepares the convolutions and linear layers of `model`, in place, for inference with the weights it has now.

    Weights are packed once as oneDNN computes with them (torch reorders them at every call), zero weights fold to their
    bias, and zero branches of zeroblock's modules are decided once, on a GPU too. float32 and bfloat16 on the CPU;
    what cannot be prepared is named in the report and stays as it is. Calls that need gradients, autocast,
    torch.compile or tensor subclasses take the ordinary path.

    The weights must not change until `unfreeze`. train(), load_state_dict and moving or casting the model unfreeze what
    they reach; an optimizer step that holds a frozen parameter raises RuntimeError, as does a call after a write that
    can be seen. Writes that leave no trace (through .data, by numpy) are found only with check=True, which keeps the
    original of every weight and compares all bits at each use. state_dict, deepcopy and pickle give unfrozen layers.

    Raises TypeError when model is not a Module. Freezing twice prepares the weights anew.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be a Module, got {type(model).__name__}")
    unfreeze(model)
    report = FreezeReport(check=check)
    copies: dict[int, packed.Copy] = {}
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, layers)]:
        why = _why_not(module)
        if why is not None:
            report.skipped[name] = why
            continue
        copy = _freeze_layer(module, check)
        copies[id(copy)] = copy
        (report.folded if copy.zero else report.packed).append(name)
    report.nbytes = sum(c.nbytes() for c in copies.values())
    return report


def _freeze_layer(module: nn.Module, check: bool) -> packed.Copy:
    weight, bias = module.weight, module.bias
    copy = packed.add(weight, zero.is_exactly_zero(weight), check)
    if bias is not None:
        packed.add(bias, zero.is_exactly_zero(bias), check)
    if not copy.zero:
        geometry = None if isinstance(module, nn.Linear) else _geometry(module)
        if geometry is None:
            copy.pack_linear()
        else:
            copy.pack_conv(select("conv_residual", weight), geometry)
    module.__class__ = _frozen_class(type(module))
    return copy


def _thaw(module: nn.Module) -> None:
    original = getattr(type(module), "_zeroblock_original", None)
    if original is None:
        return
    module.__class__ = original
    for parameter in (module.weight, module.bias):
        if parameter is not None:
            packed.drop(parameter)


def unfreeze(model: nn.Module) -> None:
    """Takes back `freeze` for every layer of `model`; nothing happens to layers that are not frozen."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfreeze: model must be a Module, got {type(model).__name__}")
    for module in model.modules():
        _thaw(module)


def _refuse_frozen(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not packed.copies:
        return
    frozen = packed.any_frozen([p for group in optimizer.param_groups for p in group["params"]])
    if frozen is not None:
        raise RuntimeError(
            f"zeroblock: {type(optimizer).__name__}.step would change a frozen parameter of shape "
            f"{list(frozen.shape)}; call zeroblock.unfreeze(model) first"
        )


register_optimizer_step_pre_hook(_refuse_frozen)
