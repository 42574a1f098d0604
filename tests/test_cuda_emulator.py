"""The emulator and its three builds: what each must catch, planted in small kernels and in the real ones."""

import math
import re

import pytest

from .simt import emulated

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
BUILDS = tuple(emulated.BUILDS)
QUIET = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=0"}


def _run(path, *arguments):
    """(what it printed, the sanitizer's reports)"""
    done = emulated.run(str(path), *arguments, env=QUIET)
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


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_are_clean(build):
    """Every launcher over small shapes on exact heap blocks, blocks concurrent: no report, nothing unwritten."""
    path = emulated.program("drive.cpp", build, kernels=emulated.kernels())
    for seed in ("0", "7") if build == "plain" else ("7",):
        printed, reports = _run(path, seed)
        assert reports == [] and re.search(r"\d+ calls, 0 failures", printed), (printed, reports[:5])


# source, what is replaced by what, the build that must notice, and how.
MUTATIONS = {
    "missing-cluster-barrier": (
        "group_norm_silu", "    cluster_arrive();\n    cluster_wait();  // every block", "    // every block", "tsan",
        "ThreadSanitizer: data race",
    ),
    "block-leaves-while-its-neighbour-reads": (
        "group_norm_silu_bwd", "if (kMode == Mode::kCluster) cluster_wait();", "", "tsan",
        "ThreadSanitizer: data race",
    ),
    "removed-barrier": (
        "conv_residual", "      __syncthreads();  // step s has arrived", "      // step s has arrived", "tsan",
        "ThreadSanitizer: data race",
    ),
    "barrier-missing-after-activation": (
        "conv_residual", "conv.activate(block);\n        __syncthreads();", "conv.activate(block);", "tsan",
        "ThreadSanitizer: data race",
    ),
    "vector-load-one-too-far": (
        "zero_flag", "if (i < packs) bits", "if (i <= packs) bits", "asan", "AddressSanitizer: heap-buffer-overflow",
    ),
    "missing-async-wait": (
        "conv_residual", "copy_async_wait<kStages - 2>();", "copy_async_wait<kStages>();", "plain", "was not written",
    ),
    "thread-leaves-before-barrier": (
        "gate_residual", "  float sums[V] = {};\n", "  float sums[V] = {};\n  if (!at.active) return;\n", "plain",
        "deadlock",
    ),
    "misaligned-vector-store": (
        "gate_residual", "(p.dbranch) + i, dbranch)", "(p.dbranch) + i + 1, dbranch)", "plain",
        "misaligned access of 16 bytes",
    ),
    "blocks-write-one-address": (
        "gate_residual", "p.workspace[blockIdx.x] = sum;", "p.workspace[0] = sum;", "tsan",
        "ThreadSanitizer: data race",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_bug_planted_in_a_real_kernel_is_caught(name, tmp_path):
    source, old, new, build, expected = MUTATIONS[name]
    text = (emulated.CSRC / f"cuda/{source}.cu").read_text()
    assert text.count(old) == 1, f"the planted bug no longer fits {source}.cu"
    changed = tmp_path / f"{source}.cu"
    changed.write_text(text.replace(old, new))
    op = source.removesuffix("_bwd")
    linked = [k for k in emulated.kernels() if k.stem.startswith(op) and k.stem != source]
    macros = [f"-DZB_DRIVE_ONLY=ZB_OP_{'clusters' if op == 'group_norm_silu' else op}"]
    path = emulated.program("drive.cpp", build, macros, [changed, *linked], plant=changed.read_text())
    printed, reports = _run(path)
    if "Sanitizer" in expected:
        assert any(report.startswith(expected) for report in reports), printed
    else:
        assert expected in printed, printed
