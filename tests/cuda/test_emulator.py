"""The emulator and its three builds: what each must catch, planted in small kernels and in the real ones."""

import math
import re
from typing import NamedTuple

import pytest

from .simt import emulated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing())),
]
BUILDS = tuple(emulated.BUILDS)
QUIET = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=0"}


FIRST_REPORT = {**QUIET, "TSAN_OPTIONS": "exitcode=0 halt_on_error=1"}


def _run(path, *arguments, env=QUIET):
    """(what it printed, the sanitizer's reports)"""
    done = emulated.run(str(path), *arguments, env=env)
    reports = re.findall(r"(AddressSanitizer: [\w-]+|runtime error: .*|ThreadSanitizer: \w+ \w+)", done.stderr)
    return done.stdout, reports


def _values(text):
    assert text.startswith("finished "), text
    return [float(word) for word in text.split()[1:]]


def _product():
    return [sum((m + 2.0 * k) * (k - n) for k in range(16)) for m in range(16) for n in range(8)]


CORRECT = {
    "reverse": [63.0 - i for i in range(64)],
    "warp_sum": [1984.0] * 32,
    "exchange": [float(i ^ 1) for i in range(64)],
    "async": [1.0] * 4 + [0.0] * 4 + [1.0] * 24,
    "product": _product(),
    "cluster": [1100.0 * ((b + 1) % 4) + 31 - i for b in range(4) for i in range(32)],
}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("seed", ("0", "5"))
@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels_are_left_alone(build, seed, name):
    printed, reports = _run(emulated.program("plants.cpp", build), name, seed)
    assert reports == []
    assert _values(printed)[: len(CORRECT[name])] == CORRECT[name]


# Which build sees which bug: "nan", an emulator error, or a sanitizer's report; None where that build may not notice.
PLANTS = {
    "no_barrier": ("nan", "nan", "ThreadSanitizer: data race"),
    "no_sync_warp": ("nan", "nan", "ThreadSanitizer: data race"),
    "no_async_wait": ("nan", "nan", "nan"),
    "never_waits": ("copies it never waited for",) * 3,
    "reads_unwritten": ("nan", "nan", "nan"),
    "shared_overflow": (None, "runtime error: index 64 out of bounds", None),
    "dynamic_overflow": (None, "AddressSanitizer: heap-buffer-overflow", None),
    "global_overflow": (None, "AddressSanitizer: heap-buffer-overflow", None),
    "misaligned": ("misaligned access of 16 bytes",) * 3,
    "returns_early": ("deadlock: 40 threads in __syncthreads",) * 3,
    "divergent": ("divergent __syncthreads",) * 3,
    "lane_outside_mask": ("the calling lane is not in its mask",) * 3,
    "dead_lanes": ("16 in a warp operation, 16 returned",) * 3,
    "blocks_collide": (None, None, "ThreadSanitizer: data race"),
    "cluster_no_barrier": ("nan", "nan", "ThreadSanitizer: data race"),
    "cluster_reads_the_dead": ("nan", "AddressSanitizer: use-after-poison", "ThreadSanitizer: data race"),
    "cluster_maps_the_dead": ("block 0 has returned",) * 3,
    "cluster_arrives_twice": ("a thread arrives twice",) * 3,
    "cluster_never_arrives": ("a thread waits that did not arrive",) * 3,
    "cluster_divergent": ("divergent barrier.cluster",) * 3,
    "cluster_deadlock": ("31 threads in __syncthreads, 32 in barrier.cluster", "deadlock", "deadlock"),
    "cluster_stranger": ("the cluster has no block 2",) * 3,
    "cluster_global": ("not a place in shared memory",) * 3,
    "cluster_too_large": ("clusters of 16 of 16 blocks cannot be launched",) * 3,
    "cluster_half": ("clusters of 2 of 3 blocks cannot be launched",) * 3,
    "large_shared": ("cannot be launched",) * 3,
    "first_threads_collide": (None, None, "ThreadSanitizer: data race"),
    "empty_grid": ("cannot be launched",) * 3,
    "large_block": ("cannot be launched",) * 3,
}


@pytest.mark.parametrize(
    ("name", "build", "expected"),
    [
        pytest.param(name, build, expected, id=f"{name}-{build}")
        for name, row in PLANTS.items()
        for build, expected in zip(BUILDS, row, strict=True)
        if expected is not None
    ],
)
def test_planted_bug_is_caught(name, build, expected):
    printed, reports = _run(emulated.program("plants.cpp", build), name)
    if expected == "nan":
        assert any(math.isnan(v) for v in _values(printed))
    elif build != "plain" and ("Sanitizer" in expected or "runtime" in expected):
        assert any(report.startswith(expected) for report in reports), reports
    else:
        assert printed.startswith("simt::error") and expected in printed


# ---- the real kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_are_clean(build):
    """Every launcher over small shapes on exact heap blocks, blocks concurrent: no report, nothing unwritten."""
    path = emulated.program("drive.cpp", build, emulated.kernels())
    for seed in ("0", "7") if build == "plain" else ("7",):
        printed, reports = _run(path, seed)
        assert reports == [] and re.search(r"\d+ calls, 0 failures", printed), (printed, reports[:5])


class Bug(NamedTuple):
    """A mistake planted beside the right code of a kernel; `if planted(n)` chooses at run time."""

    source: str
    right: str
    planted: str
    op: str
    build: str
    expected: str


RACE = "ThreadSanitizer: data race"
BUGS = {
    "missing-cluster-barrier": Bug(
        "group_norm_silu",
        "    cluster_arrive();\n    cluster_wait();  // every block",
        "    if (!planted(1)) { cluster_arrive(); cluster_wait(); }  // every block",
        "clusters",
        "tsan",
        RACE,
    ),
    "block-leaves-while-its-neighbour-reads": Bug(
        "group_norm_silu_bwd",
        "if (kMode == Mode::kCluster) cluster_wait();",
        "if (kMode == Mode::kCluster && !planted(2)) cluster_wait();",
        "clusters",
        "tsan",
        RACE,
    ),
    "removed-barrier": Bug(
        "conv_residual",
        "__syncthreads();  // step s has arrived",
        "if (!planted(3)) __syncthreads();  // step s has arrived",
        "conv_residual",
        "tsan",
        RACE,
    ),
    "barrier-missing-after-activation": Bug(
        "conv_residual",
        "conv.activate(block);\n        __syncthreads();",
        "conv.activate(block);\n        if (!planted(4)) __syncthreads();",
        "conv_residual",
        "tsan",
        RACE,
    ),
    "vector-load-one-too-far": Bug(
        "zero_flag",
        "if (i < packs) bits",
        "if (i < packs + planted(5)) bits",
        "zero_flag",
        "asan",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "missing-async-wait": Bug(
        "conv_residual",
        "copy_async_wait<kStages - 2>();",
        "planted(6) ? copy_async_wait<kStages>() : copy_async_wait<kStages - 2>();",
        "conv_residual",
        "plain",
        "was not written",
    ),
    "row-read-before-it-has-arrived": Bug(
        "row_norm_bwd",
        "copy_async_wait<Ahead::kAhead>();",
        "planted(21) ? copy_async_wait<Ahead::kAhead + 1>() : copy_async_wait<Ahead::kAhead>();",
        "row_norm",
        "plain",
        "was not written",
    ),
    "thread-leaves-before-barrier": Bug(
        "gate_residual",
        "  float sums[V] = {};\n",
        "  float sums[V] = {};\n  if (planted(7) && !at.active) return;\n",
        "gate_residual",
        "plain",
        "deadlock",
    ),
    "misaligned-vector-store": Bug(
        "gate_residual",
        "(p.dbranch) + i, dbranch)",
        "(p.dbranch) + i + planted(8), dbranch)",
        "gate_residual",
        "plain",
        "misaligned access of 16 bytes",
    ),
    "blocks-write-one-address": Bug(
        "gate_residual",
        "p.workspace[blockIdx.x] = sum;",
        "p.workspace[planted(9) ? 0 : blockIdx.x] = sum;",
        "gate_residual",
        "tsan",
        RACE,
    ),
    "teams-added-too-early": Bug(
        "residual_norm_bwd",
        "    __syncthreads();\n    const int64_t size",
        "    if (!planted(10)) __syncthreads();\n    const int64_t size",
        "residual_norm_modulate",
        "tsan",
        RACE,
    ),
}
PLANTED = """\
extern int planted_bug;  // of drive.cpp
static bool planted(int number) { return planted_bug == number; }
"""


def _program_with_bugs(build, folder):
    """drive.cpp with the kernels that have bugs for this build, and the others as they are: one compile for all."""
    sources = []
    for kernel in emulated.kernels():
        text, bugs = kernel.read_text(), [b for b in BUGS.values() if (b.source, b.build) == (kernel.stem, build)]
        for bug in bugs:
            assert text.count(bug.right) == 1, f"{bug.planted} no longer fits {kernel.name}"
            text = text.replace(bug.right, bug.planted)
        if bugs:
            kernel = folder / kernel.name
            kernel.write_text(PLANTED + text)
        sources.append(kernel)
    return emulated.program("drive.cpp", build, sources)


@pytest.mark.parametrize("build", BUILDS)
def test_bugs_planted_in_the_real_kernels_are_caught(build, tmp_path):
    path = _program_with_bugs(build, tmp_path)
    bugs = {name: bug for name, bug in BUGS.items() if bug.build == build}
    for op in {bug.op for bug in bugs.values()}:  # it is the bug that is seen, not the planting
        printed, reports = _run(path, "1", op)
        assert reports == [] and re.search(r"\d+ calls, 0 failures", printed), (op, printed, reports[:5])
    for name, bug in bugs.items():
        number = re.search(r"planted\((\d+)\)", bug.planted)[1]
        printed, reports = _run(path, "1", bug.op, number, env=FIRST_REPORT)
        if "Sanitizer" in bug.expected:
            assert any(report.startswith(bug.expected) for report in reports), (name, printed)
        else:
            assert bug.expected in printed, (name, printed)
