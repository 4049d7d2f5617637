"""Interactions of order 3: the default call beside shapiq's estimators, and against enumeration.

    python -m bench.triples --tables FOLDER [--budgets 512 1024 2048] [--games 4] [--seeds 1] [--python PYTHON]

Tables are those of :mod:`bench.peers`; of every group the first games are taken, and of each all triples of players.
A call that evaluates all 2^n coalitions, but could have ended sooner, has to say what enumeration says; that row is the
largest difference relative to the range of the values. Rows are appended to bench/results/triples.jsonl as they come;
what is there is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from bench import shapiq_peers
from bench.peers import Found, Probed, folders, nmse, slope, summary
from bench.timing import RESULTS, machine_line, read, write
from flmoe_fast import interactions
from flmoe_fast.probes.exact import exact_index
from flmoe_fast.probes.result import half_width

NAME = "triples"
BUDGETS = (512, 1024, 2048)
#: Those of shapiq's estimators that were strong for pairs and know triples.
PEERS = ("ProxySHAP", "ProxySHAP, MSR", "ProxySHAP, one tree", "ProxySHAP, linear, MSR")
#: Coalitions of such a call, and our name for it.
WHOLE, EXACT = 1 << 10, "default, all coalitions"


class Triples:
    """A game with all its triples (T, 3) and their SII (T,)."""

    def __init__(self, game: Probed):
        self.game = game
        self.members = torch.tensor(list(itertools.combinations(range(game.n), 3)))
        every = (torch.arange(2**game.n)[:, None] >> torch.arange(game.n) & 1).bool()
        self.truth = exact_index(game.torch(every)[:, None], game.n, self.members, "SII", 3)[:, 0].numpy()

    def ours(self, budget: int, seed: int) -> Found:
        """The default call."""
        game = self.game
        game.asked, game.seconds, started = 0, 0.0, time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = interactions(game.torch, n=game.n, pairs=[(0, 1)], triples=self.members.numpy(), budget=budget,
                                  seed=seed, progress=False)  # fmt: skip
        seconds = time.process_time() - started - game.seconds
        found = result.also["SII", 3]
        near = half_width(found.stderr, found.degrees, 0.95) + 1e-9 * np.abs(self.truth).max()
        held = {"sii": float((np.abs(found.values - self.truth) <= near).mean())}
        figures = nmse(found.values, self.truth), slope(found.values, self.truth), game.asked, seconds
        return Found(*figures, held, {"sii": float(np.isnan(near).mean())})

    def theirs(self, budget: int, seed: int, worker: shapiq_peers.Shapiq, name: str) -> Found:
        """One of shapiq's estimators."""
        self.game.asked = 0
        sets = [tuple(three) for three in self.members.tolist()]
        answer = worker.estimate(name, self.game.values, self.game.n, sets, budget, seed)
        return Found(nmse(answer.values, self.truth), slope(answer.values, self.truth), self.game.asked, answer.seconds)


def cell(games: list[Triples], budget: int, seeds: int, worker: shapiq_peers.Shapiq | None, name: str) -> dict:
    """One row's figures; the first refusal ends it."""
    row: dict = {"n": games[0].game.n, "games": len(games), "seeds": seeds}
    try:
        found = [
            three.ours(budget, seed) if worker is None else three.theirs(budget, seed, worker, name)
            for three in games
            for seed in range(seeds)
        ]
    except shapiq_peers.Refusal as refusal:
        return row | {"refuses": str(refusal)}
    return row | summary(found)


def exactness(games: list[Triples]) -> dict:
    """Largest difference from enumeration, relative to the range of values, of a call that could have ended sooner."""
    worst = 0.0
    for three in games:
        n = three.game.n
        found = interactions(three.game.torch, n=n, pairs=[(0, 1)], triples=three.members.numpy(), budget=2**n,
                             until=1e-300, progress=False)  # fmt: skip
        every = (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).bool()
        worst = max(
            worst,
            float(np.abs(found.also["SII", 3].values - three.truth).max() / np.ptp(three.game.torch(every).numpy())),
        )
    return {"n": games[0].game.n, "games": len(games), "seeds": 1, "difference": worst}


def restricted(game: Probed) -> Probed:
    """The game of its first players when all others are present, few enough for :data:`WHOLE`."""
    few = WHOLE.bit_length() - 1
    if game.n <= few:
        return game
    rest = np.ones((WHOLE, game.n), dtype=bool)
    rest[:, :few] = np.arange(WHOLE)[:, None] >> np.arange(few) & 1
    return Probed.of_table(game.values(rest))


def main() -> None:
    """Measure what is missing and append it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=Path, nargs="+", required=True)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--python", help="an interpreter with shapiq")
    parser.add_argument("--games", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = read(NAME)
    if before is None:
        write(NAME, [])
    done = {(row["group"], row["estimator"], row["budget"]) for row in before[1]} if before else set()
    worker = shapiq_peers.Shapiq(options.python) if options.python else None

    def add(group: str, estimator: str, budget: int, figures: dict) -> None:
        row = {"group": group, "estimator": estimator, "budget": budget} | figures | machine_line()
        with open(RESULTS / f"{NAME}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    for group, games in folders(options.tables):
        if (group, EXACT, WHOLE) not in done:
            add(group, EXACT, WHOLE, exactness([Triples(restricted(game)) for game in games[: options.games]]))
        some = [Triples(game) for game in games[: options.games]]
        for budget in options.budgets:
            for name in ("default", *(f"shapiq {name}" for name in PEERS if worker is not None)):
                if (group, name, budget) not in done:
                    asked = None if name == "default" else worker
                    add(group, name, budget, cell(some, budget, options.seeds, asked, name.removeprefix("shapiq ")))


if __name__ == "__main__":
    main()
