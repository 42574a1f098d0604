"""Facts of the CUDA kernels, compiled without a GPU: `python -m tests.cuda.simt.static` renews static.csv.

Each source is compiled for each target and read back: registers, spills, static and dynamic shared memory, resident
blocks, and how many instructions of the kinds that matter. Rows carry the hash of what was compiled (sources, compiler,
target). With `--check N` rows of another hash are an error, and N sources are compiled anew and compared.
Threads, dynamic shared memory and cluster are those of the launch at the shapes in `launches` and norm_shapes.py; other
kernels are listed without. sm_80 has no clusters: kernels for them are empty there and not listed.
"""

from __future__ import annotations

import argparse
import collections
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...support import HANG, ROOT
from .norm_shapes import norm_launches

SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TABLE = Path(__file__).with_name("static.csv")
CACHE = ROOT / "build/simt/cubin"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
# Shared memory of a multiprocessor, warps, blocks (CUDA programming guide); a block takes 1 KB more than it asks for.
LIMITS = {"sm_80": (167936, 64, 32), "sm_90": (233472, 64, 32), "sm_100": (233472, 64, 32), "sm_120": (102400, 48, 24)}
KINDS = {
    "HMMA": r"HMMA\.", "LDSM": r"LDSM", "LDGSTS": r"LDGSTS", "LDG.128": r"LDG\.E\.(?:\w+\.)*128",
    "LDG.other": r"LDG\.", "STG.128": r"STG\.E\.(?:\w+\.)*128", "STG.other": r"STG\.",
    "MUFU": r"MUFU", "BAR": r"BAR\.", "UCGABAR": r"UCGABAR", "SHFL": r"SHFL",
}  # fmt: skip
SIZES = ("registers", "spills", "static_shared", "threads", "dynamic_shared", "cluster", "blocks", "instructions")
COLUMNS = ("kernel", "target", *SIZES, *KINDS, "hash")


def nvcc() -> str | None:
    return shutil.which("nvcc")


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one inside the triton wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        import importlib.util

        spec = importlib.util.find_spec("triton")
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
            found = str(path) if path.exists() else None
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def digest(source: Path, target: str) -> str:
    version = re.search(r"release [\d.]+, V[\d.]+", run(str(nvcc()), "--version"))
    text = hashlib.sha256(f"{version and version[0]} {target}".encode())
    headers = [*(ROOT / "csrc/cuda").glob("*.cuh"), *(ROOT / "csrc/cuda").glob("*.h"), ROOT / "csrc/zeroblock.h"]
    for path in [source, *sorted(headers)]:
        text.update(path.read_bytes())
    return text.hexdigest()[:16]


def cubin(source: Path, target: str, fresh: bool = False) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{source.stem}-{target}-{digest(source, target)}.cubin"
    if fresh or not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.cubin")
        run(str(nvcc()), "-std=c++17", "-O3", f"-arch={target}", "-cubin", str(source), "-o", str(temporary))
        temporary.replace(path)
    return path


def facts(source: Path, target: str, fresh: bool = False) -> list[dict[str, str]]:
    """One row per kernel of the source."""
    path = str(cubin(source, target, fresh))
    usage, assembly = (run(str(disassembler()), option, path) for option in ("-res-usage", "-sass"))
    rows: dict[str, dict[str, str]] = {}
    for name, registers, stack, shared, local in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        # sm_90 and later count the 1 KB that the system takes of each block.
        own = int(shared) - (1024 if target != "sm_80" and int(shared) >= 1024 else 0)
        rows[name] = {
            "target": target,
            "registers": registers,
            "spills": str(int(stack) + int(local)),
            "static_shared": str(own),
            "hash": digest(source, target),
        }
    counts: dict[str, collections.Counter] = {name: collections.Counter() for name in rows}
    current = None
    for line in assembly.splitlines():
        if function := re.search(r"Function : (\S+)", line):
            current = function[1]
        elif current and (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", line)):
            counts[current]["instructions"] += 1
            kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, found[1])), None)
            counts[current][kind] += 1
    demangled = run("c++filt", *rows).splitlines()
    for (name, row), text in zip(rows.items(), demangled, strict=True):
        row["kernel"] = short_name(text)
        row.update({kind: str(counts[name][kind]) for kind in ("instructions", *KINDS)})
    listed = [row for row in rows.values() if target != "sm_80" or not is_clustered(row)]
    return sorted(listed, key=lambda row: row["kernel"])


def is_clustered(row: dict[str, str]) -> bool:
    """Mode::kCluster of the group norm."""
    return row["kernel"].startswith("group_norm_silu") and row["kernel"].endswith(",3>")


def short_name(demangled: str) -> str:
    """group_norm_silu_fwd_kernel<bf16,8,1,0> of a demangled signature."""
    text = demangled.replace("(anonymous namespace)", "anonymous").replace("zeroblock::cuda::", "")
    found = re.search(r"::(\w+_kernel)(?:<(.*?)>)?\(", text)
    assert found is not None, demangled
    values = re.sub(r"\([^()]*\)", "", found[2] or "").replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    return f"{found[1]}<{values.replace(' ', '')}>" if values else found[1]


def resident(target: str, threads: int, registers: int, shared: int) -> int:
    """Blocks on one multiprocessor: registers by warp in units of 256, shared memory with the system's 1 KB."""
    warps, (memory, most, blocks) = -(-threads // 32), LIMITS[target]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    return min(blocks, most // warps, by_registers, memory // (-(-(shared + 1024) // 128) * 128))


def table(targets=TARGETS, fresh: bool = False) -> list[dict[str, str]]:
    jobs = [(source, target) for target in targets for source in SOURCES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        rows = [row for rows in pool.map(lambda job: facts(*job, fresh), jobs) for row in rows]
    sizes = {target: launches(target) | norm_launches(target) for target in targets}
    for row in rows:
        size = sizes[row["target"]].get(row["kernel"])
        row["threads"], row["dynamic_shared"], row["cluster"] = (str(n) for n in size) if size else ("", "", "")
        row["blocks"] = ""
        if size:
            shared = int(row["static_shared"]) + size[1]
            row["blocks"] = str(resident(row["target"], size[0], int(row["registers"]), shared))
    return rows


def launches(target: str) -> dict[str, tuple[int, int, int]]:
    """{kernel: (threads, bytes of dynamic shared memory, blocks of a cluster)} at shapes of U-Nets and DiTs in bf16."""
    import torch

    from zeroblock.backends.base import GroupNorm
    from zeroblock.backends.cuda import CUDA

    from . import emulated

    def t(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16)

    def image(*size: int) -> torch.Tensor:
        return t(*size).to(memory_format=torch.channels_last)

    def norm(x, dy=None):
        v, N, C = t(x.shape[1]), *x.shape[:2]
        if dy is None:
            return lambda: CUDA.group_norm_silu(x, 32, v, v, 1e-5, t(N, C), t(N, C), True)
        stats = torch.empty(N, 32)
        return lambda: CUDA.group_norm_silu_bwd(dy, x, stats, stats, v, v, t(N, C), t(N, C), 32, True)

    def conv(C: int, K: int, size: int, normed: bool):
        x, y, stats = image(8, C, size, size), image(8, K, size, size), torch.empty(8, 32)
        if not normed:
            return lambda: CUDA.conv_and_statistics(x, image(K, C, 3, 3), t(K), y)
        v, film = t(C), t(8, C)
        whole = GroupNorm(32, v, v, 1e-5, film, film, None, 0.0)
        return lambda: CUDA.norm_conv(x, stats, stats, whole, image(K, C, 3, 3), t(K), y)

    x, v, stats = t(32, 256, 1152), t(32, 1152), torch.empty(32, 256)
    nchw, nhwc, flat, small = t(8, 320, 64, 64), image(8, 320, 64, 64), image(8, 1280, 8, 8), t(1, 320, 64, 64)
    finish = "group_norm_silu_bwd_params_kernel<bf16>"
    gate_finish = "gate_residual_bwd_gate_kernel<bf16>"
    row_finish = "row_norm_bwd_samples_kernel<bf16>"
    fwd, bwd = "group_norm_silu_fwd_kernel<bf16,8,{},{}>", "group_norm_silu_bwd_kernel<bf16,8,{},{}>"
    huge, huge_nhwc = t(2, 128, 512, 512), image(2, 128, 512, 512)
    totals = ["group_norm_silu_bwd_totals_kernel"]

    def norms(kernel: str, last: str, between: Sequence[str] = (), without: Sequence[str] = ("sm_80",)) -> list[str]:
        """A cluster, two passes on GPUs without one that is large enough."""
        if target not in without:
            return [kernel.format(last, 3)]
        return [kernel.format(last, 1), *between, kernel.format(last, 2)]

    calls = [
        (norm(nchw), [fwd.format("false", 0)]),
        (norm(small), norms(fwd, "false")),
        (norm(huge), [fwd.format("false", 1), fwd.format("false", 2)]),
        (norm(flat), [fwd.format("true", 0)]),
        (norm(nhwc), norms(fwd, "true")),
        (norm(huge_nhwc), [fwd.format("true", 1), fwd.format("true", 2)]),
        (norm(t(8, 640, 32, 32), t(8, 640, 32, 32)), [bwd.format("false", 0), finish]),
        (norm(small, small), [*norms(bwd, "false", totals), finish]),
        (norm(huge, huge), [bwd.format("false", 1), *totals, bwd.format("false", 2), finish]),
        (norm(flat, flat), [bwd.format("true", 0), finish]),
        (norm(nhwc, nhwc), [*norms(bwd, "true", totals, ("sm_80", "sm_120")), finish]),
        (norm(huge_nhwc, huge_nhwc), [bwd.format("true", 1), *totals, bwd.format("true", 2), finish]),
        (lambda: CUDA.layer_norm_modulate(x, v, v, None, None, 1e-6, False), ["row_norm_fwd_kernel<bf16,8,false>"]),
        (lambda: CUDA.gate_residual_layer_norm_modulate(x, v, x, v, v, 1e-6), ["row_norm_fwd_kernel<bf16,8,true>"]),
        (
            lambda: CUDA.layer_norm_modulate_bwd(x, x, stats, stats, v, v, None, None, False),
            ["row_norm_bwd_kernel<bf16,8,false>", row_finish],
        ),
        (
            lambda: CUDA.gate_residual_layer_norm_modulate_bwd(x, x, x, stats, stats, v, x, v, v),
            ["row_norm_bwd_kernel<bf16,8,true>", row_finish],
        ),
        (lambda: CUDA.gate_residual(x, v, x), ["gate_residual_fwd_kernel<bf16,8>"]),
        (lambda: CUDA.gate_residual_bwd(x, v, x, True, True), ["gate_residual_bwd_kernel<bf16,8>", gate_finish]),
        (conv(640, 640, 32, True), ["conv_residual_kernel<bf16,128,true>"]),
        (conv(640, 640, 32, False), ["conv_residual_kernel<bf16,128,false>"]),
        (conv(320, 320, 64, True), ["conv_residual_kernel<bf16,64,true>"]),
        (conv(320, 320, 64, False), ["conv_residual_kernel<bf16,64,false>"]),
        (lambda: CUDA.are_zero([image(640, 640, 3, 3)]), ["zero_flag_kernel"]),
    ]
    found: dict[str, tuple[int, int, int]] = {}
    with emulated.emulated(), emulated.gpu(*emulated.GPUS[target]):
        for call, names in calls:
            sizes = emulated.recorded(call)
            assert len(sizes) == len(names), (names, sizes)
            found.update(zip(names, sizes, strict=True))
    return found


def problems(row: dict[str, str]) -> list[str]:
    found = []
    if int(row["spills"]):
        found.append(f"{row['spills']} bytes of stack")
    if row["blocks"] == "0":
        found.append("not one block fits on a multiprocessor")
    if is_clustered(row) and row["UCGABAR"] == "0":
        found.append("no barrier of the cluster")
    vectors = re.search(r"<(?:bf16|fp16),8|<float,4", row["kernel"])
    if vectors and not int(row["LDG.128"]) + int(row["LDGSTS"]):
        found.append("no 16-byte loads")
    if row["kernel"].startswith("conv_residual") and not all(int(row[k]) for k in ("HMMA", "LDSM", "LDGSTS")):
        found.append("no tensor-core instructions, ldmatrix or cp.async")
    return [f"{row['kernel']} {row['target']}: {what}" for what in found]


def read() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def compare(rows: list[dict[str, str]], source: Path, target: str) -> None:
    """Compiles one source anew; every fact must be that of the table."""
    known = {row["kernel"]: row for row in rows if row["target"] == target}
    for row in facts(source, target, fresh=True):
        old = known[row["kernel"]]
        wrong = {key: (value, old[key]) for key, value in row.items() if old[key] != value}
        if wrong:
            raise SystemExit(f"{row['kernel']} {target}: (now, in the table) {wrong}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=int, metavar="N", help="compare N sources' rows instead of renewing the table")
    arguments = parser.parse_args()
    if nvcc() is None or disassembler() is None:
        raise SystemExit("static.py needs nvcc, and cuobjdump of the CUDA toolkit or of triton")
    if arguments.check is None:
        rows = table()
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        print(f"{len(rows)} rows in {TABLE.relative_to(ROOT)}")
    else:
        rows = read()
        stale = {row["hash"] for row in rows} ^ {digest(source, target) for source in SOURCES for target in TARGETS}
        if stale:
            raise SystemExit(
                "static.csv is not of these sources and this nvcc: python -m tests.cuda.simt.static renews it"
            )
        for number in range(arguments.check):
            compare(rows, SOURCES[number * 3 % len(SOURCES)], TARGETS[number % len(TARGETS)])
    wrong = [text for row in rows for text in problems(row)]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
