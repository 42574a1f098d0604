"""The shipped kernels compile for every target without spills, and the gates that say so can fail.

Everything that compiles runs in another process: this one interprets.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from ..support import HANG, ROOT  # noqa: E402
from . import ptx, static  # noqa: E402

GOOD = {
    "case": "c",
    "kernel": "k",
    "target": "sm_90",
    "registers": 64,
    "spills": 0,
    "shared": 1024,
    "warps": 8,
    "blocks": 4,
    "wide": 100,
    "tensor": 8,
}


# In which layouts of the U-Net stages a program holds its groups, where that is not the contiguous one alone.
HELD = {
    "group_norm_silu": {"1280x16": {"nchw", "nhwc"}, "1280x8": {"nchw", "nhwc"}},
    "group_norm_silu_bwd": {"320x64": set(), "1280x8": {"nchw", "nhwc"}},
}


def compiling(*arguments: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=HANG, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)}
    )


def test_committed_table_holds():
    """Every row passes its gates, no kernel is missing, and rows compiled again come out the same."""
    done = compiling("-m", "tests.triton.static", "--check", "6", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " kernels, 0 problems" in done.stdout


def test_table_has_every_target_and_kernel():
    rows = static.read().values()
    assert {row["target"] for row in rows} == set(static.TARGETS)
    kernels = set(static.KERNELS) - {"_reduce"} | {"sum_partials"}
    for target in static.TARGETS:
        cases = {row["case"] for row in rows if row["target"] == target}
        assert {kernel for kernel in kernels if any(case.startswith(f"{kernel}-") for case in cases)} == kernels
        one_read = {row["case"] for row in rows if row["target"] == target and row["kernel"] == "_one_read"}
        for shape in ("320x64", "640x32", "1280x16", "1280x8"):  # kernels of one name in two files are two
            for op in ("group_norm_silu", "group_norm_silu_bwd"):
                layouts = {case[-4:] for case in one_read if case.startswith(f"{op}-{shape}-bfloat16-")}
                assert layouts == HELD[op].get(shape, {"nchw"}), (op, shape, target)


def test_group_norms_are_short_programs():
    """Compile time grows with the instructions: a second or less for 4000 of them, 20 for 9000 (counted, not timed)."""
    rows = [
        row for row in static.read().values() if row["case"].startswith(("group_norm_silu-", "group_norm_silu_bwd-"))
    ]
    assert rows and max(int(row["instructions"]) for row in rows if row["target"].startswith("sm_")) <= 4000


def test_two_programs_of_the_largest_convolution_are_resident():
    """Where 128 registers allow it without spills: on sm_90, in half precision."""
    rows = [row for row in static.read().values() if row["kernel"] == "_conv_residual" and row["target"] == "sm_90"]
    large = [row for row in rows if re.match(r"conv_residual-[13]x[13]-128x128-(bf|fp)16", row["case"])]
    assert len(large) == 4
    assert all(int(row["registers"]) <= 128 and int(row["blocks"]) == 2 for row in large), large


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 8}, "8 bytes spilled"),
        ({"shared": 232449}, "bytes of shared memory"),
        ({"target": "sm_120", "shared": 102400}, "a block may have 101376"),
        ({"blocks": 0}, "not one block fits"),
        ({"warps": 33}, "1056 threads, a block may have 1024"),
        ({"target": "gfx942", "warps": 17}, "1088 threads"),
        ({"wide": 94}, "only 94 % of the streamed bytes"),
        ({"tensor": 0}, "no tensor-core instruction"),
    ],
)
def test_gates_fail(change, message):
    assert static.problems(GOOD, True, True) == []
    (problem,) = static.problems(GOOD | change, True, True)
    assert message in problem


def test_products_may_be_narrower_on_amd():
    amd = GOOD | {"target": "gfx942", "wide": 60}
    assert static.problems(amd, True, True) == []
    assert "only 59 %" in static.problems(amd | {"wide": 59}, True, True)[0]
    assert "only 60 %" in static.problems(amd, True, False)[0]


def test_warps_of_64_threads_are_half_as_many():
    """But those of products, where each drives a matrix core."""
    from zeroblock.kernels._launch import Launch

    options = {"num_warps": 8, "num_stages": 1}
    plain, product = Launch(None, (1,), {}, options), Launch(None, (1,), {"PRECISION": "ieee"}, options)
    assert plain.options_for(32) == product.options_for(64) == options
    assert plain.options_for(64) == options | {"num_warps": 4}
    assert Launch(None, (1,), {}, options | {"num_warps": 1}).options_for(64)["num_warps"] == 1


FULLEST = """
from tests.triton import static
found = static.launches()
chosen = {static.configuration(launch): launch for _, launch in static.fullest(found)}
assert set(chosen) == {static.configuration(launch) for _, launch in found}
for _, launch in found:
    assert len(static.parameters(chosen[static.configuration(launch)])) >= len(static.parameters(launch))
print(len(chosen) < len(found))
"""


def test_fullest_specialisation_stands_for_its_configuration():
    """One launch of each configuration, the one with the most operands."""
    done = compiling("-c", FULLEST)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


def test_occupancy_is_that_of_the_vendor_calculator():
    """Values of cuda_occupancy.h for the same resources."""
    assert static.occupancy("sm_80", 8, 178, 0) == 1
    assert static.occupancy("sm_90", 8, 108, 98304) == 2
    assert static.occupancy("sm_90", 4, 32, 0) == 16 and static.occupancy("sm_80", 1, 16, 0) == 32
    assert static.occupancy("sm_120", 4, 32, 0) == 12
    assert static.occupancy("sm_120", 4, 32, 101376) == 1 and static.occupancy("gfx942", 4, 128, 32768) == 2


PTX = """
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u64 k_param_1,
    .param .u64 .ptr .global .align 1 k_param_2
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    ld.param.b64 %rd3, [k_param_2];
    add.s64 %rd4, %rd1, %rd2;
    mov.b64 %rd5, %rd6;
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 0 ];
    @%p2 ld.global.L1::evict_last.b16 { %rs1 }, [ %rd5 + 4 ];
    add.s64 %rd6, %rd4, 16;
    @!%p3 st.global.v2.b64 [ %rd3 + 0 ], { %rd8, %rd9 };
    cp.async.cg.shared.global [ %r7 + 0 ], [ %rd6 + 0 ], 0x10, %r8;
    cp.async.ca.shared.global [ %r7 + 0 ], [ %rd6 + 0 ], 0x4, %r8;
"""


def test_accesses_are_traced_to_their_argument():
    """Through sums, moves and a loop; the stored values are no addresses."""
    assert ptx.accesses(PTX) == {(0, 16): 2, (0, 2): 1, (0, 4): 1, (2, 16): 1}


LLVM = """
define amdgpu_kernel void @k(ptr addrspace(1) inreg %0, i32 inreg %1, ptr addrspace(1) inreg captures(none) %2) {
  %4 = getelementptr bfloat, ptr addrspace(1) %0, i64 %3
  %5 = phi ptr addrspace(1) [ %4, %a ], [ %8, %b ]
  %6 = load <8 x bfloat>, ptr addrspace(1) %5, align 16, !dbg !1
  %7 = load <4 x float>, ptr addrspace(3) @shared, align 16
  %8 = getelementptr i8, ptr addrspace(1) %5, i64 64
  %9 = tail call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %2, i16 0, i64 2147483646, i32 1)
  %10 = tail call <2 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v2i32(ptr addrspace(8) %9, i32 %1, i32 0, i32 0)
  tail call void @llvm.amdgcn.raw.ptr.buffer.store.i16(i16 %3, ptr addrspace(8) %9, i32 %1, i32 0, i32 0)
  store <1 x i32> %11, ptr addrspace(1) %2, align 4
"""


def test_accesses_of_amd_kernels_are_traced_to_their_argument():
    """Through a loop and a buffer; shared memory is not counted."""
    assert ptx.llvm_accesses(LLVM) == {(0, 16): 1, (2, 8): 1, (2, 2): 1, (2, 4): 1}


def test_sample_moves_through_the_table(monkeypatch):
    class Today:
        day = 0

        def today(self):
            return self

        def toordinal(self):
            return self.day

    today, keys, seen = Today(), [f"{i:02}" for i in range(11)], set()
    monkeypatch.setattr(static.datetime, "date", today)
    for today.day in range(4):
        seen |= set(static.sample(keys, 3))
    assert seen == set(keys) and len(static.sample(keys, 20)) == 11


PLANTED = """
import torch, triton, triton.language as tl
from tests.triton import static
from zeroblock.kernels._launch import Launch

@triton.jit
def copy(x, y, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i * STEP, tl.load(x + i * STEP, mask=i < n), mask=i < n)

@triton.jit
def outer(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i[:, None] * BLOCK + i[None, :]).to(tl.float32)
    for k in range(0, 4):
        a = a * tl.sum(a, 0)[None, :] + tl.sum(a, 1)[:, None]
    tl.store(y + i[:, None] * BLOCK + i[None, :], a)

def problems(kernel, warps, **arguments):
    x = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta")
    launch = Launch(kernel, (1,), {"x": x, "y": x, **arguments}, {"num_warps": warps, "num_stages": 1})
    for target in ("sm_90", "sm_100"):
        row = {"case": "planted", "kernel": kernel.__name__, "target": target, **static.compile_facts(launch, target)}
        print(target, kernel.__name__, arguments, static.problems(row, True, False))

problems(copy, 4, n=1 << 20, STEP=1, BLOCK=2048)
problems(copy, 4, n=1 << 20, STEP=3, BLOCK=2048)
problems(copy, 4, n=1 << 20 | 1, STEP=1, BLOCK=2048)
problems(outer, 1, BLOCK=128)
"""


def test_planted_kernels_are_caught(tmp_path):
    """Strided and unaligned accesses are narrow; a tile of 512 registers per thread spills."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    done = compiling(str(script))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    for line in lines[:2]:
        assert line.endswith("[]"), line
    for line in lines[2:6]:
        assert "only 0 % of the streamed bytes in 16-byte accesses" in line, line
    for line in lines[6:]:
        assert "bytes spilled" in line, line


def test_nothing_is_compiled_in_an_interpreting_process():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.triton.static", "--check", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=HANG)
    assert done.returncode and "nothing can be compiled" in done.stderr


def test_every_kernel_file_is_in_the_table():
    """A new file with COMPILE_CASES must be named in static.KERNELS."""
    folder = Path(importlib.util.find_spec("zeroblock.kernels._launch").origin).parent
    files = {path.stem for path in folder.glob("*.py") if "\nCOMPILE_CASES" in path.read_text()}
    assert files == set(static.KERNELS)
