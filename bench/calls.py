"""Other people's models by the size of a call: the engine against the model's own batches, on random coalitions.

    python -m bench.calls [--cases clip bert vit vit_removed vilt] [--calls 8 32 320] [--layers 4] [--rounds 3]

Random coalitions have nothing in common that an engine could share, and few of them pay for little. Models as in
:mod:`bench.adapt`, of fewer layers for the time that takes; the last layer, of which an engine computes only what the
head reads, counts for more in them.
"""

from __future__ import annotations

import argparse
import functools

import torch

from bench.adapt import MODELS
from bench.cells import Table, quartiles
from bench.timing import interleave, spread, write
from flmoe_fast import accelerate, image_players
from flmoe_fast.games.game import Game


def draws(game: Game, count: int, generator: torch.Generator) -> torch.Tensor:
    """Values of so many coalitions that the game has not seen."""
    return game(torch.rand(count, game.n, generator=generator) < 0.5)


def measured(name: str, layers: int, counts: list[int], rounds: int) -> list[dict]:
    """Rows of one model."""
    torch.manual_seed(0)
    model, inputs, players, options = MODELS[name](layers)
    model = model.eval()
    fast = accelerate(model).game(inputs, players, path="engine", **options)
    if any(part.mask == "" for part in players):  # only the engine removes these: replaced ones cost the model the same
        players = [image_players(inputs["pixel_values"], patch=16)]
    many = accelerate(model).game(inputs, players, path="module", batch=16, **options)
    about = fast.about()
    rows = []
    for count in counts:
        first, second = (torch.Generator().manual_seed(0) for _ in range(2))
        runs = {
            "batches": functools.partial(draws, many, count, first),
            "engine": functools.partial(draws, fast, count, second),
        }
        seconds = interleave(runs, rounds)
        row = {"case": name, "layers": layers, "players": fast.n, "calls": count, "threads": torch.get_num_threads()}
        row |= {"engine": about.get("level") or about.get("backend") or "torch", "reason": about.get("reason", "")}
        row |= {f"{way}_ms": spread([1e3 * s / count for s in times]) for way, times in seconds.items()}
        row["speed"] = spread([a / b for a, b in zip(seconds["batches"], seconds["engine"])])
        rows.append(row)
        print(name, count, row["engine"], row["batches_ms"], row["engine_ms"], row["speed"], flush=True)
    return rows


def table(rows: list[dict]) -> Table:
    """The engine against the model's own batches."""
    lines = [
        [
            f"{row['case']}, {row['layers']} layers",
            row["engine"],
            str(row["calls"]),
            f"{row['batches_ms']['median']:.1f}",
            f"{row['engine_ms']['median']:.1f}",
            quartiles(row["speed"], 2) + "x",
        ]
        for row in rows
    ]
    columns = ["model", "engine", "coalitions a call", "own batches, ms each", "engine, ms each", "speed"]
    return columns, lines, f"Random coalitions, {rows[0]['threads']} threads; medians of {rows[0]['speed']['rounds']}."


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"calls": ("calls", table)}


def main() -> None:
    """Measure, print, and write bench/results/calls.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--calls", nargs="+", type=int, default=[8, 32, 320])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for case in options.cases:
        rows += measured(case, options.layers, options.calls, options.rounds)
    print("wrote", write("calls", rows))


if __name__ == "__main__":
    main()
