"""Memory that an engine uses again for the next chunk, apart for every thread that calls it.

Fresh pages cost more than the arithmetic of an elementwise operation on them, so engines keep what they compute in. One
engine may be called by any number of threads at a time: each finds its own tensors here, and what a thread kept is
freed when it ends.
"""

from __future__ import annotations

import math
import threading

import torch


class Scratch(threading.local):
    """Tensors by name whose memory is used again. A copy, or what comes back from a pickle, starts empty."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()

    def tensor(
        self, name: str, *shape: int, dtype: torch.dtype = torch.uint8, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """An uninitialised tensor of that shape; what this thread asked for under the name before is overwritten."""
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != dtype:
            self._kept.pop(name, None)  # never both at once
            kept = self._kept[name] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)
