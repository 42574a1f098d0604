"""Memory formats of modules: zero, dense and frozen ones return what their eager twins return."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import counters, eager, reset_counters

from ..formats import LAST, LAYOUTS, SPACE, TOKENS, formats
from ..twins import EAGER


def _body(dims, channels=4):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(nn.GroupNorm(2, channels), nn.SiLU(), conv(channels, channels, 3, padding=1))


def _zero_conv(dims):
    return lambda ns: getattr(ns, f"ZeroConv{dims}d")(4, 4, 3, padding=1)


MODULES = {
    **{f"ResBlock-{dims}d": (lambda ns, d=dims: ns.ResBlock(32, 8, 0.0, dims=d), dims, 32, True) for dims in (1, 2, 3)},
    "ResBlock-wider": (lambda ns: ns.ResBlock(32, 8, 0.0, out_channels=64), 2, 32, True),
    "ResBlock-film": (lambda ns: ns.ResBlock(32, 8, 0.0, use_scale_shift_norm=True), 2, 32, True),
    **{f"ZeroConv{dims}d": (_zero_conv(dims), dims, 4, False) for dims in (1, 2, 3)},
    "ZeroConv2d-1x1": (lambda ns: ns.ZeroConv2d(4, 4, 1), 2, 4, False),
    "ZeroConv2d-to-one": (lambda ns: ns.ZeroConv2d(4, 1, 3, padding=1), 2, 4, False),
    **{
        f"ResidualBranch-{dims}d": (
            lambda ns, d=dims: ns.ResidualBranch(
                _body(d), eager.zero_module((nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1](4, 4, 3, padding=1))
            ),
            dims,
            4,
            False,
        )
        for dims in (1, 2, 3)
    },
    "ResidualBranch-gate": (
        lambda ns: ns.ResidualBranch(_body(2), nn.Conv2d(4, 4, 1), nn.Parameter(torch.zeros(1))),
        2,
        4,
        False,
    ),
    **{f"ReZero-{dims}d": (lambda ns, d=dims: ns.ReZero(_body(d)), dims, 4, False) for dims in (1, 2, 3)},
    "FixupBasicBlock": (lambda ns: ns.FixupBasicBlock(4, 4), 2, 4, False),
}


def pair(name, phase, weights):
    build, dims, channels, embedded = MODULES[name]
    torch.manual_seed(0)
    ours, theirs = build(zb.nn), build(EAGER)
    with torch.no_grad():
        for n, p in ours.named_parameters():
            if phase == "dense" or not (p == 0).all() or n.endswith("bias"):
                p.copy_(torch.randn_like(p) * 0.3)
    theirs.load_state_dict(ours.state_dict())
    if weights == "channels-last" and dims > 1:
        ours, theirs = (m.to(memory_format=LAST[dims + 2]) for m in (ours, theirs))
    return ours.eval(), theirs.eval(), dims, channels, embedded


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("weights", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, weights, phase, frozen):
    ours, theirs, dims, channels, embedded = pair(name, phase, weights)
    emb = (torch.randn(2, 8),) if embedded else ()
    if frozen:
        zb.freeze(ours)
    reset_counters()
    for layout in LAYOUTS:
        # Of one image that lies in memory otherwise a sum goes by the branch, of which a skipped body says nothing.
        if layout == "from an image" and (embedded or name.startswith("ReZero")):
            continue
        x = LAYOUTS[layout](torch.randn(2, channels, *SPACE[dims]))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                results = [[m(x, *emb).detach()] for m in (ours, theirs)]
            formats(results, (name, weights, layout, grad))
    counted = [n for n, (_, skipped) in counters().items() if skipped]
    assert bool(counted) == (phase == "zero"), counters()
    zb.unfreeze(ours)


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", ["ReZero", "ReZero-row", "ZeroLinear", "ResidualBranch"])
def test_modules_on_tokens(name, phase):
    build = {
        "ReZero": lambda ns: ns.ReZero(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6))),
        "ReZero-row": lambda ns: ns.ResidualBranch(nn.LayerNorm(6), nn.Linear(6, 6), nn.Parameter(torch.zeros(6))),
        "ZeroLinear": lambda ns: ns.ZeroLinear(6, 6),
        "ResidualBranch": lambda ns: ns.ResidualBranch(nn.LayerNorm(6), eager.zero_module(nn.Linear(6, 6))),
    }[name]
    torch.manual_seed(0)
    ours, theirs = build(zb.nn), build(EAGER)
    if phase == "dense":
        nn.init.normal_(getattr(ours, "resweight", None) if name == "ReZero" else next(ours.parameters()))
        for p in ours.parameters():
            nn.init.normal_(p)
    theirs.load_state_dict(ours.state_dict())
    for layout, grad in itertools.product(TOKENS, (False, True)):
        x = TOKENS[layout](torch.randn(2, 5, 6))
        with torch.set_grad_enabled(grad):
            formats([[m(x).detach()] for m in (ours, theirs)], (name, layout, grad))


@pytest.mark.parametrize("layout", TOKENS)
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_transformer_blocks_give_contiguous_tokens(layout, grad):
    """Zero or not, so that what follows sees no difference when the gates begin to move."""
    torch.manual_seed(0)
    block = zb.nn.DiTBlock(8, 2)
    x, c = TOKENS[layout](torch.randn(2, 5, 8)), torch.randn(2, 8)
    for phase in ("zero", "dense"):
        if phase == "dense":
            nn.init.normal_(block.adaLN_modulation[1].weight)
        with torch.set_grad_enabled(grad):
            y = block(x, c)
        assert y.is_contiguous() and y.data_ptr() != x.data_ptr(), phase
