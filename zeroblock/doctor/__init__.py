"""`zeroblock.doctor`: will this initialisation learn, and when does each branch wake up?

`examine.py` is the course of an examination. The model's step is taped once (tape.py), its zeros are followed through
the tape to a prediction (zeros.py), and plain SGD steps verify it (measure.py). Everything is put back bit for bit
(snapshot.py). `diagnosis.py` puts prediction and measurement together, `savings.py` counts what the fast path leaves
out, `explain.py` says why in words; `text.py` and `html.py` show the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .diagnosis import Diagnosis, ParameterReport
    from .measure import Loss

__all__ = ["Diagnosis", "ParameterReport", "doctor"]


def __getattr__(name: str) -> Any:
    """The result's classes. They and the examination are imported when first wanted: a sixth of zeroblock's import."""
    if name in ("Diagnosis", "ParameterReport"):
        from . import diagnosis

        return getattr(diagnosis, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def doctor(
    model: nn.Module | Callable[[], Any],
    example_batch: Any = None,
    loss: Loss | None = None,
    steps: int = 4,
    *,
    lr: float = 1e-2,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> Diagnosis:
    """Says which zero and constant parameters of a model learn, and in which step each parameter first moves.

    Args:
        model: any nn.Module, or a function without arguments that returns (model, example_batch) or (model,
            example_batch, loss).
        example_batch: what the model is called with; a tuple or list gives positional, a dict keyword arguments.
            Tensors of any shape and dtype, on the model's device.
        loss: loss(model, example_batch) -> Tensor of one element; None: the mean square of (output - a fixed random
            target), over all floating outputs.
        steps: plain SGD steps to take, at least 1, in training mode and in place.
        lr: their learning rate, positive and finite.
        progress: progress(phase, done, total, note), called after each step; None: nothing is shown.

    Returns a `Diagnosis`. A parameter moves first in the step of its first gradient that is not exactly zero. The
    model, its gradients, the batch and the random number generators are put back bit for bit afterwards, also when
    something raises. The device needs the memory of an ordinary SGD step; a copy of the weights is kept in host memory.

    Raises TypeError where model, example_batch or loss are of another kind than said here, example_batch is missing,
    or loss returns no Tensor; ValueError where steps or lr are out of range, model has nothing to train, model or loss
    fail on the batch, or the loss is no scalar that depends on a parameter; RuntimeError where the batch does not fit
    into the device's memory.
    """
    from .examine import examine

    return examine(model, example_batch, loss, steps, lr, progress)
