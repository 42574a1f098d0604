"""Seams: the last gate of a block and the first norm of the next one in one pass, where nothing stands in between."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zeroblock as zb
from zeroblock.convert import seam
from zeroblock.convert.choice import BlockCall

from .seam_models import LAYERS, MODELS, accelerated, counted, dit, flux

ALL = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@ALL
def test_one_op_less_in_each_stream_from_the_second_call_on(name):
    make, streams, each = MODELS[name]
    model, inputs, alone = accelerated(make)
    for ops_saved in (0, streams * (LAYERS - 1), streams * (LAYERS - 1)):
        y, count = counted(model, inputs)
        assert torch.equal(y, alone) and count == each * LAYERS - ops_saved
    model.to(torch.bfloat16)
    inputs = tuple(t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs)
    with seam.paused():
        alone = model(*inputs)
    assert torch.equal(model(*inputs), alone)


@ALL
def test_nothing_of_a_call_lives_on(name):
    model, inputs, _ = accelerated(MODELS[name][0])
    gc.disable()
    try:
        for _ in range(2):
            y = model(*inputs)
            dies = weakref.ref(y), *(weakref.ref(t) for t in inputs if isinstance(t, Tensor))
            del y
            assert dies[0]() is None
    finally:
        gc.enable()
    del inputs
    assert all(find() is None for find in dies)


def _in_place(x: Tensor) -> Tensor:
    return x.add_(1.0)


def _other(x: Tensor) -> Tensor:
    return x + 1.0


@pytest.mark.parametrize("between", [_in_place, _other])
def test_what_is_added_between_blocks(between):
    """Before anything was learned, and after."""
    model, inputs, alone = accelerated(lambda: dit(between=between))
    assert all(torch.equal(model(*inputs), alone) for _ in range(3))
    model, inputs, alone = accelerated(dit)
    model(*inputs), model(*inputs)
    model.between = between
    with seam.paused():
        expected = model(*inputs)
    assert not torch.equal(expected, alone)
    assert all(torch.equal(model(*inputs), expected) for _ in range(8))
    model.between = lambda x: x
    assert all(torch.equal(model(*inputs), alone) for _ in range(40))


def test_a_condition_that_changes_between_blocks():
    model, (x, c), _ = accelerated(dit)
    model(x, c), model(x, c)

    def changes(x: Tensor) -> Tensor:
        c.mul_(-1.0)
        return x

    model.between = changes
    with seam.paused():
        expected = model(x, c), model(x, c)
    assert all(torch.equal(model(x, c), y) for y in expected)


def test_blocks_that_are_left_out_exchanged_or_repeated():
    model, inputs, _ = accelerated(dit)
    model(*inputs), model(*inputs)
    blocks = list(model.blocks)
    for order in ([0, 2, 3], [3, 2, 1, 0], [0, 0, 1, 1, 3, 3], [0]):
        model.blocks = nn.ModuleList(blocks[i] for i in order)
        with seam.paused():
            expected = model(*inputs)
        assert all(torch.equal(model(*inputs), expected) for _ in range(8)), order


def _pre_hook(block: nn.Module) -> None:
    block.register_forward_pre_hook(lambda m, args: (args[0] * 2.0, *args[1:]))


def _hook(block: nn.Module) -> None:
    block.register_forward_hook(lambda m, args, y: y * 2.0)


def _offloaded(block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda *args: forward(*args) * 2.0


def _norm_hook(block: nn.Module) -> None:
    block.norm1.register_forward_hook(lambda m, args, y: y * 2.0)


def _modulation_hook(block: nn.Module) -> None:
    block.adaLN_modulation.register_forward_hook(lambda m, args, y: y * 2.0)


@pytest.mark.parametrize("watch", [_pre_hook, _hook, _offloaded, _norm_hook, _modulation_hook])
def test_hooks_that_come_later(watch):
    model, inputs, alone = accelerated(dit)
    model(*inputs), model(*inputs)
    watch(model.blocks[2])
    with seam.paused():
        expected = model(*inputs)
    assert not torch.equal(expected, alone)
    assert all(torch.equal(model(*inputs), expected) for _ in range(8))


def test_the_next_block_is_not_touched_while_it_has_hooks():
    """Its parameters may be elsewhere until then (FSDP, offloading)."""
    model, inputs, _ = accelerated(dit)
    model(*inputs), model(*inputs)
    seen: list[str] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda m, args, i=i: seen.append(f"block {i}"))
        block.adaLN_modulation[0].register_forward_hook(lambda m, args, y, i=i: seen.append(f"modulation {i}"))
    model(*inputs)
    assert seen == [f"{what} {i}" for i in range(LAYERS) for what in ("block", "modulation")]


def test_fp16_streams_are_clipped():
    """What a block then returns is another tensor: nothing is prepared for nothing."""
    model, inputs, _ = accelerated(lambda: flux("FluxTransformerBlock"))
    model(*inputs), model(*inputs)
    model.half()
    inputs = tuple(t.half() for t in inputs)
    assert counted(model, inputs)[1] == counted(model, inputs)[1] == 6 * LAYERS


def test_training_checkpoints_and_modes_know_no_seam():
    model, inputs, alone = accelerated(dit)
    model(*inputs)

    def count(call) -> int:
        return counted(call, inputs)[1]

    with torch.inference_mode():
        assert count(model) == count(model) == 3 * LAYERS
    with torch.autocast("cpu", torch.bfloat16):
        with seam.paused():
            expected = model(*inputs)
        assert all(torch.equal(model(*inputs), expected) for _ in range(3))
    assert all(torch.equal(model(*inputs), alone) for _ in range(3))
    model.train()
    x, c = (t.clone().requires_grad_() for t in inputs)
    grads = {}
    with torch.enable_grad():
        for kind in (None, False, True):
            y = x
            for block in model.blocks:
                y = block(y, c) if kind is None else checkpoint(block, y, c, use_reentrant=kind)
            assert not hasattr(y, seam._ATTRIBUTE) or kind
            x.grad = c.grad = None
            y.square().sum().backward()
            grads[kind] = [x.grad, c.grad]
    for kind in (False, True):
        assert all(map(torch.equal, grads[kind], grads[None]))


def test_copies_and_files_of_what_a_block_returned():
    model, inputs, alone = accelerated(dit)
    model(*inputs)
    for _ in range(2):
        x = model.blocks[0](*inputs)
        file = io.BytesIO()
        torch.save(x, file)
        file.seek(0)
        copies = copy.deepcopy(x), torch.load(file, weights_only=True)
        expected = model.blocks[1](x, inputs[1])
        for twin in copies:
            assert torch.equal(model.blocks[1](twin, inputs[1]), expected)
    twin = copy.deepcopy(model)
    assert all(torch.equal(m(*inputs), alone) for m in (twin, model, twin, model))


def test_restored_blocks_and_other_options():
    model, inputs, alone = accelerated(dit)
    model(*inputs), model(*inputs)
    zb.restore(model.blocks[1])
    torch.testing.assert_close(model(*inputs), alone, rtol=1e-4, atol=1e-4)
    zb.accelerate(model.blocks[1], zero_skip="never")
    assert all(torch.equal(model(*inputs), alone) for _ in range(8))


def test_zero_blocks_are_skipped():
    model, inputs, _ = accelerated(dit)
    model(*inputs), model(*inputs)
    for linear in (block.adaLN_modulation[-1] for block in list(model.blocks)[::2]):
        for t in (linear.weight, linear.bias):
            t.chunk(6)[2].zero_(), t.chunk(6)[5].zero_()
    with seam.paused():
        expected = model(*inputs)
    assert all(torch.equal(model(*inputs), expected) for _ in range(8))


def test_threads():
    model, inputs, _ = accelerated(dit)
    cases = [tuple(torch.randn_like(t) for t in inputs) for _ in range(4)]
    with seam.paused():
        expected = [model(*case) for case in cases]
    wrong: list[int] = []

    def serve(i: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(model(*cases[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_compiled_blocks_know_no_seam():
    model, inputs, alone = accelerated(dit)
    model(*inputs), model(*inputs)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(model(*inputs), alone, rtol=1e-5, atol=1e-5)


def test_a_choice_measures_blocks_alone():
    """What a block prepares for the next one is no part of its own time."""
    model, inputs, _ = accelerated(dit)
    model(*inputs), model(*inputs)
    block, seen = model.blocks[1], []
    call = BlockCall(
        block, inputs[0], "DiTBlock", lambda block, *args: seen.append(seam._paused), block.forward, inputs, {}, False
    )
    call.run(call.fused)
    assert seen == [1] and seam._paused == 0
