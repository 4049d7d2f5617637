"""Error, coverage and seconds at equal evaluations: our estimators and every one of shapiq's, where truth is known.

    python -m bench.peers [--tables FOLDER ...] [--kinds NAME ...] [--budgets 512 1024 2048] [--games 4] [--seeds 3]
                          [--methods default grid ...] [--gaps max ...] [--python PYTHON [--estimators NAME ...]]
                          [--into peers]

- ``--tables``: folders of games, each a NAME_NUMBER.npz whose ``values`` are those of all 2^n coalitions (bit p of the
  index says whether player p is present); those of one name are a group. ``python -m bench.model_games`` writes such a
  folder from models trained here; published game tables do as well. All pairs are asked for, or those in ``pairs``.
- ``--kinds``: groups of :mod:`bench.kinds`, a game a seed. Without an argument: all of them.
- ``--methods``: ours; "default" is the call without a method.
- ``--python``: an interpreter with shapiq (of any version, 1.8 needs Python 3.12), for shapiq's estimators; those that
  were strong in an earlier run, or those named, or all with ``--estimators`` alone.

Every group, estimator and budget is a row of bench/results/peers.jsonl, or of the file named by ``--into``, appended as
it comes with its machine; what is there, of as many seeds, is not measured again, and of two rows the later counts.
nMSE is the sum of squared errors over the pairs of a game relative to the sum of squares of the truth: 1 is what
answering zero everywhere would score. The slope is that of the estimates on the truth: 1 on average for an unbiased
estimator, less for one that shrinks. Seconds are the estimator's own, of one thread: those that the game took are not
counted.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench import kinds, shapiq_peers
from bench.timing import RESULTS, machine_line, read, write
from flmoe_fast import InteractionResult, exact_interactions, interactions
from flmoe_fast.probes.gap import GAPS
from flmoe_fast.probes.interactions import METHODS

BUDGETS = (512, 1024, 2048)
#: What makes a row.
KEY = ("group", "estimator", "budget")


@dataclass
class Probed:
    """A game whose truth is known; it counts what it is asked for, and the processor seconds of answering."""

    n: int
    answers: kinds.Values
    pairs: np.ndarray
    sii: np.ndarray
    gaps: dict[str, np.ndarray] = field(default_factory=dict)
    asked: int = 0
    seconds: float = 0.0

    @classmethod
    def of_table(cls, values: np.ndarray, pairs: np.ndarray | None = None) -> Probed:
        """From the values of all coalitions (2^n,), with the truth of every kind of gap."""
        n = len(values).bit_length() - 1
        bits = 1 << np.arange(n)
        game = cls(n, lambda rows: values[rows @ bits], kinds.all_pairs(n) if pairs is None else pairs, np.empty(0))
        for gap in GAPS:
            exact = exact_interactions(game.torch, n=n, pairs=game.pairs.tolist(), gap=gap, progress=False)
            game.sii, game.gaps[gap] = exact.sii, exact.gap
        return game

    @classmethod
    def of_kind(cls, known: kinds.Known) -> Probed:
        """From a kind; the gaps' truth only where a game can be enumerated."""
        if known.n <= kinds.ENUMERABLE:
            table = cls.of_table(known.values(kinds.every_coalition(known.n)), known.pairs)
            return cls(known.n, known.values, known.pairs, known.truth, table.gaps)
        return cls(known.n, known.values, known.pairs, known.truth)

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Values (C,) of bool coalitions (C, n)."""
        started = time.process_time()
        found = self.answers(rows)
        self.asked += len(rows)
        self.seconds += time.process_time() - started
        return found

    def torch(self, rows: torch.Tensor) -> torch.Tensor:
        """The same for tensors."""
        return torch.from_numpy(self.values(rows.cpu().numpy()))


@dataclass(frozen=True)
class Found:
    """One estimate: nMSE, cost, and of the intervals of each score the share that hold and that are NaN."""

    nmse: float
    slope: float
    evaluations: int
    seconds: float
    held: dict[str, float] = field(default_factory=dict)
    withheld: dict[str, float] = field(default_factory=dict)


def folders(paths: list[Path]) -> Iterator[tuple[str, list[Probed]]]:
    """Groups of the tables under some folders, by name."""
    for path in paths:
        groups: dict[str, list[Path]] = {}
        for file in sorted(path.glob("*.npz")):
            groups.setdefault(file.stem.rpartition("_")[0], []).append(file)
        for name, files in groups.items():
            games = []
            for file in files:
                with np.load(file) as table:
                    games.append(Probed.of_table(table["values"], table["pairs"] if "pairs" in table else None))
            yield name, games


def nmse(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Squared error relative to the truth's sum of squares; without a truth, the squared error itself."""
    return float(((estimate - truth) ** 2).sum() / ((truth**2).sum() or 1.0))


def slope(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Of the estimates on the truth, through the origin."""
    return float((estimate * truth).sum() / ((truth**2).sum() or 1.0))


def holding(result: InteractionResult, of: str, truth: np.ndarray) -> tuple[float, float]:
    """Of the 95 % intervals of the SII or the gap: the share that hold the truth, and the share that are NaN.

    Only where the truth is defined; an exact answer, whose interval has no width, may be rounded.
    """
    low, high = result.interval(of=of)
    defined = np.isfinite(truth)
    given = defined & np.isfinite(low)
    slack = 1e-9 * np.abs(truth[defined]).max(initial=0.0)
    inside = (low - slack <= truth) & (truth <= high + slack)
    held = float(inside[given].mean()) if given.any() else float("nan")
    return held, float((defined & ~given).sum() / max(defined.sum(), 1))


def ours(game: Probed, budget: int, seed: int, options: dict, gaps: Sequence[str] = GAPS) -> Found:
    """One of our methods; a call for every kind of gap, if their truth is known."""
    figures: list[tuple[float, float, int, float]] = []
    intervals: dict[str, tuple[float, float]] = {}
    for gap in gaps if game.gaps else gaps[:1]:
        game.asked, game.seconds, started = 0, 0.0, time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = interactions(game.torch, n=game.n, pairs=game.pairs.tolist(), budget=budget, seed=seed, gap=gap,
                                  progress=False, **options)  # fmt: skip
        seconds = time.process_time() - started - game.seconds
        figures.append((nmse(result.sii, game.sii), slope(result.sii, game.sii), game.asked, seconds))
        intervals.setdefault("sii", holding(result, "sii", game.sii))
        if game.gaps:
            intervals[gap] = holding(result, "gap", game.gaps[gap])
    held, withheld = ({of: shares[side] for of, shares in intervals.items()} for side in (0, 1))
    return Found(*figures[0], held, withheld)


def theirs(game: Probed, budget: int, seed: int, worker: shapiq_peers.Shapiq, name: str) -> Found:
    """One of shapiq's estimators."""
    game.asked = 0
    answer = worker.estimate(name, game.values, game.n, [tuple(p) for p in game.pairs.tolist()], budget, seed)
    return Found(nmse(answer.values, game.sii), slope(answer.values, game.sii), game.asked, answer.seconds)


def estimators(methods: list[str], gaps: Sequence[str], python: str | None, names: list[str]) -> dict[str, Callable]:
    """By name, functions of a game, a budget and a seed."""
    found: dict[str, Callable] = {}
    for method in methods:
        found[method] = partial(ours, options={} if method == "default" else {"method": method}, gaps=gaps)
    if python is not None:
        worker = shapiq_peers.Shapiq(python)
        for name in names:
            found[f"shapiq {name}"] = partial(theirs, worker=worker, name=name)
    return found


def cell(games: list[Probed], estimate: Callable, budget: int, seeds: int) -> dict:
    """One row's figures over games and seeds; the first refusal ends it."""
    found: list[Found] = []
    row: dict = {"n": games[0].n, "pairs": len(games[0].pairs), "games": len(games), "seeds": seeds}
    for game in games:
        for seed in range(seeds):
            try:
                found.append(estimate(game, budget, seed))
            except shapiq_peers.Refusal as refusal:
                return row | {"refuses": str(refusal)}
    return row | summary(found)


def summary(found: list[Found]) -> dict:
    """Means, medians and spreads of estimates."""
    errors, slopes = [one.nmse for one in found], [one.slope for one in found]
    row: dict = {
        "nmse": float(np.mean(errors)),
        "nmse_median": float(np.median(errors)),
        "nmse_stderr": standard_error(errors),
        "slope": float(np.mean(slopes)),
        "slope_stderr": standard_error(slopes),
        "seconds": float(np.median([one.seconds for one in found])),
        "most_evaluations": max(one.evaluations for one in found),
    }
    for of in found[0].held:
        shares = [one.held[of] for one in found if np.isfinite(one.held[of])]
        row[f"coverage_{of}"] = float(np.mean(shares)) if shares else None
        row[f"withheld_{of}"] = float(np.mean([one.withheld[of] for one in found]))
    return row


def standard_error(values: list[float]) -> float | None:
    """Of their mean."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def main() -> None:
    """Measure what is missing and append it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=Path, nargs="+", default=[])
    parser.add_argument("--kinds", nargs="*", choices=[*kinds.KINDS, *kinds.CONTROLS], metavar="KIND")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--methods", nargs="*", choices=["default", *METHODS], default=["default"])
    parser.add_argument(
        "--gaps", nargs="+", choices=GAPS, default=GAPS, help="a call each; their intervals are checked"
    )
    parser.add_argument("--python", help="an interpreter with shapiq")
    parser.add_argument(
        "--estimators", nargs="*", metavar="NAME", choices=shapiq_peers.ESTIMATORS, default=list(shapiq_peers.STRONG)
    )
    parser.add_argument("--games", type=int, default=4, help="games of a kind")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--into", default="peers", help="name of the results file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = read(options.into)
    if before is None:
        write(options.into, [])
    done = {tuple(row.get(key) for key in KEY): row["seeds"] for row in before[1]} if before else {}
    every = estimators(
        options.methods, options.gaps, options.python, options.estimators or list(shapiq_peers.ESTIMATORS)
    )

    def measure(group: str, games: list[Probed]) -> None:
        for budget in options.budgets:
            for name, estimate in every.items():
                if done.get((group, name, budget), 0) >= options.seeds:
                    continue
                row = {"group": group, "estimator": name, "budget": budget}
                row |= cell(games, estimate, budget, options.seeds) | machine_line()
                with open(RESULTS / f"{options.into}.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)

    for group, games in folders(options.tables):
        measure(group, games)
    named = kinds.KINDS | kinds.CONTROLS
    for group in list(kinds.KINDS) if options.kinds == [] else options.kinds or []:
        measure(group, [Probed.of_kind(named[group](seed)) for seed in range(options.games)])


if __name__ == "__main__":
    main()
