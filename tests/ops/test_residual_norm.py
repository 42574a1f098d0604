"""Modulation in all its forms: rows per sample, token and frame, chosen by an index, with tables, and the public
arguments that lead there. Parity in every dtype and layout: test_parity.py."""

import pytest
import torch
import torch.nn.functional as F

import zeroblock as zb
from zeroblock.testing import assert_bitwise_equal, assert_error_budget, eager_ops, poison_empty
from zeroblock.testing.draw import Draw
from zeroblock.testing.row_inputs import draw_index

B, T, D, K = 2, 12, 40, 4
# As the user gives them; "f" frames, "k" rows to choose from, "1" a batch of one.
SHAPES = {"d": (D,), "bd": (B, D), "btd": (B, T, D), "bfd": (B, 3, D), "1fd": (1, 6, D), "kd": (K, D), "bkd": (B, K, D)}
BF16, F32 = torch.bfloat16, torch.float32


def _drawn(seed, device, kind, x_dtype, rows_dtype, tables=True):
    draw = Draw(F32, seed=seed, device=device)
    index = draw_index(draw, B, T, K) if "k" in kind else None
    tensors = {name: draw.tokens(B, T, D).to(x_dtype) for name in ("residual", "branch")}
    for name in ("gate", "shift", "scale"):
        tensors[name] = draw.normal(*SHAPES[kind]).to(rows_dtype)
        if tables:
            tensors[f"{name}_table"] = draw.vector(D).to(rows_dtype)
    return tensors, index


def _results(fn, seed, tensors, dtype, **options):
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    outputs = fn(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(y.shape, generator=generator).to(y.device) for y in outputs]
    torch.autograd.backward(outputs, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])
    found = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape, name
        found[f"d{name}"] = leaf.grad
    return found


def _assert_budget(ours, eager, make, **options):
    """By the error budget, of several draws together: the error of a few numbers is luck."""
    stacks = {}
    for seed in range(6):
        tensors, given = make(seed)
        wide = {k: None if isinstance(v, torch.dtype) else v for k, v in options.items()}
        with poison_empty():
            got = _results(ours, seed, tensors, None, **given, **options)
        expected = _results(eager, seed, tensors, None, **given, **options)
        exact = _results(eager, seed, tensors, torch.float64, **given, **wide)
        for name, t in got.items():
            stacks.setdefault(name, []).append([t, expected[name].to(t.dtype), exact[name]])
    for name, triples in stacks.items():
        assert_error_budget(*(torch.stack(c) for c in zip(*triples, strict=True)), name, draws=True)


@pytest.mark.parametrize("kind", SHAPES)
def test_fp32_rows_beside_bf16_tokens(backend, device, kind):
    """x_new and y in the dtype of the tokens, as Wan has them; nothing is narrowed before it is used."""

    def make(seed):
        tensors, index = _drawn(seed, device, kind, BF16, F32)
        return tensors, {"index": index}

    _assert_budget(zb.residual_norm_modulate, eager_ops.residual_norm_modulate, make, out_dtype=BF16, y_dtype=BF16)


@pytest.mark.parametrize("function", ("layer_norm_modulate", "rms_norm_modulate"))
@pytest.mark.parametrize("kind", ("btd", "bfd", "1fd", "kd", "bkd"))
def test_norms_take_every_form(backend, device, function, kind):
    norm = "layer" if function == "layer_norm_modulate" else "rms"

    def eager(residual, **tensors):
        return eager_ops.residual_norm_modulate(residual, residual * 0, norm=norm, **tensors)[1]

    def ours(residual, **tensors):
        return getattr(zb, function)(residual, **tensors)

    def make(seed):
        tensors, index = _drawn(seed, device, kind, F32, F32)
        tensors = {n: t for n, t in tensors.items() if n != "branch" and not n.startswith("gate")}
        return {**tensors, "weight": tensors["shift_table"] + 1}, {"index": index}

    _assert_budget(ours, eager, make)


@pytest.mark.parametrize("kind", ("d", "bd", "bfd", "bkd"))
@pytest.mark.parametrize("activation", (None, "tanh"))
def test_gate_residual_takes_every_form(backend, device, kind, activation):
    rms = None if kind == "d" else "rms"

    def eager(residual, branch, gate, gate_table, branch_weight, index=None, **options):
        given = {"gate": gate, "gate_table": gate_table, "branch_weight": branch_weight, "index": index}
        return eager_ops.residual_norm_modulate(residual, branch, **given, **options)[0]

    def make(seed):
        tensors, index = _drawn(seed, device, kind, F32, F32)
        tensors = {n: tensors[n] for n in ("residual", "gate", "branch", "gate_table")}
        return {**tensors, "branch_weight": 1 + tensors["gate_table"].flip(0)}, {"index": index}

    _assert_budget(zb.gate_residual, eager, make, gate_activation=activation, branch_norm=rms)


def test_small_gates_keep_their_digits_under_tanh(backend, device):
    """Gates begin at zero: tanh of 1e-4 is that, to the last bits."""
    x = torch.zeros(1, 3, 16, device=device)
    gate = torch.linspace(1e-6, 1e-3, 16, device=device)
    y = zb.gate_residual(x, gate, torch.ones_like(x), gate_activation="tanh")
    torch.testing.assert_close(y[0, 0], gate.tanh(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ("bfd", "kd", "bkd"))
def test_the_ops_around_linears(backend, device, kind):
    def norm_linear(residual, shift, scale, weight, shift_table, scale_table, index):
        given = {"shift_table": shift_table, "scale_table": scale_table, "index": index}
        return zb.layer_norm_modulate_linear(residual, shift, scale, weight, **given)

    def eager_norm_linear(residual, weight, **given):
        return F.linear(eager_ops.residual_norm_modulate(residual, residual * 0, **given)[1], weight)

    def linear_gate(residual, branch, weight, gate, gate_table, index):
        return zb.linear_gate_residual(branch, weight, None, gate, residual, gate_table=gate_table, index=index)

    def eager_linear_gate(residual, branch, weight, **given):
        return eager_ops.residual_norm_modulate(residual, F.linear(branch, weight), **given)[0]

    def make(names):
        def drawn(seed):
            tensors, index = _drawn(seed, device, kind, F32, F32)
            weight = Draw(F32, seed=seed, device=device).normal(D, D, std=D**-0.5)
            return {**{n: tensors[n] for n in names}, "weight": weight}, {"index": index}

        return drawn

    modulated = ("residual", "shift", "scale", "shift_table", "scale_table")
    _assert_budget(norm_linear, eager_norm_linear, make(modulated))
    _assert_budget(linear_gate, eager_linear_gate, make(("residual", "branch", "gate", "gate_table")))


@pytest.mark.parametrize("kind", ("bd", "bfd", "bkd"))
def test_seam_is_a_case_of_it(backend, device, kind):
    tensors, index = _drawn(0, device, kind, F32, F32)
    expected = zb.residual_norm_modulate(**tensors, index=index)
    got = zb.gate_residual_layer_norm_modulate(**tensors, index=index)
    for a, b in zip(got, expected, strict=True):
        assert_bitwise_equal(a, b)


def test_forms_of_one_modulation_agree_bitwise(backend, device):
    """The same rows per frame, per token or by an index, and a table alone or beside rows, give the same bits."""
    draw = Draw(F32, device=device)
    x, branch = draw.tokens(B, T, D), draw.tokens(B, T, D)
    gate, shift, scale = (draw.normal(B, 3, D) for _ in range(3))
    zeros = torch.zeros(D, device=device)
    frame = torch.arange(T, device=device) // (T // 3)

    def call(form, index=None):
        rows = {name: form(v) for name, v in (("gate", gate), ("shift", shift), ("scale", scale))}
        return zb.residual_norm_modulate(x, branch, **rows, scale_table=zeros, index=index)

    expected = call(lambda v: v)
    for got in (
        call(lambda v: v.repeat_interleave(T // 3, 1)),
        call(lambda v: v, frame),
        call(lambda v: v, frame.int().expand(B, T)),
    ):
        for a, b in zip(got, expected, strict=True):
            assert_bitwise_equal(a, b)
    row = gate[0, 0]
    alone = zb.residual_norm_modulate(x, branch, gate_table=row, shift_table=row, scale_table=row)
    rows = zb.residual_norm_modulate(x, branch, gate=row, shift=row[None, None], scale=row[None], scale_table=zeros)
    for a, b in zip(alone, rows, strict=True):
        assert_bitwise_equal(a, b)


def test_views_need_not_be_dense(backend, device):
    """Six rows of one [B, T, 6, D]; their gradients meet in one tensor."""
    draw = Draw(F32, device=device)
    x, branch, packed = draw.tokens(B, T, D), draw.tokens(B, T, D), draw.normal(B, T, 6, D)

    def run(fn, contiguous):
        leaf = packed.detach().requires_grad_()
        rows = [v.contiguous() if contiguous else v for v in leaf.unbind(2)]
        x_new, y = fn(x, branch, gate=rows[2], shift=rows[0], scale=rows[1])
        (x_new.sum() + (y * branch).sum()).backward()
        return x_new.detach(), y.detach(), leaf.grad

    for a, b in zip(run(zb.residual_norm_modulate, False), run(zb.residual_norm_modulate, True), strict=True):
        assert_bitwise_equal(a, b)


def test_second_modulation_of_one_norm(backend, device):
    tensors, _ = _drawn(0, device, "bd", F32, F32)
    x, shift, scale = (tensors[n] for n in ("residual", "shift", "scale"))
    for function in (zb.layer_norm_modulate, zb.rms_norm_modulate):
        y, other = function(x, shift, scale, second=(scale, shift))
        torch.testing.assert_close(y, function(x, shift, scale))
        torch.testing.assert_close(other, function(x, scale, shift))
