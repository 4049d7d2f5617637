"""What can run here, what cannot and why, and the facts about the machine that a result should carry.

Nothing is probed at import: triton is looked for without being imported, and CUDA is asked only when a function here is
called.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from types import ModuleType

import torch

from flmoe_fast import coalitions
from flmoe_fast.checks import ArgumentError


@dataclass(frozen=True)
class Backend:
    """One way to run some of the work.

    Attributes:
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

    def __getitem__(self, key: str | int | slice):
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


class MissingExtra(ImportError):
    """A package that an optional part needs is not installed, or too old; the message says what to install."""


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package, or raise :class:`MissingExtra` with one line on what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        package = module.partition(".")[0]
        if problem.name is not None and problem.name.partition(".")[0] != package:
            raise  # installed, but broken in its own way
        lacks = "is not installed"
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
            lacks = f"{_version(package)} has no {module}, a newer one is needed"
        raise MissingExtra(f"{package} {lacks}: pip install 'flmoe-fast[{extra}]'", name=package) from None


def backends() -> Backends:
    """Every backend with its state in this process. Asks CUDA whether there is a GPU."""
    extension, missing = coalitions.extension()
    info = extension.info() if extension is not None else {}
    gpu = _gpu()
    return Backends(
        (
            Backend("reference", True, "", "one coalition at a time, float64: what the others are checked against"),
            Backend("torch", True, "", f"batched PyTorch on {'cpu and ' + gpu if gpu else 'cpu'}"),
            _cpu_engine(),
            Backend(
                "native",
                extension is not None,
                missing,
                f"C++ for coalition words (packing, context draws), {info['compiler']}"
                if info
                else "C++ for coalition words; NumPy gives the same bits meanwhile",
            ),
            _cuda_engine(info),
            _triton_engine(),
        )
    )


def _cpu_engine() -> Backend:
    """The native CPU engine and its instruction levels; float32 games on the CPU use it unless told otherwise."""
    extension, missing = coalitions.extension()
    if extension is None:
        return Backend("cpu", False, missing, "native float32 engine; the torch engine runs instead")
    usable = [f"{name} ({arithmetic})" for name, arithmetic, lacking in extension.cpu_levels() if not lacking]
    return Backend("cpu", True, "", "native float32 engine for transformers, best level first: " + ", ".join(usable))


def _triton_engine() -> Backend:
    """The Triton engine; float32 games on an NVIDIA GPU use it unless told otherwise."""
    version = _version("triton")
    about = "fused Triton kernels for float32 games on NVIDIA GPUs (mixed, fp16x2, fp16, tf32, fp32 or bf16 products)"
    if version is None:
        return Backend("triton", False, "triton is not installed: pip install 'flmoe-fast[triton]'", about)
    about += f", triton {version}"
    if not torch.cuda.is_available():
        return Backend("triton", False, "torch finds no CUDA device", about)
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return Backend("triton", False, f"{_gpu()} has compute capability {capability}, and 8.0 is needed", about)
    return Backend("triton", True, "", f"{about}, {_gpu()}")


def _cuda_engine(info: dict) -> Backend:
    """The fused CUDA kernels; they need the Triton engine beside them."""
    about = "fused CUDA kernels for dense float32 games on NVIDIA GPUs (mixed, fp16x2 or fp16 products)"
    if not info.get("cuda"):
        why = info.get("without_cuda") or "there is no extension"
        return Backend("cuda", False, f"{why}: reinstall with nvcc on PATH and FLMOE_CUDA=on", about)
    about += f", built by nvcc {info['nvcc']} for {info['archs']}"
    beside = _triton_engine()
    return Backend("cuda", beside.available, beside.reason, about)


def environment() -> dict[str, str | int | None]:
    """What a measurement depends on: versions, processor, threads, GPU. ``None`` where there is no such thing."""
    extension, _ = coalitions.extension()
    info = extension.info() if extension is not None else {}
    return {
        "flmoe_fast": _version("flmoe-fast") or info.get("version"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "coalitions": coalitions.implementation(),
        "compiler": info.get("compiler"),
        "nvcc": info.get("nvcc") or None,
        "cuda_archs": info.get("archs") or None,
        "cpu": _cpu(),
        "cpu_levels": [name for name, _, lacking in extension.cpu_levels() if not lacking] if extension else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": _gpu(),
        "cuda": torch.version.cuda,
    }


def doctor() -> str:
    """A report for a person or a bug report: the environment and the backends."""
    facts = [(name, "none" if value is None else str(value)) for name, value in environment().items()]
    return f"{_table(facts)}\n\n{backends()!r}"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _version(distribution: str) -> str | None:
    """An installed distribution's version, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    """The current GPU's name, or None."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(torch.cuda.current_device())


def _cpu() -> str | None:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None
