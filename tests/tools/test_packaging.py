"""The wheel, the editable install, the source layout: what a user gets, and whom it must not disturb."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import zeroblock as zb
from zeroblock.kernels._torch import OLDEST_NATIVE, VERSION
from zeroblock.testing import CPU_MISSING

from ..support import ROOT

pytestmark = pytest.mark.one_worker

HF_KERNELS = "def get_kernel(name):\n    return name\n"
WHEEL = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w")
INSTALL = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target")


def run(*command, cwd, **env):
    merged = {**os.environ, **env}
    result = subprocess.run(command, cwd=cwd, env=merged, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree without anything built, as a fresh clone has it."""
    target = tmp_path_factory.mktemp("source") / "zeroblock"
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    if (
        "PYTEST_XDIST_WORKER" in os.environ
    ):  # fails where another worker builds it too: conftest's scheduler did not work
        (tmp_path_factory.getbasetemp().parent / "built").touch(exist_ok=False)
    out = tmp_path_factory.mktemp("wheel")
    run(*WHEEL, str(out), ".", cwd=source, ZEROBLOCK_BUILD_CUDA="0")  # tests/cuda/test_build.py builds the others
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"zeroblock", f"zeroblock-{zb.__version__}.dist-info"}
    assert {"zeroblock/kernels/_launch.py", "zeroblock/ops/register.py", "zeroblock/nn/resblock.py"} <= set(names)
    assert "zeroblock/testing/eager.py" in names
    assert any(re.fullmatch(r"zeroblock/_C.*\.so", name) for name in names) == (CPU_MISSING is None)


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The wheel installed next to another top-level package `kernels`."""
    site = tmp_path_factory.mktemp("site")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(HF_KERNELS)
    run(*INSTALL, str(site), str(wheel), cwd=site)
    return site


@pytest.mark.slow
def test_wheel_beside_hugging_face_kernels(site, tmp_path):
    """Both import, and neither touches the other's files."""
    assert (site / "kernels" / "__init__.py").read_text() == HF_KERNELS
    code = "import kernels, zeroblock, zeroblock.kernels; print(kernels.get_kernel('x'), zeroblock.__file__)"
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert printed == ["x", str(site / "zeroblock" / "__init__.py")]


@pytest.mark.slow
def test_wheel_runs_with_its_own_native_kernels(site, tmp_path):
    code = (
        "import torch, zeroblock as zb; x = torch.randn(2, 64, 5, 5);"
        "print(zb.explain('group_norm_silu', x, 32).backend, zb.group_norm_silu(x, 32).isfinite().all().item())"
    )
    backend, finite = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert (backend, finite) == ("reference" if CPU_MISSING else "cpu", "True")


@pytest.fixture(scope="module")
def pure_site(source, tmp_path_factory):
    """Installed from the source where there is no compiler."""
    clean, site = (tmp_path_factory.mktemp(name) for name in ("clean", "pure"))
    shutil.copytree(source, clean / "s", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    run(*INSTALL, str(site), str(clean / "s"), cwd=clean, CXX="no-such-compiler", ZEROBLOCK_BUILD_CUDA="0")
    return site


@pytest.mark.slow
def test_build_without_a_compiler_leaves_a_working_reference(pure_site, tmp_path):
    assert not list(pure_site.rglob("*.so"))
    code = "import torch, zeroblock as zb; print(zb.explain('group_norm_silu', torch.randn(2, 64, 5, 5), 32))"
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(pure_site))
    assert "backend reference" in printed and "was not built" in printed


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    """The source distribution, unpacked."""
    made, unpacked = (tmp_path_factory.mktemp(name) for name in ("sdist", "unpacked"))
    backend = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", backend, str(made), cwd=source)
    tarfile.open(next(made.glob("*.tar.gz"))).extractall(unpacked, filter="data")
    return next(unpacked.iterdir())


@pytest.mark.slow
def test_sdist_holds_all_that_is_built(source, sdist):
    for folder in ("zeroblock", "kernels", "csrc"):
        ours, theirs = ({p.relative_to(top) for p in (top / folder).rglob("*.*")} for top in (source, sdist))
        assert {p for p in ours if "__pycache__" not in p.parts} <= theirs


@pytest.mark.slow
def test_wheel_in_pure_python_from_the_sdist(sdist, tmp_path):
    """For every system: its tag says so, and it runs."""
    run(*WHEEL, str(tmp_path), ".", cwd=sdist, ZEROBLOCK_BUILD_NATIVE="0")
    (made,) = tmp_path.glob("*.whl")
    assert made.name == f"zeroblock-{zb.__version__}-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith((".so", ".pyd"))]
    zipfile.ZipFile(made).extractall(tmp_path / "site")
    code = (
        "import sys, torch; sys.modules |= dict.fromkeys(('fcntl', 'resource', 'triton'));"  # Windows has none of them
        "import zeroblock as zb; block = zb.nn.ResBlock(32, 8, 0.0);"
        "block(torch.randn(2, 32, 4, 4), torch.randn(2, 8)).sum().backward();"
        "print(zb.__file__, zb.info())"
    )
    site = {"PYTHONPATH": str(tmp_path / "site"), "ZEROBLOCK_PLAN": "measure", "ZEROBLOCK_CACHE_DIR": str(tmp_path)}
    printed = run(sys.executable, "-c", code, cwd=tmp_path, **site)
    assert str(tmp_path / "site") in printed and "cpu kernels: not used" in printed
    assert "triton kernels: triton" not in printed


FACTORY = """
from torch import nn, randn
def dead():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    for p in (*model[0].parameters(), *model[2].parameters()):
        nn.init.zeros_(p)
    return model, randn(4, 8)
"""
EVERY_HELP = """
from importlib.metadata import entry_points
(point,) = entry_points(group="console_scripts", name="zeroblock")
main = point.load()
for command in ([], ["doctor"], ["bench"], ["info"], ["demo"]):
    try:
        main([*command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    print("<<<", end="")
assert main(["info"]) == 0
"""


@pytest.mark.slow
def test_installed_entry_point(pure_site, tmp_path):
    """The script that the installation puts on the path: every --help, the report."""
    (tmp_path / "factories.py").write_text(FACTORY)
    environment = {**os.environ, "PYTHONPATH": str(pure_site)}
    command = [pure_site / "bin" / "zeroblock", "doctor", "factories:dead", "--html", "page.html"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "never move" in done.stdout, done.stderr
    assert "First motion by layer" in (tmp_path / "page.html").read_text()
    # The same entry point, once for each --help, in one process: importing torch takes seconds.
    found = run(sys.executable, "-c", EVERY_HELP, cwd=tmp_path, PYTHONPATH=str(pure_site)).split("<<<")
    words = ("{doctor,bench,info,demo}", "--html", "--seconds", "family", "--quick", "was not built")
    for printed, word in zip(found, words, strict=True):
        assert word in printed, printed


@pytest.mark.parametrize("value, message", [("1", "ZEROBLOCK_BUILD_CUDA=1, but"), ("maybe", "must be auto, 1 or 0")])
def test_asking_for_cuda_in_vain_fails_loudly(source, value, message):
    env = {**os.environ, "ZEROBLOCK_BUILD_CUDA": value, "CUDA_HOME": "/nowhere"}  # where there is no nvcc
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext"], cwd=source, env=env, capture_output=True, text=True
    )
    assert result.returncode != 0 and message in result.stdout + result.stderr


ISOLATED = """
import importlib.util, runpy, sys, types
fake = types.ModuleType("setuptools")
fake.Extension, fake.find_packages = (lambda *a, **k: a), (lambda **k: [])
fake.setup = lambda **options: print(options["version"], "ext_modules" in options)
command = types.ModuleType("setuptools.command.build_ext")
command.build_ext = object
sys.modules |= {"setuptools": fake, "setuptools.command": types.ModuleType("command"), command.__name__: command}
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
assert importlib.util.find_spec("torch") is None
runpy.run_path("setup.py")
"""


def test_an_isolated_build_takes_the_torch_that_is_there():
    """And asks for none: pip and uv would download a second one, with its CUDA libraries."""
    (line,) = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("requires = ")]
    assert "torch" not in line.partition("#")[0]
    label = {"ZEROBLOCK_LOCAL_VERSION": "cu130"}
    found = run(sys.executable, "-c", ISOLATED, cwd=ROOT, PYTHONPATH="", ZEROBLOCK_BUILD_CUDA="0", **label)
    if VERSION < OLDEST_NATIVE:
        assert "they need torch 2.10 or newer" in found
    else:
        folder = Path(importlib.util.find_spec("torch").origin).parent
        assert f"building for torch {torch.__version__} in {folder}" in found
    assert found.split()[-2:] == [f"{zb.__version__}+cu130", str(VERSION >= OLDEST_NATIVE)]


def test_checkout_on_the_path(tmp_path):
    """Works without being installed, and leaves the name `kernels` to the package that is installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(HF_KERNELS)
    code = (
        "import kernels, torch, zeroblock; from zeroblock.kernels import _torch;"
        "print(kernels.get_kernel('x'), _torch.__file__, zeroblock.__file__)"
    )
    # -S: nothing but the standard library and PYTHONPATH, so not what is installed here.
    packages = os.pathsep.join([str(ROOT), str(tmp_path), *site_packages()])
    printed = run(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH=packages).split()
    assert printed == ["x", str(ROOT / "kernels" / "_torch.py"), str(ROOT / "zeroblock" / "__init__.py")]


def site_packages() -> list[str]:
    """Where torch and numpy are."""
    found = [importlib.util.find_spec(name) for name in ("torch", "numpy")]
    return list(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in found if spec is not None))


def test_only_the_bindings_include_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and path.parent.name != "torch":
            found = re.findall(r"#include\s*[<\"](?:torch|ATen|c10)/[^>\"]+", path.read_text())
            assert not found, f"{path.relative_to(ROOT)}: {found}"


@pytest.mark.slow
@pytest.mark.skipif(CPU_MISSING is not None, reason=f"no native kernels: {CPU_MISSING}")
def test_kernel_objects_share_no_inline_function(wheel, source):
    """A weak symbol could be taken from the object that an older processor cannot run."""
    objects = sorted((source / "build").rglob("kernels_*_avx*.o"))
    assert len(objects) == 10
    for path in objects:
        symbols = run("nm", "--defined-only", "-C", str(path), cwd=ROOT)
        weak = [line for line in symbols.splitlines() if re.search(r"\s[WVu]\s", line)]
        assert not weak, f"{path.name}: {weak[:3]}"


def test_importing_pulls_in_no_test_or_demo_package():
    code = (
        "import sys, zeroblock;"
        "extras = ('sklearn', 'matplotlib', 'hypothesis', 'diffusers', 'pytest', 'triton');"
        "print([m for m in extras if m in sys.modules])"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT.parent).strip() == "[]"


def test_every_variable_the_code_reads_is_documented():
    read = set()
    for path in [ROOT / "setup.py", *(ROOT / "zeroblock").rglob("*.py")]:
        read |= set(re.findall(r"environ(?:\.get\(|\[)\"(ZEROBLOCK_\w+)\"", path.read_text()))
    text = "".join((ROOT / name).read_text() for name in ("README.md", "csrc/README.md"))
    assert read and all(name in text for name in read)
