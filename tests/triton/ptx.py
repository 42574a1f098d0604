"""Which argument each global access of a PTX kernel belongs to, and how many bytes a thread moves at once."""

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
    changed = True
    while changed:  # loops carry addresses around
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
