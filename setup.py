"""Builds zeroblock: the package map (kernels/ becomes zeroblock.kernels) and the optional native extension.

Nothing here needs a GPU, the network or an environment variable. What is built:
  * CPU kernels, when the compiler targets x86-64: csrc/cpu/kernels.cpp once per instruction set, picked at run time;
  * CUDA kernels, when csrc/cuda has any and ZEROBLOCK_BUILD_CUDA (auto | 1 | 0) allows it.
TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") overrides the architectures of the CUDA kernels, MAX_JOBS the compilers at a time.
Without a usable compiler the wheel is pure Python; `python -c "import zeroblock; print(zeroblock.info())"` says why.
CXX and CXXFLAGS are honoured; CXXFLAGS=-march=native makes a wheel for this processor only.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "zeroblock/_version.py").read_text()).group(1)
# The oldest torch whose stable ABI the extension uses (2.13), in the encoding of TORCH_TARGET_VERSION.
TORCH_TARGET_VERSION = "0x020d000000000000"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:  # metadata and sdist work without torch
    BuildExtension = None


# One cubin each for Ampere, Hopper and Blackwell data-centre parts; PTX of the last serves what comes later. Cubins run
# on later minor versions too (8.0 on 8.6 and 8.9).
CUDA_ARCHS = "8.0;9.0;10.0+PTX"


def nvcc_path() -> str | None:
    """nvcc of CUDA_HOME, or the one on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def wants_cuda() -> bool:
    """Whether to build csrc/cuda: `auto` needs a CUDA build of torch and nvcc, never a visible GPU."""
    import torch

    mode = os.environ.get("ZEROBLOCK_BUILD_CUDA", "auto")
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"ZEROBLOCK_BUILD_CUDA must be auto, 1 or 0, got {mode!r}")
    missing = [
        reason
        for absent, reason in [
            (torch.version.cuda is None, "torch was built without CUDA"),
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
    import torch

    dryrun = subprocess.run([str(nvcc_path()), "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    tops = re.findall(r"^#\$ TOP=(.+)$", dryrun, re.M)
    roots = [Path(top) for top in tops] + sorted((Path(torch.__file__).parent.parent / "nvidia").glob("cu*"))
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


def cuda_jobs(build_dir: Path) -> dict[Path, list[str]]:
    """{object: command} of the torch-free CUDA sources."""
    flags, _ = cuda_archs()
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    common = [str(nvcc_path()), "-std=c++17", "-O3", *flags, *host]
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    return {build_dir / f"cuda_{path.stem}.o": [*common, "-c", str(path.relative_to(ROOT))] for path in sources}


def cpu_jobs(cxx: str, build_dir: Path) -> dict[Path, list[str]]:
    """{object: command} of the torch-free CPU sources, one object per instruction set."""
    user = shlex.split(os.environ.get("CXXFLAGS", ""))
    # No contraction: a product that must cancel exactly (g - mean(g)) must not be kept in higher precision.
    common = [cxx, "-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *user]
    if "clang" not in cxx:
        common += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # false alarms in the headers of the intrinsics
    jobs = {build_dir / "dispatch.o": [*common, "-c", "csrc/cpu/dispatch.cpp"]}
    for isa, flags in ISA_FLAGS.items():
        names = [f"-DZB_TABLE=kernels_{isa}", f'-DZB_ISA_NAME="{isa}"']
        jobs[build_dir / f"kernels_{isa}.o"] = [*common, *flags, *names, "-c", "csrc/cpu/kernels.cpp"]
    return jobs


def compile_objects(jobs: dict[Path, list[str]]) -> list[str]:
    """Runs the compilers side by side. Objects of the same command, newer than their folder's sources, are kept."""

    def newest(source: Path) -> float:
        return max(path.stat().st_mtime for path in [*source.parent.iterdir(), *(ROOT / "csrc").glob("*.h")])

    def compile_one(target: Path, command: list[str]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp = target.with_suffix(".command")
        known = stamp.read_text() if stamp.exists() and target.exists() else None
        if known != shlex.join(command) or target.stat().st_mtime < newest(ROOT / command[-1]):
            subprocess.run([*command, "-o", str(target)], check=True)
            stamp.write_text(shlex.join(command))

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: compile_one(*job), jobs.items()))
    return [str(path) for path in jobs]


def extension() -> dict:
    """The ext_modules and cmdclass arguments of setup(); empty when the native part cannot be built here."""
    if BuildExtension is None or platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        print("zeroblock: no native CPU kernels are built (they need torch and a Unix compiler for x86-64)")
        return {}
    cuda = wants_cuda()

    class Build(BuildExtension):
        """Adds the per-instruction-set objects; a failing compiler leaves a pure-Python package that says so."""

        def build_extension(self, ext):
            cxx = os.environ.get("CXX", "g++")
            try:
                folder = Path(self.build_temp).resolve() / "csrc"
                ext.extra_objects = compile_objects({**cpu_jobs(cxx, folder), **(cuda_jobs(folder) if cuda else {})})
                if cuda:
                    ext.extra_objects.append(str(cuda_runtime()))
                super().build_extension(ext)
            except (OSError, subprocess.CalledProcessError) as error:
                if os.environ.get("ZEROBLOCK_BUILD_CUDA") == "1":
                    raise SystemExit(f"ZEROBLOCK_BUILD_CUDA=1, but the build failed: {error}") from error
                ext.optional = True
                print(f"zeroblock: native CPU kernels were not built: {error}")

    ext = CppExtension(
        "zeroblock._C",
        ["csrc/bindings.cpp", *(["csrc/bindings_cuda.cpp", "csrc/bindings_cuda_conv.cpp"] if cuda else [])],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.[hc]*"))],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
        + ([("ZB_CUDA_ARCHS", f'"{cuda_archs()[1]}"')] if cuda else []),
        libraries=["rt", "dl", "pthread"] if cuda else [],
        extra_compile_args=["-O2", "-fvisibility=hidden", "-Wall"],
        py_limited_api=True,
    )
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {
        "ext_modules": [ext],
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
        "options": options,
    }


setup(
    version=VERSION,
    packages=[*find_packages(include=["zeroblock", "zeroblock.*"]), "zeroblock.kernels"],
    package_dir={"zeroblock": "zeroblock", "zeroblock.kernels": "kernels"},
    package_data={"zeroblock": ["py.typed"], "zeroblock.doctor": ["report.html"]},
    **extension(),
)
