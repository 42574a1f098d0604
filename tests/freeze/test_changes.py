"""Frozen weights and geometry that change by roads torch does not count: the new result or an error, by default."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.steps import packed as _packed

from .cases import call, frozen_layers, needs_native, needs_onednn, randomise
from .cases import nothing_stays_frozen as _nothing_stays_frozen  # noqa: F401  (for every test)

pytestmark = needs_onednn


def _fused_adamw(p):
    zeros = [torch.zeros_like(p) for _ in range(2)]
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    options |= {"amsgrad": False, "maximize": False}
    torch._fused_adamw_([p.data], [torch.ones_like(p)], [zeros[0]], [zeros[1]], [], [torch.ones(())], **options)


def _numpy(p):
    p.detach().numpy()[...] *= 2


def _ema(p):
    p.data.copy_(torch.randn(p.shape))


def _merge(p):
    """As LoRA is merged into the layer it belongs to."""
    rows = p.shape[0]
    p.data += (torch.randn(rows, 4) @ torch.randn(4, p.numel() // rows)).view_as(p)


# Roads by which neither torch's version nor the address moves.
SILENT = {
    "data": lambda p: p.data.add_(1.0),
    "out": lambda p: torch.mul(p.detach(), 2.0, out=p.data),
    "numpy": _numpy,
    "storage": lambda p: p.untyped_storage().copy_(torch.randn(p.shape).untyped_storage()),
    "foreach": lambda p: torch._foreach_lerp_([p.data], [torch.randn_like(p)], 0.5),
    "fused": _fused_adamw,
    "ema": _ema,
    "merge": _merge,
    "zero": lambda p: p.data.zero_(),
}
LAYERS = {
    "linear": (lambda: nn.Linear(48, 32), (3, 48)),
    "conv": (lambda: nn.Conv2d(16, 32, 3, padding=1), (2, 16, 6, 6)),
    "wide": (lambda: nn.Linear(1536, 1152), (2, 1536)),
    "small": (lambda: nn.Linear(3, 5), (2, 3)),
}


def frozen(name):
    make, size = LAYERS[name]
    layer, x = randomise(make()), torch.randn(size)
    zb.freeze(layer)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    call(layer, x)
    return layer, x


@pytest.mark.parametrize("road", SILENT)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "conv" else needs_native) for n in LAYERS])
def test_a_write_without_a_trace_raises(name, road):
    torch.manual_seed(0)
    layer, x = frozen(name)
    version = layer.weight._version
    SILENT[road](layer.weight)
    assert layer.weight._version == version
    with pytest.raises(RuntimeError, match="was written while frozen; call zeroblock.unfreeze"):
        call(layer, x)
    zb.freeze(layer)
    expected = call(copy.deepcopy(layer), x)
    torch.testing.assert_close(call(layer, x), expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    zb.unfreeze(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_weight_written_without_a_trace_raises(dtype):
    for layer, size in ((nn.Linear(8, 8), (2, 8)), (nn.Conv2d(8, 8, 3), (1, 8, 4, 4))):
        nn.init.zeros_(layer.weight)
        layer.to(dtype)
        x = torch.randn(size, dtype=dtype)
        assert zb.freeze(layer).folded == [""]
        call(layer, x)
        layer.weight.data.add_(0.5)
        with pytest.raises(RuntimeError, match="was written while frozen"):
            call(layer, x)
        zb.unfreeze(layer)


@needs_native
def test_writes_in_inference_mode_raise():
    with torch.inference_mode():
        layer, x = nn.Linear(8, 8), torch.randn(2, 8)
        zb.freeze(layer)
        layer(x)
        layer.weight.add_(1)
        with pytest.raises(RuntimeError, match="was written while frozen"):
            layer(x)
        zb.unfreeze(layer)


@pytest.mark.parametrize("block", ["ResBlock", "DiTBlock"])
def test_zero_branches_of_blocks_follow_or_raise(block):
    """A branch that freeze found zero, and weights that an EMA writes into the model afterwards."""
    torch.manual_seed(0)
    model, inputs = {
        "ResBlock": (zb.nn.ResBlock(32, 16, 0.0), (torch.randn(1, 32, 4, 4), torch.randn(1, 16))),
        "DiTBlock": (zb.nn.DiTBlock(32, 2), (torch.randn(1, 4, 32), torch.randn(1, 32))),
    }[block]
    model.eval()
    zb.freeze(model)
    with torch.no_grad():
        model(*inputs)
        for p in model.parameters():
            _ema(p)
        with pytest.raises(RuntimeError, match="was written while frozen"):
            model(*inputs)


MOVED = {
    "set_": lambda p: p.set_(torch.randn(p.shape)),
    "transposed": lambda p: setattr(p, "data", p.data.t()),
    "fewer rows": lambda p: setattr(p, "data", p.data[:4]),
    "shared": lambda p: p.share_memory_(),
    "emptied": lambda p: p.untyped_storage().resize_(0),
}


@needs_native
@pytest.mark.parametrize("road", MOVED)
def test_another_storage_or_shape_raises(road):
    layer, x = randomise(nn.Linear(16, 16)), torch.randn(2, 16)
    zb.freeze(layer)
    with torch.no_grad():
        MOVED[road](layer.weight)
    with pytest.raises(RuntimeError, match=r"shape \[16, 16\] was moved while frozen"):
        call(layer, x)


@needs_native
def test_parameters_that_cannot_be_swapped_say_so():
    layer = randomise(nn.Linear(4, 4))
    zb.freeze(layer)
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(4, 4)))
    zb.unfreeze(layer)
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(4, 4)))


SHAPES = [(8, 8), (96, 100), (512, 512), (384, 1152), (1152, 384), (1536, 384), (2304, 384), (768, 3072), (1024, 1024)]
SHAPES += [(128, 128, 3, 3), (512, 512, 3, 3), (64, 256, 1, 1), (320, 4, 3, 3), (1280, 1280), (97, 89), (4096, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sample_reaches_every_part(shape):
    step, numel = _packed.sample_step(shape), math.prod(shape)
    count = len(range(0, numel, step))
    assert min(numel, _packed.SAMPLE) <= count <= 3 * max(_packed.SAMPLE, numel // _packed.EVERY)
    parts = torch.zeros(shape, dtype=torch.bool)
    rows, columns = shape[:2]
    for n, dim in ((rows, 0), (columns, 1)):
        for of in (2, 3, 6):  # the queries alone, one of the six vectors of a modulation
            for i in range(of):
                part = parts.clone()
                part.narrow(dim, i * n // of, max(1, n // of)).fill_(True)
                assert part.view(-1)[::step].any(), (dim, of, i)
    for tap in range(math.prod(shape[2:]) if len(shape) > 2 else 0):
        part = parts.clone()
        part.view(rows, columns, -1)[..., tap] = True
        assert part.view(-1)[::step].any(), tap


@needs_native
def test_a_weight_with_gaps_is_compared_in_full():
    """Its neighbours in memory may change; a single element of its own may not."""
    base = torch.randn(200, 64)
    layer = nn.Linear(32, 200)
    layer.weight = nn.Parameter(base[:, :32])
    assert not layer.weight.is_contiguous()
    x = torch.randn(3, 32)
    zb.freeze(layer)
    expected = call(layer, x)
    base.numpy()[:, 32:] += 1
    testing.assert_bitwise_equal(call(layer, x), expected)
    base.numpy()[77, 5] += 1
    with pytest.raises(RuntimeError, match="was written while frozen"):
        call(layer, x)


GEOMETRY = {
    "circular": {"padding_mode": "circular"},
    "reflect": {"padding_mode": "reflect"},
    "dilation": {"dilation": (2, 2)},
    "stride": {"stride": (2, 1)},
    "stride, a number": {"stride": 2},
    "padding": {"padding": (0, 2)},
    "padding, a list": {"padding": [0, 2]},
    "padding, a number": {"padding": 2},
    "same": {"padding": "same"},
    "too wide": {"dilation": (9, 9)},
    "same, strided": {"padding": "same", "stride": (2, 2)},
    "no stride": {"stride": (0, 0)},
    "negative": {"padding": (-1, 0)},
    "groups": {"groups": 2},
    "in_channels": {"in_channels": 4},
}


@pytest.mark.parametrize("weight", ["dense", "zero"])
@pytest.mark.parametrize("change", GEOMETRY)
def test_a_geometry_that_changes_is_followed(change, weight):
    oracle = randomise(nn.Conv2d(8, 16, 3, padding=1))
    if weight == "zero":
        nn.init.zeros_(oracle.weight)
    x = torch.randn(2, 8, 7, 9).to(memory_format=torch.channels_last)
    model = copy.deepcopy(oracle)
    zb.freeze(model)
    call(model, x)
    results = []
    for conv in (model, oracle):
        for name, value in GEOMETRY[change].items():
            setattr(conv, name, value)
        pads = [conv.padding] * 2 if isinstance(conv.padding, int) else conv.padding
        if not isinstance(pads, str):  # as torch keeps it for the padding modes
            conv._reversed_padding_repeated_twice = [n for n in reversed(pads) for _ in range(2)]
        try:
            results.append(call(conv, x))
        except RuntimeError as error:
            results.append(str(error))
    got, expected = results
    if isinstance(expected, str):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected)
    zb.unfreeze(model)
    if not isinstance(expected, str):
        testing.assert_bitwise_equal(call(model, x), expected)


class Tiled(nn.Conv2d):
    """Its forward is torch's, what that computes with is not."""

    def _conv_forward(self, x, weight, bias):
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 0, 0), mode="circular"), weight, bias)


def test_a_convolution_that_computes_otherwise_is_left_alone():
    model, x = nn.Sequential(randomise(Tiled(4, 4, 3))), torch.randn(1, 4, 6, 6)
    expected = call(model, x)
    assert "a way of its own" in zb.freeze(model).skipped["0"] and frozen_layers(model) == 0
    testing.assert_bitwise_equal(call(model, x), expected)


@needs_native
def test_a_weight_shared_with_a_stale_copy_freezes_anew():
    first, second = randomise(nn.Linear(64, 32)), nn.Linear(64, 32)
    second.weight = first.weight
    x = torch.randn(2, 64)
    zb.freeze(first)
    first.weight.data.mul_(2)
    zb.freeze(second, check=True)
    for layer in (first, second):
        torch.testing.assert_close(call(layer, x), call(copy.deepcopy(layer), x))
    first.weight.data.view(-1)[1] += 1e-3  # one that no sample sees: the copy is one that keeps the original
    with pytest.raises(RuntimeError, match="written"):
        call(second, x)
    zb.unfreeze(first)
    assert _packed.is_frozen(second.weight)
    zb.unfreeze(second)


def test_one_modulation_in_two_blocks_is_decided_for_each():
    """The verdict about a shared weight is not that about another bias."""
    torch.manual_seed(0)
    first, second = zb.nn.DiTBlock(32, 2).eval(), zb.nn.DiTBlock(32, 2).eval()
    second.adaLN_modulation[-1].weight = first.adaLN_modulation[-1].weight
    nn.init.normal_(second.adaLN_modulation[-1].bias)
    x, c = torch.randn(1, 4, 32), torch.randn(1, 32)
    model = nn.ModuleList([first, second])
    with torch.no_grad():
        expected = [block(x, c) for block in model]
        zb.freeze(model)
        for block, y in zip(model, expected, strict=True):
            torch.testing.assert_close(block(x, c), y)
    assert not torch.equal(expected[1], x)
