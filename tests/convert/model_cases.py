"""How the tests compare a model of another package with its accelerated copy."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.convert import Reason, Report
from zeroblock.convert.trial import tensors as outputs

from ..twins import Results, assert_within_budget

STEPS = 10


class Case(NamedTuple):
    """A model, keyword arguments of its forward drawn from a generator, what is zero in the zero phase (patterns of
    parameters' names, a range of their rows as a fraction), {family: branches skipped in a forward of that phase}."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    zero: tuple[tuple[str, float, float], ...]
    skipped: dict[str, int]
    inferred: dict[str, int] | None = None  # skipped without gradients, where that differs
    lr: float = 0.1


def rows(name: str, *chunks: int, of: int = 1) -> tuple[tuple[str, float, float], ...]:
    """Of weight and bias of a layer: these of its `of` equal parts."""
    return tuple((f"{name}.{p}", i / of, (i + 1) / of) for i in chunks or (0,) for p in ("weight", "bias"))


def normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator)


def prepared(case: Case, phase: str) -> nn.Module:
    """The model with parameters none of which is special, but for the zero ones of the zero phase."""
    torch.manual_seed(7)
    model = case.build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for i, (pattern, start, stop) in enumerate(case.zero if phase == "zero" else ()):
            for name, p in model.named_parameters():
                if fnmatch.fnmatch(name, pattern):
                    p = p.view(-1) if p.dim() == 0 else p
                    p[round(start * len(p)) : round(stop * len(p))] = -0.0 if i % 2 else 0.0
    return model


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {k: cast(v, dtype) for k, v in inputs.items()}
    return tuple(cast(v, dtype) for v in inputs) if isinstance(inputs, tuple) else inputs


def _floating(inputs: dict[str, Any]) -> list[str]:
    return [k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()]


def evaluate(model: nn.Module, inputs: dict[str, Any]) -> Results:
    """{output, name: gradient of that input or parameter}; what has no gradient is not listed."""
    leaves = {k: inputs[k].detach().clone().requires_grad_() for k in _floating(inputs)}
    torch.manual_seed(3)
    ys = outputs(model(**(inputs | leaves)))
    generator = torch.Generator().manual_seed(5)
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in ys]
    wanted = leaves | {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(ys, list(wanted.values()), dys, allow_unused=True)
    results = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return results | {n: g for n, g in zip(wanted, grads, strict=True) if g is not None}


@torch.no_grad()
def infer(model: nn.Module, inputs: dict[str, Any]) -> Results:
    torch.manual_seed(3)
    return {f"y{i}": y for i, y in enumerate(outputs(model(**inputs)))}


def drawn(case: Case, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return cast(case.inputs(torch.Generator().manual_seed(seed)), dtype)


def accelerated(model: nn.Module, **options: Any) -> tuple[nn.Module, Report]:
    twin = copy.deepcopy(model)
    return twin, zb.accelerate(twin, **options)


def _together(results: Results, exact: Results) -> Results:
    """The outputs, and all gradients as one vector, each divided by its size; those that vanish but for rounding, by a
    thousandth of the largest."""
    ys = {k: y for k, y in results.items() if k in ("y0", "y1", "y2")}
    sizes = {k: g.norm() for k, g in exact.items() if k not in ys}
    if not sizes:
        return ys
    least = 1e-3 * max(sizes.values())
    grads = [(results[k] / size.clamp_min(least)).to(results[k].dtype).flatten() for k, size in sizes.items()]
    return ys | {"gradients": torch.cat(grads)}


def check(
    case: Case,
    phase: str,
    run: Callable[..., Results] = evaluate,
    dtype: torch.dtype = torch.float32,
    together: bool = False,
) -> None:
    """Forward and every gradient within the budget; in the zero phase exactly the branches of the case are skipped.

    With `together` the gradients of a whole model share one budget: of hundreds of tensors, in ill-conditioned places,
    one exceeds its own by chance.
    """
    plain = prepared(case, phase).to(dtype)
    expected = case.skipped
    if run is infer:
        plain.eval()
        expected = case.skipped if case.inferred is None else case.inferred
    ours, report = accelerated(plain)
    assert report.blocks and all(b.kind in (Reason.PARTS, Reason.UNKNOWN) for b in report.left_alone), report
    exact = copy.deepcopy(plain).double()
    if run is infer:
        run(ours, drawn(case, 0, dtype))  # a ControlNet's first call runs, to be compared
    testing.reset_counters()
    run(ours, drawn(case, 0, dtype))
    counts = testing.counters()
    for family, count in expected.items():
        assert counts.get(family, (0, 0))[1] == (count if phase == "zero" else 0), counts
    if phase == "zero":
        assert {b.family for b in report.branches if b.zero} >= set(expected), report

    def sample(seed: int) -> tuple[Results, Results, Results]:
        inputs = drawn(case, seed, dtype)
        results = run(ours, inputs), run(plain, inputs), run(exact, cast(inputs, torch.float64))
        assert results[0].keys() == results[1].keys() == results[2].keys()
        return tuple(_together(r, results[2]) for r in results) if together else results

    assert_within_budget(sample)


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(model: nn.Module, call: Callable[[nn.Module, int], Any], lr: float) -> Tensor:
    """STEPS steps of regression to a fixed target, call(model, i) being the i-th forward; the weights at the end."""
    step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for i in range(STEPS):
        torch.manual_seed(i)
        ys = outputs(call(model, i))
        generator = torch.Generator().manual_seed(4)
        targets = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys]
        loss = sum((y - t).square().mean() for y, t in zip(ys, targets, strict=True))
        step.zero_grad()
        loss.backward()
        step.step()
    return _flat(model)


def assert_trained_alike(
    ours: nn.Module, plain: nn.Module, oracle: nn.Module, call: Callable[[nn.Module, int], Any], lr: float
) -> None:
    """Ten steps of ours end as close to the oracle's (float64) as those of the untouched model; trains all three."""
    start = _flat(plain).double()
    exact = train(oracle, call, lr)
    assert (exact - start).norm() > 1e-4 * start.norm(), "nothing was trained"
    testing.assert_error_budget(train(ours, call, lr), train(plain, call, lr), exact)


def check_training(case: Case) -> None:
    """Ten optimizer steps from the model's own initialisation end as close to an fp64 run as eager's do."""
    torch.manual_seed(0)
    plain = case.build()
    ours, _ = accelerated(plain)
    oracle = copy.deepcopy(plain).double()
    call = lambda model, i: model(**drawn(case, i, next(model.parameters()).dtype))  # noqa: E731
    assert_trained_alike(ours, plain, oracle, call, case.lr)


def three_tests(
    cases: dict[str, Case], together: bool = False, slow: bool = False
) -> tuple[Callable, Callable, Callable]:
    """test_gradients, test_inference and test_ten_steps of every case, for a test module to hold."""
    names, phases = pytest.mark.parametrize("name", cases), pytest.mark.parametrize("phase", ["zero", "dense"])

    @phases
    @names
    def test_gradients(name, phase):
        check(cases[name], phase, evaluate, together=together)

    @phases
    @names
    def test_inference(name, phase):
        check(cases[name], phase, infer)

    @names
    def test_ten_steps(name):
        check_training(cases[name])

    return test_gradients, test_inference, pytest.mark.slow(test_ten_steps) if slow else test_ten_steps
