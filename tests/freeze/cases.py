"""Models, and what every test of freeze and unfreeze watches: that copies are used, and that none is left behind."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.steps import packed as _packed
from zeroblock.testing import eager

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
needs_onednn = pytest.mark.skipif(not _packed.ONEDNN, reason="this build of torch has no oneDNN")
needs_native = pytest.mark.skipif(
    testing.CPU_MISSING is not None, reason="without native kernels no linear layer uses its copy"
)


@pytest.fixture(autouse=True)
def nothing_stays_frozen():
    yield
    if _packed.copies:
        gc.collect()
    left = len(_packed.copies)
    _packed.copies.clear()
    assert not left, "a test's copies outlive its modules"


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(1000 + seed)  # a stream of its own: inputs must not resemble weights
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else 0.3))
    return model.eval()


def compare(model: nn.Module, oracle: nn.Module, *inputs: torch.Tensor, draws: bool = False) -> None:
    with torch.no_grad():
        expected = oracle(*inputs)
        exact = copy.deepcopy(oracle).double()(*(t.double() for t in inputs))
        got = model(*inputs)
    testing.assert_error_budget(got, expected, exact, draws=draws)
    assert got.stride() == expected.stride()
    assert all(got.data_ptr() != t.data_ptr() for t in inputs)


def blocks(dtype):
    """name: (model, oracle, inputs), the tails not zero."""
    torch.manual_seed(3)
    x, emb = torch.randn(2, 64, 8, 8), torch.randn(2, 48)
    tokens, c = torch.randn(2, 16, 64), torch.randn(2, 64)
    makers = {
        "film": (lambda m: m.ResBlock(64, 48, 0.0, use_scale_shift_norm=True), (x, emb)),
        "wider": (lambda m: m.ResBlock(64, 48, 0.1, out_channels=96), (x, emb)),
        "down": (lambda m: m.ResBlock(64, 48, 0.0, down=True), (x, emb)),
        "dit": (lambda m: m.DiTBlock(64, 4), (tokens, c)),
        "final": (lambda m: m.FinalLayer(64, 2, 4), (tokens, c)),
    }
    for name, (make, inputs) in makers.items():
        oracle, model = randomise(make(eager)).to(dtype), make(zb.nn).to(dtype).eval()
        model.load_state_dict(oracle.state_dict())
        yield name, model, oracle, [t.to(dtype) for t in inputs]


def model_and_input():
    return randomise(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 8, 1))), torch.randn(
        2, 8, 6, 6
    )


def frozen_layers(model) -> int:
    return sum(hasattr(type(m), "_zeroblock_original") for m in model.modules())


def call(model, x):
    with torch.no_grad():
        return model(x)
