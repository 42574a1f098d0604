"""Words that are zero before and after every kernel on their stream: programs count in them how many are done, and the
last one leaves zeros. So a kernel whose last program sums up needs no second launch, nor one that clears.

Launches on one stream follow each other, and share the words; a CUDA graph has its own, cleared by a node of it, since
its replays may run beside anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch import capturing, stream_of

WORDS = 64  # int64

_words: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    if device.type == "meta":
        return torch.empty(WORDS, dtype=torch.int64, device=device)
    if capturing(device):
        return torch.zeros(WORDS, dtype=torch.int64, device=device)
    key = device, stream_of(device)
    found = _words.get(key)
    if found is None:
        with torch.inference_mode(False):
            _words[key] = found = torch.zeros(WORDS, dtype=torch.int64, device=device)
    return found
