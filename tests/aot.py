"""Compile every kernel launch of an engine for GPUs that are not here, and report what each needs.

``python tests/aot.py TARGET [PRECISION ...] [DEPTH ...]`` (not under TRITON_INTERPRET) prints one JSON object: entry to
resources.
The engine runs its whole host side on CPU tensors; instead of launching, each kernel is compiled with exactly the
arguments, specialisations and configuration it would have been launched with, by the ptxas that triton carries.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
import triton
from edge_shapes import Edge
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from flmoe_fast.engines.engine import Reduction
from flmoe_fast.engines.gpu.chunk import PLAIN
from flmoe_fast.engines.gpu.kernels import (
    attention,
    choice,
    combine,
    configs,
    corners,
    grouped,
    head,
    linear,
    order,
    routing,
)
from flmoe_fast.engines.gpu.kernels.configs import KERNELS, entry
from flmoe_fast.engines.gpu.triton import TritonEngine

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: Sizes whose specialisations are those of real shapes: every width a multiple of 16, any length. By head width.
SHAPES = {
    32: Edge("head of 32", (9, 8), (9, 8), hidden=128, heads=4),
    64: Edge("head of 64", (20, 13), (20, 13), hidden=256, heads=4),
    128: Edge("head of 128", (9, 8), (9, 8), hidden=256, heads=2),
    256: Edge("head of 256", (9, 8), (9, 8), hidden=256, heads=1),
}
#: The first and the last of three layers are sparse.
SPARSE = Edge("sparse", (20, 13), (20, 13), hidden=256, heads=4, layers=3, gate="gshard", ffn_experts=4)


class NoDevice(DriverBase):
    """Stands for a GPU that compiles and is never launched on."""

    def __init__(self, capability: int):
        self.capability = capability

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, kind):
        return kind

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def set_current_device(self, device):
        pass

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        raise RuntimeError("nothing is timed here")

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        pass


def resources(compiled) -> dict[str, int]:
    """Registers, stack, spills and shared bytes of a compiled kernel, and how often its code has some instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    found = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "HMMA", "LDL", "STL")}
    counts["UTCMMA"] = len(re.findall(r"\bUTC\w*MMA\b", code))
    return {
        "registers": found["reg"],
        "stack": found["stack"] + found["local"],
        "spills": counts["LDL"] + counts["STL"],
        "shared": compiled.metadata.shared,
        "wgmma": counts["HGMMA"],
        "mma": counts["HMMA"] + counts["UTCMMA"],
    }


#: Kernels in the order of launches: a sample's projection, one chunk of two layers, the reduction of corners.
ENDS = ("head", "mean_features", "hidden", "gate", "corners")
ORDER = ("states", *KERNELS, *ENDS)
SENT = ("choose", "scan", "place", "sparse_up")
SPARSE_ORDER = ("states", "context", "first", "project", *SENT, "sparse_down", "combine", "qkv", "later")
SPARSE_ORDER += ("project", "up", "down", "qkv", "later", "project_last", *SENT, "pool", *ENDS)


def compile_all(arch: str, precisions: list[str], depths: tuple[int, ...] = ()) -> dict[str, dict[str, int]]:
    """Configuration and resources of kernels on ``arch`` ("sm_90"), by entry.

    Of the precisions named, with the head widths named or every one; without any, what its file has, and what
    has no file.
    """
    driver.set_active(NoDevice(int(arch[3:])))
    # The engine then takes CPU tensors; the kernels were decorated before, and are compiled.
    triton.knobs.runtime.interpret = True
    found: dict[str, dict[str, int]] = {}
    names: list[str] = []

    def compile_instead(kernel, programs, config, *args, **constants):
        name = names.pop(0)
        plain = name in PLAIN
        depth = edge.hidden // edge.heads if name in ("context", "first", "later") else 0
        key = entry(name, "fp32" if plain else precision, depth)
        tiles = configs.TILES.get(precision, precision)
        # Narrower heads, and precisions with another one's tiles, change attention only; what the states are projected
        # with is the later layers' kernel.
        if key in found or name == "states" or (tiles != precision and not depth):
            return
        if not (precisions or plain or entry(name, tiles, depth) in shipped):
            return
        options = {"num_warps": config.warps, "num_stages": config.stages}
        compiled = kernel.warmup(*args, **constants, **options, grid=(programs,))
        found[key] = asdict(config) | resources(compiled)

    with contextlib.ExitStack() as stack:
        for module in (linear, attention, head, routing, corners, choice, order, grouped, combine):
            stack.enter_context(mock.patch.object(module, "launch", compile_instead))
        shipped = configs._file(arch)
        for precision in precisions or [*sorted({key.split("/")[1] for key in shipped}, reverse=True), *configs.TILES]:
            tiles = configs.TILES.get(precision, precision)
            for depth, edge in (*SHAPES.items(), (64, SPARSE)):
                if depths and depth not in depths or not (precisions or entry("later", tiles, depth) in shipped):
                    continue
                names[:] = SPARSE_ORDER if edge is SPARSE else ORDER
                problem = edge.game(dtype=torch.float32, backend="torch").problem
                engine = TritonEngine(problem, device="cpu", precision=precision, arch=arch)
                words, varies = engine.coalition_words(edge.coalitions(problem.n, 2))
                engine.plan(words, varies, group=2).run()
                pair, values = torch.tensor([[0, 1]]), torch.zeros(1, 4, 1, dtype=torch.float64)
                reduction = Reduction(pair, 1 + pair, "ratio", 0.0)
                engine.reduce_corners(values, torch.ones(1, 2, dtype=torch.bool), reduction)
                assert not names
    return found


if __name__ == "__main__":
    named = [name for name in sys.argv[2:] if not name.isdigit()]
    print(json.dumps(compile_all(sys.argv[1], named, tuple(int(name) for name in sys.argv[2:] if name.isdigit()))))
