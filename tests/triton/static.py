"""Facts of the shipped kernels, compiled without a GPU: `python -m tests.triton.static` renews static.csv.

Every shipped configuration (a kernel, its constants and dtypes, warps and stages: what the kernels' COMPILE_CASES
launch) is compiled as the JIT would specialise it, in the specialisation with the most operands, for every target. Read
back are registers, spills, shared memory, resident blocks, instructions, tensor-core instructions and the percentage of
the bytes of large tensors that moves in 16-byte accesses. A row carries the hash of what was compiled (source,
specialisation, options, target, compiler): rows of unchanged hash are kept, so the table is also the cache. `--check N`
judges the table, compiles what is missing (at most MISSING, else the table is stale) and N rows of it once more, others
every day, and fails when one differs. `--all` compiles everything for every target, operands absent or not, and writes
no table.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import hashlib
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from . import ptx
from .occupancy import LIMITS, MOST_THREADS, TARGETS, occupancy, warp

TABLE = Path(__file__).with_name("static.csv")
FACTS = ("registers", "spills", "shared", "warps", "blocks", "instructions", "wide", "tensor")
COLUMNS = ("case", "kernel", "target", *FACTS, "hash")
KERNELS = (
    "_reduce", "activation", "add_bias", "channel_rms_norm_silu", "conv_residual", "gate_residual",
    "gate_residual_layer_norm_modulate", "group_norm_silu", "group_norm_silu_bwd", "group_norm_silu_conv_residual",
    "layer_norm_modulate", "linear_gate_residual", "residual_norm_modulate", "residual_norm_modulate_bwd", "zero_flag",
)  # fmt: skip
TENSOR = r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA|v_mfma)\w*"
MISSING = 40
# Percent; what is left are partial sums, one number per column of a tile. AMD's matrix cores leave 8 bytes of a column
# in a thread for the epilogue.
WIDE, WIDE_AMD_PRODUCT = 95, 60
SMALL = 1 << 18  # tensors of fewer bytes may be accessed as the kernel likes, and those of 1/16 of the largest


def parameters(launch) -> list[object]:
    """The values of a launch that are parameters of the compiled kernel, in order."""
    constants = {launch.kernel.arg_names[i] for i in launch.kernel.constexprs}
    values = [launch.arguments[name] for name in launch.kernel.arg_names if name not in constants]
    flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    return [value for value in flat if value is not None and not (type(value) is int and value == 1)]


def wide_percent(launch, accesses) -> int:
    """Of the bytes that a thread moves to and from the large tensors, those in accesses of 16 bytes or more."""
    import torch

    sizes = [v.numel() * v.element_size() if isinstance(v, torch.Tensor) else 0 for v in parameters(launch)]
    streamed = {i for i, size in enumerate(sizes) if size >= max(SMALL, max(sizes) // 16)}
    found = {key: count for key, count in accesses.items() if key[0] in streamed}
    total = sum(width * count for (_, width), count in found.items())
    return round(100 * sum(w * count for (_, w), count in found.items() if w >= 16) / total) if total else 100


@functools.cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin"


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        outputs = [
            subprocess.run([_tools() / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    return outputs[0], outputs[1]


def _target(name: str):
    from triton.backends.compiler import GPUTarget

    if name.startswith("gfx"):
        return GPUTarget("hip", name, warp(name))
    return GPUTarget("cuda", int(name[3:]), warp(name))


def digest(source, options: dict[str, int], target: str) -> str:
    import triton

    text = f"{triton.__version__} {source.hash()} {sorted(options.items())} {target}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compile_facts(launch, target: str) -> dict[str, object]:
    """Compiles one launch for one target and reads the result."""
    import triton

    options = launch.options_for(warp(target))
    compiled = triton.compile(launch.source(), target=_target(target), options=options)
    warps, shared = options["num_warps"], compiled.metadata.shared
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        count = {
            key: int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        }
        registers = count["vgpr_count"]
        spills = sum(count.values()) - registers
        instructions = len(re.findall(r"^\s+[svdgb]\w*_\w+", assembly, re.M))
        accesses = ptx.llvm_accesses(compiled.asm["llir"])
    else:
        usage, assembly = _disassemble(compiled.asm["cubin"])
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        spills = stack + local
        instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", assembly, re.M))
        accesses = ptx.accesses(compiled.asm["ptx"])
    blocks = occupancy(target, warps, registers, shared)
    wide, tensor = wide_percent(launch, accesses), len(re.findall(TENSOR, assembly))
    return dict(zip(FACTS, (registers, spills, shared, warps, blocks, instructions, wide, tensor), strict=True))


def launches() -> list[tuple[str, object]]:
    """(case, launch) of every case, one per distinct specialisation."""
    launch_module = importlib.import_module("zeroblock.kernels._launch")
    found = []
    for kernel in KERNELS:
        for name, case in importlib.import_module(f"zeroblock.kernels.{kernel}").COMPILE_CASES.items():
            with launch_module.recording(run=False) as recorded:
                case()
            found += [(name, launch) for launch in recorded]
    return found


def configuration(launch) -> str:
    """What a launch is configured with: two of one configuration differ in which operands they have."""
    import torch

    constants = {
        name: launch.arguments[name] for name in (launch.kernel.arg_names[i] for i in launch.kernel.constexprs)
    }
    dtypes = sorted({str(v.dtype) for v in parameters(launch) if isinstance(v, torch.Tensor)} - {"torch.int32"})
    kernel = launch.kernel.__module__, launch.kernel.__name__  # forward and backward share names
    return str((kernel, sorted(constants.items()), sorted(launch.options.items()), dtypes))


def fullest(found: list[tuple[str, object]]) -> list[tuple[str, object]]:
    """Of the launches of each configuration the one with the most operands."""
    best: dict[str, tuple[str, object]] = {}
    for name, launch in found:
        key = configuration(launch)
        if key not in best or len(parameters(launch)) > len(parameters(best[key][1])):
            best[key] = name, launch
    return list(best.values())


def is_product(launch) -> bool:
    """Whether it must run on tensor cores: it has a precision, and that is not full fp32."""
    import torch

    arguments = launch.arguments
    operand = next((arguments[name] for name in ("dy", "h", "x") if name in arguments), None)
    half = operand is not None and operand.dtype != torch.float32
    return "PRECISION" in arguments and (half or arguments["PRECISION"] != "ieee")


def problems(row: dict[str, object], must_be_wide: bool, must_be_tensor: bool) -> list[str]:
    """What is wrong with a row: spills, too much shared memory, narrow global accesses, no tensor cores."""
    found = []
    if int(row["spills"]):
        found.append(f"{row['spills']} bytes spilled")
    if int(row["shared"]) > LIMITS[row["target"]][0]:
        found.append(f"{row['shared']} bytes of shared memory, a block may have {LIMITS[row['target']][0]}")
    if int(row["warps"]) * warp(row["target"]) > MOST_THREADS:
        found.append(f"{int(row['warps']) * warp(row['target'])} threads, a block may have {MOST_THREADS}")
    if not int(row["blocks"]):
        found.append("not one block fits")
    least = WIDE_AMD_PRODUCT if must_be_tensor and row["target"].startswith("gfx") else WIDE
    if must_be_wide and int(row["wide"]) < least:
        found.append(f"only {row['wide']} % of the streamed bytes in 16-byte accesses")
    if must_be_tensor and not int(row["tensor"]):
        found.append("no tensor-core instruction")
    return [f"{row['case']} {row['kernel']} {row['target']}: {what}" for what in found]


def read() -> dict[str, dict[str, str]]:
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {row["hash"]: row for row in csv.DictReader(file)}


def write(rows: list[dict[str, str]]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plan(everything: bool = False) -> dict[str, tuple[str, object, str]]:
    """{hash: (case, launch, target)}, the first case of each."""
    found: dict[str, tuple[str, object, str]] = {}
    for name, launch in launches() if everything else fullest(launches()):
        source = launch.source()
        for target in TARGETS:
            found.setdefault(digest(source, launch.options_for(warp(target)), target), (name, launch, target))
    return found


def sample(keys: list[str], count: int) -> list[str]:
    """`count` of the keys, the next ones every day."""
    keys, day = sorted(keys), datetime.date.today().toordinal()
    return [keys[(day * count + i) % len(keys)] for i in range(min(count, len(keys)))]


_planned: dict[str, tuple[str, object, str]] = {}


def _facts(key: str) -> dict[str, object]:
    name, launch, target = _planned[key]
    return {
        "case": name,
        "kernel": launch.kernel.__name__,
        "target": target,
        **compile_facts(launch, target),
        "hash": key,
    }


def compile_all(keys: list[str], jobs: int) -> dict[str, dict[str, str]]:
    rows = {}
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for i, row in enumerate(pool.imap_unordered(_facts, keys), 1):
            print(f"[{i:3d}/{len(keys)}] {row['case']} {row['kernel']} {row['target']}", file=sys.stderr, flush=True)
            rows[row["hash"]] = {key: str(value) for key, value in row.items()}
    return rows


def gate(rows: dict[str, dict[str, str]]) -> list[str]:
    found = []
    for key, (name, launch, _) in _planned.items():
        if key in rows:
            found += problems(rows[key], not name.endswith("-unaligned"), is_product(launch))
    return found


def report(found: list[str]) -> int:
    print(f"{len(_planned)} kernels, {len(found)} problems", *found, sep="\n")
    return 1 if found else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=int, metavar="N", help="change nothing; recompile N rows and compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (default: all cores)")
    parser.add_argument("--all", action="store_true", help="compile and judge every case for every target; no table")
    options = parser.parse_args(arguments)
    _planned.update(plan(options.all))
    if options.all:
        return report(gate(compile_all(list(_planned), options.jobs)))
    known = read()
    missing = [key for key in _planned if key not in known]
    if options.check is not None:
        found = [
            f"{row['case']} {row['target']} is compiled no longer" for key, row in known.items() if key not in _planned
        ]
        again = compile_all(sample([key for key in _planned if key in known], options.check), options.jobs)
        found += [
            f"{row['case']} {row['target']}: {row} but the table says {known[key]}"
            for key, row in again.items()
            if row != known[key]
        ]
        if len(missing) + len(found) > MISSING:
            found = [f"{TABLE.name} is stale: {len(missing)} rows missing; run python -m tests.triton.static"]
            missing = []
        known |= compile_all(missing, options.jobs)
    else:
        # The same code may have become another case's.
        save = lambda: write([known[key] | {"case": _planned[key][0]} for key in _planned if key in known])  # noqa: E731
        for start in range(0, len(missing), 50):  # what is done is kept when the run is interrupted
            known |= compile_all(missing[start : start + 50], options.jobs)
            save()
        save()
        found = []
    return report(found + gate(known))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("static: TRITON_INTERPRET=1 is set, nothing can be compiled")
    sys.exit(main(sys.argv[1:]))
