"""EDM's blocks accelerated."""

import pytest
import torch

import zeroblock as zb
from zeroblock.testing import counters, reset_counters

from . import oracles_edm as oracles
from .cases import Case, assert_drop_in

EMB = (2, 16)


def block(skipped=1, channels=16, **options):
    branches = 1 + bool(options.get("num_heads"))
    return Case(
        lambda: oracles.UNetBlock(16, channels, 16, **options),
        lambda: (torch.randn(2, 16, 4, 4), torch.randn(EMB)),
        {"UNetBlock": skipped} if skipped else {},
        branches,
    )


SONG = {"skip_scale": 0.5**0.5, "eps": 1e-6, "adaptive_scale": False, "resample_proj": True, "init_zero": 1e-5}
CASES = {
    "adm": block(),
    "wider": block(channels=32),
    "attention": block(2, num_heads=2),
    "up": block(up=True),
    "down, attention, dropout": block(2, down=True, num_heads=2, dropout=0.2),
    "scaled": block(2, skip_scale=0.5**0.5, num_heads=2),
    "added embedding": block(adaptive_scale=False, resample_proj=True, up=True),
    "song": block(0, num_heads=1, down=True, dropout=0.1, **SONG),
}


EDM2 = Case(
    oracles.UNet,
    lambda: (torch.randn(2, 3, 8, 8), torch.randn(2, 6)),
    {},
    3,
    skipped_inference={"EDM2UNet": 1, "MPConv": 3},
)
CASES["edm2"] = EDM2


@pytest.mark.parametrize("name", CASES)
def test_drop_in(name):
    assert_drop_in(CASES[name])


def test_weights_that_are_zero_only_in_half_precision():
    """The master weight decides nothing: what is convolved is its copy in the dtype of x."""
    theirs = oracles.UNetBlock(16, 16, 16)
    theirs.conv1.weight.data.fill_(1e-9)
    ours = oracles.UNetBlock(16, 16, 16)
    ours.load_state_dict(theirs.state_dict())
    (row,) = zb.accelerate(ours).branches
    assert row.zero is False
    x, emb = torch.randn(2, 16, 4, 4).half(), torch.randn(EMB)
    assert torch.equal(ours(x, emb), theirs(x, emb))
    assert torch.equal(ours(x.float(), emb), theirs(x.float(), emb)) or not torch.equal(ours(x.float(), emb), x.float())


@torch.no_grad()
def test_gains_of_edm2_in_inference():
    """First the network runs, without its embedding and output layers, then it does not; a gain wakes its layer."""
    model = EDM2.make().eval()
    zb.accelerate(model)
    inputs = EDM2.inputs()
    for expected in ({"EDM2UNet": (0, 1), "MPConv": (0, 3)}, {"EDM2UNet": (0, 1)}):
        reset_counters()
        assert not model(*inputs).any()
        assert counters() == expected
    model.out_gain.fill_(1.0)
    reset_counters()
    assert model(*inputs).any() and counters() == {"EDM2UNet": (1, 0), "MPConv": (1, 2)}
