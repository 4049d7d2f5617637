"""Scratch memory of a chunk: one buffer in which every array that a step writes has its place by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

#: Byte boundary of every array.
ALIGNMENT = 256


class Array(NamedTuple):
    """An array that some step writes."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


class Layout:
    """Places of arrays in a buffer; one name is one place, as large as the largest array that goes by it.

    Attributes
    ----------
    starts : dict of int
        First byte of every name.
    bytes : int
        Of all arrays together, each on a boundary of :data:`ALIGNMENT`.
    """

    def __init__(self, writes: Iterable[Mapping[str, Array]]):
        largest: dict[str, int] = {}
        for arrays in writes:
            for name, array in arrays.items():
                largest[name] = max(largest.get(name, 0), array.bytes)
        self.starts: dict[str, int] = {}
        self.bytes = 0
        for name, size in largest.items():
            self.starts[name] = self.bytes
            self.bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def view(self, workspace: torch.Tensor, name: str, array: Array) -> torch.Tensor:
        """The array that goes by ``name``, in a buffer of uint8."""
        start = self.starts[name]
        return workspace[start : start + array.bytes].view(array.dtype).view(array.shape)
