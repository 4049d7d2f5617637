"""Milliseconds per coalition and per pair-sample: naive loop, batched PyTorch, and the engines on corner grids.

    python -m bench.engine [--shapes mmimdb enrico mimic digits] [--rounds 5] [--compile]

A pair-sample is one sample of one pair's second difference: four evaluations where corners are evaluated pair by pair,
(1 + a + b + a b) / (a b) on an a x b corner grid. All candidates of a shape take turns in one run; ratios are medians
of the rounds' ratios.
"""

from __future__ import annotations

import argparse

import torch

from bench.baselines import BatchedSDPA
from bench.shapes import SHAPES, Shape
from bench.timing import interleave, spread, write
from flmoe_fast.environment import backends
from flmoe_fast.probes.grid import CornerGrid

GRIDS = ((4, 5), (10, 10))


def grid(shape: Shape, rows: int, cols: int) -> CornerGrid:
    """Corner grid of the first tokens of the first two modalities."""
    rows, cols = min(rows, shape.tokens[0]), min(cols, shape.tokens[1])
    pairs = torch.cartesian_prod(torch.arange(rows), shape.tokens[0] + torch.arange(cols))
    return CornerGrid.of(pairs, sum(shape.tokens))


def measure(shape: Shape, rounds: int, compiled: bool) -> list[dict]:
    """Rows of one shape."""
    game = shape.game(heads=("mixture",), backend="torch")
    engines = {"torch engine": game}
    if backends()["cpu"].available:
        engines["native CPU engine"] = shape.game(heads=("mixture",), backend="cpu")
    reference = shape.game(heads=("mixture",), backend="reference", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    coalitions = torch.rand(32, game.n, generator=generator) < 0.5
    context = torch.rand(1, game.n, generator=generator) < 0.5
    batched = BatchedSDPA(game)
    small = shape.name == "digits"
    naive_count, batch = (20, 256) if small else (4, 16)
    many = torch.rand(batch, game.n, generator=generator) < 0.5

    runs = {"naive loop": (naive_count, 4.0, lambda: reference(coalitions[:naive_count]))}
    runs["batched PyTorch (SDPA, fp32)"] = (batch, 4.0, lambda: batched(many))
    if compiled:
        program = torch.compile(batched, mode="max-autotune-no-cudagraphs", dynamic=False)
        runs["batched PyTorch (SDPA, fp32, torch.compile)"] = (batch, 4.0, lambda: program(many))
    for rows, cols in GRIDS:
        corners = grid(shape, rows, cols)
        contexts = context.expand(8 if small else 1, -1)
        count = corners.evaluations * len(contexts)
        share = corners.evaluations / len(corners.pairs)
        for name, engine in engines.items():
            label = f"{name}, {min(rows, shape.tokens[0])} x {min(cols, shape.tokens[1])} grid"
            runs[label] = (count, share, lambda e=engine, c=contexts, g=corners: e.corner_values(c, g.toggled))

    seconds = interleave({name: run for name, (_, _, run) in runs.items()}, rounds)
    per_coalition = {name: [1e3 * s / runs[name][0] for s in seconds[name]] for name in runs}
    per_sample = {name: [ms * runs[name][1] for ms in per_coalition[name]] for name in runs}
    rows_out = []
    for name in runs:
        naive = [a / b for a, b in zip(per_sample["naive loop"], per_sample[name])]
        plain = [a / b for a, b in zip(per_sample["batched PyTorch (SDPA, fp32)"], per_sample[name])]
        rows_out.append(
            {
                "shape": shape.name,
                "tokens": list(shape.tokens),
                "experts": len(shape.modalities) + 2,
                "hidden": shape.hidden,
                "candidate": name,
                "threads": torch.get_num_threads(),
                "dtype": "float32",
                "coalitions_timed": runs[name][0],
                "ms_per_coalition": spread(per_coalition[name]),
                "ms_per_pair_sample": spread(per_sample[name]),
                "times_naive": spread(naive),
                "times_batched": spread(plain),
            }
        )
    return rows_out


def main() -> None:
    """Measure, print, and write bench/results/engine-cpu.jsonl (or engine-gpu.jsonl)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the batched baseline as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.shapes:
        rows += measure(SHAPES[name], options.rounds, options.compile)
        for row in rows:
            if row["shape"] == name:
                per, sample = row["ms_per_coalition"], row["ms_per_pair_sample"]
                print(
                    f"{name:8} {row['candidate']:45} {per['median']:9.3f} ms/coalition "
                    f"[{per['q1']:.3f}, {per['q3']:.3f}] {sample['median']:9.3f} ms/pair-sample  "
                    f"x{row['times_naive']['median']:.1f} naive  x{row['times_batched']['median']:.1f} batched",
                    flush=True,
                )
    print("wrote", write("engine-cpu", rows))


if __name__ == "__main__":
    main()
