"""Search tile sizes of the Triton kernels on this machine's GPU, the only place that does, and write them for its name.

    python -m bench.tune [--shape mmimdb] [--precisions fp16x2 fp16] [--kernels qkv up] [--seconds 480] [--dry]

One kernel at a time, the others at their best so far: a candidate counts by the time of a whole chunk. A shape with a
gate (enrico-gshard) has the kernels of sparse blocks as well. Candidates that
do not run, or give other numbers than the configuration in use, are left out. The file is
flmoe_fast/engines/gpu/kernels/configs/<device>.json; it starts from the configurations in use, and is written after
every kernel. No new candidate is tried when the time is up, and a kernel whose candidates were all tried on the same
device is not tried again (bench/results/gpu_tune.jsonl). Candidates are compiled ahead, by as many processes as there
are cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from unittest import mock

import torch

from bench import gpu
from bench.shapes import SHAPES
from bench.timing import read, write
from flmoe_fast.engines.gpu import chunk
from flmoe_fast.engines.gpu.kernels import configs
from flmoe_fast.engines.gpu.kernels.configs import KERNELS, SPARSE_KERNELS, Config
from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS
from flmoe_fast.engines.gpu.triton import TritonEngine, interpreted

ROUNDS = 7
#: A candidate whose first time is longer than the best by more than this is not timed again.
HOPELESS = 1.05
ATTENTION = ("context", "first", "later")


def candidates(kernel: str, used: Config) -> list[Config]:
    """Tiles worth trying for ``kernel``."""
    if kernel in ATTENTION:
        sizes = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))
        return [Config(rows, columns, 0, warps, stages) for rows, columns, warps, stages in sizes]
    # Producers of LayerNorm statistics share one number of columns, so columns stay.
    columns = (used.columns,) if kernel in ("project", "down", "project_last") else (64, 128, 256)
    sizes = itertools.product((64, 128), columns, (32, 64), (4, 8), (3, 4))
    return [Config(*size) for size in sizes]


class Trial:
    """Times chunks with configurations of one's own."""

    def __init__(self, shape: str, precision: str, coalitions: int, arch: str):
        made = SHAPES[shape]
        self.precision, self.depth = precision, made.hidden // made.heads
        self.problem = made.game(heads=("mixture",), backend="torch", device=gpu.DEVICE).problem
        self.corners = made.corners(10)
        count = max(1, coalitions // self.corners.evaluations)
        self.contexts = torch.rand(count, self.problem.n, generator=torch.Generator().manual_seed(0)) < 0.5
        self.arch = arch
        kernels = (*KERNELS, *SPARSE_KERNELS) if made.gate else KERNELS
        self.chosen = {name: self.find(name, precision, self.arch, self.at(name)) for name in kernels}
        self.expected: torch.Tensor | None = None

    def at(self, kernel: str) -> int:
        return self.depth if kernel in ATTENTION else 0

    find = staticmethod(configs.find)

    @contextlib.contextmanager
    def running(self, changes: dict[str, Config]) -> Iterator[tuple[Callable[[], object], torch.Tensor]]:
        """A chunk with other configurations, which launches ask for: to run again, and its experts' logits."""
        tried = self.chosen | changes

        def find(kernel: str, precision: str, arch: str, depth: int = 0) -> Config:
            return tried.get(kernel) or self.find(kernel, precision, arch, depth)

        with mock.patch.object(chunk, "find", find):
            engine = TritonEngine(self.problem, device=gpu.DEVICE, precision=self.precision)
            words, varies = engine.toggle_words(self.contexts, self.corners.toggled)
            plan = engine.plan(words, varies, group=self.corners.evaluations)
            found = plan.run().experts
            torch.cuda.synchronize()
            yield plan.run, found

    def seconds(self, changes: dict[str, Config], best: float = float("inf")) -> float | None:
        """Median seconds of one chunk, or None where a configuration cannot run or runs wrong."""
        try:
            with self.running(changes) as (again, found):
                return self._timed(again, found, best)
        except Exception as error:
            print("   ", type(error).__name__, str(error).splitlines()[0][:90])
            return None

    def _timed(self, again: Callable[[], object], found: torch.Tensor, best: float) -> float | None:
        if self.expected is None:
            self.expected = found
        error = (found - self.expected).abs().max() / self.expected.abs().max()
        if not float(error) <= 8 * 2.0 ** -min(PRECISIONS[self.precision].bits, 20):
            print(f"    differs by {float(error):.1e}")
            return None
        first = gpu.seconds_of(again)
        if first > HOPELESS * best:
            return first
        return statistics.median([first, *(gpu.seconds_of(again) for _ in range(ROUNDS - 1))])

    def tune(self, kernels: Sequence[str], until: float, keep: Callable[[str, int, float], object]) -> None:
        """Choose the best configuration found of every kernel; of ``kernels``, others than in use are tried until then.

        ``keep`` is given every kernel whose candidates were all tried, how many they were, and the chunk's seconds.
        """
        best = self.seconds({})
        if best is None:
            raise SystemExit("the configurations in use do not run here")
        print(f"{self.precision}: {1e3 * best:.2f} ms a chunk with what is in use")
        for kernel in (name for name in kernels if name in self.chosen):
            tried = [other for other in candidates(kernel, self.chosen[kernel]) if other != self.chosen[kernel]]
            for candidate in tried:
                if time.monotonic() > until:
                    return
                found = self.seconds({kernel: candidate}, best)
                if found is not None and found < 0.995 * best:
                    best = found
                    self.chosen[kernel] = candidate
                    print(f"  {kernel}: {candidate} {1e3 * best:.2f} ms", flush=True)
            keep(kernel, len(tried), best)

    def entries(self) -> dict[str, Config]:
        """What a file of configurations holds of it."""
        return {configs.entry(name, self.precision, self.at(name)): c for name, c in self.chosen.items()}


def compile_one(trial: Trial, kernel: str, candidate: Config) -> None:
    """Fill the compile cache with one candidate; what is wrong with it is said when it is timed."""
    with contextlib.suppress(Exception), trial.running({kernel: candidate}):
        pass


def compile_ahead(trial: Trial, kernels: Sequence[str], jobs: int) -> None:
    """Compile every candidate, in several processes."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for kernel in (name for name in kernels if name in trial.chosen):
            for candidate in candidates(kernel, trial.chosen[kernel]):
                pool.submit(compile_one, trial, kernel, candidate)


def main() -> None:
    """Search and write, or only print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mmimdb")
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), default=["fp16x2", "fp16"])
    parser.add_argument(
        "--kernels", nargs="+", choices=(*KERNELS, *SPARSE_KERNELS), default=[*KERNELS, *SPARSE_KERNELS]
    )
    parser.add_argument("--coalitions", type=int, default=484)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new candidate after that long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile ahead")
    parser.add_argument("--dry", action="store_true", help="print the configurations and write nothing")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "bench.tune: torch finds no CUDA device\n")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    arch = configs.arch_of(name, capability)
    found = {key: Config(**value) for key, value in configs._file(arch).items()}
    until = time.monotonic() + options.seconds
    before = read("gpu_tune")
    rows = before[1] if before and before[0]["machine"]["gpu"] == name else []

    for precision in options.precisions:
        done = {row["kernel"] for row in rows if (row["shape"], row["precision"]) == (options.shape, precision)}
        kernels = [kernel for kernel in options.kernels if kernel not in done]
        trial = Trial(options.shape, precision, options.coalitions, arch)
        if not kernels or time.monotonic() > until:
            continue
        if options.jobs > 1 and not interpreted():
            compile_ahead(trial, kernels, options.jobs)

        def keep(kernel: str, tried: int, best: float, precision=precision, trial=trial) -> None:
            row = {"shape": options.shape, "precision": precision, "kernel": kernel, "tried": tried}
            rows.append({**row, "configuration": asdict(trial.chosen[kernel]), "ms": 1e3 * best})
            found.update(trial.entries())
            if not options.dry:
                configs.write(configs.device_name(name), found)
                write("gpu_tune", rows)

        trial.tune(kernels, until, keep)
        found.update(trial.entries())
    if not options.dry:
        configs.write(configs.device_name(name), found)
    print("\n".join(f"{key}: {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
