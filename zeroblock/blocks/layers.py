"""What kind of layer a module is: the plain one it looks like, one that may draw random numbers, one of zeroblock's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..backends.select import select

Owned = tuple[nn.Module, str, Tensor]  # a parameter: the module that holds it, its name there
Forward = TypeVar("Forward", bound=Callable[..., Any])

# ---- which forwards compute what -------------------------------------------------------------------------------------

# The functions, as they were when zeroblock was imported: a class whose forward is patched later is no longer plain.
# The keys of a dict, since torch 2.7 cannot trace whether a function is in a set.
Forwards = dict[Callable[..., Any], None]

# Convolution or linear of the module's own weight and bias, and what nn.ConvNd.forward computes with.
_PLAIN_FORWARDS: Forwards = dict.fromkeys(m.forward for m in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
_PLAIN_FORWARDS.update(dict.fromkeys(m._conv_forward for m in (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYER_NORMS: Forwards = {nn.LayerNorm.forward: None}
GROUP_NORMS: Forwards = {nn.GroupNorm.forward: None}
SILUS: Forwards = {nn.SiLU.forward: None}
# The same functions one by one: a compiler asks for them in a third of the time of a look into a table, all of which it
# reads and guards. Asked of the layer's own class: torch 2.11's compiler guards no class that is compared alone.
_CONV2D, _CONVOLVE2D = nn.Conv2d.forward, nn.Conv2d._conv_forward
_LINEAR, _GROUP_NORM = nn.Linear.forward, nn.GroupNorm.forward
DROPOUTS: Forwards = {nn.Dropout.forward: None}


def plain_forward(forward: Forward) -> Forward:
    """Decorator: this forward of a subclass computes what torch's does, so that its layers count as plain ones."""
    _PLAIN_FORWARDS[forward] = None
    return forward


# What `on_trial` was asked about.
_asked: list[tuple[Forwards, Callable[..., Any]]] | None = None


def computes(module: Any, known: Forwards) -> bool:
    """Whether the forward of the module's class is one of `known`."""
    forward = type(module).forward
    return forward in known or _asked is not None and _taken_on_trial(forward, known)


def _taken_on_trial(forward: Callable[..., Any], known: Forwards) -> bool:
    assert _asked is not None
    _asked.append((known, forward))
    return True


@contextlib.contextmanager
def on_trial() -> Iterator[Callable[[], None]]:
    """While a family is proved on a foreign block: classes that nobody knows yet (somebody's GroupNorm32) count as
    what they stand for. The function it gives keeps those that were asked about, after the proof."""
    global _asked
    before, _asked = _asked, []
    asked = _asked

    def keep() -> None:
        for known, forward in asked:
            known[forward] = None

    try:
        yield keep
    finally:
        _asked = before


# ---- plain layers ----------------------------------------------------------------------------------------------------

# Neither None (parametrized and pruned weights live elsewhere) nor another subclass: what is quantised or sharded
# computes in its own way. Those of a compiler stand for ordinary ones.
_PLAIN_WEIGHTS: dict[type, None] = dict.fromkeys((nn.Parameter, Tensor, FakeTensor, FunctionalTensor))


# Sharded weights that FSDP has made whole when a block is called; filled while blocks are looked for.
_whole_when_called: dict[Tensor, None] = {}


@contextlib.contextmanager
def sharded_weights_count(model: nn.Module) -> Iterator[None]:
    """While blocks are looked for in `model`, the weights that FSDP makes whole for a call are plain ones; those that
    stay distributed (tensor parallelism) are not."""
    _whole_when_called.update(dict.fromkeys(_of_fsdp(model)))
    try:
        yield
    finally:
        _whole_when_called.clear()


def _of_fsdp(model: nn.Module) -> Iterator[Tensor]:
    """The sharded parameters of torch's fully_shard that are ordinary tensors once they are whole."""
    for m in model.modules():
        if any(c.__name__ == "FSDPModule" for c in type(m).__mro__):
            state: Any = m._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch before 2.12
            for group in groups:
                for p in () if group is None else group.fsdp_params:
                    if not p.is_dtensor:
                        yield p.sharded_param


def is_whole(t: Any) -> bool:
    """One of those weights."""
    return bool(_whole_when_called) and t in _whole_when_called


def is_distributed(t: Any) -> bool:
    """A DTensor, and one that is no ordinary tensor when a block is called."""
    return any(c.__name__ == "DTensor" for c in type(t.data).__mro__) and not is_whole(t)


def _is_plain_weight(t: Any) -> bool:
    return type(t) in _PLAIN_WEIGHTS or is_whole(t)


def is_plain_conv(module: Any) -> bool:
    """A convolution whose forward is torch.convolution of its weight: no unknown subclass, zero padding, no patch."""
    kind: Any = type(module)
    return (
        isinstance(module, CONVS)
        and (kind.forward is _CONV2D or kind.forward in _PLAIN_FORWARDS)
        and (kind._conv_forward is _CONVOLVE2D or kind._conv_forward in _PLAIN_FORWARDS)
        and "_conv_forward" not in vars(module)
        and module._conv_forward is not None  # a compiler guards attributes, not what __dict__ lacks
        and "forward" not in vars(module)
        and (type(weight := module._parameters.get("weight")) in _PLAIN_WEIGHTS or is_whole(weight))
        and module.padding_mode == "zeros"
    )


def is_plain_linear(module: Any) -> bool:
    """A linear layer whose forward is F.linear of its weight, an ordinary tensor."""
    return (
        isinstance(module, nn.Linear)
        and (type(module).forward is _LINEAR or type(module).forward in _PLAIN_FORWARDS)
        and "forward" not in vars(module)
        and (type(weight := module._parameters.get("weight")) in _PLAIN_WEIGHTS or is_whole(weight))
    )


def is_plain_layer(module: Any) -> bool:
    return is_plain_linear(module) or is_plain_conv(module)


def is_plain_norm(module: Any) -> bool:
    """A LayerNorm of the last dimension without parameters."""
    plain = type(module).forward in LAYER_NORMS
    return plain and module._parameters.get("weight") is None and len(module.normalized_shape) == 1


def is_group_norm(module: Any, swish: float = 0.0) -> bool:
    """A GroupNorm with parameters of its own (parametrized ones live elsewhere) that computes one, and then silu(y)
    where `swish` is 1: glide-text2im's norms hold their activation, as an attribute of that name."""
    return (
        isinstance(module, nn.GroupNorm)
        and (type(module).forward is _GROUP_NORM or computes(module, GROUP_NORMS))
        and module._parameters.get("weight") is not None
        and vars(module).get("swish", 0.0) == swish
    )


def fits_fused(conv: Any) -> bool:
    """A convolution that the fused ops take: plain, stride 1, dilation 1, one group."""
    return (
        is_plain_conv(conv)
        and not isinstance(conv.padding, str)
        and conv.groups == 1
        and conv.stride in ((1, 1), (1, 1, 1), (1,))  # written out: a compiler guards what it reads of a global
        and conv.dilation in ((1, 1), (1, 1, 1), (1,))
    )


def is_unit_conv(module: Any) -> bool:
    """A convolution's weight, an ordinary tensor, of stride 1, dilation 1 and one group, whatever its forward does
    beside: video autoencoders pad in a forward of their own."""
    return (
        isinstance(module, CONVS)
        and "forward" not in vars(module)
        and "_conv_forward" not in vars(module)
        and module._conv_forward is not None
        and _is_plain_weight(module._parameters.get("weight"))
        and module.groups == 1
        and module.stride in ((1, 1), (1, 1, 1), (1,))
        and module.dilation in ((1, 1), (1, 1, 1), (1,))
    )


def conv_padding(conv: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The padding on both sides of each dimension, and what "same" adds on the far side of it for even kernels."""
    zeros = (0,) * len(conv.kernel_size)
    if not isinstance(conv.padding, str):
        return tuple(conv.padding), zeros
    if conv.padding == "valid":
        return zeros, zeros
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return tuple(t // 2 for t in total), tuple(t % 2 for t in total)


def linear(h: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """act(F.linear(h, weight, bias)) without gradients, by the fastest way of its backend."""
    return select("linear_gate_residual", h).linear(h.to(weight.dtype), weight, bias, activation)


def parameters_of(*modules: nn.Module) -> list[Owned]:
    """Every parameter of the modules; empty when gradients are disabled."""
    if not torch.is_grad_enabled():
        return []
    found: dict[int, Owned] = {}
    for top in modules:
        for m in top.modules():
            for name, p in m._parameters.items():
                if p is not None:
                    found.setdefault(id(p), (m, name, p))
    return list(found.values())


# ---- whose a module is, and what it may draw -------------------------------------------------------------------------

_own_packages: tuple[str, ...] = ()


def register_own_package(package: str) -> None:
    """`package.*` defines modules of zeroblock's own: accelerate leaves them alone, and none of their forwards draws a
    random number but through its submodules."""
    global _own_packages
    _own_packages = (*_own_packages, f"{package}.")


def is_own(module: nn.Module) -> bool:
    """One of zeroblock's own modules (also while frozen, which keeps the name of the class); not a user's subclass."""
    home = type(module).__module__
    for package in _own_packages:  # torch.compile does not know str.startswith of a tuple
        if home.startswith(package):
            return True
    return False


# The files of torch.nn whose modules never draw random numbers, with the exceptions among them.
_DETERMINISTIC = {
    f"torch.nn.modules.{name}"
    for name in "activation batchnorm container conv flatten instancenorm linear normalization padding pixelshuffle "
    "pooling upsampling".split()
}
_RANDOM = (nn.RReLU, nn.MultiheadAttention, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
# Classes of torch.nn and of zeroblock that were met and declare nothing. A skip that has to know asks every module of
# its branch (benchmarks/overhead.py), and the attribute that a class lacks is found out slowly.
undeclared: set[type[nn.Module]] = set()


def may_draw(module: nn.Module, trusted: str | None = None) -> bool:
    """Whether a call of module may consume random numbers: in training, anything but the layers known not to; in eval
    mode, what declares that it does.

    trusted: how the names of Python modules begin (of attention processors too) whose code draws through layers of
    torch alone; "" is all of them.
    """
    waiting: list[nn.Module | None] = [module]
    for m in waiting:  # grows by the children of each
        if m is None:
            continue
        if (type(m) not in undeclared or m.training or "draws_random_numbers" in m.__dict__) and draws(m, trusted):
            return True
        children = m._modules
        if children:
            waiting.extend(children.values())
    return False


def draws(m: nn.Module, trusted: str | None = None) -> bool:
    """`may_draw` for m itself, its submodules aside."""
    kind, fields = type(m), m.__dict__
    # On the class or the instance: asking the module itself for an attribute it lacks costs ten times as much.
    declared = getattr(kind, "draws_random_numbers", None)
    if declared is None:
        if kind.__module__.startswith("torch.nn.") or is_own(m):
            undeclared.add(kind)
        declared = fields.get("draws_random_numbers")
    return m.training and not _is_deterministic(m, trusted) if declared is None else declared


def _is_deterministic(m: nn.Module, trusted: str | None) -> bool:
    if isinstance(m, nn.modules.dropout._DropoutNd):
        return m.p in (0.0, 1.0)
    home = type(m).__module__
    if home in _DETERMINISTIC:
        return not isinstance(m, _RANDOM)
    if trusted is not None and home.startswith(trusted):
        return type(getattr(m, "processor", m)).__module__.startswith(trusted)
    return is_own(m)
