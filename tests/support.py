"""What tests of every folder use."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

# After so many seconds something that a test waits for counts as hung. It says nothing about speed: beside other work a
# process takes many times as long as alone.
HANG = 1800
