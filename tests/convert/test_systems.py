"""What surrounds a model: compile, export, autocast, GradScaler, checkpoints, accumulation, optimizers, EMA, ranks."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeroblock as zb
from zeroblock.testing import assert_error_budget, counters, eager, reset_counters, rounding
from zeroblock.tools import models

from ..twins import assert_gradients
from . import test_edm, test_guided, test_others
from .cases import outputs, randomize_, run
from .ranks import run_on_two_ranks
from .system_models import COUNTED, MODELS

ONE_OF_EACH = {
    **{name: test_others.CASES[name] for name in ("fixup-bottleneck", "rezero", "pixart", "controlnet")},
    **{name: test_guided.CASES[name] for name in ("down", "sgm-video", "attention-new")},
    **{name: test_edm.CASES[name] for name in ("attention", "edm2")},
}
if importlib.util.find_spec("timm"):
    from . import test_dit

    ONE_OF_EACH["timm"] = test_dit.CASES["timm"]


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


def leaves(inputs, dtype=torch.float32):
    return tuple(t.detach().to(dtype).requires_grad_() for t in inputs)


def assert_as_good(ours, theirs, inputs, y, got):
    """y and the gradients are as near to those in float64 as the untouched model's."""
    (expected_y,), expected = run(theirs, leaves(inputs))
    (exact_y,), exact = run(copy.deepcopy(theirs).double(), leaves(inputs, torch.float64))
    assert_error_budget(y.detach(), expected_y.detach(), exact_y.detach(), "y")
    assert_gradients((got, expected, exact))


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
        (y,), got = run(compiled, leaves(inputs))
        assert_as_good(ours, theirs, inputs, y, {n.removeprefix("_orig_mod."): g for n, g in got.items()})


@pytest.mark.parametrize("name", MODELS)
def test_export(name):
    ours, theirs, inputs = pair(name)
    exported = torch.export.export(ours, inputs).module()
    for _ in range(2):
        exact = copy.deepcopy(theirs).double()(*(t.double() for t in inputs))
        assert_error_budget(exported(*inputs).detach(), theirs(*inputs).detach(), exact.detach())
        exported.load_state_dict(randomize_(theirs).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_family_compiles_in_one_graph(name):
    case = ONE_OF_EACH[name]
    torch.manual_seed(0)
    theirs = case.make().eval()
    ours = copy.deepcopy(theirs)
    zb.accelerate(ours)
    torch._dynamo.reset()
    with torch.no_grad():
        inputs = case.inputs()
        got = outputs(torch.compile(ours, fullgraph=True, backend="aot_eager")(*inputs))
        exact = outputs(case.exact(theirs)(*(t.double() if isinstance(t, torch.Tensor) else t for t in inputs)))
        for y, expected_y, exact_y in zip(got, outputs(theirs(*inputs)), exact, strict=True):
            assert_error_budget(y, expected_y, exact_y)


# ---- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["UNet", "DiT"])
def test_whole_model_that_tells_blocks_by_their_class(name):
    """The demo's networks with eager blocks; the U-Net passes the embedding to instances of ResBlock alone."""
    torch.manual_seed(0)
    options = {"model_channels": 32} if name == "UNet" else {"image_size": 8, "hidden_size": 16, "depth": 2}
    theirs = getattr(models, name)(eager, num_classes=3, num_heads=2, **options)
    ours = copy.deepcopy(theirs)
    report = zb.accelerate(ours)
    assert {b.block for b in report.left_alone} == ({"AttentionBlock"} if name == "UNet" else set())
    x, *labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 2])
    for _ in range(2):
        (y,), got = run(ours, (x, *labels))
        (expected_y,), expected = run(theirs, (x, *labels))
        (exact_y,), exact = run(copy.deepcopy(theirs).double(), (x.double(), *labels))
        assert_error_budget(y.detach(), expected_y.detach(), exact_y.detach())
        assert_gradients((got, expected, exact))
        ours.load_state_dict(randomize_(theirs).state_dict())
    reset_counters()
    ours(x, *labels)
    assert report.counters() and not any(n for _, n in counters().values())


# ---- mixed precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_autocast_and_grad_scaler(name, dtype):
    """Among the steps is one whose gradients overflow: the scaler skips it, and the branches stay as they are."""
    ours, theirs, _ = pair(name)
    exact = copy.deepcopy(theirs).double()
    start = torch.cat([p.detach().flatten() for p in exact.parameters()])
    finals = []
    for model in (ours, theirs, exact):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for i in range(5):
            inputs = [t.double() if model is exact else t for t in MODELS[name][1]()]
            before = [p.clone() for p in model.parameters()]
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=model is not exact):
                y = model(*inputs)
            loss = ((y if model is exact else y.float()) - 1).square().mean() * (float("inf") if i == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved == (i != 1)
        finals.append(torch.cat([p.detach().flatten().double() for p in model.parameters()]) - start)
    got, expected, exact = finals  # how far the parameters moved, computed in dtype
    assert (got - exact).norm() <= 2 * (expected - exact).norm() + rounding(dtype) * exact.norm() and exact.any()


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


class Checkpointed(nn.Module):
    def __init__(self, block, by):
        super().__init__()
        self.block, self.by = block, by

    def forward(self, *args):
        return self.by(self.block, *args)


def learning(module):
    return [p for p in module.parameters() if p.requires_grad]


CHECKPOINTS = {
    "reentrant": lambda m, *a: checkpoint(m, *a, use_reentrant=True),
    "not reentrant": lambda m, *a: checkpoint(m, *a, use_reentrant=False),
    "guided-diffusion": lambda m, *a: OpenAICheckpoint.apply(m, len(a), *a, *learning(m)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("randomize", [False, True], ids=["zero", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointed(name, randomize, kind):
    ours, theirs, inputs = pair(name, randomize)
    for model in (ours, theirs):
        part = "res" if hasattr(model, "res") else "block"
        setattr(model, part, Checkpointed(getattr(model, part), CHECKPOINTS[kind]))
    (y,), got = run(ours, leaves(inputs))
    assert_as_good(ours, theirs, inputs, y, got)


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
    exact = copy.deepcopy(theirs).double()
    counted = COUNTED[name]
    finals, plans = [], []
    for model, dtype in ((ours, torch.float32), (theirs, torch.float32), (exact, torch.float64)):
        torch.manual_seed(1)
        optimizer = OPTIMIZERS[kind](model.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            for _ in range(2):
                reset_counters()
                (model(*(t.to(dtype) for t in MODELS[name][1]())) - 1).square().mean().backward()
                if model is ours:
                    plans.append(counters()[counted][1] > 0)
            optimizer.step()
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert plans == [True] * 4 + [False] * 6
    assert_error_budget(*finals, "parameters")


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
        assert any(n for _, n in counters().values()) == zero_now
        with torch.no_grad():
            expected, exact = theirs(*inputs), copy.deepcopy(theirs).double()(*(t.double() for t in inputs))
        assert_error_budget(y, expected, exact)


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_ddp_and_fsdp_on_two_ranks(tmp_path):
    """All models in one pair of processes: torch and diffusers are imported once by each."""
    packages = {"guided": "torch", "dit": "diffusers", "lora": "peft"}
    names = [name for name, package in packages.items() if importlib.util.find_spec(package)]
    run_on_two_ranks(Path(__file__).with_name("dist_worker.py"), tmp_path, *names)
    if missing := sorted(packages.keys() - set(names)):
        pytest.skip(f"passed, but for {missing}: {[packages[name] for name in missing]} not installed")
