"""The doctor leaves no trace: parameters, buffers, gradients, modes, attributes, hooks, the batch, random streams."""

import random

import numpy
import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.doctor.snapshot import preserved
from zeroblock.testing import assert_bitwise_equal


class Everything(nn.Module):
    """A model whose steps change all that a step can change."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.tied = nn.Linear(4, 8, bias=False)
        self.tied.weight = nn.Parameter(self.head.weight.detach().t().clone())
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("expanded", torch.ones(1).expand(5))
        self.cache = torch.zeros(2)  # a tensor that is no buffer
        self.count = 0
        self.fails_at = fails_at
        self.eval()
        self.conv.train()  # a mixture of modes

    def forward(self, x):
        self.count += 1
        self.calls += 1
        self.cache[0] += random.random() + float(numpy.random.rand())
        self.replaced = torch.rand(3)
        if self.fails_at is not None and self.count >= self.fails_at:
            raise OverflowError("planted")
        x.mul_(1.5)
        h = self.head(self.drop(self.norm(self.conv(x))).mean((2, 3)))
        return self.tied(h) * self.expanded.sum()


def bits(model, batch):
    """Everything that must come back, with the identities of the tensors."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "cache": model.cache, "batch": batch[0]}
    grads = {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: (id(t), t.data_ptr(), t.detach().clone()) for n, t in {**tensors, **grads}.items()}


def streams():
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()


def check_same(before, after):
    assert before.keys() == after.keys()
    for name, (identity, pointer, value) in before.items():
        assert (identity, pointer) == after[name][:2], name
        assert_bitwise_equal(after[name][2], value, name)


@pytest.mark.parametrize("grads", [False, True], ids=["no_grads", "grads"])
@pytest.mark.parametrize("fails_at", [None, 1, 2])
def test_everything_comes_back(grads, fails_at):
    torch.manual_seed(0)
    model, batch = Everything(), (torch.randn(4, 3, 6, 6),)
    model.conv.weight.data[0, 0, 0, 0] = float("nan")
    model.conv.weight.data.view(torch.int32)[0, 0, 0, 1] = 0x7FC01234  # a NaN with a payload
    if grads:
        model(batch[0].clone()).sum().backward()
        model.tied.weight.grad = None
        del model.replaced
        model.conv.weight.data[0, 0, 0, 2] = -0.0
    model.count, model.fails_at = 0, fails_at
    calls = []
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    hooks, modes = dict(model.conv._forward_hooks), [m.training for m in model.modules()]
    keys = {m: list(vars(m)) for m in model.modules()}
    before, random_before = bits(model, batch), streams()
    if fails_at is None:
        zb.doctor(model, batch, steps=2)
    else:
        with pytest.raises(ValueError, match="OverflowError: planted"):
            zb.doctor(model, batch, steps=2)
    check_same(before, bits(model, batch))
    assert streams() == random_before
    assert model.count == 0 and not hasattr(model, "replaced")
    assert dict(model.conv._forward_hooks) == hooks and [m.training for m in model.modules()] == modes
    assert {m: list(vars(m)) for m in model.modules()} == keys
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_the_steps_did_change_it():
    """Without the snapshot the same steps change every kind of state: the test above can fail."""
    from zeroblock.doctor import measure
    from zeroblock.doctor.examine import random_target_loss

    torch.manual_seed(0)
    model, batch = Everything(), (torch.randn(4, 3, 6, 6),)
    before, random_before = bits(model, batch), streams()
    with measure.training(model):
        measure.measure(model, batch, random_target_loss, 1, 1e-2, None, set(), lambda *_: None)
    after = bits(model, batch)
    changed = {n for n, (_, _, value) in before.items() if not torch.equal(value, after[n][2])}
    assert {"conv.weight", "norm.running_mean", "calls", "cache", "batch", "tied.weight"} <= changed
    assert after.keys() - before.keys() == {f"{n}.grad" for n, _ in model.named_parameters()}
    now = streams()
    assert all(now[i] != random_before[i] for i in range(3))


def test_hooks_added_and_parameters_replaced_are_undone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    weight, child = model[0].weight, model[1]
    with pytest.raises(KeyboardInterrupt), preserved(model, None):
        model[0].register_forward_pre_hook(lambda *_: None)
        model[0].weight = nn.Parameter(torch.zeros(3, 3))
        model[1] = nn.ReLU()
        weight.data.zero_()
        weight.requires_grad_(False)
        raise KeyboardInterrupt
    assert model[0].weight is weight and model[1] is child and weight.requires_grad and weight.all()
    assert not model[0]._forward_pre_hooks


def test_shared_and_leaf_inputs():
    """Tied parameters are reported once; a batch that wants gradients gets none from the doctor."""
    a = nn.Linear(4, 4)
    model = nn.Sequential(a, nn.Tanh(), a)
    x = torch.randn(2, 4, requires_grad=True)
    d = zb.doctor(model, (x,))
    assert [p.name for p in d.parameters] == ["0.weight", "0.bias"] and x.grad is None


def test_device_memory_is_that_of_a_step():
    """What the steps hold at once beyond an ordinary SGD step, by counting live tensor bytes: nothing of weight size.

    The copy of the weights is host memory; here host and device are the same, so it is counted apart.
    """
    import gc
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    class Peak(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.live, self.peak, self.seen = 0, 0, weakref.WeakSet()

        def free(self, n):
            self.live -= n

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    storage = t.untyped_storage()
                    if storage not in self.seen:
                        self.seen.add(storage)
                        self.live += storage.nbytes()
                        weakref.finalize(storage, self.free, storage.nbytes())
                        self.peak = max(self.peak, self.live)
            return out

    from zeroblock.doctor import measure
    from zeroblock.doctor.examine import random_target_loss
    from zeroblock.doctor.measure import record

    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])
    batch = (torch.randn(8, 256),)

    def ordinary():
        for p in model.parameters():
            p.grad = None
        random_target_loss(model, batch).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-1e-2)

    peaks = []
    for run in (
        ordinary,
        lambda: record(model, batch, random_target_loss),
        lambda: measure.measure(model, batch, random_target_loss, 2, 1e-2, None, set(), lambda *_: None),
    ):
        model.zero_grad()
        gc.collect()
        with Peak() as peak:
            run()
        peaks.append(peak.peak)
    one = 256 * 256 * 4
    assert peaks[0] >= 6 * one  # the gradients
    assert max(peaks[1:]) <= peaks[0] + one // 2
