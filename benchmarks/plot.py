"""Draw the stored results again: `python benchmarks/plot.py [RESULTS/MACHINE]` writes PNGs beside the CSVs; with
`--front` instead the picture of the first README, and prints its table of numbers."""

import sys
from pathlib import Path

from zbench import front, plot, store

if __name__ == "__main__":
    if "--front" in sys.argv[1:]:
        print(f"{front.draw()}\n\n{front.table()}")
        sys.exit()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else store.RESULTS / store.machine_slug()
    for path in plot.draw(folder):
        print(path)
