"""zeroblock's blocks, and the eager ones the other tests trust, against the blocks of diffusers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.testing import eager

from ..twins import assert_within_budget, redrawn

resnet = pytest.importorskip("diffusers.models.resnet", reason="the oracles are in diffusers, which is not here")
attention = pytest.importorskip("diffusers.models.attention", reason="the oracles are in diffusers, which is not here")

RESNET_KEYS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
DIT_KEYS = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


class _Given(nn.Module):
    """In place of the block's own timestep and label embedder: the embedding that the test chose."""

    def forward(self, *_args, **_kwargs):
        return self.embedding


class DiffusersDiT(nn.Module):
    """BasicTransformerBlock with ada_norm_zero as a function of (x, c), as DiT's block is."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.block = attention.BasicTransformerBlock(
            dim,
            heads,
            dim // heads,
            num_embeds_ada_norm=4,
            attention_bias=True,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        )
        self.block.norm1.emb = _Given()

    def forward(self, x, c):
        self.block.norm1.emb.embedding = c
        index = torch.zeros(x.shape[0], dtype=torch.long)
        return self.block(x, timestep=index, class_labels=index)


def _translated(oracle: nn.Module, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The oracle's parameters, or their gradients, under the names of our blocks."""
    if isinstance(oracle, DiffusersDiT):
        qkv = [{k: values[f"block.attn1.to_{n}.{k}"] for k in ("weight", "bias")} for n in "qkv"]
        result = {f"attn.qkv.{k}": torch.cat([t[k] for t in qkv]) for k in ("weight", "bias")}
        keys, values = DIT_KEYS, {k.removeprefix("block."): v for k, v in values.items()}
    else:
        result, keys = {}, RESNET_KEYS
    for theirs, ours in keys.items():
        result |= {f"{ours}.{k}": values[f"{theirs}.{k}"] for k in ("weight", "bias") if f"{theirs}.{k}" in values}
    return result


def _run(block: nn.Module, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = block(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    named = dict(block.named_parameters())
    grads = torch.autograd.grad(y, [*leaves, *named.values()], dy)
    parameters = dict(zip(named, grads[len(leaves) :], strict=True))
    if isinstance(block, (resnet.ResnetBlock2D, DiffusersDiT)):
        parameters = _translated(block, parameters)
    return {"y": y.detach(), **{f"input {i}": g for i, g in enumerate(grads[: len(leaves)])}, **parameters}


def _resnet(film: bool, channels: int, out_channels: int) -> nn.Module:
    return resnet.ResnetBlock2D(
        in_channels=channels,
        out_channels=out_channels,
        temb_channels=24,
        groups=32,
        eps=1e-5,
        time_embedding_norm="scale_shift" if film else "default",
    )


CASES = {
    "resnet-add": (lambda: _resnet(False, 64, 64), lambda ns: ns.ResBlock(64, 24, 0.0)),
    "resnet-add-1x1": (lambda: _resnet(False, 64, 96), lambda ns: ns.ResBlock(64, 24, 0.0, 96)),
    "resnet-film": (lambda: _resnet(True, 64, 64), lambda ns: ns.ResBlock(64, 24, 0.0, use_scale_shift_norm=True)),
    "resnet-film-1x1": (
        lambda: _resnet(True, 96, 64),
        lambda ns: ns.ResBlock(96, 24, 0.0, 64, use_scale_shift_norm=True),
    ),
    "dit": (lambda: DiffusersDiT(48, 4), lambda ns: ns.DiTBlock(48, 4)),
}


def _pair(name: str, phase: str, namespace) -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    make_oracle, make_block = CASES[name]
    oracle = make_oracle()
    with torch.no_grad():
        for p in oracle.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if phase == "zero" and name == "dit":
            gates = [t.unflatten(0, (6, -1)) for t in oracle.block.norm1.linear.parameters()]
            for t in gates:
                t[[2, 5]] = 0
        elif phase == "zero":
            oracle.conv2.weight.zero_()
    block = make_block(namespace)
    block.load_state_dict(_translated(oracle, oracle.state_dict()))
    if name == "dit":
        return oracle, block, [torch.randn(3, 7, 48), torch.randn(3, 48)]
    return oracle, block, [torch.randn(2, block.channels, 6, 4), torch.randn(2, 24)]


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_eager_block_is_bit_equal_to_diffusers(name, phase):
    oracle, block, inputs = _pair(name, phase, eager)
    with torch.no_grad():
        testing.assert_bitwise_equal(block(*inputs), oracle(*inputs))


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_eager_gradients_are_those_of_diffusers(name, phase):
    oracle, block, inputs = _pair(name, phase, eager)
    got, expected = (_run(m.double(), [t.double() for t in inputs]) for m in (block, oracle))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_block_matches_diffusers(name, phase, dtype):
    oracle, block, inputs = _pair(name, phase, zb.nn)
    oracle, block, inputs = oracle.to(dtype), block.to(dtype), [t.to(dtype) for t in inputs]
    testing.reset_counters()
    block(*inputs)
    assert (testing.counters()[type(block).__name__][1] > 0) == (phase == "zero")
    exact_oracle = copy.deepcopy(oracle).double()

    def sample(seed):
        tensors = redrawn(inputs, seed)
        return _run(block, tensors), _run(oracle, tensors), _run(exact_oracle, [t.double() for t in tensors])

    assert_within_budget(sample)
