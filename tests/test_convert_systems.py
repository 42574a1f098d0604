"""What surrounds a model: compile, export, autocast and GradScaler, checkpoints, accumulation, optimizers, EMA, ranks."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeroblock as zb
from zeroblock.testing import counters, eager, reset_counters

from . import convert_oracles_edm as oracles
from .convert_cases import randomize_, run


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.res = eager.ResBlock(32, 16, 0.0, use_scale_shift_norm=True)
        self.edm = oracles.UNetBlock(32, 32, 16)
        self.out = eager.zero_module(nn.Conv2d(32, 3, 3, padding=1))

    def forward(self, x, emb):
        return self.out(self.edm(self.res(self.first(x), emb), emb))


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.final_layer = eager.DiTBlock(16, 2), eager.FinalLayer(16, 1, 4)

    def forward(self, x, c):
        return self.final_layer(self.block(x, c), c)


MODELS = {
    "unet": (UNet, lambda: (torch.randn(2, 3, 4, 4), torch.randn(2, 16))),
    "dit": (DiT, lambda: (torch.randn(2, 5, 16), torch.randn(2, 16))),
}


def pair(name, randomize=False):
    """(accelerated, untouched, inputs)"""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    theirs = make()
    ours = copy.deepcopy(theirs)
    assert not zb.accelerate(ours).left_alone
    if randomize:
        ours.load_state_dict(randomize_(theirs).state_dict())
    return ours, theirs, inputs()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def skipped():
    return sum(n for _, n in counters().values())


# ---- compile and export ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_compile_without_a_graph_break(name):
    """The weights decide at each run, also after compilation."""
    ours, theirs, inputs = pair(name)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for values in (theirs.state_dict(), randomize_(copy.deepcopy(theirs)).state_dict()):
        values = {n: v.clone() for n, v in values.items()}
        for model in (ours, theirs):
            for n, p in model.named_parameters():
                p.data.copy_(values[n])
        (y,), got = run(compiled, tuple(t.requires_grad_() for t in inputs))
        (expected_y,), expected = run(theirs, inputs)
        close(y, expected_y)
        for n, g in expected.items():
            close(got[n if n.startswith("input") else f"_orig_mod.{n}"], g)


@pytest.mark.parametrize("name", MODELS)
def test_export(name):
    ours, theirs, inputs = pair(name)
    exported = torch.export.export(ours, inputs).module()
    close(exported(*inputs), theirs(*inputs))
    exported.load_state_dict(randomize_(theirs).state_dict())
    close(exported(*inputs), theirs(*inputs))


# ---- mixed precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_autocast_and_grad_scaler(name, dtype):
    """Among the steps is one whose gradients overflow: the scaler skips it, and the branches stay as they are."""
    ours, theirs, _ = pair(name)
    finals = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for i in range(5):
            inputs = MODELS[name][1]()
            before = [p.clone() for p in model.parameters()]
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                y = model(*inputs)
            loss = (y.float() - 1).square().mean() * (float("inf") if i == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved == (i != 1)
        finals.append([p.detach() for p in model.parameters()])
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)


# ---- activation checkpointing ---------------------------------------------------------------------------------------


class OpenAICheckpoint(torch.autograd.Function):
    """guided-diffusion's: no graph at first, everything again in backward, gradients by autograd.grad."""

    @staticmethod
    def forward(ctx, run, count, *tensors):
        ctx.run, ctx.inputs, ctx.parameters = run, list(tensors[:count]), list(tensors[count:])
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx, dy):
        inputs = [t.detach().requires_grad_() for t in ctx.inputs]
        with torch.enable_grad():
            y = ctx.run(*(t.view_as(t) for t in inputs))
        return None, None, *torch.autograd.grad(y, inputs + ctx.parameters, dy, allow_unused=True)


CHECKPOINTS = {
    "reentrant": lambda m, *a: checkpoint(m, *a, use_reentrant=True),
    "not reentrant": lambda m, *a: checkpoint(m, *a, use_reentrant=False),
    "guided-diffusion": lambda m, *a: OpenAICheckpoint.apply(m, len(a), *a, *m.parameters()),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("randomize", [False, True], ids=["zero", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointed(name, randomize, kind):
    ours, theirs, inputs = pair(name, randomize)
    results = []
    for model in (ours, theirs):
        block = model.res if name == "unet" else model.block
        leaves = tuple(t.clone().requires_grad_() for t in inputs)
        x = model.first(leaves[0]) if name == "unet" else leaves[0]
        y = CHECKPOINTS[kind](block, x, leaves[1])
        y.square().mean().backward()
        results.append([y.detach(), *(t.grad for t in leaves), *(p.grad for p in block.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        close(a, b)


# ---- optimizers and EMA ---------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "loop": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, foreach=False),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, fused=True),  # bumps no version counter
    "fused adam": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-2, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_optimizers_with_accumulation(name, kind):
    """Two micro-batches a step: the zero phase lasts four forwards of the blocks, then nothing is skipped."""
    ours, theirs, _ = pair(name)
    counted = "ResBlock" if name == "unet" else "DiTBlock"
    finals, plans = [], []
    for model in (ours, theirs):
        torch.manual_seed(1)
        optimizer = OPTIMIZERS[kind](model.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            for _ in range(2):
                reset_counters()
                (model(*MODELS[name][1]()) - 1).square().mean().backward()
                if model is ours:
                    plans.append(counters()[counted][1] > 0)
            optimizer.step()
        finals.append([p.detach() for p in model.parameters()])
    assert plans == [True] * 4 + [False] * 6
    for a, b in zip(*finals, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_data_swap_of_an_ema(name):
    """Averages that are written through .data and taken back: no version counter tells of it."""
    ours, theirs, inputs = pair(name)
    average = [torch.randn_like(p) * 0.2 for p in theirs.parameters()]
    kept = [p.detach().clone() for p in theirs.parameters()]
    for values, zero_now in ((kept, True), (average, False), (kept, True)):
        for model in (ours, theirs):
            for p, v in zip(model.parameters(), values, strict=True):
                p.data.copy_(v)
        reset_counters()
        with torch.no_grad():
            y = ours(*inputs)
        assert bool(skipped()) == zero_now
        close(y, theirs(*inputs))


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_ddp_and_fsdp_on_two_ranks(tmp_path):
    worker = Path(__file__).with_name("convert_dist_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), "2", str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
