"""Which argument each global access of a compiled kernel belongs to, and how many bytes a thread moves at once: from
PTX, or from the LLVM IR that AMD's assembly is made from."""

from __future__ import annotations

import collections
import re

_BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "b32": 4, "u32": 4, "f32": 4, "b64": 8, "u64": 8, "f64": 8}
_ACCESS = re.compile(r"(?:ld|st)\.global([\w.:]*)")
_REGISTER = re.compile(r"%rd\d+")


def _lines(ptx: str) -> list[str]:
    return [re.sub(r"^@!?%p\d+\s+", "", line.strip()) for line in ptx.splitlines()]


def pointers(lines: list[str]) -> dict[str, set[int]]:
    """{64-bit register: numbers of the pointer parameters its value is computed from}"""
    parameters = {int(n) for line in lines for n in re.findall(r"\.param \.u64 \.ptr.*_param_(\d+)", line)}
    flows = []
    known: dict[str, set[int]] = collections.defaultdict(set)
    for line in lines:
        loaded = re.match(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]", line)
        if loaded:
            known[loaded[1]] |= {int(loaded[2])} & parameters
        elif not line.startswith(("ld.", "st.", "cp.", "setp")) and (registers := _REGISTER.findall(line)):
            flows.append((registers[0], registers[1:]))
    return _spread(known, flows)


def _spread(known: dict[str, set[int]], flows: list[tuple[str, list[str]]]) -> dict[str, set[int]]:
    """What sources are known to come from, their targets come from; loops carry addresses around."""
    changed = True
    while changed:
        changed = False
        for target, sources in flows:
            found = set().union(*(known[source] for source in sources)) if sources else set()
            if not found <= known[target]:
                known[target] |= found
                changed = True
    return known


def accesses(ptx: str) -> collections.Counter:
    """{(parameter, bytes at once): instructions}; an address chosen among several parameters counts for each."""
    lines = _lines(ptx)
    known, found = pointers(lines), collections.Counter()
    for line in lines:
        if line.startswith(("cp.async.cg", "cp.async.ca")):
            width = int(re.search(r"\], (0x[0-9a-f]+|\d+)", line)[1], 0)
        elif match := _ACCESS.match(line):
            parts = re.split(r"[.:]+", match[1])
            lanes = next((int(part[1]) for part in parts if re.fullmatch(r"v\d", part)), 1)
            width = lanes * next(_BYTES[part] for part in parts if part in _BYTES)
        else:
            continue
        for register in re.findall(r"\[\s*(%rd\d+)", line):
            for parameter in known[register]:
                found[parameter, width] += 1
    return found


_GLOBAL = "ptr addrspace(1) "
_BITS = {"float": 32, "double": 64, "half": 16, "bfloat": 16}
_TYPE = r"(?:<(\d+) x )?(i\d+|float|double|half|bfloat)>?"
_BUFFER = re.compile(r"\.buffer\.(?:load|store)\.(?:v(\d+))?(i\d+|f\d+|bf16)\(.*?ptr addrspace\(8\) (%[\w.]+)")
_LOAD, _STORE = re.compile(rf"load {_TYPE}, (ptr.*)"), re.compile(rf"store {_TYPE} (?:<.*>|\S+), (ptr.*)")


def llvm_accesses(ir: str) -> collections.Counter:
    """The same of a kernel in LLVM IR."""
    lines = [line.strip() for line in ir.splitlines()]
    known, flows = collections.defaultdict(set), []
    (header,) = (line for line in lines if line.startswith("define amdgpu_kernel"))
    for number, argument in enumerate(header.split("(", 1)[1].split(", ")):
        if argument.startswith(_GLOBAL):
            known[re.findall(r"%[\w.]+", argument)[0]] = {number}
    for line in lines:
        target, _, value = line.partition(" = ")
        if _GLOBAL in value and (value.startswith(("getelementptr", "phi", "select")) or ".buffer.rsrc." in value):
            flows.append((target, re.findall(r"%[\w.]+", value)))
    _spread(known, flows)
    found: collections.Counter = collections.Counter()
    for line in lines:
        if match := _BUFFER.search(line):
            address = match[3]
        elif (match := _LOAD.search(line) or _STORE.match(line)) and match[3].startswith(_GLOBAL):
            address = match[3][len(_GLOBAL) :].split(",")[0]
        else:
            continue
        bits = _BITS.get(match[2]) or int(re.sub(r"\D", "", match[2]))
        for parameter in known[address]:
            found[parameter, int(match[1] or 1) * bits // 8] += 1
    return found
