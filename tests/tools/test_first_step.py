"""How many kernels the first training step of a U-Net compiles; each takes a third of a CPU second (docs/gpu.md)."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")
pytestmark = pytest.mark.usefixtures("benchmark_path")


def test_a_step_starts_few_kernels():
    """The sizes of Stable Diffusion 1.5, narrower: as many stages and layers, so as many kernels."""
    from gpurun.first_step import step, unet

    model = unet((32, 64, 96, 96))
    by_rule, measured = step(model, "fixed"), step(model, "measure")
    names = {launch.kernel.__name__ for launch in measured}
    assert {"_one_read", "_apply", "_sums"} <= names
    assert {launch.kernel.__name__ for launch in by_rule} <= names
    assert 30 <= len(by_rule) <= 60 and 30 <= len(measured) <= 80
