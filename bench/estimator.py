"""Time and memory of the estimator itself, beside the evaluations of a probe of MM-IMDb's shape.

    python -m bench.estimator [--threads 2] [--rounds 3] [--cases 16:2048:29 ...]

A case is PLAYERS:EVALUATIONS:HEADS: the default call on a game that costs next to nothing, in a process of its own. Its
seconds are those of the whole call less those of the game, by the clock and of the processor (the latter hold beside
other work too), its memory the peak over what was there before the call. The share is that of the same number of
evaluations and of this call, the evaluations at the speed of the fastest engine in bench/results/cpu-engine.jsonl.
Results go to bench/results/estimator.jsonl; measure on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from bench import kinds
from bench.timing import read, spread, write

CASES = ("16:512:1", "16:2048:1", "16:2048:29", "16:8192:29", "32:2048:29", "64:2048:29", "64:8192:29", "200:2048:29",
         "200:8192:29", "516:8192:29")  # fmt: skip
#: What a probe is compared with.
SHAPE = "mmimdb"


class Heads:
    """Many probabilities of one coalition, each the sigmoid of a quadratic form; counts its own seconds."""

    def __init__(self, n: int, heads: int):
        rng = np.random.default_rng(0)
        self.n, self.seconds, self.processor = n, 0.0, 0.0
        self.single = torch.from_numpy(rng.normal(0, 1.5 / n**0.5, (n, heads)))
        self.left, self.right = (torch.from_numpy(rng.normal(0, n**-0.5, (n, heads))) for _ in range(2))

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        started, began = time.perf_counter(), time.process_time()
        signs = 2.0 * coalitions.double() - 1
        found = torch.sigmoid(signs @ self.single + (signs @ self.left) * (signs @ self.right))
        self.seconds += time.perf_counter() - started
        self.processor += time.process_time() - began
        return found


def peak() -> float:
    """Largest resident size of this process so far, GB (1e9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def one(case: str, threads: int, rounds: int) -> dict:
    """Measured in this process."""
    from flmoe_fast import interactions

    torch.set_num_threads(threads)
    n, points, heads = map(int, case.split(":"))
    pairs = kinds.busy_pairs(np.arange(n)[::-1]).tolist()
    game = Heads(n, heads)
    game(torch.zeros(1, n, dtype=torch.bool))
    before, seconds, processor = peak(), [], []
    for seed in range(rounds):
        game.seconds, game.processor, started, began = 0.0, 0.0, time.perf_counter(), time.process_time()
        found = interactions(game, n=n, pairs=pairs, budget=points, seed=seed, progress=False)
        seconds.append(time.perf_counter() - started - game.seconds)
        processor.append(time.process_time() - began - game.processor)
    return {"players": n, "evaluations": found.evaluations, "heads": heads, "pairs": len(pairs), "threads": threads,
            "seconds": spread(seconds), "processor_seconds": spread(processor),
            "gb": peak() - before, "method": found.about.get("method")}  # fmt: skip


def evaluation_seconds(threads: int) -> float | None:
    """Of one coalition of MM-IMDb's shape on the fastest engine that was measured."""
    _, rows = read("cpu-engine") or ({}, [])
    found = [row["ms_per_coalition"]["median"] for row in rows
             if row.get("shape") == SHAPE and row.get("threads") == threads and "ms_per_coalition" in row]  # fmt: skip
    return min(found) / 1000 if found else None


def main() -> None:
    """Measure every case in a process of its own, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(one(options.cases[0], options.threads, options.rounds)))
        return
    rows, evaluation = [], evaluation_seconds(options.threads)
    for case in options.cases:
        command = [sys.executable, "-m", "bench.estimator", "--here", "--cases", case]
        command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(said.splitlines()[-1])
        if evaluation is not None:
            own = row["seconds"]["median"]
            row["share_of_probe"] = own / (own + evaluation * row["evaluations"])
        print(row, flush=True)
        rows.append(row)
    print("wrote", write("estimator", rows))


if __name__ == "__main__":
    main()
