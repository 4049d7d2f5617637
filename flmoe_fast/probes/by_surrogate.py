"""Estimates from surrogates of every output, and the choice between them and corner grids."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.games.game import Game
from flmoe_fast.probes.by_grid import DEFAULT_CONTEXTS, PILOT_UNITS
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import IndexEstimate
from flmoe_fast.probes.moments import successive_variance, unit_means
from flmoe_fast.probes.points import Points
from flmoe_fast.probes.reading import Control, Estimate, Reading, read
from flmoe_fast.probes.run import Found, Run, corner_values, fresh_noise_share, per_head, second_difference
from flmoe_fast.probes.surrogate import MOST_POINTS, Surrogate

#: Fewest coalitions worth fitting a surrogate to.
LEAST_POINTS = 32
#: Pairs and contexts by which "auto" tells what a grid would do.
PILOT_PAIRS, PILOT_CONTEXTS = 8, 8
#: Shares of the budget after which it looks, and by what factor a surrogate then has to be worse to be given up: early
#: on it still gains faster than a grid.
LOOKS = ((0.25, 4.0), (0.5, 1.0))
#: Share of the pairs' mean variance that is added to each pair's: a surrogate that errs by more than it knows errs on
#: pairs it takes for well known. Chosen by the coverage on games of digits.
SHARED = 0.05
#: Its contexts are independent of all others of the same seed.
PILOT_REPLICATE = 1 << 30


def surrogate_budget(grid: CornerGrid, contexts: int | None, budget: int | None, method: str) -> int:
    """Evaluations that a surrogate may spend."""
    if budget is None:
        return integer("contexts", DEFAULT_CONTEXTS if contexts is None else contexts, least=1) * grid.evaluations
    if contexts is not None:
        raise ArgumentError("budget", "a budget together with contexts", "one of the two")
    return integer("budget", budget, least=LEAST_POINTS, most=MOST_POINTS if method == "surrogate" else None)


def by_surrogate(run: Run, grid: CornerGrid, budget: int, method: str) -> Found | None:
    """Estimates from surrogates of every output; None where a grid is expected to do better (``method="auto"``).

    "auto" fits to a quarter of the budget first, then perhaps to half, and compares the variance that the surrogates
    claim with that of a grid of the same cost, by the second differences of a few pairs in a few contexts. If the grid
    promises the smaller error, the rest of the budget goes to it, with the surrogates as control variates where they
    lessen the variance.
    """
    game, pairs = run.game, len(grid.pairs)
    points = Points(game, run.seed, run.bar)
    pilot = None
    if method == "auto":
        pilot = _Pilot(game, grid, run.seed)
        if pilot.evaluations > budget // 4:
            pilot = None  # a surrogate needs no whole contexts, so it makes more of the little there is
    if pilot is not None:
        pilot.evaluate(run.bar)
        for share, much_worse in LOOKS:
            points.evaluate(min(int(budget * share), MOST_POINTS))
            surrogates, readings = _read_all(run, grid, points)
            before, after = pilot.unit_variances(surrogates)
            spent = pilot.evaluations + points.spent
            claimed = torch.stack([reading.sii.variance.mean() for reading in readings])
            rival = before / max(1.0, spent / (2 * grid.evaluations))
            ratio = claimed / rival.clamp(min=torch.finfo(before.dtype).tiny)
            run.facts["surrogate_over_grid"] = ratio.tolist()
            worse = float(ratio.clamp(min=1e-30).log().mean().exp())
            affordable = budget - spent >= PILOT_UNITS * 2 * grid.evaluations
            if affordable and (worse > much_worse or budget - pilot.evaluations > MOST_POINTS):
                run.evaluations = spent
                if bool((after < before).all()):
                    run.controls = [Control(s, r) for s, r in zip(surrogates, readings)]
                return None
            if worse < 1.0:
                break
        points.add(pilot.coalitions, pilot.values)
    pilot_cost = 0 if pilot is None else pilot.evaluations
    points.evaluate(min(points.count + budget - pilot_cost - points.spent, MOST_POINTS))
    surrogates, readings = _read_all(run, grid, points)
    run.evaluations = pilot_cost + points.spent
    run.facts |= {"link": [s.link for s in surrogates], "explained": [s.explained for s in surrogates]}

    def stacked(estimates: list[Estimate]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value, variance, degrees = (
            torch.stack([getattr(estimate, part) for estimate in estimates], 1)
            for part in ("value", "variance", "degrees")
        )
        return value, (variance + SHARED * variance.nanmean(0)).sqrt(), degrees.min(1).values

    also = {}
    for key, (members, _) in readings[0].also.items():
        value, stderr, degrees = stacked([reading.also[key][1] for reading in readings])
        also[key] = IndexEstimate(members.numpy(), per_head(game, value), per_head(game, stderr), degrees.numpy())
    spread = torch.stack([(reading.unit_variance * 2).mean() for reading in readings])
    sii, sii_stderr, degrees = stacked([reading.sii for reading in readings])
    noise, checks = fresh_noise_share(game, grid, run.seed, spread)
    return Found(
        "surrogate",
        sii,
        sii_stderr,
        *stacked([reading.gap for reading in readings])[:2],
        degrees,
        torch.full((pairs,), points.count),
        noise,
        checks,
        also,
    )


def _read_all(run: Run, grid: CornerGrid, points: Points) -> tuple[list[Surrogate], list[Reading]]:
    """A surrogate of every output, and what it says about the pairs."""
    surrogates = [Surrogate(points.coalitions, column) for column in points.values.T]
    return surrogates, [read(s, grid, run.game.n, run.gap_kind, run.also, run.seed) for s in surrogates]


class _Pilot:
    """Second differences of a few pairs in a few contexts, to compare methods by."""

    def __init__(self, game: Game, grid: CornerGrid, seed: int):
        some = torch.linspace(0, len(grid.pairs) - 1, min(PILOT_PAIRS, len(grid.pairs))).long()
        self.game, self.grid = game, CornerGrid.of(grid.pairs[some], game.n)
        words = sample_contexts(game.n, PILOT_CONTEXTS, seed=seed, replicate=PILOT_REPLICATE).words
        self.contexts = unpack(words, game.n)
        self.coalitions = (self.contexts[:, None] ^ self.grid.toggled).flatten(0, 1)
        self.evaluations = len(self.coalitions)

    def evaluate(self, bar: tqdm) -> None:
        """Values (C, O) of the coalitions."""
        values = corner_values(self.game, self.contexts, self.grid)
        self.values = values.flatten(0, 1)
        bar.update(self.evaluations)

    def unit_variances(self, surrogates: list[Surrogate]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean variance over pairs (O,) of an antithetic pair of contexts: as it is, and less what surrogates say."""

        def variance(values: torch.Tensor) -> torch.Tensor:
            second = second_difference(self.grid.corners(self.contexts, values.unflatten(0, (len(self.contexts), -1))))
            return successive_variance(unit_means(second, 2)).mean(0)

        said = torch.stack([s.predict(self.coalitions) for s in surrogates], 1)
        return variance(self.values), variance(self.values - said)
