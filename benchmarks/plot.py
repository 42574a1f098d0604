"""Draw the stored results again: `python benchmarks/plot.py [RESULTS/MACHINE]` writes PNGs beside the CSVs."""

import sys
from pathlib import Path

from zbench import plot, store

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else store.RESULTS / store.machine_slug()
    for path in plot.draw(folder):
        print(path)
