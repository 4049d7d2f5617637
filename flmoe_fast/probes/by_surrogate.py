"""Estimates from surrogates of every output."""

from __future__ import annotations

import torch

from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import IndexEstimate
from flmoe_fast.probes.noise import fresh_noise_share
from flmoe_fast.probes.points import Points
from flmoe_fast.probes.reading import Estimate, read
from flmoe_fast.probes.run import Found, Run, per_head
from flmoe_fast.probes.surrogate import Surrogate

#: Fewest coalitions worth fitting a surrogate to.
LEAST_POINTS = 32
#: Evaluations of the first batch, where something else than the budget may end a probe.
FIRST_POINTS = 128
#: Share of the pairs' mean variance that is added to each pair's: a surrogate that errs by more than it knows errs on
#: pairs it takes for well known. Chosen by the coverage on games of digits.
SHARED = 0.05


def by_surrogate(run: Run, grid: CornerGrid, budget: int) -> Found:
    """Estimates from surrogates fitted to coalitions drawn at random, one for every output."""
    points = Points(run.game, run.seed, run.bar)
    found: Found | None = None
    before = run.evaluations
    for total in run.stopping.totals(min(FIRST_POINTS, budget), budget):
        try:
            points.evaluate(total)
        except KeyboardInterrupt:
            if run.stopping.interrupted(points.count >= LEAST_POINTS):
                break
            raise
        finally:
            run.evaluations = before + points.spent
        found = None
        if total == budget:
            break
        if run.stopping.until is not None:
            found = _from_points(run, grid, points)
            if run.stopping.ends(found.sii, found.sii_stderr):
                break
        if run.stopping.late():
            break
    return _from_points(run, grid, points) if found is None else found


def _from_points(run: Run, grid: CornerGrid, points: Points) -> Found:
    """Estimates from all that was evaluated."""
    game, pairs = run.game, len(grid.pairs)
    surrogates = [Surrogate(points.coalitions, column) for column in points.values.T]
    readings = [read(s, grid, game.n, run.gap_kind, run.also, run.seed) for s in surrogates]

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
    sii, sii_stderr, degrees = stacked([reading.sii for reading in readings])
    spread = torch.stack([(reading.unit_variance * 2).mean() for reading in readings])
    noise, checks = fresh_noise_share(game, grid, run.seed, run.evaluations, spread)
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
        {"link": [s.link for s in surrogates], "explained": [s.explained for s in surrogates]},
    )
