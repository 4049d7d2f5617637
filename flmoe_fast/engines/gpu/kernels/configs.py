"""Tile sizes of the kernels: from the file of the device, else of its architecture, else an analytic default.

Files are ``configs/<arch>.json``, with one entry per kernel and precision. They are looked up by kernel, precision
and head width only, never by a length, and nothing searches here: ``python -m bench.tune`` does, and writes such a
file.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"
#: Kernels with entries, in the order in which a chunk launches them.
KERNELS = ("context", "first", "project", "up", "down", "qkv", "later", "project_last", "up_last")
#: The same of sparse feed-forward blocks.
SPARSE_KERNELS = ("sparse_up", "sparse_down")
#: Precisions that take the tiles of another one.
TILES = {"mixed": "fp16x2"}
#: Bytes of shared memory that one program may use.
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


@dataclass(frozen=True)
class Config:
    """``rows`` by ``columns`` of output a program makes, ``inner`` of the sum at a time (keys are ``columns``)."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def device_name(name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def arch_of(name: str, capability: tuple[int, int]) -> str:
    """The name under which configurations of a device are kept: its own if there is a file, else its architecture."""
    own = device_name(name)
    return own if (FOLDER / f"{own}.json").exists() else f"sm_{capability[0]}{capability[1]}"


def shipped() -> tuple[str, ...]:
    """Architectures and devices that have a file."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def entry(kernel: str, precision: str, depth: int = 0) -> str:
    """The key of a configuration; attention depends on the head width, nothing else on any size."""
    return f"{kernel}/{precision}" + (f"/d{depth}" if depth else "")


@functools.cache
def find(kernel: str, precision: str, arch: str, depth: int = 0) -> Config:
    """Configuration of ``kernel`` on ``arch``: its own file, the nearest older architecture's, or the default.

    An older architecture with more shared memory than the device has is no help.
    """
    precision = TILES.get(precision, precision)
    architecture = int(arch[3:]) if re.fullmatch(r"sm_\d+", arch) else 0
    older = sorted((int(n[3:]) for n in shipped() if re.fullmatch(r"sm_\d+", n)), reverse=True)
    shared = SHARED_BYTES.get(architecture, min(SHARED_BYTES.values()))
    fitting = [number for number in older if number <= architecture and SHARED_BYTES[number] <= shared]
    for name in (arch, *(f"sm_{number}" for number in fitting)):
        found = _file(name).get(entry(kernel, precision, depth))
        if found:
            return Config(**found)
    return default(kernel, precision, depth)


def default(kernel: str, precision: str, depth: int = 0) -> Config:
    """What fits registers and shared memory of every supported device by construction, with some room."""
    if kernel in ("context", "first", "later"):
        # Query, sums and one block of scores stay in registers: small tiles for wide heads, and for fp32 without tensor
        # cores, whose operands are in registers too.
        if depth > 128:
            return Config(32, 16, 0, 8, 2)
        if precision == "fp32" and depth > 32:
            return Config(32, 32 if depth <= 64 else 16, 0, 4 if depth <= 64 else 8, 2)
        single = precision in ("fp16", "bf16")
        if depth > 64:
            return Config(64, 16 if precision == "fp16x2" else 32, 0, 4 if single else 8, 2)
        if precision == "fp16x2":
            return Config(128, 32, 0, 8, 2)
        return Config(64, 64 if single and depth <= 32 else 32, 0, 4, 2)
    if kernel in ("mean_features", "gate"):
        return Config(16, 0, {"mean_features": 16, "gate": 32}[kernel], 4, 2)
    if kernel == "head":
        return Config(32, 0, 32, 4, 2)
    if kernel == "choose":
        return Config(64, 0, 16, 4, 2)
    if kernel in ("scan", "place"):
        return Config({"scan": 1024, "place": 128}[kernel], 0, 0, 4, 1)
    if kernel in ("combine", "pool"):
        return Config({"combine": 16, "pool": 32}[kernel], {"combine": 0, "pool": 128}[kernel], 0, 4, 1)
    if kernel == "corners":
        return Config(128, 0, 0, 4, 1)
    if kernel == "hidden":
        return Config(16, 64, 32, 4, 2)
    if precision == "fp32":
        return Config(64, 64, 16, 4, 2)
    return Config(64, 128, 32, 8 if precision in ("fp16x2", "tf32") else 4, 3)


@functools.cache
def _file(arch: str) -> dict[str, dict[str, int]]:
    path = FOLDER / f"{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(arch: str, entries: dict[str, Config]) -> Path:
    """Write the file of ``arch``; for the tuner."""
    path = FOLDER / f"{arch}.json"
    rows = [f"  {json.dumps(key)}: {json.dumps(asdict(entries[key]))}" for key in sorted(entries)]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    _file.cache_clear()
    find.cache_clear()
    return path
