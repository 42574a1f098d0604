"""Which channels-last group norms the CUDA kernels read once and Triton's twice: for the fixed rule.

A group's rows of pixels are too short to be read alone, and of several groups a large image is more than a program of
Triton's holds: it takes two passes. On GPUs that have clusters, one of eight blocks holds eight times what a block
does.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..._layout import pointwise_format
from .. import available

if available.triton() is not None:
    from ..triton import splits

CLUSTER, LEAST_BLOCKS, LEAST_ROW, THREADS = 8, 64, 32, 512  # csrc/cuda/group_norm_tile.cuh, common.cuh


@functools.lru_cache
def cluster_shared(device: torch.device) -> int:
    """Bytes of shared memory of a block that may be one of a cluster, 0 where there are no clusters."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    found = torch.cuda.get_device_properties(device)
    return found.shared_memory_per_multiprocessor - 1024 if found.major >= 9 else 0


@functools.lru_cache
def a_cluster_holds(N: int, C: int, pixels: int, num_groups: int, size: int, tensors: int, shared: int) -> bool:
    """Whether clusters of eight blocks, the largest, hold the channels-last `tensors` that a pass reads and fill a
    GPU."""
    pack, channels = 16 // size, C // num_groups
    if C % pack:
        return False

    def fits(groups: int) -> bool:
        return num_groups % groups == 0 and groups * channels % pack == 0 and groups * channels * size >= LEAST_ROW

    slab = channels * next((groups for groups in range(1, num_groups) if fits(groups)), num_groups)
    sums = 4 * (6 * slab + max(2 * slab, 2 * (THREADS // min(THREADS, slab // pack)) * slab) + 4)
    tiles = slab * -(-pixels // CLUSTER) * size * tensors
    return sums + tiles <= shared and N * (C // slab) * CLUSTER >= LEAST_BLOCKS


def prefers_cuda(x: Tensor, num_groups: int, backward: bool) -> bool:
    """Whether the CUDA kernels read x once (in backward dy, too) where Triton's read it twice."""
    shared = cluster_shared(x.device)
    if shared == 0 or x.is_contiguous() or pointwise_format(x) is None:
        return False
    N, C, pixels = x.shape[0], x.shape[1], x.shape[2:].numel()
    sizes = N, C, pixels, num_groups, x.element_size()
    return splits(*sizes, backward) and a_cluster_holds(*sizes, 1 + backward, shared)
