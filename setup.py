"""Builds zeroblock: the package map (kernels/ becomes zeroblock.kernels) and the optional native extension of csrc/.

Nothing here needs a GPU, the network or an environment variable; csrc/README.md has the variables that are honoured.
What is built, side by side, and again only where something that it includes has changed:
  * CPU kernels, when the compiler targets x86-64: csrc/cpu/table_*.cpp once per instruction set, picked at run time;
  * CUDA kernels, when ZEROBLOCK_BUILD_CUDA (auto | 1 | 0) allows it;
  * their bindings, csrc/torch.
Without a usable compiler the wheel is pure Python; `python -c "import zeroblock; print(zeroblock.info())"` says why.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "zeroblock/_version.py").read_text()).group(1)
LOCAL_VERSION = os.environ.get("ZEROBLOCK_LOCAL_VERSION")  # tells wheels of one version apart
# The oldest torch whose stable ABI the extension uses, and its encoding.
OLDEST_TORCH, TORCH_TARGET_VERSION = (2, 10), "0x020a000000000000"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
KERNELS = ("gated_norms", "rows", "images", "residual_norms", "convs")

CXX = shlex.split(os.environ.get("CXX", "g++"))
CXXFLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
HIDDEN = ["-fPIC", "-fvisibility=hidden"]

# One cubin each for Ampere, Hopper and Blackwell data-centre parts; PTX of the last serves what comes later. Cubins run
# on later minor versions too (8.0 on 8.6 and 8.9).
CUDA_ARCHS = "8.0;9.0;10.0+PTX"


class Torch(NamedTuple):
    """The torch to build for: its headers and libraries. It is not imported, and under build isolation could not be."""

    folder: Path
    version: str
    cuda: str | None  # None: built without CUDA


def site_packages() -> Iterator[Path]:
    """Where a torch may be: on this process's path; under pip's build isolation, in the environment of this Python;
    under uv's, which has a Python of its own, in the environment that is active or in the folder where uv was called.
    Any torch that is new enough will do: what is built is the same."""
    yield from map(Path, sys.path)
    yield from (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    environments = [Path(folder).parent for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    environments += [Path(os.environ.get("PWD", ROOT)) / ".venv"]
    yield from (path / f"lib/python3.{sys.version_info.minor}/site-packages" for path in environments)


def find_torch() -> Torch | None:
    for site in site_packages():
        if (site / "torch/version.py").exists():
            found: dict = {}
            exec((site / "torch/version.py").read_text(), found)
            return Torch(site / "torch", found["__version__"], found["cuda"])
    return None


TORCH = find_torch()


def nvcc_path() -> str | None:
    """nvcc of CUDA_HOME, or the one on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def cuda_mode() -> str:
    mode = os.environ.get("ZEROBLOCK_BUILD_CUDA", "auto")
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"ZEROBLOCK_BUILD_CUDA must be auto, 1 or 0, got {mode!r}")
    return mode


def wants_cuda() -> bool:
    """Whether to build csrc/cuda: `auto` needs a CUDA build of torch and nvcc, never a visible GPU."""
    mode = cuda_mode()
    missing = [
        reason
        for absent, reason in [
            (TORCH.cuda is None, "torch was built without CUDA"),
            (nvcc_path() is None, "nvcc was not found"),
            (nvcc_path() and cuda_runtime() is None, "libcudart_static.a was not found"),
        ]
        if absent
    ]
    if mode == "1" and missing:
        raise SystemExit(f"ZEROBLOCK_BUILD_CUDA=1, but {' and '.join(missing)}")
    if mode == "auto" and missing:
        print(f"zeroblock: no CUDA kernels are built, because {' and '.join(missing)}")
    return mode != "0" and not missing


def cuda_runtime() -> Path | None:
    """The static CUDA runtime: beside nvcc (which may be a script), or in the packages that came with torch."""
    dryrun = subprocess.run([str(nvcc_path()), "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    tops = re.findall(r"^#\$ TOP=(.+)$", dryrun, re.M)
    roots = [Path(top) for top in tops] + sorted((TORCH.folder.parent / "nvidia").glob("cu*"))
    found = (
        root / lib / "libcudart_static.a" for root in roots for lib in ("lib64", "lib", "targets/x86_64-linux/lib")
    )
    return next((path for path in found if path.exists()), None)


def cuda_archs() -> tuple[list[str], str]:
    """nvcc's flags for the architectures, and their names for the library to report."""
    flags, names = [], []
    for arch in re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must list architectures such as 8.0 or 9.0+PTX, got {arch!r}")
        number = match[1] + match[2]
        if int(match[1]) < 8:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: the kernels need compute capability 8.0 or later, got {arch!r}")
        flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] if match[3] else []
        names += [f"sm_{number}", *([f"compute_{number}"] if match[3] else [])]
    return flags, " ".join(names)


def cpu_jobs(folder: Path) -> dict[Path, list[str]]:
    """{object: command} of the torch-free CPU sources, several objects of kernels per instruction set."""
    # No contraction: a product that must cancel exactly (g - mean(g)) must not be kept in higher precision.
    common = [*CXX, "-std=c++17", "-O3", "-ffp-contract=off", "-fno-exceptions", "-Wall", "-Wextra", *HIDDEN, *CXXFLAGS]
    if not any("clang" in word for word in CXX):
        common += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # false alarms in the headers of the intrinsics
    jobs = {}
    for isa, flags in ISA_FLAGS.items():
        for part in KERNELS:
            target = folder / f"kernels_{part}_{isa}.o"
            jobs[target] = [*common, *flags, f"-DZB_ISA={isa}", "-c", f"csrc/cpu/table_{part}.cpp"]
    return {**jobs, folder / "pick_isa.o": [*common, "-c", "csrc/cpu/pick_isa.cpp"]}


def cuda_jobs(folder: Path) -> dict[Path, list[str]]:
    """{object: command} of the torch-free CUDA sources, the longest first."""
    flags, _ = cuda_archs()
    common = [str(nvcc_path()), "-std=c++17", "-O3", *flags, "-Xcompiler", ",".join(HIDDEN)]
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    return {folder / f"cuda_{path.stem}.o": [*common, "-c", str(path.relative_to(ROOT))] for path in sources}


def torch_jobs(folder: Path, cuda: bool) -> dict[Path, list[str]]:
    """{object: command} of the bindings."""
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    if cuda:
        macros += [f'-DZB_CUDA_ARCHS="{cuda_archs()[1]}"']
    common = [*CXX, "-std=c++20", "-O2", "-Wall", *HIDDEN, *macros, f"-isystem{TORCH.folder / 'include'}", *CXXFLAGS]
    sources = sorted((ROOT / "csrc/torch").glob("*.cpp" if cuda else "cpu_*.cpp"))
    return {folder / f"torch_{path.stem}.o": [*common, "-c", str(path.relative_to(ROOT))] for path in sources}


def is_current(target: Path, command: list[str]) -> bool:
    """Whether the object is of this command, and newer than all it was made from, as its compiler listed that (-MD)."""
    stamp, listed = target.with_suffix(".command"), target.with_suffix(".d")
    if not (target.exists() and stamp.exists() and listed.exists()) or stamp.read_text() != shlex.join(command):
        return False
    sources = listed.read_text().partition(":")[2].replace("\\\n", " ").split()
    times = [os.stat(path).st_mtime if os.path.exists(path) else float("inf") for path in sources]
    return max(times) < target.stat().st_mtime


def compile_objects(jobs: dict[Path, list[str]]) -> None:
    """Runs the compilers side by side, MAX_JOBS at a time; objects that are current are kept."""

    def compile_one(target: Path, command: list[str]) -> None:
        if not is_current(target, command):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_suffix(".command").unlink(missing_ok=True)
            dependencies = ["-MD", "-MF", str(target.with_suffix(".d"))]
            subprocess.run([*command, *dependencies, "-o", str(target)], check=True)
            target.with_suffix(".command").write_text(shlex.join(command))

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: compile_one(*job), jobs.items()))


class Build(build_ext):
    """Compiles csrc and links zeroblock/_C.so; a failing compiler leaves a pure-Python package that says so."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # one file for every Python: torch loads it, not Python

    def build_extension(self, ext: Extension) -> None:
        cuda = wants_cuda()
        folder = Path(self.build_temp).resolve() / "csrc"
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            jobs = {**cpu_jobs(folder), **(cuda_jobs(folder) if cuda else {}), **torch_jobs(folder, cuda)}
            compile_objects(jobs)
            objects = [*map(str, jobs), *([str(cuda_runtime())] if cuda else [])]
            libraries = [f"-L{TORCH.folder / 'lib'}", "-lc10", "-ltorch_cpu"]
            system = ["-lrt", "-ldl", "-lpthread"] if cuda else []
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = shlex.split(os.environ.get("LDFLAGS", ""))
            subprocess.run([*CXX, "-shared", *flags, *objects, *libraries, *system, "-o", str(target)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if cuda_mode() == "1":
                raise SystemExit(f"ZEROBLOCK_BUILD_CUDA=1, but the build failed: {error}") from error
            ext.optional = True
            print(f"zeroblock: native kernels were not built: {error}")


def extension() -> dict:
    """The ext_modules, cmdclass and options of setup(); empty when the native part cannot be built here."""
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        reason = "they need a Unix compiler for x86-64"
    elif os.environ.get("ZEROBLOCK_BUILD_NATIVE") == "0":
        reason = "ZEROBLOCK_BUILD_NATIVE=0"
    elif TORCH is None:
        reason = "no torch was found; install it first, and zeroblock with --no-build-isolation"
    elif tuple(map(int, re.findall(r"\d+", TORCH.version)[:2])) < OLDEST_TORCH:
        reason = f"they need torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is {TORCH.version}"
    else:
        reason = None
    if reason is not None:
        if cuda_mode() == "1":
            raise SystemExit(f"ZEROBLOCK_BUILD_CUDA=1, but no native kernels are built: {reason}")
        print(f"zeroblock: no native kernels are built: {reason}")
        return {}
    print(f"zeroblock: building for torch {TORCH.version} in {TORCH.folder}")
    return {
        "ext_modules": [Extension("zeroblock._C", sources=[], py_limited_api=True)],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    version=f"{VERSION}+{LOCAL_VERSION}" if LOCAL_VERSION else VERSION,
    packages=[*find_packages(include=["zeroblock", "zeroblock.*"]), "zeroblock.kernels"],
    package_dir={"zeroblock": "zeroblock", "zeroblock.kernels": "kernels"},
    package_data={
        "zeroblock": ["py.typed"],
        "zeroblock.doctor": ["report.html"],
        "zeroblock.convert": ["coverage.csv"],
    },
    **extension(),
)
