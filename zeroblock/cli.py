"""The command `zeroblock` (also `python -m zeroblock`): doctor, bench, info, demo.

Exit status: 0 fine; 1 doctor found something dead or symmetric, bench a difference, demo a failed check; 2 the command
could not run.

bench and demo are imported when they are called: they need `resource` (of POSIX alone), scikit-learn and matplotlib.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._explain import info
from .convert import families
from .convert.table import coverage_table
from .doctor import doctor
from .doctor.examine import random_target_loss
from .doctor.text import render
from .tools import configured
from .tools.progress import Progress

DEMO_HELP = (
    "train a small U-Net and a small DiT on real digits, with eager blocks and with zeroblock's, and compare them"
)
FACTORY_HELP = (
    "package.module:factory or file.py:factory, a function without arguments that returns (model, example_batch) or "
    "(model, example_batch, loss) with loss(model, example_batch) -> scalar; or a model alone, with --shape; or a "
    "class of diffusers, or a checkpoint's folder (config.json alone is read), as the class initialises it"
)


class CommandError(Exception):
    """The command cannot run: printed without a traceback, exit status 2."""


def load_factory(target: str) -> Callable[[], Any]:
    """The function that a command names.

    target: "package.module:name" or "path/file.py:name".

    Raises CommandError where it cannot be imported, has no such name, or is no function.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise CommandError(f"factory must be given as package.module:name, file.py:name or a folder, got {target!r}")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, module)
            spec.loader.exec_module(module)
        else:
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            module = importlib.import_module(where)
    except (Exception, SystemExit) as error:
        raise CommandError(f"cannot import {where}: {type(error).__name__}: {error}") from error
    factory: Any = module
    for part in name.split("."):
        if not hasattr(factory, part):
            raise CommandError(f"{where} has no attribute {name!r}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise CommandError(f"{target} must be a function, got {type(factory).__name__}")
    return factory


def build(options: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """(model, example_batch, loss or None) from the factory, or from --shape, on --device.

    options: of a command that takes a factory.

    Raises CommandError where the factory fails or returns something else, no batch is given, or the device is missing.
    """
    folder = Path(options.factory)
    factory: Any = None if folder.is_dir() else load_factory(options.factory)
    torch.manual_seed(options.seed)
    if factory is None or configured.is_class(factory):
        return _on_device(*_from_configuration(options, factory, folder), None, options)
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise CommandError(f"{options.factory} failed: {type(error).__name__}: {error}") from error
    parts = made if isinstance(made, tuple) else (made,)
    if not isinstance(parts[0], nn.Module) or len(parts) > 3:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise CommandError(f"{options.factory} must return (model, example_batch[, loss]), got ({kinds})")
    model = parts[0]
    batch = parts[1] if len(parts) > 1 else None
    if options.shape:
        batch = tuple(torch.randn(shape) for shape in options.shape)
    if batch is None:
        raise CommandError(f"{options.factory} returns a model alone: give the shapes of its inputs with --shape")
    return _on_device(model, batch, parts[2] if len(parts) > 2 else None, options)


def _from_configuration(options: argparse.Namespace, cls: Any, folder: Path) -> tuple[nn.Module, Any]:
    """(model, example_batch) of a class of diffusers, or of what the folder names; says what was made smaller."""
    try:
        cls, config = (cls, {}) if cls else configured.of_folder(folder)
        made = configured.make(cls, config, options.largest)
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    if made.changed and not getattr(options, "quiet", False):
        print(f"zeroblock {options.command}: {made}", file=sys.stderr)
    return made.model, made.batch


def _on_device(model: nn.Module, batch: Any, loss: Any, options: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    if options.device:
        try:
            model = model.to(options.device)
            batch = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(options.device), batch)
        except RuntimeError as error:
            raise CommandError(f"--device {options.device}: {error}") from error
    return model, batch, loss


def run_doctor(options: argparse.Namespace) -> int:
    """Exit status 1 if a parameter is dead or symmetric. Raises CommandError where `zeroblock.doctor` raises."""
    for path in filter(None, (options.json, options.html)):
        if not Path(path).resolve().parent.is_dir():
            raise CommandError(f"{path}: the folder does not exist")
    model, batch, loss = build(options)
    progress = Progress(terminal=False if options.quiet else None)
    try:
        diagnosis = doctor(model, batch, loss, options.steps, lr=options.lr, progress=progress)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    finally:
        progress.close()
    for path, text in ((options.json, diagnosis.to_json), (options.html, diagnosis.to_html)):
        if path:
            _write(path, text())
    if not options.quiet and options.json != "-":
        print(render(diagnosis))
    return diagnosis.exit_status


def _write(path: str, text: str) -> None:
    try:
        print(text) if path == "-" else Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error


def run_bench(options: argparse.Namespace) -> int:
    """Exit status 1 if the accelerated model gives other results. Raises CommandError where the model cannot be run."""
    from .tools.bench import bench, draw

    model, batch, loss = build(options)
    try:
        comparison = bench(model, batch, loss or random_target_loss, options.seconds, not options.no_compile)
        if options.picture:
            draw(comparison, options.picture)
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    if options.json:
        _write(options.json, comparison.to_json())
    if options.json != "-":
        print(comparison)
    return 0 if comparison.equal else 1


def run_demo(options: argparse.Namespace) -> int:
    """Exit status 1 if a check fails. Raises CommandError where scikit-learn or matplotlib is missing."""
    from .tools import demo

    try:
        return 0 if demo.run(options.out, options.steps, options.seed, options.quick) else 1
    except ImportError as error:
        raise CommandError(str(error)) from error


def run_info(options: argparse.Namespace) -> int:
    """Exit status 0. Raises CommandError for a family that is not known."""
    known, name = families(), options.family
    if name is None or name == "coverage":
        print(info() if name is None else coverage_table())
    elif name == "all":
        print("\n\n".join(f"{name}\n{text}" for name, text in known.items()))
    elif name in known:
        print(known[name])
    else:
        raise CommandError(f"no family {name!r}; known: {', '.join(known)}")
    return 0


def shape(text: str) -> tuple[int, ...]:
    """The sizes in the value of --shape, "2,3,32,32" or "2x3x32x32". Raises argparse.ArgumentTypeError for others."""
    try:
        found = tuple(int(n) for n in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape like 2,3,32,32") from None
    if any(n < 1 for n in found):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes must be at least 1")
    return found


def positive(kind: type) -> Callable[[str], Any]:
    """The conversion of an option's value to a positive, finite number of this kind (int or float)."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be positive")
        return value

    return convert


def parser() -> argparse.ArgumentParser:
    """The options of every command; `options.run(options)` runs the one that was chosen."""
    top = argparse.ArgumentParser(prog="zeroblock", description="Zero-aware residual blocks for diffusion models.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{doctor,bench,info,demo}")

    def model_command(name: str, run: Any, help: str, description: str, largest: float) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=description)
        command.add_argument("factory", help=FACTORY_HELP)
        command.add_argument("--shape", type=shape, action="append", help="a random normal input, as 2,3,32,32; repeat")
        command.add_argument("--device", help="move model and batch there first, as cuda:0 (default: leave them)")
        command.add_argument("--seed", type=int, default=0, help="set before the factory is called (default: 0)")
        command.add_argument("--traceback", action="store_true", help="show where an error comes from")
        command.set_defaults(run=run, largest=largest)
        return command

    command = model_command(
        "doctor",
        run_doctor,
        "will this initialisation learn, and when does each branch wake up?",
        "Predicts from the zeros of a model when each parameter gets its first gradient, checks it with plain SGD "
        "steps (undone afterwards), and names what is dead or symmetric. Exit status: 1 if anything is, 2 cannot run.",
        configured.LIMIT,
    )
    command.add_argument("--steps", type=positive(int), default=4, help="SGD steps (default: 4)")
    command.add_argument("--lr", type=positive(float), default=1e-2, help="their learning rate (default: 0.01)")
    command.add_argument("--json", metavar="FILE", help="write everything found as JSON; -: print it alone")
    command.add_argument("--html", metavar="FILE", help="write a page with timeline, table and explanation")
    command.add_argument("--quiet", action="store_true", help="print nothing; the exit status tells")

    command = model_command(
        "bench",
        run_bench,
        "your own model in eager mode, compiled, accelerated, both, and frozen: which to use",
        "Times a model and an accelerated copy of it in turns, each as it is and under torch.compile, for inference "
        "also frozen; counts the bytes saved for backward and the most that a training step allocates; compares loss "
        "and gradients, and says which to use. Exit status: 1 if they differ, 2 cannot run.",
        math.inf,
    )
    command.add_argument("--seconds", type=positive(float), default=5.0, help="for inference and for training each")
    command.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes its time")
    command.add_argument("--json", metavar="FILE", help="write everything measured as JSON; -: print it alone")
    command.add_argument("--picture", metavar="FILE", help="draw it, by the ending as PNG, SVG or PDF")

    command = commands.add_parser("info", help="what is built and why not", description="What is built and why not.")
    command.add_argument("family", nargs="?", help="a family of blocks, all, or coverage: of diffusers' models")
    command.set_defaults(run=run_info, traceback=False)

    command = commands.add_parser("demo", help=DEMO_HELP, description=DEMO_HELP)
    command.add_argument("--steps", type=positive(int), help="optimizer steps of each model (default: some hundreds)")
    command.add_argument("--out", default="demo.png", help="the picture to write (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of weights, batches and samples (default: %(default)s)")
    command.add_argument("--quick", action="store_true", help="a few steps: only shows that everything runs")
    command.set_defaults(run=run_demo, traceback=False)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    arguments: as on the command line, without the program's name; None: those of this process.

    Raises SystemExit (status 2) for arguments that cannot be parsed, and after --help (status 0).
    """
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except CommandError as error:
        if options.traceback:
            traceback.print_exception(error.__cause__ or error)
        print(f"zeroblock {options.command}: {str(error).removeprefix(f'{options.command}: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
