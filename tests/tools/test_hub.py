"""The package for the kernels hub: its layers compute what they replace, and it loads beside the installed package."""

import ast
import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from zeroblock.nn import hub as layers
from zeroblock.testing import assert_error_budget
from zeroblock.tools import hub

from ..support import ROOT

normalization = pytest.importorskip("diffusers.models.normalization")

# The module, and the arguments of its forward beside x.
WIDTH = 24
MODULES = {
    "AdaLayerNormContinuous": ((WIDTH, 16), {"elementwise_affine": False, "eps": 1e-6}, (16,)),
    "AdaLayerNormContinuous-affine": ((WIDTH, 16), {}, (16,)),
    "AdaLayerNormContinuous-rms": ((WIDTH, 16), {"norm_type": "rms_norm"}, (16,)),
    "AdaLayerNormZero": ((WIDTH,), {}, (WIDTH,)),
    "AdaLayerNormZero-fp32": ((WIDTH,), {"norm_type": "fp32_layer_norm"}, (WIDTH,)),
    "AdaLayerNormZeroSingle": ((WIDTH,), {}, (WIDTH,)),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", MODULES)
def test_layers_compute_what_diffusers_does(name, dtype):
    positional, options, width = MODULES[name]
    name = name.partition("-")[0]
    torch.manual_seed(0)
    module = getattr(normalization, name)(*positional, **options).to(dtype)
    x, emb = torch.randn(2, 7, WIDTH, dtype=dtype), torch.randn(2, *width, dtype=dtype)
    argument = "emb" if "Zero" in name else "conditioning_embedding"

    def results(forward, module, wide):
        leaf = x.to(wide).requires_grad_()
        y = forward(module, leaf, **{argument: emb.to(wide)})
        y = y if isinstance(y, tuple) else (y,)
        wanted = leaf, module.linear.weight
        return [t.detach() for t in (*y, *torch.autograd.grad(y, wanted, [torch.ones_like(t) for t in y]))]

    got = results(getattr(layers, name).forward, module, dtype)
    eager = results(type(module).forward, module, dtype)
    exact = results(type(module).forward, copy.deepcopy(module).double(), torch.float64)
    for number, tensors in enumerate(zip(got, eager, exact, strict=True)):
        assert_error_budget(*tensors, f"{name} {number}")


def test_layers_are_what_the_hub_asks_for():
    """Nothing but forward and what it tells of itself; no state."""
    plain = set(dir(torch.nn.Module))
    for name in layers.__all__:
        layer = getattr(layers, name)
        assert set(dir(layer)) - plain <= {"has_backward", "can_torch_compile"} and layer.has_backward
        assert layer.__init__ is torch.nn.Module.__init__


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return folder, hub.write(folder)


def test_variants_are_the_source_and_a_name_of_their_own(package):
    folder, variants = package
    assert [v.name for v in variants] == ["torch-cuda", "torch-rocm", "torch-cpu"]
    names = [json.loads((v / "metadata.json").read_text())["id"] for v in variants]
    assert len(set(names)) == 3 and all(name.isidentifier() for name in names)
    source = contents(folder / "torch-ext/zeroblock")
    assert {"kernels/layer_norm_modulate.py", "doctor/report.html", "nn/hub.py"} <= set(source)
    assert not [path for path in source if path.startswith(("tools/", "testing/", "zeroblock/"))]
    for variant, name in zip(variants, names, strict=True):
        found = contents(variant)
        assert f"torch.ops.{name}\n" in found.pop("_ops.py").decode() and found.pop("metadata.json")
        assert found == source


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_second_package_replaces_the_first(package):
    folder, variants = package
    before = contents(folder)
    (variants[0] / "left.py").touch()
    (folder / "torch-ext/zeroblock/left.py").touch()
    hub.write(folder)
    assert contents(folder) == before


def test_imports_of_the_package_are_relative(package):
    """Several versions of it are loaded by names of their own."""
    for path in (package[0] / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            absolute = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            absolute += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in absolute if name.partition(".")[0] in ("zeroblock", "kernels")], path


HOLDS = """
from pathlib import Path
from kernels._rust import Backend, Build, Digest, DigestAlgorithm, Metadata

folder = Path({folder!r})
build = Build.open(folder)
assert build.general.backends == [Backend.CUDA, Backend.ROCm, Backend.CPU]
for backend in build.general.backends:
    variant = folder / f"build/torch-{{str(backend).lower()}}"
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert (str(metadata.name), metadata.version, metadata.license) == ("zeroblock", {version}, "Apache-2.0")
    assert metadata.backend.backend_type == backend and metadata.kernel_depends == []
    assert f'version = {{metadata.version}}\\n' in (folder / "build.toml").read_text()
    assert len(metadata.digest.files) > 100
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
"""


def test_the_hub_reads_its_files(package, tmp_path):
    """With the parsers that its builder and its loader use."""
    run_beside_kernels(HOLDS.format(folder=str(package[0]), version=hub.VERSION), tmp_path)


LOAD = """
from pathlib import Path
import kernels, torch, zeroblock as zb
from diffusers import SD3Transformer2DModel
from diffusers.models import normalization

folder = Path({folder!r})
package = kernels.get_local_kernel(folder)
assert package is not zb and package.ops.register.NAMESPACE == package.__name__ in dir(torch.ops)
x, row = torch.randn(2, 7, 8, requires_grad=True), torch.randn(2, 8)
y = package.layer_norm_modulate(x, row, row)
torch.testing.assert_close(y, zb.layer_norm_modulate(x, row, row))
names = package.layers.__all__
for name in names:
    kernels.replace_kernel_forward_from_hub(getattr(normalization, name), name)
torch.manual_seed(0)
model = SD3Transformer2DModel(
    sample_size=4, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8)
inputs = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 16), torch.randn(1, 12), torch.tensor([10])
expected = model(*inputs, return_dict=False)[0]
repository = lambda name: kernels.LocalLayerRepository(repo_path=folder, layer_name=name)
with kernels.use_kernel_mapping({{name: {{"cpu": repository(name)}} for name in names}}):
    model = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
own = [m for m in model.modules() if m.forward.__func__.__module__.startswith(package.__name__)]
got = model(*inputs, return_dict=False)[0]
torch.testing.assert_close(got, expected)
got.sum().backward()
print(len(own), "layers")
"""


ALONE = """
import sys
sys.modules["zeroblock"] = None  # as where it is not installed
from pathlib import Path
import kernels, torch
from diffusers import DiTTransformer2DModel

package = kernels.get_local_kernel(Path({folder!r}))
sizes = {{"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 4}}
model = DiTTransformer2DModel(**sizes).eval()
inputs = torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([3, 4])
expected = model(*inputs).sample
report = package.accelerate(model)
torch.testing.assert_close(model(*inputs).sample, expected)
print(len(report.branches), "branches", package.explain("gate_residual", *[torch.randn(2, 3, 8)] * 3).backend)
"""


def run_beside_kernels(code, folder):
    """What the code prints where Hugging Face's `kernels` is (a folder of that name in the tree is not it)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    probe = [sys.executable, "-c", "import kernels._rust"]
    if subprocess.run(probe, cwd=folder, env=environment, capture_output=True).returncode:
        pytest.skip("Hugging Face's kernels is not installed, or too old")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_takes_its_layers_from_the_package(package, tmp_path):
    assert int(run_beside_kernels(LOAD.format(folder=str(package[0])), tmp_path).split()[0]) >= 4


def test_the_package_stands_alone(package, tmp_path):
    """All of it, where zeroblock is not installed."""
    branches, _, backend = run_beside_kernels(ALONE.format(folder=str(package[0])), tmp_path).split()
    assert int(branches) >= 2 and backend == "reference"
