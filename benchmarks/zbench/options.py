"""The options that the scripts share."""

import argparse
import os
import sys
from pathlib import Path

from . import store


def parse_common(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parses with the options of every script that stores times; the parser has --seconds of its own."""
    parser.add_argument("--allocator", default="pinned", choices=store.ALLOCATORS, help="see README.md")
    parser.add_argument("--out", default=store.RESULTS, type=Path, help="default: benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that everything runs, not how fast")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = min(options.seconds, 0.02)
        if options.out == store.RESULTS:
            parser.error("--quick needs --out: its times must not replace measured ones")
    return options


def use_allocator(name: str) -> None:
    """Starts this process again where it runs under another setting: malloc reads its settings once, at start."""
    if name != store.allocator():
        pinned = store.ALLOCATORS["pinned"]
        kept = {key: value for key, value in os.environ.items() if key not in pinned}
        os.execve(sys.executable, sys.orig_argv, kept | store.ALLOCATORS[name])
