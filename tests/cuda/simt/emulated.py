"""Builds the CUDA kernels for the emulator and lends them to the CUDA backend on CPU tensors.

Objects, programs and the library are cached under build/simt by a hash of everything that goes into them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...support import HANG, ROOT, TORCH_TARGET

SIMT, CSRC = ROOT / "tests/cuda/simt", ROOT / "csrc"
BINDINGS = sorted((CSRC / "torch").glob("cuda_*.cpp"))
CACHE = ROOT / "build/simt"
CXX = shlex.split(os.environ.get("CXX", "g++"))
NAMESPACE = "zeroblock_simt"
COMMON = ["-std=c++17", "-fno-strict-aliasing", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DZB_SIMT"]
BUILDS = {
    "plain": ["-O2"],
    # Unoptimised: compiling takes longer than running. Line numbers are all that a report needs.
    "asan": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}
# traffic.cpp takes the place of ThreadSanitizer.
COUNTING = ["-O2", "-fsanitize=thread", "-U__SANITIZE_THREAD__"]
LINKING = {
    **BUILDS,
    "counting": ["-Wl,--wrap=memcpy"],
}


def cuda_include() -> Path | None:
    """The folder with cuda_fp16.h: that of nvcc, or of the packages that a CUDA build of torch brings."""
    nvcc = shutil.which("nvcc")
    roots = [Path(nvcc).resolve().parent.parent] if nvcc else []
    roots += [Path(p) for p in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if p]
    import torch

    roots += sorted((Path(torch.__file__).parent.parent / "nvidia").glob("cu*"))
    return next((r / "include" for r in roots if (r / "include/cuda_fp16.h").exists()), None)


def missing() -> str | None:
    """Why the emulator cannot run here."""
    import platform

    from zeroblock.kernels._torch import OLDEST_NATIVE, VERSION

    if VERSION < OLDEST_NATIVE:
        return "the bindings need the headers of a newer torch"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the emulator switches stacks on x86-64 only"
    if shutil.which(CXX[0]) is None:
        return f"the compiler {CXX[0]} is not installed"
    if cuda_include() is None:
        return "the CUDA headers (cuda_fp16.h) are not installed"
    return None


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=HANG)


def jobs() -> int:
    """Compilers at a time: the processors, shared between the workers of pytest-xdist."""
    shared = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 1)
    return int(os.environ.get("MAX_JOBS") or max(1, (os.cpu_count() or 1) // shared))


def _hash(*parts: str | Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part.read_bytes() if isinstance(part, Path) else part.encode()) + b"\0")
    return digest.hexdigest()[:16]


def _made(target: Path, make: Callable[[Path], None], wait: bool = True) -> bool:
    """Makes a file once, whichever process comes first. Without `wait`, False where another is at it."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{target}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            if not target.exists():
                temporary = target.with_name(f"making-{target.name}")
                make(temporary)
                temporary.replace(target)
    return True


def _compiler(*arguments: str) -> None:
    done = run(*CXX, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]


def objects(sources: Sequence[Path], flags: Sequence[str]) -> list[Path]:
    """The objects of the sources; side by side, and shared with other processes that want the same ones."""
    folders = [f"-I{SIMT}", f"-I{CSRC}", f"-I{CSRC}/cuda", f"-isystem{cuda_include()}"]
    headers = sorted([*CSRC.glob("*.h"), *CSRC.glob("torch/*.h"), *(CSRC / "cuda").glob("*.*h"), *SIMT.glob("*.h")])
    common = _hash(*CXX, *flags, *headers)
    targets = [CACHE / f"objects/{source.stem}-{_hash(common, source)}.o" for source in sources]

    def compile_one(source: Path, target: Path, wait: bool) -> None:
        command = [*flags, *folders, "-x", "c++", "-c", str(source), "-o"]
        _made(target, lambda temporary: _compiler(*command, str(temporary)), wait)

    with ThreadPoolExecutor(jobs()) as pool:
        for wait in (False, True):  # what another process compiles is waited for last
            list(pool.map(compile_one, sources, targets, [wait] * len(targets)))
    return targets


def kernels() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def library() -> Path:
    """The kernels with their real binding, as a library of private ops for CPU tensors."""
    import torch
    from torch.utils import cpp_extension

    headers = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    # The version only tells apart what other headers made.
    macros = [f"-DZB_NAMESPACE={NAMESPACE}", TORCH_TARGET]
    macros += [f"-DZB_TORCH={torch.__version__}"]
    parts = objects([*kernels(), SIMT / "settings.cpp"], [*COMMON, *BUILDS["plain"]])
    parts += objects(BINDINGS, [*COMMON, "-std=c++20", "-O0", *macros, *headers])
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    target = CACHE / f"library-{_hash(*map(str, parts))}.so"
    command = ["-shared", *map(str, parts), *libraries, "-ltorch", "-ltorch_cpu", "-lc10", "-o"]
    _made(target, lambda temporary: _compiler(*command, str(temporary)))
    return target


def program(source: str, build: str, kernels: Sequence[Path] = ()) -> Path:
    """An executable of tests/cuda/simt/<source> and some kernels in one of BUILDS."""
    parts = objects([SIMT / source, *kernels], [*COMMON, *{**BUILDS, "counting": COUNTING}[build]])
    target = CACHE / f"{Path(source).stem}-{build}-{_hash(*map(str, parts))}"
    _made(target, lambda temporary: _compiler(*LINKING[build], *map(str, parts), "-o", str(temporary)))
    return target


@functools.cache
def _loaded() -> ctypes.CDLL:
    import torch

    path = str(library())
    torch.ops.load_library(path)
    settings = ctypes.CDLL(path)
    settings.simt_seed.argtypes = [ctypes.c_uint64]
    settings.simt_gpu.argtypes = [ctypes.c_uint64] * 2
    settings.simt_last_blocks.argtypes = [ctypes.c_uint64]
    for name in ("launches", "clusters", "records", "record_threads", "record_bytes", "record_cluster"):
        getattr(settings, f"simt_{name}").restype = ctypes.c_uint64
    for name in ("record_threads", "record_bytes", "record_cluster"):
        getattr(settings, f"simt_{name}").argtypes = [ctypes.c_uint64]
    return settings


def launches() -> int:
    """How many kernels the emulator has run."""
    return _loaded().simt_launches()


def clusters() -> int:
    """How many clusters of several blocks the emulator has run."""
    return _loaded().simt_clusters()


# Bytes of shared memory that a block may ask for, and blocks of a cluster.
GPUS = {
    "sm_80": (163 * 1024, 1),
    "sm_90": (227 * 1024, 8),
    "sm_100": (227 * 1024, 8),
    "sm_120": (99 * 1024, 8),
}


@contextlib.contextmanager
def gpu(shared: int, cluster: int) -> Iterator[None]:
    """Plays a GPU with so much shared memory for a block and clusters of so many blocks; outside of it sm_80."""
    _loaded().simt_gpu(shared, cluster)
    try:
        yield
    finally:
        _loaded().simt_gpu(*GPUS["sm_80"])


@contextlib.contextmanager
def last_blocks(count: int) -> Iterator[None]:
    """Of each launch in the block only the last so many blocks run: of a launch that is too large to run as a whole."""
    _loaded().simt_last_blocks(count)
    try:
        yield
    finally:
        _loaded().simt_last_blocks(0)


@contextlib.contextmanager
def refusing(only_clusters: bool = False) -> Iterator[None]:
    """Launches fail in the block, as they do on a GPU without the resources."""
    _loaded().simt_mode(3 if only_clusters else 1)
    try:
        yield
    finally:
        _loaded().simt_mode(0)


def recorded(call: Callable[[], object]) -> list[tuple[int, int, int]]:
    """(threads, bytes of dynamic shared memory, blocks of a cluster) of the launches of call(), which are not run."""
    settings = _loaded()
    settings.simt_mode(2)
    try:
        call()
        return [
            (settings.simt_record_threads(i), settings.simt_record_bytes(i), settings.simt_record_cluster(i))
            for i in range(settings.simt_records())
        ]
    finally:
        settings.simt_mode(0)


@contextlib.contextmanager
def emulated(seed: int = 1) -> Iterator[None]:
    """Runs the block with backend "cuda" available for CPU tensors, on the emulated kernels.

    Blocks and threads run in a random order that `seed` chooses anew for every launch; seed 0 keeps them in order.
    """
    from zeroblock.backends.cuda import CUDA

    _loaded().simt_seed(seed)
    with CUDA.using(NAMESPACE, "cpu"):
        yield
