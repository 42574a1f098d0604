"""Rule 2 of the zero contract in inference: nothing is remembered between two calls of a module, whatever was changed
in between, and by which way.

Every test first lets the branch be skipped, so that anything that could be kept would be.
"""

import copy
import functools
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from zeroblock.testing import CPU_MISSING, assert_bitwise_equal, counters, reset_counters, use_backend

from .cases import CASES, matmuls, same, was_skipped

NAMES = ["ResBlock", "ResBlock-add-1x1", "DiTBlock", "FinalLayer", "ResidualBranch-conv", "ResidualBranch-linear"]
# A leaf that a skip leaves uncalled.
BYPASSED = {
    "ResBlock": "in_layers.1",
    "ResBlock-add-1x1": "emb_layers.1",
    "DiTBlock": "attn.qkv",
    "FinalLayer": "norm_final",
    "ResidualBranch-conv": "body.1",
    "ResidualBranch-linear": "body.0",
}


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def skipped_once(name):
    """(case, ours, eager, inputs) after a call that was skipped."""
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = tuple(t.detach() for t in case.example())
    assert was_skipped(case.counter, lambda: ours(*inputs))
    assert torch.equal(ours(*inputs), theirs(*inputs))
    return case, ours, theirs, inputs


def skips(case, module, inputs):
    """Whether a call skips a branch; one that may not be judged is not counted at all."""
    reset_counters()
    module(*inputs)
    return counters().get(case.counter, (0, 0))[1] > 0


def tail_of(case, module):
    return module.get_submodule(case.tail.rpartition(".")[0])


def becomes_dense(case, ours, theirs, inputs):
    assert not was_skipped(case.counter, lambda: ours(*inputs))
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    assert not torch.equal(ours(*inputs), case.pair()[0](*inputs))


def filled(weight):
    return torch.full_like(weight, 0.01)


CHANGES = {
    "parameter": lambda tail: setattr(tail, "weight", nn.Parameter(filled(tail.weight))),
    "entry of the dict": lambda tail: tail._parameters.__setitem__("weight", nn.Parameter(filled(tail.weight))),
    "data": lambda tail: setattr(tail.weight, "data", filled(tail.weight)),
    "in place": lambda tail: tail.weight.fill_(0.01),
    "in place through data": lambda tail: tail.weight.data.fill_(0.01),
    "load_state_dict": lambda tail: tail.load_state_dict(tail.state_dict() | {"weight": filled(tail.weight)}),
    "strided": lambda tail: setattr(tail.weight, "data", filled(tail.weight).repeat_interleave(2, 1)[:, ::2]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_no_longer_zero(name, change):
    case, ours, theirs, inputs = skipped_once(name)
    for module in (ours, theirs):
        CHANGES[change](tail_of(case, module))
    becomes_dense(case, ours, theirs, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_tail_replaced_by_another_module(name):
    case, ours, theirs, inputs = skipped_once(name)
    path, _, leaf = case.tail.rpartition(".")[0].rpartition(".")
    for module in (ours, theirs):
        other = copy.deepcopy(tail_of(case, module))
        other.weight.fill_(0.01)
        setattr(module.get_submodule(path), leaf, other)
    becomes_dense(case, ours, theirs, inputs)


@pytest.mark.parametrize("how", ["registered", "new dict", "forward", "added child"])
@pytest.mark.parametrize("name", NAMES)
def test_a_submodule_that_is_watched_from_now_on(name, how):
    case, ours, theirs, inputs = skipped_once(name)
    leaf, seen = ours.get_submodule(BYPASSED[name]), []
    if how == "registered":
        handle = leaf.register_forward_hook(lambda *_: seen.append(1))
    elif how == "new dict":
        leaf._forward_pre_hooks = OrderedDict({0: lambda *_: seen.append(1)})
    elif how == "forward":
        leaf.forward = lambda x: seen.append(1) or type(leaf).forward(leaf, x)
    else:  # one that watches, below a leaf
        leaf.watched = nn.Identity()
        leaf.watched.register_forward_hook(lambda *_: None)
        assert not skips(case, ours, inputs)
        return
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    assert len(seen) == 1 and not skips(case, ours, inputs)
    if how == "registered":
        handle.remove()
        assert skips(case, ours, inputs) and len(seen) == 2


@pytest.mark.parametrize("name", ["ResBlock", "ResidualBranch-conv"])
def test_a_body_replaced_by_one_that_watches(name):
    _, ours, theirs, inputs = skipped_once(name)
    path, _, leaf = BYPASSED[name].rpartition(".")
    other, seen = nn.SiLU(), []
    other.register_forward_hook(lambda *_: seen.append(1))
    setattr(ours.get_submodule(path), leaf, other)
    assert torch.equal(ours(*inputs), theirs(*inputs)) and seen == [1]


def test_a_hooked_identity_shortcut_is_called():
    _, ours, _, inputs = skipped_once("ResBlock")
    ours.skip_connection.register_forward_hook(lambda m, i, y: y * 2)
    assert torch.equal(ours(*inputs), inputs[0] * 2 + ours.out_layers[3].bias[:, None, None])


def test_an_identity_shortcut_replaced_by_a_module():
    _, ours, theirs, inputs = skipped_once("ResBlock")
    ours.skip_connection = theirs.skip_connection = nn.Tanh()
    same(ours(*inputs), theirs(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_and_its_original_go_their_own_ways(name):
    case, ours, theirs, inputs = skipped_once(name)
    copies = [copy.deepcopy(ours)]
    if "ResidualBranch" not in name:
        copies.append(pickle.loads(pickle.dumps(ours)))
    tail_of(case, theirs).weight.fill_(0.01)
    for other in copies:
        assert was_skipped(case.counter, lambda other=other: other(*inputs))
        tail_of(case, other).weight.fill_(0.01)
        becomes_dense(case, other, theirs, inputs)
    assert was_skipped(case.counter, lambda: ours(*inputs))
    tail_of(case, ours).weight.fill_(0.01)
    becomes_dense(case, ours, theirs, inputs)


def test_train_and_eval_and_the_dropout_stream():
    case, ours, theirs, inputs = skipped_once("ResBlock")
    for training in (False, True, False, True):
        states = []
        for module in (ours, theirs):
            module.out_layers[2].p = 0.5
            module.train(training)
            torch.manual_seed(3)
            module(*inputs)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
        assert was_skipped(case.counter, lambda: ours(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_entered_later(name):
    case, ours, theirs, inputs = skipped_once(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert was_skipped(case.counter, lambda: ours(*inputs))
        y, expected = ours(*inputs), theirs(*inputs)
    assert y.dtype == expected.dtype and torch.equal(y, expected)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_later(name):
    _, ours, theirs, inputs = skipped_once(name)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), theirs(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_another_policy(name):
    case, ours, _, inputs = skipped_once(name)
    ours.zero_skip = "never"
    assert not skips(case, ours, inputs)
    ours.zero_skip = "sync"
    assert was_skipped(case.counter, lambda: ours(*inputs))
    ours.zero_skip = "perhaps"
    with pytest.raises(ValueError, match="zero_skip must be one of"):
        ours(*inputs)


@pytest.mark.parametrize("name", NAMES)
def test_another_dtype_and_backend(name):
    case, ours, theirs, inputs = skipped_once(name)
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        ours, theirs, inputs = ours.to(dtype), theirs.to(dtype), tuple(t.to(dtype) for t in inputs)
        call = functools.partial(ours, *inputs)
        assert was_skipped(case.counter, call)
        same(call(), theirs(*inputs))
        with use_backend("reference"):
            same(ours(*inputs), theirs(*inputs))


def test_a_bias_that_comes_and_goes():
    case, ours, theirs, inputs = skipped_once("ResBlock")
    for bias in (torch.randn(32), torch.zeros(32), torch.full((32,), -0.0), None, torch.randn(32)):
        for module in (ours, theirs):
            module.out_layers[3].bias = None if bias is None else nn.Parameter(bias)
        assert was_skipped(case.counter, lambda: ours(*inputs))
        same(ours(*inputs), theirs(*inputs))


@pytest.mark.parametrize("bias", ["random", "zero"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_result_of_a_shortcut_is_its_own(layout, bias):
    """The sum goes into the fresh result of a plain convolution, into nothing that anybody else holds."""
    case, ours, theirs, inputs = skipped_once("ResBlock-add-1x1")
    for module in (ours, theirs):
        module.to(memory_format=layout)
        module.skip_connection.weight[::2].zero_()
        module.skip_connection.bias[::2].fill_(-0.0)  # every other channel is a zero of either sign
        if bias == "zero":
            module.out_layers[3].bias.zero_()
    same(ours(*inputs), theirs(*inputs))
    kept = []
    ours.skip_connection.register_forward_hook(lambda m, i, y: kept.append(y))
    expected = theirs.skip_connection(inputs[0])
    same(ours(*inputs), theirs(*inputs))
    assert_bitwise_equal(kept[0], expected)


@pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
def test_one_native_call_is_all_that_runs():
    """No second pass, no read of the weight apart: what the profiler sees of a block whose shortcut is the identity."""
    for name in ("ResBlock", "DiTBlock"):
        _, ours, _, inputs = skipped_once(name)
        assert matmuls(lambda ours=ours, inputs=inputs: ours(*inputs)) == {}
        with torch.profiler.profile() as recorded:
            ours(*inputs)
        own = [e.name for e in recorded.events() if e.name.startswith("zeroblock::")]
        assert own == ["zeroblock::_residual_if_zero"], own
        assert counters()[CASES[name].counter][1] > 0
