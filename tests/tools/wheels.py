"""Tries wheels in the environment that runs this: `python tests/tools/wheels.py dist/*.whl` (`make try-wheels`).

Each is installed into a folder of its own, without what it depends on, and there every op is compared with eager's in
float64, forward and backward; modules, torch.compile and `info` run. Nothing of the tree is imported.
"""

import os
import subprocess
import sys
import tempfile

TRY = """
import platform, torch, zeroblock as zb
from zeroblock.testing.cases import CASES, DTYPES
from zeroblock.testing.parity import assert_parity

first = {}
for case in CASES:
    first.setdefault(case.op, case)
for case in first.values():
    for dtype in DTYPES:
        assert_parity(case, dtype, case.layouts[0], "cpu")
zb.nn.ResBlock(32, 16, 0.0)(torch.randn(2, 32, 8, 8), torch.randn(2, 16)).sum().backward()
zb.nn.DiTBlock(64, 4)(torch.randn(2, 8, 64), torch.randn(2, 64)).sum().backward()
modulate = torch.compile(zb.layer_norm_modulate, fullgraph=True, backend="aot_eager")
modulate(torch.randn(2, 8, 64), torch.randn(2, 64), torch.randn(2, 64))
backend = zb.explain("gate_residual", *[torch.randn(2, 3, 8)] * 3).backend
print(f"  python {platform.python_version()}, torch {torch.__version__}: {len(first)} ops as eager, on {backend}")
print(*["    " + line for line in str(zb.info()).splitlines() if "kernels" in line], sep="\\n")
"""


def main(wheels: list[str]) -> int:
    for wheel in wheels:
        with tempfile.TemporaryDirectory() as folder:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
            subprocess.run([*install, wheel], check=True)
            print(os.path.basename(wheel), flush=True)
            environment = {**os.environ, "PYTHONPATH": folder, "ZEROBLOCK_CACHE_DIR": ""}
            subprocess.run([sys.executable, "-c", TRY], cwd=folder, env=environment, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
