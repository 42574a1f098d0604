"""Rule 8 of the zero contract: hooks on bypassed submodules and BatchNorm in train mode stop a skip."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks

import zeroblock as zb
from zeroblock.testing import assert_bitwise_equal, counters, eager, reset_counters

from ..twins import assert_gradients, run
from .cases import CASES, image, was_skipped, zeroed


def skipped(fn):
    """Whether fn() skipped anything."""
    reset_counters()
    fn()
    return any(n for _, n in counters().values())


# ---- hooks ----------------------------------------------------------------------------------------------------------

BYPASSED = {
    "ResBlock": ["in_layers.0", "in_layers.1", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"],
    "DiTBlock": ["attn", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.act", "mlp.fc2", "norm1", "norm2"],
    "FinalLayer": ["adaLN_modulation.1", "linear", "norm_final"],
    "ResidualBranch-conv": ["body", "body.0", "body.2", "tail"],
    "ReZero": ["body", "body.1"],
    "FixupBasicBlock": ["conv1", "conv2"],
}
HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "full_backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "full_backward_pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", BYPASSED)
def test_hooks_on_submodules_fire_as_in_eager(name, kind):
    case = CASES[name]
    for path in BYPASSED[name]:
        calls = []
        for module in case.pair():
            seen = []
            handle = HOOKS[kind](module.get_submodule(path), seen)
            run(module, case.example())
            calls.append(len(seen))
            handle.remove()
        assert calls[0] == calls[1] > 0, path


@pytest.mark.parametrize("name", BYPASSED)
def test_a_hooked_branch_still_equals_eager(name):
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = case.example()
    oracle = case.pair()[1].double()
    for module in (ours, theirs, oracle):
        module.get_submodule(BYPASSED[name][0]).register_forward_hook(lambda m, i, y: y * 1.5)
    exact = run(oracle, tuple(t.detach().double().requires_grad_() for t in inputs))[1]
    (y, got), (expected_y, expected) = run(ours, inputs), run(theirs, inputs)
    assert torch.equal(y, expected_y)
    assert_gradients((got, expected, exact))


GLOBAL_HOOKS = {
    "forward": global_hooks.register_module_forward_hook,
    "forward_pre": global_hooks.register_module_forward_pre_hook,
    "full_backward": global_hooks.register_module_full_backward_hook,
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
@pytest.mark.parametrize("name", ["ResBlock", "DiTBlock", "ResidualBranch-conv", "FinalLayer"])
def test_global_hooks_see_every_submodule(name, kind):
    case = CASES[name]
    calls = []
    for module in case.pair():
        seen = set()
        names = {m: n for n, m in module.named_modules()}
        handle = GLOBAL_HOOKS[kind](lambda m, *_, seen=seen, names=names: seen.add(names[m]))
        try:
            run(module, case.example())
        finally:
            handle.remove()
        calls.append(seen)
    assert calls[0] == calls[1]
    assert skipped(lambda: case.pair()[0](*case.example()))


@pytest.mark.parametrize("name", BYPASSED)
def test_replaced_forward_on_an_instance_runs(name):
    """Offloading and layerwise casting wrap the forward of a leaf, and hand it other weights."""
    case = CASES[name]
    for path in BYPASSED[name]:
        module = case.pair()[0]
        leaf, seen = module.get_submodule(path), []

        def watched(*args, leaf=leaf, seen=seen):
            seen.append(1)
            return type(leaf).forward(leaf, *args)

        leaf.forward = watched
        module(*case.example())
        assert len(seen) == 1, path


def test_offloaded_weight_on_meta_is_served_by_its_hook():
    case = CASES["ResBlock"]
    ours, theirs = case.pair()
    conv = ours.out_layers[3]
    kept = conv.weight.data.clone().fill_(0.25)
    theirs.out_layers[3].weight.data.copy_(kept)
    conv.weight = nn.Parameter(kept.to("meta"))
    conv.forward = lambda h: nn.functional.conv2d(h, kept, conv.bias, padding=1)
    with torch.no_grad():
        inputs = case.example()
        torch.testing.assert_close(ours(*inputs), theirs(*inputs))


def test_hooks_on_the_block_itself_and_on_the_shortcut_do_not_stop_a_skip():
    case = CASES["ResBlock-add-1x1"]
    ours, _ = case.pair()
    seen = []
    for m in (ours, ours.skip_connection):
        m.register_forward_hook(lambda *_: seen.append("forward"))
        m.register_full_backward_hook(lambda *_: seen.append("backward"))
    assert was_skipped("ResBlock", lambda: ours(*case.example()).sum().backward())
    assert sorted(seen) == ["backward", "backward", "forward", "forward"]


# ---- running statistics ---------------------------------------------------------------------------------------------

LEARNING = {
    "BatchNorm": lambda: nn.BatchNorm2d(32),
    "InstanceNorm": lambda: nn.InstanceNorm2d(32, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("norm", LEARNING)
@pytest.mark.parametrize("mode", ["training", "frozen tail", "no grad"])
def test_norm_with_running_statistics_learns_as_in_eager(mode, norm):
    def step(ns):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), LEARNING[norm](), nn.ReLU())
        branch = ns.ResidualBranch(body, zeroed(nn.Conv2d(32, 32, 1)))
        branch.tail.requires_grad_(mode == "training")
        with torch.set_grad_enabled(mode != "no grad"):
            y = branch(image(requires_grad=True))
        return y, branch

    (y, ours), (expected_y, theirs) = step(zb.nn), step(eager)
    assert torch.equal(y, expected_y)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert_bitwise_equal(a, b, name)
    assert ours.body[1].running_mean.any()
    ours.eval()
    assert was_skipped("ResidualBranch", lambda: ours(image()))
