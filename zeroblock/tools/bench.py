"""`python -m zeroblock bench`: a user's model before and after `zeroblock.accelerate`.

Times are taken in interleaved pairs (testing/timing.py) and saved bytes are counted exactly. Loss and gradients must
agree; their relative differences (L2) are shown, since fused ops round otherwise and are not bit-equal.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..convert import accelerate
from ..doctor.measure import Loss, call_loss
from ..doctor.snapshot import preserved
from ..testing import saved_activation_bytes
from ..testing.timing import Ratio, measure

# What `bench` calls equal: the relative difference that rounding may add up to over a model, forward and backward.
EQUAL = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@dataclass
class Comparison:
    """What was measured of a model before and after; str() is the table."""

    report: str  # accelerate's
    times: dict[str, tuple[float, float, Ratio]]  # of "inference" and "training": median ms before, after, their ratio
    saved_bytes: tuple[int, int]  # for backward: before, after
    differences: dict[str, float]  # relative, of the loss and of all gradients together
    equal: bool  # no difference is larger than rounding explains

    def __str__(self) -> str:
        lines = [self.report, "", f"{'':<12}{'before':>12}{'after':>12}{'ratio':>9}"]
        for what, (before, after, ratio) in self.times.items():
            interval = f"  (95 % {ratio.lo:.2f}-{ratio.hi:.2f}, {ratio.rounds} rounds)"
            lines.append(f"{what:<12}{before:>9.2f} ms{after:>9.2f} ms{ratio.median:>8.2f}x{interval}")
        before, after = (n / 2**20 for n in self.saved_bytes)
        share = f"{after / before:>8.2f}x" if before else ""
        lines.append(f"{'saved':<12}{before:>8.2f} MiB{after:>8.2f} MiB{share}")
        found = ", ".join(f"{what} {d:.1e}" for what, d in self.differences.items())
        lines.append(f"{'equality':<12}{'ok' if self.equal else 'DIFFERENT'} (largest relative difference: {found})")
        return "\n".join(lines)


def bench(model: nn.Module, batch: Any, loss: Loss, seconds: float) -> Comparison:
    """Compares a model with an accelerated copy of it. The model, the batch and the random streams are put back.

    model: any nn.Module with parameters.
    batch: what `loss` calls it with, as in `zeroblock.doctor`.
    loss: loss(model, batch) -> Tensor of one element that depends on a parameter.
    seconds: of timing, for inference and for training each.

    Raises as `zeroblock.doctor` does where model or loss fail on the batch, and what `accelerate` raises.
    """
    with preserved(model, batch):
        after = copy.deepcopy(model)
        report = accelerate(after)
        return compare({"before": model, "after": after}, batch, loss, seconds, str(report))


def compare(models: dict[str, nn.Module], batch: Any, loss: Loss, seconds: float, report: str) -> Comparison:
    """Compares two models, {"before": ..., "after": ...}, with the same parameters; arguments as in `bench`."""
    device = next(iter(models["before"].parameters())).device

    def inference(model: nn.Module) -> None:
        with torch.no_grad():
            loss(model, batch)
        _wait(device)

    def training(model: nn.Module) -> None:
        model.zero_grad()
        loss(model, batch).sum().backward()
        _wait(device)

    results = {name: _results(model, batch, loss) for name, model in models.items()}
    differences = _differences(*results.values())
    dtype = next(iter(models["before"].parameters())).dtype
    saved = [
        saved_activation_bytes(partial(loss, m, batch), exclude=[*m.parameters(), *m.buffers(), *_tensors(batch)])
        for m in models.values()
    ]
    times = {}
    for what, step in (("inference", inference), ("training", training)):
        for m in models.values():
            m.train(what == "training")
        timing = measure({name: partial(step, m) for name, m in models.items()}, seconds)
        before, after = timing.median("before") / 1e3, timing.median("after") / 1e3
        times[what] = before, after, timing.ratio("before", "after")
    equal = all(d <= EQUAL.get(dtype, 1e-3) for d in differences.values())
    return Comparison(report, times, (saved[0], saved[1]), differences, equal)


def _tensors(batch: Any) -> list[Tensor]:
    return [t for t in tree_leaves(batch) if isinstance(t, Tensor)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _results(model: nn.Module, batch: Any, loss: Loss) -> dict[str, Tensor]:
    """Loss and gradients with the same random numbers for every model."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    value = call_loss(model, batch, loss)
    value.sum().backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"": value.detach().reshape(1), **grads}


def _differences(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 distances: of the loss, and of all gradients together."""
    if before.keys() != after.keys():
        return {"gradients (not of the same parameters)": float("inf")}
    found = {}
    for what, names in (("loss", [""]), ("gradients", [n for n in before if n])):
        distance = sum(float((after[n].double() - before[n].double()).square().sum()) for n in names)
        size = sum(float(before[n].double().square().sum()) for n in names)
        found[what] = (distance / size) ** 0.5 if size else float(distance > 0)
    return found
