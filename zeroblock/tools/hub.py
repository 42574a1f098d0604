"""Writes a package for Hugging Face's kernels hub: `python -m zeroblock.tools.hub DIR` (`make hub`).

DIR is a project of the hub's builder, for a kernel without compiled parts (`torch-noarch`): build.toml, flake.nix,
CARD.md and torch-ext/zeroblock, which has this package's own files and the Triton kernels. DIR/build has what the
builder makes of it: torch-cuda, torch-rocm and torch-cpu, each with metadata.json and a namespace of its own for its
ops, so that it stands beside an installed zeroblock and other versions of itself. Load it with
`kernels.get_local_kernel(DIR)`; its layers are those of nn/hub.py.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .._version import NAMESPACE, __version__
from ..kernels import _torch

PACKAGE = Path(__file__).parents[1]
KERNELS = Path(_torch.__file__).parent
BACKENDS = ("cuda", "rocm", "cpu")
# The hub counts whole versions: 0.2.1 is its 2, 1.3.0 its 103.
MAJOR, MINOR, *_ = map(int, __version__.split("."))
VERSION = 100 * MAJOR + MINOR
LICENSE = "Apache-2.0"
# The command, and what it alone uses, which names the package as it is installed.
LEFT_OUT = ("tools", "testing", "cli.py", "__main__.py", "__pycache__")
SUFFIXES = (".html", ".py")

BUILD_TOML = f"""[general]
name = "{NAMESPACE}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
pyext = {json.dumps([suffix[1:] for suffix in SUFFIXES])}
"""
FLAKE = """{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
CARD = f"""---
library_name: kernels
license: apache-2.0
---

zeroblock {__version__}: the residual blocks of diffusion models, in Triton and PyTorch.
"""
LAYERS = '\nfrom .nn import hub as layers\n\n__all__ += ["layers"]\n'
# _ops.py is the builder's, and says which namespace a build's ops are in.
VERSION_PY = f"""from ._ops import add_op_namespace_prefix

__version__ = "{__version__}"
NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
"""
OPS_PY = """import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""


def files() -> Iterator[tuple[Path, Path]]:
    """(a file, its place in the package) of all that is needed. In a checkout the kernels stand beside the package."""
    beside = [(KERNELS, Path("kernels"))] if KERNELS.parent != PACKAGE else []
    for top, place in [(PACKAGE, Path()), *beside]:
        for path in sorted(top.rglob("*")):
            inner = path.relative_to(top)
            if path.suffix in SUFFIXES and not set(inner.parts) & set(LEFT_OUT):
                yield path, place / inner


def digest() -> str:
    found = hashlib.sha256()
    for path, place in files():
        found.update(f"{place}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def write(folder: Path) -> list[Path]:
    """The variants that were written, in place of those that were there."""
    source = folder / "torch-ext" / NAMESPACE
    for written in (source, *(folder / f"build/torch-{backend}" for backend in BACKENDS)):
        shutil.rmtree(written, ignore_errors=True)
    write_source(source)
    for name, text in (("build.toml", BUILD_TOML), ("flake.nix", FLAKE), ("CARD.md", CARD)):
        (folder / name).write_text(text)
    return [write_variant(folder / f"build/torch-{backend}", source, backend) for backend in BACKENDS]


def write_source(folder: Path) -> None:
    for path, place in files():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / place)
    (folder / "_version.py").write_text(VERSION_PY)
    with (folder / "__init__.py").open("a") as init:
        init.write(LAYERS)


def write_variant(folder: Path, source: Path, backend: str) -> Path:
    name = f"_{NAMESPACE}_{backend}_{digest()}"
    shutil.copytree(source, folder)
    (folder / "_ops.py").write_text(OPS_PY.format(name=name))
    (folder / "metadata.json").write_text(json.dumps(metadata(name, backend, folder), indent=2) + "\n")
    return folder


def metadata(name: str, backend: str, folder: Path) -> dict[str, object]:
    """Of the variant in `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).digest() for path in paths}
    return {
        "id": name,
        "name": NAMESPACE,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(found).decode() for path, found in sums.items()},
        },
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for variant in write(parser.parse_args(arguments).folder):
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
