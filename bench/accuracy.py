"""Accuracy at equal evaluations against exact truth, and coverage of the intervals.

    python -m bench.accuracy [--model out/demo/model.safetensors] [--games 4] [--seeds 10] [--coverage-seeds 200]

Games are held-out digits seen by the demonstration's model: 16 tokens, 64 cross-modal pairs, every one of the 2^16
coalitions evaluated beforehand. Estimators then look values up, so that all of them see the same game, and are charged
for every evaluation they ask for. nMSE is the summed squared error over the pairs relative to the sum of squares of the
truth: 1 is what answering zero everywhere would score.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch

from bench.timing import write
from flmoe_fast import InteractionResult, TokenGame, exact_interactions, interactions, load_checkpoint
from flmoe_fast.data.digits import two_view_digits
from flmoe_fast.games.heads import Heads
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.probes.exact import enumerate_values
from flmoe_fast.probes.naive import four_corner_loop

BUDGETS = (1024, 2048, 4096)
#: Kinds of redundancy gap whose intervals are checked.
COVERED = ("max", "strict")
PLAYERS = 16
PAIRS = [(i, j) for i in range(8) for j in range(8, 16)]


class Table:
    """A game whose values are looked up; it counts what it is asked for."""

    n = PLAYERS

    def __init__(self, values: torch.Tensor):
        self.values = values.double()
        self.asked = 0

    def __call__(self, coalitions) -> torch.Tensor:
        coalitions = torch.as_tensor(np.atleast_2d(coalitions)).long()
        self.asked += len(coalitions)
        return self.values[(coalitions << torch.arange(PLAYERS)).sum(1)]


def tables(model: FLI2MoE, count: int) -> dict[str, list[Table]]:
    """For both kinds of value, the games of the first ``count`` held-out digits."""
    _, held_out = two_view_digits()
    with torch.no_grad():
        features = model.encode(held_out.inputs)
    found: dict[str, list[Table]] = {"prob": [], "logit": []}
    for i in range(count):
        game = TokenGame(model, [f[i] for f in features], masks=[m[i] for m in held_out.masks], heads=("mixture",))
        logits = _Logits(game)
        values = enumerate_values(logits)
        for kind, games in found.items():
            heads = Heads(("mixture",), kind, game.target)
            games.append(Table(heads.values(logits.unpack(values))[:, 0]))
    return found


class _Logits(TokenGame):
    """The token game before a value is chosen: all logits and routing weights, so that one enumeration serves all."""

    def __init__(self, game: TokenGame):
        self.__dict__.update(game.__dict__)

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = self.engine.evaluate(coalitions)
        self._shape = logits.experts.shape[1:]
        return torch.cat([logits.experts.flatten(1), logits.weights], dim=1)

    def unpack(self, values: torch.Tensor):
        from flmoe_fast.engines.problem import Logits

        experts = self._shape[0] * self._shape[1]
        return Logits(values[:, :experts].unflatten(1, tuple(self._shape)), values[:, experts:])


def nmse(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Squared error relative to the truth's sum of squares."""
    return float(((estimate - truth) ** 2).sum() / (truth**2).sum())


def ours(adaptive: bool):
    """The corner grid."""

    def estimate(game: Table, budget: int, seed: int) -> np.ndarray:
        return interactions(game, pairs=PAIRS, budget=budget, seed=seed, adaptive=adaptive, progress=False).sii

    return estimate


def naive(game: Table, budget: int, seed: int) -> np.ndarray:
    """Four evaluations per pair and sample."""
    return four_corner_loop(game, PAIRS, budget // (4 * len(PAIRS)), seed=seed)[0][:, 0].numpy()


def shapiq_estimator(name: str, **options):
    """One of shapiq's approximators of all pairs, read at our pairs."""

    def estimate(game: Table, budget: int, seed: int) -> np.ndarray:
        import shapiq

        approximator = getattr(shapiq, name)(n=PLAYERS, max_order=2, index="SII", random_state=seed, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = approximator.approximate(budget, lambda rows: game(rows).numpy())
        return np.array([values[pair] for pair in PAIRS])

    return estimate


ESTIMATORS = {
    "corner grid, adaptive": ours(True),
    "corner grid": ours(False),
    "four corners per pair": naive,
    "shapiq KernelSHAP-IQ": shapiq_estimator("KernelSHAPIQ"),
    "shapiq KernelSHAP-IQ, pairing": shapiq_estimator("KernelSHAPIQ", pairing_trick=True),
    "shapiq Inconsistent KernelSHAP-IQ": shapiq_estimator("InconsistentKernelSHAPIQ"),
}


def accuracy(kind: str, games: list[Table], truths: list[np.ndarray], seeds: int) -> list[dict]:
    """nMSE of every estimator at every budget, over games and seeds."""
    rows = []
    for name, estimator in ESTIMATORS.items():
        for budget in BUDGETS:
            errors, most = [], 0
            for game, truth in zip(games, truths):
                for seed in range(seeds):
                    game.asked = 0
                    errors.append(nmse(estimator(game, budget, seed), truth))
                    most = max(most, game.asked)
            rows.append(
                {
                    "value": kind,
                    "estimator": name,
                    "budget": budget,
                    "most_evaluations": most,
                    "games": len(games),
                    "seeds": seeds,
                    "nmse": float(np.mean(errors)),
                    "nmse_median": float(np.median(errors)),
                    "nmse_stderr": float(np.std(errors, ddof=1) / len(errors) ** 0.5),
                }
            )
            print(
                f"{kind:6} {name:36} {budget:6} nMSE {rows[-1]['nmse']:9.4f} +- {rows[-1]['nmse_stderr']:.4f}",
                flush=True,
            )
    return rows


def coverage(kind: str, games: list[Table], seeds: int) -> list[dict]:
    """Share of 95 % intervals that contain the truth: of the index, and of two kinds of gap."""
    rows = []
    truths = {gap: [exact_interactions(g, pairs=PAIRS, gap=gap, progress=False) for g in games] for gap in COVERED}
    for adaptive in (True, False):
        for budget in BUDGETS:
            inside: dict[str, list[float]] = {"sii": [], **{gap: [] for gap in COVERED}}
            for gap, exact in truths.items():
                for game, truth in zip(games, exact):
                    for seed in range(1000, 1000 + seeds):
                        found = interactions(
                            game, pairs=PAIRS, budget=budget, seed=seed, gap=gap, adaptive=adaptive, progress=False
                        )
                        inside[gap].append(covered(found, truth, "gap"))
                        if gap == COVERED[0]:  # the index does not depend on the kind of gap
                            inside["sii"].append(covered(found, truth, "sii"))
            row = {"value": kind, "coverage_budget": budget, "adaptive": adaptive, "games": len(games), "seeds": seeds}
            row |= {f"coverage_{of}": float(np.mean(shares)) for of, shares in inside.items()}
            rows.append(row)
            shares = ", ".join(f"{of} {row[f'coverage_{of}']:.4f}" for of in inside)
            print(f"{kind:6} coverage at {budget}, adaptive {adaptive}: {shares}", flush=True)
    return rows


def covered(found: InteractionResult, truth: InteractionResult, of: str) -> float:
    """Share of the pairs whose interval contains the truth."""
    low, high = found.interval(of=of)
    exact = getattr(truth, of)
    return float(((low <= exact) & (exact <= high)).mean())


def main() -> None:
    """Measure, print, and write bench/results/accuracy.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("out/demo/model.safetensors"))
    parser.add_argument("--games", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--coverage-seeds", type=int, default=200)
    options = parser.parse_args()
    rows = []
    for kind, games in tables(load_checkpoint(options.model), options.games).items():
        truths = [exact_interactions(game, pairs=PAIRS, progress=False).sii for game in games]
        rows += accuracy(kind, games, truths, options.seeds)
        rows += coverage(kind, games, options.coverage_seeds)
    print("wrote", write("accuracy", rows))


if __name__ == "__main__":
    main()
