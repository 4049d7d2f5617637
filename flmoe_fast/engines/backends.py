"""What can run here, what cannot and why: every backend as its engines themselves see this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines import choose
from flmoe_fast.engines.engine import Request
from flmoe_fast.engines.levels import levels
from flmoe_fast.environment import environment, gpu, version
from flmoe_fast.native import extension


@dataclass(frozen=True)
class Backend:
    """One way to run some of the work.

    Attributes
    ----------
        name: ``reference``, ``torch``, ``cpu``, ``native``, ``cuda`` or ``triton``.
        available: whether it can be used in this process.
        reason: one line: what is missing, empty when nothing is.
        details: one line: what it does, or what it was built with.
    """

    name: str
    available: bool
    reason: str
    details: str


class Backends(tuple[Backend, ...]):
    """All backends; ``backends()["torch"]`` is one of them, and printing shows a table."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        """The backend of that name; an index or a slice works as in any tuple."""
        if not isinstance(key, str):
            return super().__getitem__(key)
        for backend in self:
            if backend.name == key:
                return backend
        raise ArgumentError("backend", repr(key), "one of " + ", ".join(repr(backend.name) for backend in self))

    def __repr__(self) -> str:
        rows = [("backend", "available", "")]
        rows += [
            (b.name, "yes" if b.available else "no", b.details if b.available else f"{b.reason} ({b.details})")
            for b in self
        ]
        return _table(rows)


def backends() -> Backends:
    """Every backend with its state in this process. Asks CUDA whether there is a GPU."""
    native, missing = extension()
    info = native.info() if native is not None else {}
    usable = [f"{name} ({arithmetic})" for name, (arithmetic, lacking) in levels().items() if not lacking]
    cpu = "native float32 engine for transformers" + (", best level first: " + ", ".join(usable) if usable else "")
    triton = "fused Triton kernels for float32 games on NVIDIA GPUs (mixed, fp16x2, fp16, tf32, fp32 or bf16 products)"
    triton += f", triton {version('triton')}" if version("triton") else ""
    cuda = "fused CUDA kernels for dense float32 games on NVIDIA GPUs (mixed, fp16x2 or fp16 products)"
    if info.get("cuda"):
        cuda += f", built by nvcc {info['nvcc']} for {info['archs']}"
    words = "C++ for coalition words (packing, context draws)"
    words += f", {info['compiler']}" if info else "; NumPy gives the same bits meanwhile"
    here = gpu()
    return Backends(
        (
            _backend("reference", "one coalition at a time, float64: what the others are checked against"),
            _backend("torch", f"batched PyTorch on {'cpu and ' + here if here else 'cpu'}"),
            _backend("cpu", cpu),
            Backend("native", native is not None, missing, words),
            _backend("cuda", cuda),
            _backend("triton", f"{triton}, {here}" if here else triton),
        )
    )


def _backend(name: str, details: str) -> Backend:
    """A backend as its engine sees this machine, for games in float32."""
    device = torch.device("cuda" if name in choose.ON_GPU else "cpu")
    reason = choose.why_not(Request(torch.float32, device, backend=name))
    return Backend(name, not reason, reason, details)


def doctor() -> str:
    """A report for a person or a bug report: the environment and the backends."""
    facts = [(name, "none" if value is None else str(value)) for name, value in environment().items()]
    return f"{_table(facts)}\n\n{backends()!r}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
