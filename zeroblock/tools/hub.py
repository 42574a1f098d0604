"""Writes a package for Hugging Face's kernels hub: `python -m zeroblock.tools.hub DIR` (`make hub`).

DIR/build/torch-cuda, torch-rocm and torch-cpu, as the hub's builder lays out a kernel without compiled parts: this
package's own files, with the Triton kernels, and metadata.json. Each has a namespace of its own for its ops, so that it
stands beside an installed zeroblock and other versions of itself. Load it with `kernels.get_local_kernel(DIR)`; its
layers are those of nn/hub.py.
"""

from __future__ import annotations

import argparse
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
# The command, and what it alone uses, which names the package as it is installed.
LEFT_OUT = ("tools", "testing", "cli.py", "__main__.py", "__pycache__")
LAYERS = '\nfrom .nn import hub as layers\n\n__all__ += ["layers"]\n'


def files() -> Iterator[tuple[Path, Path]]:
    """(a file, its place in the package) of all that is needed. In a checkout the kernels stand beside the package."""
    beside = [(KERNELS, Path("kernels"))] if KERNELS.parent != PACKAGE else []
    for top, place in [(PACKAGE, Path()), *beside]:
        for path in sorted(top.rglob("*")):
            inner = path.relative_to(top)
            if path.suffix in (".py", ".html") and not set(inner.parts) & set(LEFT_OUT):
                yield path, place / inner


def digest() -> str:
    found = hashlib.sha256()
    for path, place in files():
        found.update(f"{place}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def write(folder: Path) -> list[Path]:
    """The variants that were written, in place of those that were there."""
    variants = []
    for backend in BACKENDS:
        variant, name = folder / f"build/torch-{backend}", f"{NAMESPACE}_{backend}_{digest()}"
        shutil.rmtree(variant, ignore_errors=True)
        for path, place in files():
            (variant / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, variant / place)
        version, init = variant / "_version.py", variant / "__init__.py"
        version.write_text(version.read_text().replace(f'NAMESPACE = "{NAMESPACE}"', f'NAMESPACE = "{name}"'))
        init.write_text(init.read_text() + LAYERS)
        (variant / "metadata.json").write_text(json.dumps(metadata(name, backend), indent=2) + "\n")
        variants.append(variant)
    return variants


def metadata(name: str, backend: str) -> dict[str, object]:
    return {
        "id": name,
        "name": NAMESPACE,
        "version": int(__version__.split(".")[0]) * 100 + int(__version__.split(".")[1]),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for variant in write(parser.parse_args(arguments).folder):
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
