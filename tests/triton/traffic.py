"""What interpreted kernels do to memory: exact bytes, 32-byte sectors, addresses out of bounds, races between programs.

`install()` once, then `with record() as traffic: launcher(...)`. Every tensor argument is known by its elements, not by
its storage, so a write into the gap of a strided view is out of bounds as well. Lanes out of bounds are reported and
left out of the access. What the caches of a GPU keep cannot be seen here; see `Launch.moved` for how it is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Container, Iterator

import numpy as np
import torch

from . import interpret
from .interpret import I

SECTOR = 32
BROADCAST = 16  # an operand at most 1/16 of the largest one is read again from cache
NOBODY, SEVERAL = -1, -2


@dataclasses.dataclass
class Count:
    """Accesses of one argument by one launch. Bytes: of lanes, distinct within an operation, of sectors, distinct."""

    operations: int = 0
    lanes: int = 0
    requested: int = 0
    sectors: int = 0
    footprint: int = 0


class Region:
    """The elements of one storage that a launch may touch, and which program did."""

    def __init__(self, base: int, itemsize: int, size: int):
        self.base, self.itemsize, self.size = base, itemsize, size
        self.owner = np.full(size, NOBODY, np.int16)  # argument by number
        self.reader, self.writer = (np.full(size, NOBODY, np.int32) for _ in range(2))
        self.touched = {"load": np.zeros(size, bool), "store": np.zeros(size, bool), "atomic": np.zeros(size, bool)}

    def add(self, number: int, t: torch.Tensor) -> None:
        """Elements that two arguments share belong to the first."""
        mine = torch.zeros(self.size, dtype=torch.bool)
        mine.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
        self.owner[mine.numpy() & (self.owner == NOBODY)] = number


class Launch:
    """One launch: counts per (argument, kind), tensor-core FLOPs, and what was wrong."""

    def __init__(self, kernel: str, named: list[tuple[str, torch.Tensor]]):
        self.kernel, self.names = kernel, [name for name, _ in named]
        self.storages = {name: t.untyped_storage().data_ptr() for name, t in named}
        self.counts: dict[tuple[str, str], Count] = defaultdict(Count)
        self.problems: list[str] = []
        self.dot_flops = 0
        self.regions: dict[tuple[int, int], Region] = {}
        for number, (_, t) in enumerate(named):
            base, itemsize = t.untyped_storage().data_ptr(), t.element_size()
            size = t.untyped_storage().nbytes() // itemsize
            if t.numel():
                self.regions.setdefault((base, itemsize), Region(base, itemsize, size)).add(number, t)

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int, program: int) -> np.ndarray:
        """Counts one operation; returns the mask without the lanes that are out of bounds."""
        pointers, mask = np.broadcast_arrays(pointers, mask.astype(bool))
        lanes = pointers[mask]
        known = np.zeros(lanes.size, bool)
        for region in self.regions.values():
            if region.itemsize != itemsize or not lanes.size:
                continue
            offset = (lanes - np.uint64(region.base)).view(np.int64)
            if offset.max() < 0 or offset.min() >= region.size * itemsize:
                continue
            index = offset // itemsize
            inside = (index >= 0) & (index < region.size) & (offset % itemsize == 0)
            inside[inside] = region.owner[index[inside]] != NOBODY
            if inside.any():
                known |= inside
                self._count(region, kind, index if inside.all() else index[inside], program)
        if not known.all():
            lost = known.size - np.count_nonzero(known)
            self.problems.append(f"{self.kernel}: program {program}: {kind} out of bounds by {lost} lanes")
        allowed = np.zeros(mask.shape, bool)
        allowed[mask] = known
        return allowed

    def _count(self, region: Region, kind: str, index: np.ndarray, program: int) -> None:
        ascending = bool((index[1:] > index[:-1]).all())  # as tiles mostly are; sorting is what would take long
        distinct = index if ascending else np.unique(index)
        owners = region.owner[distinct]
        lanes = np.bincount(region.owner[index], minlength=len(self.names))
        for number in np.flatnonzero(lanes):
            mine = distinct[owners == number]
            count = self.counts[self.names[number], kind]
            count.operations += 1
            count.lanes += int(lanes[number]) * region.itemsize
            count.requested += mine.size * region.itemsize
            sector = (region.base + mine * region.itemsize) // SECTOR
            count.sectors += (1 + np.count_nonzero(sector[1:] != sector[:-1])) * SECTOR
            count.footprint += int((~region.touched[kind][mine]).sum()) * region.itemsize
        region.touched[kind][distinct] = True
        if kind == "atomic":
            return
        if kind == "store" and distinct.size != index.size:
            self._problem(program, f"{index.size - distinct.size} elements stored twice by one operation")
        writer = region.writer[distinct]
        if ((writer != NOBODY) & (writer != program)).any():
            self._problem(program, f"{kind} of elements that another program stored")
        reader = region.reader[distinct]
        if kind == "store":
            if ((reader != NOBODY) & (reader != program)).any():
                self._problem(program, "store of elements that another program loaded")
            region.writer[distinct] = program
        else:
            region.reader[distinct] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)

    def _problem(self, program: int, what: str) -> None:
        self.problems.append(f"{self.kernel}: program {program}: {what}")

    def moved(self, storages: Container[int] | None = None) -> int:
        """Bytes to and from DRAM: every request of a streamed operand; operands that stay in a cache once.

        Taken to stay: those at most 1/BROADCAST of the launch's largest operand (rows of weights, modulation,
        statistics), and the operands of a product, whose tiles neighbouring programs read at about the same time.
        storages: only arguments that live there.
        """
        largest = max((c.footprint for c in self.counts.values()), default=0)

        def is_streamed(kind: str, count: Count) -> bool:
            return not (self.dot_flops and kind == "load") and count.footprint * BROADCAST > largest

        return sum(
            c.requested if is_streamed(kind, c) else c.footprint
            for (name, kind), c in self.counts.items()
            if storages is None or self.storages[name] in storages
        )


class Traffic:
    """The launches of a `record` block."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    @property
    def problems(self) -> list[str]:
        return [problem for launch in self.launches for problem in launch.problems]

    @property
    def dot_flops(self) -> int:
        return sum(launch.dot_flops for launch in self.launches)

    def total(self, field: str) -> int:
        return sum(getattr(c, field) for launch in self.launches for c in launch.counts.values())

    def moved(self, storages: Container[int] | None = None) -> int:
        return sum(launch.moved(storages) for launch in self.launches)


_recording: Traffic | None = None
_stock_arguments = I.GridExecutor._init_args_hst


class Builder(interpret.Builder):
    """The repaired interpreter, which also counts."""

    def _access(self, kind: str, pointers, mask):
        if _recording is None:
            return mask
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        nx, ny, nz = self.grid_dim
        x, y, z = self.grid_idx
        allowed = _recording.launches[-1].access(kind, pointers.data, mask.data, itemsize, (x * ny + y) * nz + z)
        return I.TensorHandle(allowed, mask.dtype)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        mask = self._access("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        return super().create_masked_store(
            ptrs, value, self._access("store", ptrs, mask), cache_modifier, eviction_policy
        )

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        return super().create_atomic_rmw(op, ptr, val, self._access("atomic", ptr, mask), sem, scope)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if _recording is not None:
            _recording.launches[-1].dot_flops += 2 * a.data.shape[-1] * d.data.size
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)


def _tensors(name: str, value) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
    elif isinstance(value, torch.Tensor):
        yield name, value


def _arguments(self, args, kwargs):
    args_host, kwargs_host = _stock_arguments(self, args, kwargs)
    if _recording is not None:
        pairs = [*zip(self.arg_names, args_host, strict=False), *kwargs_host.items()]
        named = [found for name, value in pairs for found in _tensors(name, value)]
        _recording.launches.append(Launch(self.fn.__name__, named))
    return args_host, kwargs_host


def install() -> None:
    interpret.install(Builder)
    I.GridExecutor._init_args_hst = _arguments


@contextlib.contextmanager
def record() -> Iterator[Traffic]:
    """Counts what the launches of the block do to memory."""
    global _recording
    _recording = traffic = Traffic()
    try:
        yield traffic
    finally:
        _recording = None
