"""CUDA graphs of every op, replayed on other values: weights that become zero and come back, other inputs.

What a graph holds must be right for any values. Without a GPU a "replay" is the call again, into the same tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from zeroblock.backends import available
from zeroblock.plan import planned
from zeroblock.testing import assert_error_budget
from zeroblock.testing.cases import Case
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import Inputs, floating, leaves, output_grads

from . import checks

PLANNED = "planned"  # as users get it, where nothing is measured
DTYPES = (torch.bfloat16, torch.float32)


def graphs(device: str, quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    for case, layout in checks.firsts()[:: 4 if quick else 1]:
        for dtype in DTYPES:
            for backend in (*checks.backends(device), PLANNED):
                yield _graph(case, layout, dtype, backend, device)
    if device == "cuda" and not quick:  # a cluster of blocks for a group, and two passes over it
        yield from (_graph(case, case.layouts[0], torch.bfloat16, "cuda", device) for case in checks.LARGE[:2])


def _graph(case: Case, layout: str, dtype: torch.dtype, backend: str, device: str) -> tuple[str, Callable[[], None]]:
    name = f"graph/{backend}/{case}/{layout}/{str(dtype)[6:]}"
    return name, functools.partial(replays, case, layout, dtype, backend, device)


class Step:
    """Forward and backward of a case on tensors that stay where they are."""

    def __init__(self, case: Case, layout: str, dtype: torch.dtype, device: str):
        draw = Draw(dtype, layout, device=device)
        drawn = case.inputs(draw)
        self.case, self.dtype, self.names = case, dtype, floating(drawn)
        self.inputs = leaves(drawn, dtype, self.names)
        self.values = {name: self.inputs[name].detach().clone() for name in self.names}
        self.grads = output_grads(case, drawn, draw)

    def __call__(self, run: Callable | None = None, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """{"y0": output, ..., "dx": gradient of x, ...}; nothing but work on the device."""
        inputs = self.inputs if inputs is None else inputs
        y = (self.case.run if run is None else run)(**inputs)
        outputs = y if isinstance(y, tuple) else (y,)
        # Copies: the gradient of a residual may be the one given, and results are overwritten.
        grads = [g.to(o.dtype, copy=True) for g, o in zip(self.grads, outputs, strict=True)]
        found = torch.autograd.grad(outputs, [inputs[name] for name in self.names], grads)
        results = {f"y{i}": t.detach() for i, t in enumerate(outputs)}
        return results | {f"d{name}": g for name, g in zip(self.names, found, strict=True)}

    def expected(self, wide: torch.dtype) -> dict[str, Tensor]:
        """What eager gives for the values that the inputs have now."""
        return self(self.case.eager, leaves(self.inputs, wide, self.names))

    def fill(self, value: str) -> None:
        """value: "first", as drawn; "zero", the last weight is; "other", another first input."""
        first, last = self.names[0], "weight" if "weight" in self.names else self.names[-1]
        with torch.no_grad():
            for name in self.names:
                self.inputs[name].copy_(self.values[name])
            if value == "zero":
                self.inputs[last].zero_()
            elif value == "other":
                self.inputs[first].mul_(0.5).add_(1)


def captured(step: Step, device: str) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """(results, replay): replay() fills the results for the values that the inputs have."""
    if device == "cpu":
        results = step()

        def again() -> None:
            for name, t in step().items():
                results[name].copy_(t)

        return results, again
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles the kernels, and lets libraries allocate what they keep
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return results, graph.replay


def replays(case: Case, layout: str, dtype: torch.dtype, backend: str, device: str) -> None:
    forced = available.use_backend("auto" if backend == PLANNED else backend)
    with planned.use("fixed"), forced:
        for at_capture in ("zero", "first"):
            step = Step(case, layout, dtype, device)
            step.fill(at_capture)
            results, replay = captured(step, device)
            for value in ("first", "zero", "other", "zero", "first"):
                step.fill(value)
                for t in results.values():
                    t.fill_(float("nan"))
                replay()
                compare(step, results, f"captured {at_capture}, replayed {value}")


def compare(step: Step, results: dict[str, Tensor], what: str) -> None:
    """Outputs within eager's budget, gradients too where they have not the bits of the same call outside of a graph
    (a single number's budget is luck), and zeros where eager has zeros."""
    called, eager, exact = step(), step.expected(step.dtype), step.expected(torch.float64)
    for name, t in results.items():
        if not exact[name].any():
            assert not t.any(), f"{name}, {what}: not zero"
        elif name.startswith("y") or not torch.equal(t, called[name]):
            assert_error_budget(t, eager[name], exact[name], f"{name}, {what}")
