"""Facts about the machine that a result should carry, and optional packages.

Nothing is probed at import: triton is looked for without being imported, and CUDA is asked only when a function here is
called.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
from types import ModuleType

import torch

from flmoe_fast import coalitions
from flmoe_fast.native import extension


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
            lacks = f"{version(package)} has no {module}, a newer one is needed"
        raise MissingExtra(f"{package} {lacks}: pip install 'flmoe-fast[{extra}]'", name=package) from None


def environment() -> dict[str, str | int | list[str] | None]:
    """What a measurement depends on: versions, processor, threads, GPU. ``None`` where there is no such thing."""
    native, _ = extension()
    info = native.info() if native is not None else {}
    return {
        "flmoe_fast": version("flmoe-fast") or info.get("version"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "triton": version("triton"),
        "transformers": version("transformers"),
        "coalitions": coalitions.implementation(),
        "compiler": info.get("compiler"),
        "nvcc": info.get("nvcc") or None,
        "cuda_archs": info.get("archs") or None,
        "cpu": _cpu(),
        "cpu_levels": [name for name, _, lacking in native.cpu_levels() if not lacking] if native else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu(),
        "cuda": torch.version.cuda,
    }


def version(distribution: str) -> str | None:
    """An installed distribution's version, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> str | None:
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
