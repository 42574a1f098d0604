"""Layers that are no longer what they look like: patched, swapped, hooked, quantised. The block calls them."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeroblock as zb
from zeroblock.nn import resblock
from zeroblock.testing import eager


class Doubled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def circular(conv):
    """As seamless-texture tools do: the wrapped padding along x alone."""

    def _conv_forward(self, x, weight, bias):
        return F.conv2d(F.pad(F.pad(x, (1, 1, 0, 0), "circular"), (0, 0, 1, 1)), weight, bias)

    conv._conv_forward = types.MethodType(_conv_forward, conv)


def negated(module):
    forward = module.forward
    module.forward = lambda *args: -forward(*args)


def swap(path, make):
    def change(block):
        parent, _, name = path.rpartition(".")
        holder, old = block.get_submodule(parent), block.get_submodule(path)
        new = make(old)
        if list(old.state_dict()):
            new.load_state_dict(old.state_dict())
        holder._modules[name] = new

    return change


RESBLOCK = {
    "conv1-_conv_forward": lambda b: circular(b.in_layers[2]),
    "conv2-_conv_forward": lambda b: circular(b.out_layers[3]),
    "norm1-forward": lambda b: negated(b.in_layers[0]),
    "conv2-forward": lambda b: negated(b.out_layers[3]),
    "in_layers-forward": lambda b: negated(b.in_layers),
    "norm1-subclass": swap("in_layers.0", lambda old: Doubled(32, 64)),
    "norm2-subclass": swap("out_layers.0", lambda old: Doubled(32, 64)),
    "activation": swap("in_layers.1", lambda old: nn.GELU()),
    "second activation": swap("out_layers.1", lambda old: nn.Tanh()),
    "dropout": swap("out_layers.2", lambda old: nn.Tanh()),
    "one layer more": lambda b: b.out_layers.append(nn.Tanh()),
}


def dense_resblock():
    torch.manual_seed(0)
    block = eager.ResBlock(64, 16, 0.0)
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    return block


def assert_changed_alike(theirs, change, ours, inputs):
    """The change moves eager's result, and ours in the same way."""
    with torch.no_grad():
        plain = theirs(*inputs)
        assert torch.allclose(ours(*inputs), plain, rtol=1e-3, atol=1e-3)
        change(theirs), change(ours)
        expected = theirs(*inputs)
        assert (expected - plain).abs().max() > 1e-2
        torch.testing.assert_close(ours(*inputs), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("accelerated", [True, False], ids=["accelerated", "zb.nn"])
@pytest.mark.parametrize("name", RESBLOCK)
def test_resblock(name, accelerated):
    theirs = dense_resblock()
    if accelerated:
        ours = copy.deepcopy(theirs)
        assert zb.accelerate(ours).blocks == 1
    else:
        ours = zb.nn.ResBlock(64, 16, 0.0)
        ours.load_state_dict(theirs.state_dict())
    assert_changed_alike(theirs, RESBLOCK[name], ours, (torch.randn(2, 64, 6, 5), torch.randn(2, 16)))


@pytest.mark.parametrize("kind", ["accelerated", "zb.nn"])
def test_class_of_the_norm_is_patched(kind, monkeypatch):
    theirs, inputs = dense_resblock(), (torch.randn(2, 64, 6, 5), torch.randn(2, 16))
    if kind == "accelerated":
        ours, classes = copy.deepcopy(theirs), [eager.GroupNorm32]
        zb.accelerate(ours)
    else:
        ours, classes = zb.nn.ResBlock(64, 16, 0.0), [eager.GroupNorm32, resblock.GroupNorm32]
        ours.load_state_dict(theirs.state_dict())

    def change(_):
        for c in classes:
            monkeypatch.setattr(c, "forward", lambda self, x: F.group_norm(x, 32, self.weight, -self.bias))

    assert_changed_alike(theirs, change, ours, inputs)


@pytest.mark.parametrize("patched", [nn.LayerNorm, nn.Linear, nn.GELU])
def test_classes_of_a_dit_block_are_patched(patched, monkeypatch):
    torch.manual_seed(0)
    theirs = eager.DiTBlock(32, 4)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours = zb.nn.DiTBlock(32, 4)
    ours.load_state_dict(theirs.state_dict())
    original = patched.forward

    def change(_):
        monkeypatch.setattr(patched, "forward", lambda self, x: -original(self, x))

    assert_changed_alike(theirs, change, ours, (torch.randn(2, 6, 32), torch.randn(2, 32)))


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True}, {"down": True}], ids=["add", "film", "down"])
@pytest.mark.parametrize("container", ["in_layers", "out_layers"])
def test_hooks_on_containers_fire_as_guided_diffusion_calls_them(container, options, phase):
    """in_layers is called as a whole unless the block resamples inside, out_layers unless it modulates."""
    called = not options.get("down" if container == "in_layers" else "use_scale_shift_norm", False)
    for kind in (eager, zb.nn):
        block = kind.ResBlock(64, 16, 0.0, **options)
        if phase == "dense":
            nn.init.normal_(block.out_layers[3].weight)
        seen = []
        block.get_submodule(container).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        block(torch.randn(2, 64, 8, 8), torch.randn(2, 16))
        assert len(seen) == called, kind.__name__


def test_a_hook_on_a_container_may_change_its_result():
    theirs = dense_resblock()
    ours = zb.nn.ResBlock(64, 16, 0.0)
    ours.load_state_dict(theirs.state_dict())

    def change(block):
        block.out_layers.register_forward_hook(lambda m, args, y: 3 * y)

    assert_changed_alike(theirs, change, ours, (torch.randn(2, 64, 6, 5), torch.randn(2, 16)))


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("kind", ["DiTBlock", "FinalLayer"])
def test_quantised_linears_are_called_as_they_are(kind, phase):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    arguments = (64, 4) if kind == "DiTBlock" else (64, 2, 16)
    theirs, ours = getattr(eager, kind)(*arguments), getattr(zb.nn, kind)(*arguments)
    if phase == "dense":
        for p in theirs.parameters():
            nn.init.normal_(p, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    after, before = copy.deepcopy(theirs), copy.deepcopy(theirs)
    zb.accelerate(after)
    for module in (theirs, ours, after, before):
        quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    zb.accelerate(before)
    x, c = torch.randn(2, 6, 64), torch.randn(2, 64)
    with torch.no_grad():
        expected = theirs(x, c)
        for name, module in {"zb.nn": ours, "quantised after": after, "quantised before": before}.items():
            torch.testing.assert_close(module(x, c), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
