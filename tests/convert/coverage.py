"""What accelerate does with every model of the installed diffusers, in tiny sizes, and a table of it.

`ZEROBLOCK_PLAN=fixed python -m tests.convert.coverage [CLASS ...]` renews the table (zeroblock/convert/coverage.csv):
the model's class; the level; the families of whole blocks and how many of their branches there are; every residual
block that is left alone, with the reason. Sizes and inputs of the models are in diffusers_models.json (transformers)
and diffusers_others.json (U-Nets, ControlNets, autoencoders).

Levels: "blocks" (every residual block that has norms of its own is run by zeroblock, none of them asks its original
at a call), "some blocks", "parts" (layers or norms alone), "nothing", "no blocks" (there is none: a projection, say).
"""

from __future__ import annotations

import collections
import csv
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import zeroblock as zb
from zeroblock.blocks import tiny
from zeroblock.convert.families import known
from zeroblock.convert.table import TABLE as TABLE
from zeroblock.convert.trial import tensors as tensors

HERE = Path(__file__).parent
FIELDS = ("class", "level", "blocks", "left alone")
# Classes that cannot be run, and why.
NOT_RUN: dict[str, str] = {}


class Model(NamedTuple):
    model: nn.Module
    inputs: dict[str, Any]


def classes() -> list[str]:
    """The names of diffusers' models."""
    import diffusers

    kinds = {name: getattr(diffusers, name, None) for name in dir(diffusers)}
    base = diffusers.ModelMixin
    return [name for name, k in kinds.items() if isinstance(k, type) and issubclass(k, base) and k is not base]


def is_transformer(name: str) -> bool:
    return ("ransformer" in name or "DiT" in name) and not name.endswith("Vae")


def sizes() -> dict[str, dict[str, Any]]:
    files = ("diffusers_models.json", "diffusers_others.json")
    return {name: size for file in files for name, size in json.loads((HERE / file).read_text()).items()}


def build(name: str) -> Model:
    """The model, with parameters none of which is zero, and its arguments."""
    import diffusers

    spec, generator = sizes()[name], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**{k: _value(v, generator) for k, v in spec["config"].items()})
    with torch.no_grad():
        for p in model.parameters():
            p.masked_fill_(~(p.abs() < 100), 0.0)  # some are made by torch.empty and never filled
            p.add_(0.05 * torch.randn_like(p))
    return Model(_ready(model), {k: _value(v, generator) for k, v in spec["inputs"].items()})


def _ready(model: nn.Module) -> nn.Module:
    """The model that is run: most as they are, some need a setting or run as a part of another model."""
    import diffusers

    match type(model).__name__:
        case "AutoencoderKLAllegro":
            model.enable_tiling()
        case "ControlNetXSAdapter":
            size = {**sizes()["UNet2DConditionModel"]["config"], "layers_per_block": 2}
            unet = diffusers.UNet2DConditionModel(**{k: _value(v, torch.Generator()) for k, v in size.items()})
            return diffusers.UNetControlNetXSModel.from_unet(unet, model)
        case "MotionAdapter":
            return diffusers.UNetMotionModel.from_unet2d(build("UNet2DConditionModel").model, model)
        case "ZImageControlNetModel":
            model.gradient_checkpointing = False  # which training asks for and its constructor forgets
            return type(model).from_transformer(model, build("ZImageTransformer2DModel").model)
    return model


def _value(v: Any, generator: torch.Generator) -> Any:
    """Of the file: {"normal": size}, {dtype: values}, {dtype: size, "all": value}, {dtype: size, "below": bound},
    {"model": class}, {"object": "module.class", "of": its arguments}."""
    if isinstance(v, list):
        return [_value(x, generator) for x in v]
    if isinstance(v, str) and v.startswith("arange "):
        return torch.arange(int(v.split()[1]))
    if not isinstance(v, dict):
        return v
    if "tuple" in v:
        return tuple(_value(x, generator) for x in v["tuple"])
    if "dict" in v:
        return {k: _value(x, generator) for k, x in v["dict"].items()}
    if "model" in v:
        return build(v["model"]).model
    if "object" in v:
        return pkgutil.resolve_name(v["object"])(*v["of"])
    if "numbered" in v:
        return {int(k): x for k, x in v["numbered"].items()}
    if "normal" in v:
        return torch.randn(v["normal"], generator=generator)
    if "complex" in v:
        return torch.randn(v["complex"], generator=generator, dtype=torch.complex64)
    ((kind, given),) = [(k, x) for k, x in v.items() if k not in ("all", "below")]
    dtype = getattr(torch, kind)
    if "all" in v:
        return torch.full(given, v["all"], dtype=dtype)
    return (
        torch.randint(v["below"], given, generator=generator).to(dtype)
        if "below" in v
        else torch.tensor(given, dtype=dtype)
    )


class _Originals:
    """The families whose blocks' own forwards ran while it was active."""

    def __init__(self, model: nn.Module):
        applied = [type(m)._zeroblock for m in model.modules() if hasattr(type(m), "_zeroblock")]
        self.codes = {
            inspect.unwrap(a.method).__code__: a.family.name
            for a in applied
            if not (a.family.only_skips or a.family.inner)
        }
        self.ran: set[str] = set()

    def __enter__(self) -> _Originals:
        sys.setprofile(lambda frame, event, arg: self._note(frame) if event == "call" else None)
        return self

    def _note(self, frame: Any) -> None:
        if frame.f_code in self.codes:
            self.ran.add(self.codes[frame.f_code])

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)


def row(model: nn.Module, call: Callable[[nn.Module], Any]) -> dict[str, str]:
    """The line of the table; accelerates the model and calls it."""
    has_norms = {path for path, m in model.named_modules() if any("Norm" in type(c).__name__ for c in m.children())}
    report = zb.accelerate(model)
    with _Originals(model) as originals, torch.no_grad():
        call(model)
    blocks = collections.Counter(b.family for b in report.branches if not known()[b.family].inner)
    left = collections.Counter(f"{b.block}: {b.kind.title}" for b in report.left_alone)
    left.update(f"{name}: runs the original" for name in originals.ran)
    open_ = originals.ran or any(b.path in has_norms for b in report.left_alone)
    level = "parts" if report.blocks else "nothing" if report.left_alone else "no blocks"
    if blocks:
        level = "some blocks" if open_ else "blocks"
    words = ["; ".join(f"{k} ({n})" for k, n in sorted(counts.items())) for counts in (blocks, left)]
    return dict(zip(FIELDS[1:], (level, *words), strict=True))


def table() -> dict[str, dict[str, str]]:
    with TABLE.open(newline="") as file:
        return {line["class"]: line for line in csv.DictReader(file)}


def renew(only: list[str]) -> None:
    """All lines, or those of these classes."""
    torch.set_num_threads(1)
    lines, known_lines = [], table()
    for name in sorted(classes()):
        if name in NOT_RUN:
            lines.append({"class": name, "level": "not run", "blocks": "", "left alone": NOT_RUN[name]})
        elif only and name not in only:
            lines.append(known_lines[name])
        else:
            model, inputs = build(name)
            lines.append({"class": name, **row(model.eval(), lambda m, inputs=inputs: m(**inputs))})
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(collections.Counter(line["level"] for line in lines))


if __name__ == "__main__":
    tiny.IMAGES = tiny.TOKENS = 0  # as in the tests: the blocks here are tiny
    renew(sys.argv[1:])
