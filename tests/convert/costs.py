"""What a gated transformer block costs, counted: no clock is involved.

`ZEROBLOCK_PLAN=fixed python -m tests.convert.costs` renews the table (costs.csv), a line for each family:

    results      how many tensors the block returns
    inference    ops of norms and gates that zeroblock runs in a forward without gradients
    in a row     the same of a block between others of its class (convert/seam.py)
    training     the same of a forward with gradients
    eager        kernels of the block's own forward that are neither products nor attention nor copies
    beside       such kernels that still run beside zeroblock's ops: in attention, activations and the modulation
    eager norms  those of them that are norms or gates of the block's own: none but additions
    saved        bytes that autograd keeps for a backward, as a share of the block's own, of 256 tokens
    attention    what of it the block's own attention keeps: q, k and v before and after their norms, its result, masks
"""

from __future__ import annotations

import collections
import copy
import csv
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zeroblock as zb
from zeroblock import ops
from zeroblock.blocks import tiny
from zeroblock.convert.accelerated import applied
from zeroblock.convert.families import known
from zeroblock.convert.family import Family
from zeroblock.ops import remade

from .cases import randomize_
from .one_of_each import BLOCKS

TABLE = Path(__file__).parent / "costs.csv"
COUNTS = ("results", "inference", "in a row", "training", "eager", "beside", "eager norms")
FIELDS = ("family", *COUNTS, "saved", "attention")
WRITTEN_OUT = ("DiTBlock", "PixArtBlock", "DoubleStreamBlock", "SingleStreamBlock", "JointTransformerBlock")
OPS = [name for name in dir(ops) if ("norm" in name or "gate" in name) and "group" not in name and "bwd" not in name]
CODES = {f.__code__ for name in OPS if hasattr(f := getattr(ops, name), "__code__")}
POINTWISE = (
    *("native_layer_norm", "_fused_rms_norm", "add", "sub", "mul", "div", "rsqrt", "mean", "pow", "tanh", "silu"),
    *("gelu", "sigmoid", "_to_copy", "type_as", "clamp", "addcmul"),
)


# Their attention takes more than an example holds: caches of keys, rays of a camera, flex attention.
NOT_COUNTED = (
    *("SanaVideoMSCamCtrlBlock", "WanAnimate2TransformerBlock", "Kandinsky6SRTransformerBlock"),
    *("LTX2VideoVaeNABlock", "LTX2VideoVaeDiffusionNABlock"),
)


def families() -> list[str]:
    """The gated transformer blocks."""
    described = [name for name, kind in known().items() if hasattr(kind, "description") and name not in NOT_COUNTED]
    return [name for name in BLOCKS if name in described or name in WRITTEN_OUT]


class _Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = collections.Counter()  # type: ignore[var-annotated]
        self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1].removesuffix("_")
        self.found[name] += 1
        self.norms += name in POINTWISE and name != "add" and _of_the_block()
        return func(*args, **(kwargs or {}))

    def pointwise(self) -> int:
        return sum(n for name, n in self.found.items() if name in POINTWISE)


def _of_the_block() -> bool:
    """Whether an op that is not zeroblock's belongs to a norm or gate that a family has of a block, and not to what it
    calls: by the frames around it."""
    frame = sys._getframe(1)
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if "/zeroblock/functional/" in path:  # of an index, say
            return False
        if "/zeroblock/convert/" in path:
            return path.endswith("/streams.py") or name in ("modulated", "gated", "eager", "replaced")
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and "Norm" not in type(owner).__name__:
            ours = applied(owner)
            if ours is None or ours.family.inner:
                return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _ours(call: Any) -> int:
    found: list[int] = []
    # An op that records a gradient is entered again, directly.
    sys.setprofile(
        lambda frame, event, arg: (
            event == "call" and frame.f_code in CODES and not frame.f_locals["direct"] and found.append(1)
        )
    )
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(found)


def _first(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]


def line(name: str) -> dict[str, str]:
    torch.manual_seed(0)
    plain: nn.Module = randomize_(BLOCKS[name]()).eval()
    ours = copy.deepcopy(plain)
    zb.accelerate(ours)
    family = known()[name]()
    args, large = family.example(plain, 4), family.example(plain, 16)
    method = family.entry(type(plain))

    def run(block: nn.Module, given: tuple) -> Any:
        return getattr(block, method)(*given)

    kernels = []
    with torch.no_grad():
        results = _first(run(ours, args))
        inference, in_a_row = _ours(lambda: run(ours, args)), ""
        for block in (plain, ours):
            with _Kernels() as seen:
                run(block, args)
            kernels.append(seen.pointwise())
        kernels.append(seen.norms)
        if getattr(family, "seams", name == "DiTBlock"):
            in_a_row = str(_in_a_row(ours, args, run))

    given = tuple(t.clone().requires_grad_() if _is_floating(t) and t.dim() == 3 else t for t in large)
    plain.train(), ours.train()
    exclude = [*tree_leaves(given), *plain.parameters(), *ours.parameters()]
    tensors = [t for t in exclude if isinstance(t, Tensor)]
    with mock.patch.multiple(remade, LEAST_BYTES=1024, LEAST_WIDTH=0):
        kept = [_saved(lambda b=block: run(b, given), tensors) for block in (ours, plain)]
    counts = (len(results), inference, in_a_row, _ours(lambda: run(ours, given)), *kernels)
    shares = [f"{n / sum(kept[1]):.2f}" for n in (sum(kept[0]), kept[0][1])]
    return dict(zip(FIELDS, (name, *map(str, counts), *shares), strict=True))


def _saved(call: Any, exclude: list[Tensor]) -> tuple[int, int]:
    """Bytes that call() leaves saved, of the block and of its attention: a storage is attention's that nobody else
    saves."""
    known = {t.untyped_storage().data_ptr() for t in exclude}
    found: dict[int, tuple[Any, bool]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        at = storage.data_ptr()
        if at not in known and storage.nbytes():
            found[at] = storage, _in_attention() and found.get(at, (None, True))[1]
        return t

    pack.only_counts = True  # type: ignore[attr-defined]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    kept = [0, 0]
    for storage, attention in found.values():
        kept[attention] += storage.nbytes()
    del result
    return kept[0], kept[1]


def _in_attention() -> bool:
    """Whether a foreign module or processor of attention is being called."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = type(frame.f_locals.get("self"))
        if "Att" in owner.__name__ and not issubclass(owner, Family) and "Block" not in owner.__name__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_floating(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _in_a_row(block: nn.Module, args: tuple, run: Any) -> int:
    """Three blocks, each given what the one before returned: the middle one's ops."""
    blocks = [copy.deepcopy(block) for _ in range(3)]
    counts = []
    for _ in range(2):
        given, counts = args, []
        for b in blocks:
            found: list[Any] = []
            counts.append(_ours(lambda b=b, given=given, found=found: found.append(run(b, given))))
            given = _handed_over(args, _first(found[0]), run)
    return counts[1]


def _handed_over(args: tuple, results: list[Tensor], run: Any) -> tuple:
    """The streams are the first arguments; a family that returns them in another order has two of different sizes."""
    left, given = list(results), []
    for t in args:
        same = [r for r in left if isinstance(t, Tensor) and r.shape == t.shape]
        given.append(same[0] if same else t)
        left = [r for r in left if not same or r is not same[0]]
    return tuple(given)


def table() -> dict[str, dict[str, str]]:
    with TABLE.open(newline="") as file:
        return {line["family"]: line for line in csv.DictReader(file)}


def renew() -> None:
    torch.set_num_threads(1)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(line, sorted(families())))


if __name__ == "__main__":
    tiny.IMAGES = tiny.TOKENS = 0  # as in the tests: the blocks here are tiny
    renew()
