"""How a case is judged: results and gradients against eager in fp64, and that repeating it gives the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..backends.available import device_of as device_of
from . import assert_bitwise_equal, assert_error_budget, poison_empty
from .cases import Case, Inputs
from .draw import Draw

Results = dict[str, Tensor]
# One draw of a few numbers may come out exactly right in eager by luck, and the budget would be zero; the largest error
# of one draw is a single number. So cases are drawn again, more often while their smallest tensor has few numbers, and
# the errors of all draws are combined.
DRAWS, MOST_DRAWS, ENOUGH_NUMBERS = 4, 16, 128


def leaves(inputs: Inputs, dtype: torch.dtype, wrt: Collection[str]) -> Inputs:
    """The inputs in a dtype, strides kept, as leaves; those named in `wrt` require a gradient."""

    def leaf(name: str, t: Tensor | None) -> Tensor | None:
        if t is None or not t.is_floating_point():
            return t
        return t.detach().to(dtype).requires_grad_(name in wrt)

    return {name: leaf(name, t) for name, t in inputs.items()}


def floating(inputs: Inputs) -> list[str]:
    return [name for name, t in inputs.items() if t is not None and t.is_floating_point()]


def evaluate(fn: Callable, inputs: Inputs, grads: list[Tensor]) -> Results:
    """{"y0": first output, ..., "dx": gradient of x, ...} of fn(**inputs) for the given gradients of the outputs."""
    outputs = fn(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
    results = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    for name, t in inputs.items():
        if t is not None and t.requires_grad:
            assert t.grad is not None, f"no gradient for {name}"
            results[f"d{name}"] = t.grad
    return results


def output_grads(case: Case, inputs: Inputs, draw: Draw) -> list[Tensor]:
    """Random gradients of the outputs, laid out as the outputs are (strided: not densely)."""
    with torch.no_grad():
        outputs = case.eager(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if draw.layout == "strided":
        return [draw.tensor(*y.shape) for y in outputs]
    return [torch.empty_like(y).copy_(draw.normal(*y.shape)) for y in outputs]


def assert_same_format(got: Tensor, eager: Tensor, what: str) -> None:
    """Equal dtype, and equal strides wherever a dimension has more than one element."""
    assert got.dtype == eager.dtype, f"{what}: dtype {got.dtype}, eager gives {eager.dtype}"
    a, b = ([s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (got, eager))
    assert a == b, f"{what}: strides {a}, eager gives {b} for shape {list(got.shape)}"


def assert_parity(
    case: Case,
    dtype: torch.dtype,
    layout: str = "dense",
    device: str = "cpu",
    *,
    wrt: Collection[str] | None = None,
    run: Callable | None = None,
    seed: int = 0,
    poison: bool = True,
) -> None:
    """Checks every output of the case and its gradients against eager in fp64, by the error budget.

    case: the op and its inputs.
    dtype: of all floating inputs.
    layout: "dense", "nhwc" or "strided" (draw.py); in all but the last, outputs must have eager's strides.
    device: where the inputs live.
    wrt: names of the inputs that get a gradient; None: all floating ones.
    run: a function to judge in place of zeroblock's.
    seed: of the inputs.
    poison: uninitialised memory is poisoned, which asks for deterministic algorithms: no plan is then measured.

    Raises AssertionError where a result is out of budget, of another dtype or format,
    without a gradient, or an input was written to.
    """
    run = case.run if run is None else run
    stacks: dict[str, list[list[Tensor]]] = {}
    draws, number = 1, 0
    while number < draws:
        draw = Draw(dtype, layout, seed + 1000 * number, device)
        inputs = case.inputs(draw)
        grads = output_grads(case, inputs, draw)
        names = floating(inputs) if wrt is None else wrt
        ours = leaves(inputs, dtype, names)
        before = {name: t.detach().clone() for name, t in ours.items() if t is not None}
        with poison_empty() if poison else contextlib.nullcontext():
            got = evaluate(run, ours, grads)
        for name, t in ours.items():
            assert t is None or torch.equal(t, before[name]), f"{case}: {name} was written to"
        eager = evaluate(case.eager, leaves(inputs, dtype, names), grads)
        exact = evaluate(case.eager, leaves(inputs, torch.float64, names), grads)
        if layout != "strided":
            for name in (n for n in got if n.startswith("y")):
                assert_same_format(got[name], eager[name], f"{case} {name}")
        for name, t in exact.items():
            stacks.setdefault(name, []).append([got[name], eager[name], t])
        if number == 0:
            smallest = max(1, min(t.numel() for t in exact.values()))
            draws = max(DRAWS, min(MOST_DRAWS, -(-ENOUGH_NUMBERS // smallest)))
        number += 1
    for name, triples in stacks.items():
        all_got, all_eager, all_exact = (torch.stack(column) for column in zip(*triples, strict=True))
        assert_error_budget(all_got, all_eager, all_exact, f"{case} {name}", draws=True)


def assert_deterministic(case: Case, dtype: torch.dtype, layout: str, threads: Sequence[int]) -> None:
    """Checks that every output and gradient has the same bits for each number of `threads`, and when run again.

    case, dtype, layout: as in `assert_parity`. Raises AssertionError with the first difference.
    """
    draw = Draw(dtype, layout)
    inputs = case.inputs(draw)
    grads = output_grads(case, inputs, draw)
    before = torch.get_num_threads()
    try:
        expected: Results = {}
        for count in (*threads, threads[-1]):
            torch.set_num_threads(count)
            results = evaluate(case.run, leaves(inputs, dtype, floating(inputs)), grads)
            expected = expected or results
            for name, t in results.items():
                assert_bitwise_equal(t, expected[name], f"{case} {name}, {count} threads against {threads[0]}")
    finally:
        torch.set_num_threads(before)
