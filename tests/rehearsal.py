"""Runs a module of the GPU benchmark without a GPU: ``python tests/rehearsal.py bench.gpu times``.

Triton's interpreter and the emulator stand in for the device, a counter for its clock, and one tiny shape for all.
After ``FLMOE_REHEARSAL_CUT`` timings the process interrupts itself, as a call that is cut off does.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"
import torch

torch.cuda.is_available = lambda: True
torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda: None
torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda: 0
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda device=None: "rehearsal"
torch.cuda.get_device_capability = lambda device=None: (9, 0)

from bench import gpu, gpu_kernels, shapes, tune  # noqa: E402 - after what it stands on
from tests.interpreter import searching_once  # noqa: E402

TINY = shapes.Shape("tiny", ("a", "b"), (2, 1), 16, 1, 2, 2, "multiclass")
clock = itertools.count(1)
cut = int(os.environ.get("FLMOE_REHEARSAL_CUT", "0"))


def seconds_of(run) -> float:
    """A time that grows, of something that did run."""
    run()
    now = next(clock)
    if now == cut:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
        os.kill(os.getpid(), signal.SIGINT)
    return now / 1e3


module, *sys.argv[1:] = sys.argv[1:]
# Engines are measured one after the other: where each kernel is timed, two of them, so that one can be missing.
timed = ("mixed", "fp16") if module == "bench.gpu_kernels" else ("fp16",)
gpu.DEVICE, gpu.seconds_of, gpu.PRECISIONS = "cpu", seconds_of, {name: gpu.PRECISIONS[name] for name in timed}
gpu.SIDE, gpu.CONTEXTS, gpu.NOISE_SIDE, gpu.NOISE_CONTEXTS, gpu.MATRIX, gpu.COPIED = 1, 1, 1, 2, 16, 16
gpu.ROUNDS, gpu.MEASURED, gpu.COMPILED = 2, ("tiny",), ((("fp32", "aot"),),)
# Interpreted, the wider fused kernels take minutes.
gpu.FUSED = gpu.FUSED[:1]
gpu.SHAPES = tune.SHAPES = {"tiny": TINY, "digits": TINY, "mmimdb": replace(TINY, name="mmimdb")}
gpu_kernels.ROUNDS, gpu_kernels.REPEATS = 2, 1
tune.ROUNDS, tune.candidates = 1, lambda kernel, used: [replace(used, warps=2)] if kernel in ("qkv", "up") else []
torch.compile = lambda module, **how: module
if module == "bench.tune":
    sys.argv += ["--coalitions", "4"]
with searching_once():
    importlib.import_module(module).main()
