"""The examination: tape the model's step, predict from its zeros, measure in plain SGD steps, diagnose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import factors, measure
from .diagnosis import Diagnosis, Initial, diagnose
from .explain import explain
from .measure import Loss
from .savings import savings
from .snapshot import preserved
from .zeros import Prediction, droppable, predict


def call(model: nn.Module, batch: Any) -> Any:
    """model(batch): a tuple or list gives positional arguments, a dict keyword arguments."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def random_target_loss(model: nn.Module, batch: Any) -> Tensor:
    """The mean square of (output - a fixed random target), summed over all floating tensors that the model returns.

    model: called with `batch`, as `call` does.
    batch: a tuple or list of positional arguments, a dict of keyword arguments, or the only argument.

    Raises ValueError if the model returns no floating tensor that has a gradient.
    """
    result = call(model, batch)
    if not isinstance(result, (Tensor, tuple, list, dict)):
        result = vars(result)  # an output class
    outputs = [t for t in tree_leaves(dict(result) if isinstance(result, dict) else result) if isinstance(t, Tensor)]
    outputs = [t for t in outputs if t.is_floating_point() and (t.requires_grad or not torch.is_grad_enabled())]
    if not outputs:
        raise ValueError("the model returned no floating tensor with a gradient; pass a loss")
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), device=outputs[0].device)
    for t in outputs:
        target = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
        total = total + (t - target).square().mean()
    return total


def examine(
    model: nn.Module | Callable[[], Any],
    example_batch: Any,
    loss: Loss | None,
    steps: int,
    lr: float,
    progress: Callable[[str, int, int, str], None] | None,
) -> Diagnosis:
    """What `zeroblock.doctor` does; its docstring has the arguments."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"doctor: steps must be an int >= 1, got {steps!r}")
    if not isinstance(lr, (int, float)) or not 0 < lr < float("inf"):
        raise ValueError(f"doctor: lr must be a positive number, got {lr!r}")
    if not isinstance(model, nn.Module):
        model, example_batch, loss = _unpack(model, example_batch, loss)
    if example_batch is None:
        raise TypeError("doctor: example_batch must be given: what the model is called with")
    if loss is not None and not callable(loss):
        raise TypeError(f"doctor: loss must be a function of (model, example_batch), got {type(loss).__name__}")
    loss, report_progress = loss or random_target_loss, progress or _silent
    trainable = set(measure.trainable(model))
    if not trainable:
        raise ValueError(f"doctor: model must have a parameter with requires_grad, {type(model).__name__} has none")
    names = {name for name, _ in model.named_parameters()}

    report_progress("tape", 0, 1, "")
    initial = Initial.of(model)
    with preserved(model, example_batch), measure.training(model):
        tape = measure.record(model, example_batch, loss)
    roles = {name: role for name, role in factors.roles(tape).items() if name in names}
    report_progress("tape", 1, 1, f"{len(tape.nodes)} operations")
    with preserved(nn.Module(), None):  # the probes draw random numbers
        prediction, by_chance = predict(tape, trainable), droppable(tape)
        saved = savings(tape, roles, initial.zero, prediction.first, trainable)
    interesting = _interesting(measure.trainable(model), initial, roles, prediction)
    with preserved(model, example_batch), measure.training(model):
        measured = measure.measure(
            model,
            example_batch,
            loss,
            steps,
            lr,
            tape,
            interesting,
            lambda done, note: report_progress("steps", done, steps, note),
        )
    diagnosis = diagnose(model, initial, roles, prediction, measured, saved, by_chance)
    diagnosis.explanation = explain(diagnosis)
    return diagnosis


def _silent(phase: str, done: int, total: int, note: str) -> None:
    """The progress of who wants to see none."""


def _interesting(
    parameters: dict[str, nn.Parameter], initial: Initial, roles: dict[str, str], prediction: Prediction
) -> set[str]:
    """The parameters whose ranks the report shows: constant matrices, zero gates, and what never moves."""

    def wanted(name: str, p: Tensor) -> bool:
        zero_gate = initial.zero[name] and roles.get(name) in ("gate", "norm")
        return initial.constant[name] and (p.dim() > 1 or zero_gate) or prediction.first.get(name, 1) is None

    return {name for name, p in parameters.items() if wanted(name, p)}


def _unpack(factory: Any, example_batch: Any, loss: Loss | None) -> tuple[nn.Module, Any, Loss | None]:
    """What the factory returns; the batch and the loss that the caller gave take precedence."""
    if not callable(factory):
        raise TypeError(f"doctor: model must be an nn.Module or a function, got {type(factory).__name__}")
    made = factory()
    if isinstance(made, nn.Module):
        return made, example_batch, loss
    if not isinstance(made, tuple) or not 2 <= len(made) <= 3 or not isinstance(made[0], nn.Module):
        raise TypeError(
            "doctor: the factory must return a model, (model, example_batch) or (model, example_batch, loss), "
            f"got {type(made).__name__}"
        )
    batch = made[1] if example_batch is None else example_batch
    return made[0], batch, loss or (made[2] if len(made) == 3 else None)
