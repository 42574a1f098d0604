"""What tests of every folder use."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
# What the bindings are compiled with (they are compiled in tests too).
TORCH_TARGET = "-DTORCH_TARGET_VERSION=" + re.search(r'"(0x[0-9a-f]{16})"', (ROOT / "setup.py").read_text())[1]

# After so many seconds something that a test waits for counts as hung. It says nothing about speed: beside other work a
# process takes many times as long as alone.
HANG = 1800
