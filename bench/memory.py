"""Peak memory of a long run: 516 players, 20,000 evaluations at the MM-IMDb shape.

    python -m bench.memory [--evaluations 20000]

Writes bench/results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from bench.cells import Table
from bench.shapes import SHAPES
from bench.timing import write
from flmoe_fast import interactions


def peak() -> float:
    """Largest resident size of this process so far, GB (1e9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Run 10 x 10 pairs on all heads until the budget is spent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES["mmimdb"]
    game = shape.game()
    before = peak()
    started = time.perf_counter()
    result = interactions(
        game, rows=range(10), cols=range(320, 330), budget=options.evaluations, adaptive=False, progress=False
    )
    row = {
        "shape": shape.name,
        "players": game.n,
        "heads": len(game.heads),
        "evaluations": result.evaluations,
        "check_evaluations": result.check_evaluations,
        "noise_share": float(result.noise_share.max()),
        "seconds": time.perf_counter() - started,
        "gb_before": before,
        "gb_peak": peak(),
    }
    print(row)
    print("wrote", write("memory", [row]))


def table(rows: list[dict]) -> Table:
    """Peak memory of a long run."""
    [row] = rows
    columns = ["players", "evaluations", "peak memory", "seconds", "noise share"]
    cells = [
        str(row["players"]),
        f"{row['evaluations']:,}",
        f"{row['gb_peak']:.2f} GB",
        f"{row['seconds']:.0f}",
        f"{row['noise_share']:.1e}",
    ]
    return columns, [cells], ""


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"memory": ("memory", table)}


if __name__ == "__main__":
    main()
