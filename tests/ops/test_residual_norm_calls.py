"""Of modulation in all its forms: wrong arguments, eager's roundings, memory, threads, compilers, transforms."""

import typing

import pytest
import torch
import torch.nn.functional as F

import zeroblock as zb
from zeroblock.testing import CPU_MISSING, assert_bitwise_equal, saved_activation_bytes, use_backend

from .test_memory import allocations, most

B, T, D = 2, 12, 40
BF16 = torch.bfloat16


def _drawn(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


X, BRANCH, ROW, FRAMES, CHOICE = _drawn((B, T, D), (B, T, D), (B, D), (B, 3, D), (B, 4, D))
INDEX = torch.arange(T) % 4


norm, gated, both = zb.layer_norm_modulate, zb.gate_residual, zb.residual_norm_modulate


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: norm(X, CHOICE, None, index=INDEX + 1), ValueError, r"index must be in \[0, 4\), got 4"),
        (lambda: norm(X, CHOICE, None, index=INDEX - 1), ValueError, r"index must be in .*, got -1"),
        (lambda: norm(X, CHOICE, None, index=INDEX.float()), TypeError, "index must be int32 or int64"),
        (lambda: norm(X, CHOICE, None, index=INDEX[:5]), ValueError, r"index must have shape \[T\]"),
        (lambda: norm(X, CHOICE, None, index=[0]), TypeError, "index must be a Tensor, got list"),
        (lambda: norm(X, CHOICE[:, :, 1:], None, index=INDEX), ValueError, "shift must have shape"),
        (lambda: norm(X, FRAMES[:, :0], None), ValueError, "shift must have shape"),
        (lambda: norm(X, ROW, ROW, shift_table=ROW), ValueError, r"shift_table must have shape \[D\]"),
        (lambda: norm(X, ROW, ROW, scale_table=[1.0]), TypeError, "scale_table must be a Tensor"),
        (lambda: norm(X, ROW, ROW, y_dtype=torch.int32), TypeError, "y_dtype must be float32"),
        (lambda: norm(X, ROW, ROW, rounding="twice"), ValueError, "rounding must be one of"),
        (lambda: norm(X, ROW, ROW, second=ROW), TypeError, "second must be"),
        (lambda: gated(X, ROW, BRANCH, gate_activation="silu"), ValueError, "gate_activation must be one of"),
        (lambda: gated(X, None, BRANCH, gate_activation="tanh"), ValueError, "gate_activation must be None"),
        (lambda: gated(X, ROW, BRANCH, branch_norm="layer"), ValueError, "branch_norm must be one of"),
        (lambda: gated(X, ROW, BRANCH[:, 1:], out_dtype=BF16), ValueError, "branch must have the shape of"),
        (lambda: gated(X, ROW, BRANCH, branch_weight=ROW), ValueError, r"branch_weight must have shape \[D\]"),
        (lambda: both(X, BRANCH, norm="batch"), ValueError, "norm must be one of"),
        (lambda: both(X, BRANCH, eps=-1.0), ValueError, "eps must be finite"),
        (lambda: both(X, BRANCH, branch_eps=-1.0), ValueError, "eps must be finite"),
        (lambda: both(X, BRANCH, out_dtype="bf16"), TypeError, "out_dtype must be float32"),
    ],
)  # fmt: skip
def test_error_names_argument_and_requirement(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_eager_rounding_is_eager_to_the_bit():
    x, branch, w, v = _drawn((B, T, D), (B, T, D), (D,), (D,), dtype=BF16)
    scale, shift, gate = (t.to(BF16) for t in _drawn((B, D), (B, 3, D), (B, 4, D)))
    rows, chosen = shift.repeat_interleave(T // 3, 1), gate[:, INDEX]
    y = zb.layer_norm_modulate(x, shift, scale, weight=w, bias=v, scale_table=v, rounding="eager")
    expected = F.layer_norm(x, (D,), w, v, 1e-6) * (1 + (scale[:, None] + v)) + rows
    assert_bitwise_equal(y, expected)
    assert not torch.equal(zb.layer_norm_modulate(x, shift, scale, weight=w, bias=v, scale_table=v), expected)
    y = zb.rms_norm_modulate(x, None, gate, weight=w, index=INDEX, rounding="eager")
    assert_bitwise_equal(y, F.rms_norm(x, (D,), w, 1e-6) * (1 + chosen))
    x_new, y = zb.residual_norm_modulate(
        x, branch, gate=gate, gate_activation="tanh", branch_norm="rms", shift=v, index=INDEX, rounding="eager"
    )
    assert_bitwise_equal(x_new, x + chosen.tanh() * F.rms_norm(branch, (D,), None, 1e-6))
    assert_bitwise_equal(y, F.layer_norm(x_new, (D,), None, None, 1e-6) + v)


@pytest.mark.skipif(not hasattr(typing, "get_overloads"), reason="Python 3.10 forgets them")
def test_types_of_results():
    for f in (zb.layer_norm_modulate, zb.rms_norm_modulate):
        one, two = (o.__annotations__ for o in typing.get_overloads(f))
        assert (one["second"], one["return"]) == ("None", "Tensor")
        assert two["return"] == "tuple[Tensor, Tensor]" and list(one) == list(two) == list(f.__annotations__)


def test_dtypes_of_results():
    x, branch = X.to(BF16), BRANCH.to(BF16)
    for gate, out_dtype, y_dtype, expected in (
        (ROW, None, None, (torch.float32, torch.float32)),
        (ROW, BF16, None, (BF16, BF16)),
        (ROW, BF16, torch.float32, (BF16, torch.float32)),
        (ROW.to(BF16), None, None, (BF16, BF16)),
        (ROW.double(), BF16, None, (BF16, BF16)),
        (ROW.double(), None, BF16, (torch.float64, BF16)),
    ):
        x_new, y = zb.residual_norm_modulate(x, branch, gate=gate, shift=ROW, out_dtype=out_dtype, y_dtype=y_dtype)
        assert (x_new.dtype, y.dtype) == expected
        assert zb.gate_residual(x, gate, branch, out_dtype=out_dtype).dtype == expected[0]
    assert zb.layer_norm_modulate(x, ROW.double(), ROW, y_dtype=torch.float32).dtype == torch.float32


def test_y_is_of_x_new_as_it_is_stored():
    gate = 0.1 * ROW
    x_new, y = zb.residual_norm_modulate(X, BRANCH, gate=gate, out_dtype=BF16, y_dtype=torch.float32)
    torch.testing.assert_close(y, F.layer_norm(x_new.float(), (D,), eps=1e-6), rtol=1e-5, atol=1e-5)


def test_gate_of_any_shape_and_of_none():
    image = torch.randn(2, 6, 5, 4)
    gate = torch.tensor([0.3])
    y = zb.gate_residual(image, gate, image, gate_activation="tanh", out_dtype=BF16)
    torch.testing.assert_close(y, (image + gate.tanh() * image).to(BF16))
    torch.testing.assert_close(zb.gate_residual(X, None, BRANCH), X + BRANCH)
    torch.testing.assert_close(zb.gate_residual(X, gate, BRANCH, gate_table=ROW[0]), X + (gate + ROW[0]) * BRANCH)


def test_batch_of_one_expands():
    got = zb.residual_norm_modulate(X[:1], BRANCH, gate=CHOICE, shift=CHOICE[:1], index=INDEX[None])
    expected = zb.residual_norm_modulate(X[:1].repeat(2, 1, 1), BRANCH, gate=CHOICE, shift=CHOICE[0], index=INDEX)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    y = zb.layer_norm_modulate(X[:1], FRAMES, FRAMES)
    torch.testing.assert_close(y, zb.layer_norm_modulate(X[:1].repeat(2, 1, 1), FRAMES, FRAMES))


@pytest.mark.parametrize("size", [(0, 4, 8), (2, 0, 8), (1, 1, 1), (3, 5, 1)])
def test_empty_and_tiny(size):
    x, index = torch.randn(size), torch.zeros(size[1], dtype=torch.long)
    rows = torch.randn(2, size[2], requires_grad=True)
    x_new, y = zb.residual_norm_modulate(x, x, gate=rows, shift=rows, scale_table=rows[0], index=index)
    assert x_new.shape == y.shape == x.shape
    (x_new.sum() + y.sum()).backward()
    assert rows.grad.isfinite().all()


@pytest.mark.skipif(CPU_MISSING is not None, reason=f"the native kernels: {CPU_MISSING}")
def test_same_bits_for_any_number_of_threads():
    """Many chunks, rows that none, one and most tokens choose."""
    x, branch, rows, dy = _drawn((2, 700, 48), (2, 700, 48), (2, 70, 48), (2, 700, 48))
    index = (torch.rand(2, 700, generator=torch.Generator().manual_seed(1)) ** 4 * 70).long()

    def run():
        leaves = [t.detach().requires_grad_() for t in (rows, rows, rows, rows[0, 0])]
        gate, shift, scale, table = leaves
        out = zb.residual_norm_modulate(x, branch, gate=gate, shift=shift, scale=scale, gate_table=table, index=index)
        return [*out, *torch.autograd.grad(out, leaves, (dy, dy))]

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        for a, b in zip(again, results[0], strict=True):
            assert_bitwise_equal(a.detach(), b.detach())
    with use_backend("reference"):
        for a, b in zip(run(), results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_saved_for_backward():
    """x_new, the statistics and what the caller owns: nothing of the size of the tokens beside."""
    x, branch, packed = _drawn((B, 64, D), (B, 64, D), (B, 64, 3, D))
    packed.requires_grad_()

    def forward():
        gate, shift, scale = packed.unbind(2)
        return zb.residual_norm_modulate(x, branch, gate=gate, shift=shift, scale=scale, gate_table=ROW[0])

    tokens = x.numel() * 4
    assert saved_activation_bytes(forward, exclude=[x, branch, packed, ROW]) <= tokens + 2 * B * 64 * 4


def test_norm_before_a_linear_is_computed_again():
    """Nothing of the size of the tokens is kept."""
    x, weight = X.detach().requires_grad_(), torch.randn(8, D, requires_grad=True)

    def forward():
        return zb.layer_norm_modulate_linear(x, CHOICE, CHOICE, weight, index=INDEX)

    assert saved_activation_bytes(forward, exclude=[x, weight, CHOICE]) == 0
    y = forward()
    y.sum().backward()
    expected = zb.layer_norm_modulate(x, CHOICE, CHOICE, index=INDEX)
    torch.testing.assert_close(y, F.linear(expected, weight))
    torch.testing.assert_close(weight.grad, torch.ones(8, B * T) @ expected.detach().flatten(0, 1))


def test_compiled_and_exported():
    def call(x, branch, rows, frames, table):
        x_new, y = zb.residual_norm_modulate(
            x, branch, gate=rows, shift=rows, scale=rows, scale_table=table, index=INDEX
        )
        return x_new, zb.layer_norm_modulate(y, frames, frames)

    inputs = (X, BRANCH, CHOICE, FRAMES, ROW[0])
    expected = call(*inputs)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.no_grad():
        for a, b in zip(compiled(*inputs), expected, strict=True):
            torch.testing.assert_close(a, b)
    got = torch.autograd.grad([y.sum() for y in compiled(*leaves)], leaves)
    wanted = torch.autograd.grad([y.sum() for y in call(*leaves)], leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    for a, b in zip(torch.export.export(Module(), inputs).module()(*inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trained", ("x", "row"))
def test_double_backward_beside_frozen_operands(trained):
    leaves = {"x": X.double().requires_grad_(trained == "x"), "row": ROW.double().requires_grad_(trained == "row")}

    def penalty(function, **options):
        x, row = leaves["x"], leaves["row"]
        gate = row if trained == "x" else row.detach()
        x_new, y = function(x, gate, BRANCH.double(), row, row.detach(), **options)
        first = torch.autograd.grad(y.square().sum() + x_new.square().sum(), leaves[trained], create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), leaves[trained])[0]

    def eager(x, gate, branch, shift, scale):
        x_new = x + gate[:, None] * branch
        return x_new, F.layer_norm(x_new, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    expected = penalty(eager)
    torch.testing.assert_close(penalty(zb.gate_residual_layer_norm_modulate), expected)
    table = torch.zeros(D, dtype=torch.float64)
    torch.testing.assert_close(penalty(zb.gate_residual_layer_norm_modulate, scale_table=table), expected)


def test_vmap():
    rows = torch.randn(3, B, 4, D)
    got = torch.func.vmap(lambda v: zb.layer_norm_modulate(X, v, v, index=INDEX))(rows)
    for y, v in zip(got, rows, strict=True):
        torch.testing.assert_close(y, zb.layer_norm_modulate(X, v, v, index=INDEX))


def _wan_block(x, packed, table):
    """A block whose modulation is scale_shift_table + temb: [D] and [B, T, D] six times, or rows and an index."""
    rows, index = packed
    shift, scale, gate, shift2, scale2, gate2 = rows.unbind(2)
    t = table.unbind(0)
    h = zb.layer_norm_modulate(x, shift, scale, shift_table=t[0], scale_table=t[1], index=index)
    modulated = {"shift": shift2, "scale": scale2, "shift_table": t[3], "scale_table": t[4]}
    x, h = zb.residual_norm_modulate(x, h, gate=gate, gate_table=t[2], index=index, out_dtype=x.dtype, **modulated)
    return zb.gate_residual(x, gate2, h, gate_table=t[5], index=index, out_dtype=x.dtype)


@pytest.mark.skipif(CPU_MISSING is not None, reason=f"the native kernels: {CPU_MISSING}")
@pytest.mark.parametrize("form", ("tokens", "index"))
def test_a_block_never_materialises_table_plus_temb(form):
    """Beyond temb and its one gradient nothing is as large; with rows and an index nothing is of its size at all."""
    n = 256
    x, table = torch.randn(2, n, 64, requires_grad=True), torch.randn(6, 64, requires_grad=True)
    rows = torch.randn(2, n if form == "tokens" else 2, 6, 64, requires_grad=True)
    packed = (rows, None if form == "tokens" else (torch.arange(n) >= 64).long())
    temb = 2 * n * 6 * 64 * 4
    dy = torch.randn(2, n, 64)
    sizes = allocations(lambda: torch.autograd.grad(_wan_block(x, packed, table), (x, rows, table), dy))
    large = [size for size in sizes if size >= temb]
    assert len(large) == (1 if form == "tokens" else 0)
    if form == "index":
        assert most(sizes) < 1.5 * temb
