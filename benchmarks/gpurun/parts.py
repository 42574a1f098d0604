"""Step parts: the extension and the compiled Triton kernels that were carried here, else the extension is built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from . import ROOT, Setting, Skip

CARRIED = ROOT / "build/carried/_C.so"
ARCHIVE = ROOT / "build/triton-sm90.tar.gz"
CACHE = ROOT / "build/gpu/triton"  # TRITON_CACHE_DIR of the run
PLACE = "@CACHE@"  # stands in the archive for the folder that it is unpacked to: Triton writes it into its files
BUILT = ROOT / "zeroblock/_C.so"
TELL = """
import json
from zeroblock.backends import available
cuda = available.cuda()
print(json.dumps([available.EXTENSION_MISSING, cuda.missing, "" if cuda.missing else cuda.archs()]))
"""


def kernels(folder: Path = CACHE) -> int:
    """How many compiled kernels a Triton cache holds."""
    return len(list(folder.glob("*/*.cubin")))


def unpack(archive: Path, folder: Path) -> None:
    """Into a new folder, where nothing is in doubt."""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    for path in folder.glob("*/*.json"):
        path.write_text(path.read_text().replace(PLACE, str(folder)))


def triton_cache(setting: Setting) -> dict:
    """Unpacked once: what the run compiles on top of it stays."""
    stamp = CACHE / "unpacked"
    if not ARCHIVE.exists():
        raise Skip(f"{ARCHIVE.relative_to(ROOT)} was not carried (make gpu-cache makes it)")
    state = f"{ARCHIVE.stat().st_size} {ARCHIVE.stat().st_mtime_ns}"
    if not stamp.exists() or stamp.read_text() != state:
        unpack(ARCHIVE, CACHE)
        stamp.write_text(state)
    return {"kernels": kernels()}


def told() -> tuple[str | None, str]:
    """(why the extension does not run on this device, what its CUDA kernels were built for), by a new process."""
    done = subprocess.run([sys.executable, "-c", TELL], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip()[-300:], ""
    extension, cuda, archs = json.loads(done.stdout.splitlines()[-1])
    return extension or cuda, archs


def runs_here(setting: Setting, arch: str) -> tuple[bool, str]:
    """Whether the extension in the tree has what this device needs, and what it is."""
    missing, archs = told()
    if setting.device == "cpu":
        return missing is None or "CUDA" in missing, missing or archs
    return missing is None and f"sm_{arch}" in archs.split(), missing or archs


def extension(setting: Setting) -> dict:
    arch = ""
    if setting.device == "cuda":
        import torch

        arch = "".join(map(str, torch.cuda.get_device_capability(0)))
    tried = {}
    if BUILT.exists():
        good, tried["of the tree"] = runs_here(setting, arch)
        if good:
            return {"extension": "of the tree", "why": tried}
    if CARRIED.exists():
        draft = BUILT.with_suffix(".new")
        shutil.copy(CARRIED, draft)
        draft.replace(BUILT)
        good, tried["carried"] = runs_here(setting, arch)
        if good:
            return {"extension": "carried", "why": tried}
    if setting.quick:
        raise Skip(f"a dry run builds nothing: {tried}")
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": f"{arch[:-1]}.{arch[-1:]}" if arch else "9.0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    good, tried["built here"] = runs_here(setting, arch)
    if not good:
        raise RuntimeError(f"{tried}: {(done.stdout + done.stderr)[-800:]}")
    return {"extension": "built here", "why": tried}


def units(setting: Setting) -> dict[str, Callable[[], dict]]:
    return {f.__name__: (lambda f=f: f(setting)) for f in (triton_cache, extension)}
