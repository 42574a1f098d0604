"""Builds zeroblock: the package map (kernels/ becomes zeroblock.kernels) and the optional native extension.

Nothing here needs a GPU, the network or an environment variable. What is built:
  * CPU kernels, when the compiler targets x86-64: csrc/cpu/kernels.cpp once per instruction set, picked at run time;
  * CUDA kernels, when csrc/cuda has any and ZEROBLOCK_BUILD_CUDA (auto | 1 | 0) allows it.
Without a usable compiler the wheel is pure Python; `python -c "import zeroblock; print(zeroblock.info())"` says why.
CXX and CXXFLAGS are honoured; CXXFLAGS=-march=native makes a wheel for this processor only.
"""

import os
import platform
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "zeroblock/__init__.py").read_text()).group(1)
# The oldest torch whose stable ABI the extension uses (2.13), in the encoding of TORCH_TARGET_VERSION.
TORCH_TARGET_VERSION = "0x020d000000000000"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}

try:
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
except ImportError:  # metadata and sdist work without torch
    BuildExtension = None


def wants_cuda() -> bool:
    """Whether to build csrc/cuda: `auto` needs a CUDA build of torch and nvcc, never a visible GPU."""
    import torch

    mode = os.environ.get("ZEROBLOCK_BUILD_CUDA", "auto")
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"ZEROBLOCK_BUILD_CUDA must be auto, 1 or 0, got {mode!r}")
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    missing = [
        reason
        for absent, reason in [
            (not sources, "this version has no CUDA sources"),
            (torch.version.cuda is None, "torch was built without CUDA"),
            (CUDA_HOME is None, "nvcc was not found"),
        ]
        if absent
    ]
    if mode == "1" and missing:
        raise SystemExit(f"ZEROBLOCK_BUILD_CUDA=1, but {' and '.join(missing)}")
    if mode == "auto" and missing:
        print(f"zeroblock: no CUDA kernels are built, because {' and '.join(missing)}")
    return mode != "0" and not missing


def cpu_objects(cxx: str, build_dir: Path) -> list[str]:
    """Compiles the torch-free CPU sources, one object per instruction set, and returns the objects."""
    user = shlex.split(os.environ.get("CXXFLAGS", ""))
    # No contraction: a product that must cancel exactly (g - mean(g)) must not be kept in higher precision.
    common = [cxx, "-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *user]
    if "clang" not in cxx:
        common += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # false alarms in the headers of the intrinsics
    jobs = {build_dir / "dispatch.o": [*common, "-c", "csrc/cpu/dispatch.cpp"]}
    for isa, flags in ISA_FLAGS.items():
        names = [f"-DZB_TABLE=kernels_{isa}", f'-DZB_ISA_NAME="{isa}"']
        jobs[build_dir / f"kernels_{isa}.o"] = [*common, *flags, *names, "-c", "csrc/cpu/kernels.cpp"]
    build_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: subprocess.run([*job[1], "-o", str(job[0])], check=True), jobs.items()))
    return [str(path) for path in jobs]


def extension() -> dict:
    """The ext_modules and cmdclass arguments of setup(); empty when the native part cannot be built here."""
    if BuildExtension is None or platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        print("zeroblock: no native CPU kernels are built (they need torch and a Unix compiler for x86-64)")
        return {}
    wants_cuda()

    class Build(BuildExtension):
        """Adds the per-instruction-set objects; a failing compiler leaves a pure-Python package that says so."""

        def build_extension(self, ext):
            cxx = os.environ.get("CXX", "g++")
            try:
                ext.extra_objects = cpu_objects(cxx, Path(self.build_temp).resolve() / "csrc")
                super().build_extension(ext)
            except (OSError, subprocess.CalledProcessError) as error:
                ext.optional = True
                print(f"zeroblock: native CPU kernels were not built: {error}")

    ext = CppExtension(
        "zeroblock._C",
        ["csrc/bindings.cpp"],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.[hc]*"))],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
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
    packages=[
        "zeroblock",
        "zeroblock.convert",
        "zeroblock.doctor",
        "zeroblock.kernels",
        "zeroblock.nn",
        "zeroblock.testing",
    ],
    package_dir={"zeroblock": "zeroblock", "zeroblock.kernels": "kernels"},
    package_data={"zeroblock": ["py.typed"], "zeroblock.doctor": ["report.html"]},
    **extension(),
)
