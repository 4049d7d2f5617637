"""What the probes say where there is nothing to find, and where there is one pair among 500 players.

    python -m bench.controls [--budgets 2048 8192] [--seeds 5]

A null and an additive game have no interactions: estimates of them have to be rounding, their intervals to hold zero,
and a screening to refuse. In the planted game one pair of 124,750 interacts: a screening has to rank it first or to
refuse. Results go to bench/results/controls.jsonl.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from bench import kinds
from bench.timing import write
from flmoe_fast import interactions, screen
from flmoe_fast.probes.screening import UnresolvedError


def estimated(name: str, budget: int, seed: int) -> dict:
    """The default call on a game without interactions."""
    game = kinds.CONTROLS[name](seed)
    found = interactions(lambda rows: torch.from_numpy(game.values(rows.numpy())), n=game.n, pairs=game.pairs.tolist(),
                         budget=budget, seed=seed, progress=False)  # fmt: skip
    low, high = found.interval()
    rounding = 1e-9 * np.abs(game.values(np.ones((1, game.n), dtype=bool))).max()
    held = (low <= rounding) & (high >= -rounding)
    return {"largest": float(np.abs(found.sii).max()), "held": float(held[np.isfinite(low)].mean())}


def screened(name: str, budget: int, seed: int) -> dict:
    """What a screening of all pairs says: where the pair with the largest truth ranks, or that it refuses."""
    game = kinds.CONTROLS[name](seed)
    try:
        found = screen(lambda rows: torch.from_numpy(game.values(rows.numpy())), n=game.n, budget=budget, seed=seed,
                       progress=False)  # fmt: skip
    except UnresolvedError as refusal:
        return {"refuses": str(refusal)}
    wanted = set(map(tuple, game.pairs[game.truth != 0].tolist()))
    first = [tuple(found.pairs[number].tolist()) for number in found.order()]
    rank = min((first.index(pair) + 1 for pair in wanted), default=None)
    return {"rank": rank, "reliability": float(found.reliability)}


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=(2048, 8192))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for budget in options.budgets:
        for name in kinds.CONTROLS:
            for seed in range(options.seeds):
                for question in (estimated, screened):
                    if question is estimated and name.startswith("planted"):
                        continue
                    started = time.process_time()
                    row = {"game": name, "question": question.__name__, "budget": budget, "seed": seed}
                    row |= question(name, budget, seed) | {"seconds": time.process_time() - started}
                    print(row, flush=True)
                    rows.append(row)
    print("wrote", write("controls", rows))


if __name__ == "__main__":
    main()
