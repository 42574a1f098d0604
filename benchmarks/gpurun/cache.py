"""Prepares what a GPU machine need not build (`make gpu-cache`): build/carried/_C.so and build/triton-sm90.tar.gz.

Here, without a GPU: the extension for that architecture alone, stripped; and a Triton cache with every kernel that the
calls of `checks.py` and the headlines start. Each launch is recorded on meta tensors and compiled by Triton's JIT under
a stand-in for its driver, so that the keys are the JIT's; they hold where the same wheel of Triton is installed (of the
same Python, too). The cache stays in build/, so that only what changed is compiled again; the archive has what this
version starts. Run it with the Python and torch of that machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from . import ROOT
from .parts import ARCHIVE, CARRIED, PLACE, kernels

CAPABILITY = 90
FOLDER = ROOT / "build/triton-sm90"
MOST = 40 << 20  # bytes of both parts together

Launch = Any  # kernels._launch.Launch


def extension() -> None:
    major, minor = divmod(CAPABILITY, 10)
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "ZEROBLOCK_BUILD_CUDA": "1"}
    folders = ["--build-lib", str(ROOT / "build/lib-sm90"), "--build-temp", str(ROOT / "build/temp-sm90")]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *folders]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    CARRIED.parent.mkdir(parents=True, exist_ok=True)
    built = ROOT / "build/lib-sm90/zeroblock/_C.so"
    subprocess.run(["strip", "--strip-unneeded", "-o", str(CARRIED), str(built)], check=True)


class SeenZero:
    """Instead of a word in pinned memory: every look finds the weight zero. So the first call takes the dense plan and
    looks, the next one the flagged plan."""

    def copy(self, flag: Any) -> None:
        pass

    def ready(self) -> bool:
        return True

    def value(self) -> int:
        return 1


@contextlib.contextmanager
def meta_goes_as_a_gpu() -> Iterator[None]:
    """Meta tensors take the way of a GPU's in the block, to Triton's kernels."""
    import torch

    from zeroblock.backends import available, triton_gemms
    from zeroblock.backends.triton import TRITON
    from zeroblock.steps import hint

    enabled = torch.is_autocast_enabled
    with (
        mock.patch.object(TRITON, "device", "meta"),
        mock.patch.object(triton_gemms, "may_test", lambda t: True),
        mock.patch.object(available, "_forced", "gpu"),
        mock.patch.object(hint, "new_word", SeenZero),
        # It raises for meta.
        mock.patch.object(torch, "is_autocast_enabled", lambda *of: of != ("meta",) and enabled(*of)),
    ):
        yield


def of_checks() -> Iterator[Launch]:
    from zeroblock.kernels import _launch

    from . import checks

    every = [*checks.parity("cuda", False), *checks.large("cuda", False), *checks.measured(), *checks.ways("cuda")]
    for check in every:
        if check.chosen.startswith("cuda") or check.chosen.startswith(f"{checks.WAY}cuda"):
            continue
        with checks.chosen(check, "meta"), _launch.recording(run=False) as launches:
            checks.call(check, "meta")
        yield from launches


def of_headlines(cases: Iterable[Any]) -> Iterator[Launch]:
    """Of every way that the plans would measure; once as if the library were the slowest, once as if the fastest. Each
    is called twice: as long as nothing was seen of a weight, and where it was seen zero."""
    import torch

    from zeroblock.kernels import _launch
    from zeroblock.plan import planned

    for case, library in itertools.product(cases, (0.5, 2.0)):
        with torch.device("meta"):
            side = case.work().own
        timer = lambda name, run, device: library if name == "library" else 1.0  # noqa: E731, B023
        training = case.mode == "training"
        with planned.use("measure", timer=timer), _launch.recording(run=False) as launches:
            for _ in range(2):
                with torch.set_grad_enabled(training):
                    y = side.function(*side.inputs)
                if training:
                    outputs = y if isinstance(y, tuple) else (y,)
                    torch.autograd.grad(outputs, side.wrt, [torch.ones_like(t) for t in outputs])
        yield from launches


class Driver:
    """What Triton asks of a GPU before it starts a kernel."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def alignment(value: Any) -> tuple[bool, ...]:
    """Which tensors of an argument the JIT takes as aligned to 16 bytes (Launch.source() takes all as that)."""
    values = value if isinstance(value, tuple) else (value,)
    return tuple(v.data_ptr() % 16 == 0 for v in values if hasattr(v, "data_ptr"))


def distinct(launches: Iterable[Launch], most: int | None = None) -> list[Launch]:
    """One launch of each specialisation."""
    found: dict[str, Launch] = {}
    for launch in launches:
        aligned = [alignment(value) for value in launch.arguments.values()]
        found.setdefault(f"{launch.source().hash()} {sorted(launch.options.items())} {aligned}", launch)
        if len(found) == most:
            break
    return list(found.values())


def build_launcher(kernel: Any = None) -> None:
    """What starts a kernel there, where Triton compiles C for that (3.6 does for every signature); without a kernel
    what all of them need. It is linked to a stand-in for the GPU's library, and so made here but not loaded."""
    from triton.backends.nvidia import driver

    with mock.patch("triton.runtime.build._load_module_from_path", return_value=mock.MagicMock()):
        if kernel is None:
            driver.CudaUtils()
        elif hasattr(driver, "make_launcher"):
            driver.CudaLauncher(kernel.src, kernel.metadata)


def stand_in_library(folder: Path) -> None:
    """libcuda.so.1 with nothing in it, where Triton looks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.c").touch()
    command = ["cc", "-shared", "-Wl,-soname,libcuda.so.1", "empty.c", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=folder, check=True)
    (folder / "libcuda.so").unlink(missing_ok=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)


_work: list[Launch] = []


def compile_one(i: int) -> tuple[str, str | None]:
    """(folder of the kernel in the cache, why it does not compile)."""
    from triton.runtime.cache import get_cache_manager

    launch = _work[i]
    try:
        kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
        build_launcher(kernel)
    except Exception as error:
        return "", f"{launch.kernel.__module__}.{launch.kernel.__name__}: {type(error).__name__}: {error}"
    return Path(get_cache_manager(kernel.hash).cache_dir).name, None


def compile_all(jobs: int) -> tuple[set[str], list[str]]:
    """(folders of all kernels in the cache, why some do not compile)."""
    from triton.runtime.driver import driver

    driver.set_active(Driver())
    start, folders, failed = time.monotonic(), set(), []
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for n, (folder, error) in enumerate(pool.imap_unordered(compile_one, range(len(_work))), 1):
            folders.add(folder)
            failed += [] if error is None else [error]
            if n % 100 == 0 or n == len(_work):
                print(f"[{n}/{len(_work)}] {time.monotonic() - start:.0f} s, {len(failed)} failed", flush=True)
    return folders - {""}, failed


def without_the_rest(text: str) -> str:
    """Triton's list of a kernel's files: those that are left out must not be in it."""
    found = json.loads(text)
    if "child_paths" in found:
        found["child_paths"] = {name: path for name, path in found["child_paths"].items() if is_kept(Path(name))}
    return json.dumps(found)


def is_kept(path: Path) -> bool:
    return path.suffix in (".cubin", ".json", ".so")


def pack(cache: Path, folders: set[str], archive: Path) -> None:
    """The binaries alone, and what starts them; their place is open."""
    folders = folders | {path.parent.name for path in cache.glob("*/*.so")}
    archive.parent.mkdir(parents=True, exist_ok=True)
    draft = archive.with_suffix(".new")
    with tarfile.open(draft, "w:gz", compresslevel=9) as tar:
        for path in sorted(path for folder in folders for path in (cache / folder).iterdir()):
            if not is_kept(path):
                continue
            data = path.read_bytes()
            if path.suffix == ".json":
                data = without_the_rest(data.decode()).replace(str(cache), PLACE).encode()
            member = tarfile.TarInfo(str(path.relative_to(cache)))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    draft.replace(archive)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--jobs", default=os.cpu_count() or 1, type=int, help="compilers at a time (default: all cores)"
    )
    parser.add_argument("--kernels-only", action="store_true", help="not the extension")
    parser.add_argument("--most", type=int, help="only so many kernels, to try it")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the cache that is kept")
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    options = parser.parse_args(arguments)
    # Before triton and zeroblock are imported, which read them.
    os.environ |= {"TRITON_CACHE_DIR": str(options.folder), "ZEROBLOCK_CACHE_DIR": "", "ZEROBLOCK_PLAN": "fixed"}
    before = kernels(options.folder)
    from zbench import headlines

    with meta_goes_as_a_gpu():
        _work[:] = distinct(itertools.chain(of_checks(), of_headlines(headlines.cases(False))), options.most)
    print(f"{len(_work)} launches", flush=True)
    stand_in_library(options.folder.with_name("stand-in"))
    build_launcher()
    folders, failed = compile_all(options.jobs)
    pack(options.folder, folders, options.archive)
    print(f"{len(folders)} kernels, {kernels(options.folder) - before} new", *failed[:20], sep="\n")
    parts = [options.archive]
    if not options.kernels_only:
        extension()
        parts.append(CARRIED)
    size = sum(path.stat().st_size for path in parts)
    print(f"{size / 2**20:.1f} MiB: {', '.join(map(str, parts))}", *["that is too much"] * (size > MOST))
    return 1 if failed or size > MOST else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
