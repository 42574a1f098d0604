"""Every family under torch.compile and strict torch.export: one graph wherever the untouched model gives one."""

from __future__ import annotations

import copy
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import zeroblock as zb

from . import test_edm, test_guided, test_others
from .cases import outputs
from .model_cases import drawn, prepared

# {name: (model, positional arguments, keyword arguments)}
Built = tuple[nn.Module, tuple, dict[str, Any]]
CASES: dict[str, Callable[[], Built]] = {}
# Whole models, which take seconds.
MODELS: dict[str, Callable[[], Built]] = {}


def _positional(case) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(0)
        return case.make(), case.inputs(), {}

    return build


def _named(case) -> Callable[[], Built]:
    return lambda: (prepared(case, "dense"), (), drawn(case, 1))


for module, names in (
    (test_others, ("fixup-bottleneck", "rezero", "pixart", "controlnet", "spatial-transformer")),
    (test_guided, ("film", "attention-new")),
    (test_edm, ("attention", "edm2")),
):
    CASES |= {name: _positional(module.CASES[name]) for name in names}
if importlib.util.find_spec("timm"):
    from . import test_dit, test_timm

    CASES["timm"] = _positional(test_dit.CASES["timm"])
    CASES |= {name: _named(test_timm.BLOCKS[name]) for name in ("timm-basic", "nfnet-skipinit", "nfnet-gain")}
if importlib.util.find_spec("peft"):
    from . import test_peft

    CASES["lora"] = _named(test_peft.CASES["lora"])
if importlib.util.find_spec("diffusers"):
    from . import test_diffusers, test_diffusers_attention, test_diffusers_control, test_diffusers_models

    CASES |= {
        name: _named(test_diffusers.BLOCKS[name])
        for name in "resnet resnet-mish resnet-ada-group temporal dit dit-dropout pixart joint-dual".split()
        + "flux flux-single gligen motion ada-continuous-rms".split()
    }
    CASES |= {name: _named(test_diffusers_attention.CASES[name]) for name in ("layer-norm", "residual")}
    MODELS |= {name: _named(case) for name, case in test_diffusers_models.MODELS.items()}
    MODELS |= {f"control-{name}": _named(case) for name, case in test_diffusers_control.NETS.items()}


# Two of the quicker ones show what these do.
_SLOW = ("controlnet", "edm2", "dit-dropout", "joint-dual", "flux", "gligen", "motion", "timm-basic", "nfnet-gain")
_BLOCKS = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in CASES]
)
# torch 2.14 cannot export a checkpoint whose inputs want no gradient.
_NOT_EXPORTED = ("attention-new",)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _accelerated(build: Callable[[], Built]) -> tuple[nn.Module, nn.Module, tuple, dict[str, Any]]:
    theirs, args, kwargs = build()
    ours = copy.deepcopy(theirs)
    assert zb.accelerate(ours).blocks
    return ours, theirs, args, kwargs


def _leaves(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.detach().clone().requires_grad_(inputs.is_floating_point())
    if isinstance(inputs, dict):
        return {k: _leaves(v) for k, v in inputs.items()}
    return tuple(map(_leaves, inputs)) if isinstance(inputs, tuple) else inputs


def _trained(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The outputs of a step in training mode, then the gradients of the parameters it has."""
    torch.manual_seed(1)
    ys = [y for y in outputs(model(*_leaves(args), **_leaves(kwargs))) if y.requires_grad]
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in ys)
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [*ys, *(g for g in grads if g is not None)]


def _assert_alike(got: list[Tensor], expected: list[Tensor]) -> None:
    """As tensors of one size: a model's gradients differ in size by far, and small ones are rounding."""
    assert len(got) == len(expected)
    largest = max(float(e.detach().norm()) for e in expected)
    for g, e in zip(got, expected, strict=True):
        gap, size = float((g - e).detach().norm()), float(e.detach().norm())
        assert gap <= 1e-3 * size + 1e-5 * largest


def _compiles_whole(build: Callable[[], Built]) -> None:
    ours, theirs, args, kwargs = _accelerated(build)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for model in (ours, theirs):
        model.eval()
    with torch.no_grad():
        _assert_alike(outputs(compiled(*args, **kwargs)), outputs(theirs(*args, **kwargs)))
    assert counter.frame_count == 1
    for model in (ours, theirs):
        model.train()
    # Batch norms have learnt nothing yet: both models are as they were.
    _assert_alike(_trained(compiled, args, kwargs), _trained(theirs, args, kwargs))
    assert counter.frame_count == 2


def _exports(build: Callable[[], Built]) -> None:
    ours, theirs, args, kwargs = _accelerated(build)
    program = torch.export.export(ours.eval(), args, kwargs, strict=True).module()
    with torch.no_grad():
        _assert_alike(outputs(program(*args, **kwargs)), outputs(theirs.eval()(*args, **kwargs)))


@_BLOCKS
def test_block_compiles_whole(name):
    _compiles_whole(CASES[name])


@_BLOCKS
def test_block_exports_strictly(name):
    if name in _NOT_EXPORTED:
        pytest.skip("the untouched block is not exported either")
    _exports(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model_compiles_whole(name):
    _compiles_whole(MODELS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model_exports_strictly(name):
    _exports(MODELS[name])


def test_a_class_marked_for_the_graph_keeps_its_forward():
    """What diffusers does to its Attention: torch.compile looks nothing up on such a class."""
    attention = pytest.importorskip("diffusers.models.attention_processor", reason="diffusers is not installed")
    torch._dynamo.allow_in_graph(attention.Attention)
    layer = attention.Attention(16, heads=2, dim_head=8).eval()
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    zb.accelerate(layer)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = torch.compile(layer, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"precision": "fast"}], ids=str)
def test_options_do_not_break_the_graph(options):
    case = test_guided.CASES["film"]
    torch.manual_seed(0)
    block, inputs = case.make().eval(), case.inputs()
    zb.accelerate(block, **options)
    with torch.no_grad():
        got = torch.compile(block, backend="aot_eager", fullgraph=True)(*inputs)
        torch.testing.assert_close(got, block(*inputs), rtol=1e-4, atol=1e-4)


class _Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Shifted(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def _doubled(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * nn.functional.conv2d(x, self.weight, self.bias, padding=1)  # type: ignore[arg-type]


def _tiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As seamless textures are made."""
    return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def _dilated(conv: nn.Conv2d) -> None:
    conv.dilation, conv.padding = (2, 2), (2, 2)


def _circular(conv: nn.Conv2d) -> None:
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "class of a convolution": lambda m: setattr(m.out_layers[3], "__class__", _Doubled),
    "class of a norm": lambda m: setattr(m.out_layers[0], "__class__", _Shifted),
    "forward of an instance": lambda m: setattr(
        m.out_layers[3], "forward", types.MethodType(_doubled, m.out_layers[3])
    ),
    "convolution of an instance": lambda m: setattr(m.out_layers[3], "_conv_forward", _tiled),
    "dilation": lambda m: _dilated(m.in_layers[2]),
    "padding mode": lambda m: _circular(m.out_layers[3]),
    "layer": lambda m: m.in_layers.__setitem__(1, nn.GELU()),
    "parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.in_layers[2]),
    "dtype": lambda m: m.double(),
    "groups": lambda m: setattr(m.out_layers[0], "num_groups", 2),
}
# Which change the result by nothing but rounding.
_SAME = ("parametrization", "dtype")


def _compiled() -> tuple[nn.Module, nn.Module, Any, tuple]:
    """(accelerated, untouched, the accelerated one compiled, inputs) of a block that is not zero."""
    case = test_guided.CASES["film"]
    torch.manual_seed(0)
    theirs, inputs = case.make().eval(), case.inputs()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours = copy.deepcopy(theirs)
    assert zb.accelerate(ours).blocks
    return ours, theirs, torch.compile(ours, backend="eager", fullgraph=True), inputs


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_compilation_is_compiled_anew(change):
    ours, theirs, compiled, inputs = _compiled()
    with torch.no_grad():
        before = compiled(*inputs)
        for model in (ours, theirs):
            CHANGES[change](model)
        inputs = tuple(t.to(next(ours.parameters()).dtype) for t in inputs)
        expected, got = theirs(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert change in _SAME or not torch.allclose(before, got, rtol=1e-2, atol=1e-2)


def test_a_class_that_is_patched_after_compilation_is_compiled_anew(monkeypatch):
    _, theirs, compiled, inputs = _compiled()
    with torch.no_grad():
        before = compiled(*inputs)
        monkeypatch.setattr(nn.Conv2d, "forward", _doubled)
        got = compiled(*inputs)
        torch.testing.assert_close(got, theirs(*inputs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, got, rtol=1e-2, atol=1e-2)
