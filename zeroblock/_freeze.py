"""`freeze` and `unfreeze`: weights prepared for inference, on the user's word that they stay as they are.

A frozen convolution or linear layer becomes an instance of a subclass made for it; parameters, state_dict and
isinstance stay. The copies live beside the weight (`steps/packed.py`), where the ops of zeroblock.nn find them too.
"""

from __future__ import annotations

import copyreg
import dataclasses
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import zero
from .backends.select import select
from .blocks.layers import conv_padding, is_plain_layer, plain_forward
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


# What each frozen layer gives back when it is unfrozen: `packed.publish`'s references.
_published: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Tensor]]] = weakref.WeakKeyDictionary()
_changing = threading.RLock()  # held by whoever freezes or unfreezes


class _Frozen(nn.Module):
    """What every frozen layer adds: anything that may change its parameters, or take it elsewhere, unfreezes it.
    Classes that other libraries derive from it (parametrizations, fully_shard) stay: without copies it does nothing."""

    _zeroblock_original: type[nn.Module]

    def train(self, mode: bool = True) -> Any:
        inherited = super().train  # looked up while the class has it
        if mode:
            _thaw(self)
        return inherited(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        inherited = super()._apply
        _thaw(self)
        return inherited(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        inherited = super()._load_from_state_dict
        _thaw(self)
        inherited(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        original = _original(self)
        if original is None:
            return reduced
        return copyreg._reconstructor, (original, object, None), *reduced[2:]  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen" if self in _published else super().extra_repr()


def _original(module: nn.Module) -> type[nn.Module] | None:
    """The class that freeze replaced; None for layers that are not frozen or have another library's class since."""
    return vars(type(module)).get("_zeroblock_original")


def _usable(x: Any, weight: Tensor, bias: Tensor | None) -> packed.Copy | None:
    """What freeze keeps for the weight where this call may use it: plain inference on x, else None. Not verified:
    whoever uses it does."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or type(x) not in (Tensor, nn.Parameter):
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or zero.transforms_active():
        return None
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None  # the library's layer knows its backward
    if any(t.dtype != weight.dtype or t.device != weight.device for t in tensors):
        return None  # the library's layer says what is wrong
    return None if torch.is_autocast_enabled(x.device.type) else packed.current(weight)


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# By the number of spatial dimensions.
_CONV_FORWARDS: dict[int, Any] = {n: conv._conv_forward for n, conv in enumerate(_LAYERS[1:], 1)}


class FrozenConv(_Frozen):
    """Overrides what nn.ConvNd.forward computes with, so that subclasses keep their own forward."""

    @plain_forward
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        copy = _usable(x, weight, bias)
        geometry = None if copy is None else _geometry(self)
        takes = geometry is not None and x.dim() == weight.dim() and x.shape[1] == weight.shape[1] * geometry.groups
        if copy is None or geometry is None or not takes:
            return _CONV_FORWARDS[len(self.kernel_size)](self, x, weight, bias)
        if copy.zero:
            stride, padding, dilation, groups = geometry
            size = conv_size((x.shape[0], *x.shape[2:]), weight, padding, stride, dilation)
            if min(size) < 1 or weight.shape[0] % groups:
                return _CONV_FORWARDS[len(self.kernel_size)](self, x, weight, bias)  # which says what is wrong
            copy.verify()
            zero.count("frozen_conv", True)
            empty = lambda: empty_conv_output(x, weight, geometry, weight.dtype, size)  # noqa: E731
            return residual_alone(None, bias, None, 1, weight.dtype, empty)
        zero.count("frozen_conv", False)
        return CONV(ConvCall(select("conv_residual", x), x, weight, bias, None, geometry))


class FrozenLinear(_Frozen, nn.Linear):
    @plain_forward
    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name: callers pass it by keyword
        x, weight, bias = input, self.weight, self.bias
        copy = _usable(x, weight, bias)
        if copy is None or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
            return nn.Linear.forward(self, x)  # not super(): another thread may have unfrozen the layer
        zero.count("frozen_linear", copy.zero)
        if copy.zero:
            copy.verify()
            empty = lambda: x.new_empty(*x.shape[:-1], weight.shape[0])  # noqa: E731
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
    """Read at every call, as torch does. None where the library's layer has to say what it means or what is wrong."""
    stride, dilation, padding = conv.stride, conv.dilation, conv.padding
    for numbers in (stride, dilation) if isinstance(padding, str) else (stride, dilation, padding):
        if not isinstance(numbers, (tuple, list)) or len(numbers) != len(conv.kernel_size):  # type: ignore[arg-type]
            return None
    if conv.padding_mode != "zeros" or min(*stride, *dilation) < 1 or (padding == "same" and max(stride) > 1):
        return None
    sides, overhang = conv_padding(conv)
    if any(overhang) or min(sides) < 0:
        return None
    return Geometry(tuple(stride), sides, tuple(dilation), conv.groups)


def _why_not(module: nn.Module) -> str | None:
    """None when the layer can be frozen, else the reason."""
    if not is_plain_layer(module):
        return "its weight is computed, or it is not a plain layer (padding other than zeros, or a way of its own)"
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or weight.device.type == "meta":
        return "its weight is not a plain strided parameter"
    if zero.is_exactly_zero(weight):
        return None
    if isinstance(module, nn.Linear):
        if weight.numel() == 0:
            return "its weight is empty"
        taken = select("linear_gate_residual", weight).uses_packed_linears
        return packed.why_not_packed(weight) or (None if taken else "no linear uses it without zeroblock's own kernels")
    if weight.dim() not in (4, 5):
        return "oneDNN packs convolutions in two and three dimensions"
    return "padding on one side only" if _geometry(module) is None else packed.why_not_packed(weight)


def freeze(model: nn.Module, check: bool = False) -> FreezeReport:
    """Prepares the convolutions and linear layers of `model`, in place, for inference with the weights it has now.

    Weights are packed once as oneDNN computes with them (torch reorders them at every call), zero weights fold to their
    bias, and zero branches of zeroblock's modules are decided once, on a GPU too. float32 and bfloat16 on the CPU;
    what cannot be prepared is named in the report and stays as it is. Calls that need gradients, autocast,
    torch.compile or tensor subclasses take the ordinary path. Other threads may infer with the model meanwhile.

    The weights must not change until `unfreeze`. train(), load_state_dict and moving or casting the model unfreeze what
    they reach; an optimizer step that holds a frozen parameter raises RuntimeError. A changed stride, padding,
    padding_mode, dilation or number of groups, or a new Parameter in place of a frozen one, is followed. state_dict,
    deepcopy and pickle give unfrozen layers. Freezing twice prepares the weights anew.

    A weight that was written all the same raises RuntimeError at the next call that would use its copy. Compared are
    address, shape, strides, torch's version counter and, on the CPU, the bits of a sample, at least 64 elements or one
    in 8192, spread evenly. Where no version moves (writes through .data, by numpy, by peft's merge_adapter, by an EMA's
    copy_to, under inference_mode) that leaves:
    (1) on the CPU a write that leaves all sampled elements as they were: of a few elements, rows or columns, or by
    changes most of which are lost in rounding. One that changes a share p of the elements at random is passed over
    with probability (1 - p) ** 64 at most. It raises later: all frozen weights are compared bit by bit, in pieces of
    64 KiB one after another, in 0.2 % of the time in which calls use them. Until then, about two minutes for each
    250 MB of frozen weights, results are those of the old ones;
    (2) on a GPU, where only zero weights are remembered, every write to one of them: its branch stays skipped, without
    a word. To look would be to wait for the device.
    Whoever writes weights in such a way calls unfreeze before, or freeze again after it: nothing is left then. Where
    somebody else may write them, check=True keeps the original of every weight and compares all bits at each use, which
    reads both; on a GPU each use waits for the device, and a CUDA graph cannot be captured.

    Returns a `FreezeReport`. Raises TypeError when model is not a Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be a Module, got {type(model).__name__}")
    with _changing:
        unfreeze(model)
        report = FreezeReport(check=check)
        copies: set[packed.Copy] = set()
        for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, _LAYERS)]:
            for parameter in module._parameters.values():
                if parameter is not None:
                    packed.forget_changed(parameter)
            why = _why_not(module)
            if why is not None:
                report.skipped[name] = why
                continue
            copy = _freeze_layer(module, check)
            copies.add(copy)
            (report.folded if copy.zero else report.packed).append(name)
        report.nbytes = sum(c.nbytes() for c in copies)
    return report


def _freeze_layer(module: nn.Module, check: bool) -> packed.Copy:
    weight, bias = module.weight, module.bias
    copy = packed.prepare(weight, zero.is_exactly_zero, check)
    if not copy.zero:
        geometry = None if isinstance(module, nn.Linear) else _geometry(module)
        if geometry is None:
            copy.pack_linear()
        else:
            copy.pack_conv(select("conv_residual", weight), geometry)
    published = [packed.publish(copy)]
    if bias is not None:
        published.append(packed.publish(packed.prepare(bias, zero.is_exactly_zero, check)))
    _published[module] = published
    if not isinstance(module, _Frozen):  # else another library's class, derived from a frozen one
        module.__class__ = _frozen_class(type(module))
    return copy


def _thaw(module: nn.Module) -> None:
    with _changing:
        if (original := _original(module)) is not None:
            module.__class__ = original
        for parameter in _published.pop(module, ()):
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
