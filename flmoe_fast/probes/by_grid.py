"""Estimates from corner grids, with or without a second stage for the pairs that vary most."""

from __future__ import annotations

import torch

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.moments import Draw, combine, successive_variance
from flmoe_fast.probes.run import Found, Run, noise_share

DEFAULT_CONTEXTS = 64
#: Degrees of freedom that a gap's variance borrows from the other pairs'.
BORROWED = 1.0
#: Fewest units from which a variance is worth choosing pairs by.
PILOT_UNITS = 3


def grid_plan(grid: CornerGrid, contexts: int | None, budget: int | None, adaptive: bool | None) -> tuple[int, bool]:
    """Contexts of the first draw, and whether a second one follows."""
    if budget is None:
        if adaptive:
            raise ArgumentError("adaptive", True, "a budget to allocate, or adaptive=False")
        return integer("contexts", DEFAULT_CONTEXTS if contexts is None else contexts, least=1), False
    if contexts is not None:
        raise ArgumentError("budget", "a budget together with contexts", "one of the two")
    affordable = integer("budget", budget, least=1) // grid.evaluations
    if affordable < 1:
        raise ArgumentError("budget", budget, f"at least {grid.evaluations} evaluations, the cost of one context")
    half = 2 * max(PILOT_UNITS, affordable // 4)
    if adaptive is not False and affordable > half:
        return half, True
    return affordable - affordable % 2 if affordable >= 4 else affordable, False


def by_grid(run: Run, grid: CornerGrid, left: int, count: int, adaptive: bool) -> Found:
    """Estimates from ``count`` contexts and, where adaptive, what is left for the pairs that vary most."""
    start, pairs = run.evaluations, len(grid.pairs)
    first = run.draw(grid, torch.arange(pairs), count)
    noise, checks = noise_share(run.game, grid, first)
    if adaptive:
        again, more = _worth_repeating(grid.pairs, first.sii, left - (run.evaluations - start))
        if more:
            run.draw(CornerGrid.of(grid.pairs[again], run.game.n), again, more)
    sii, sii_stderr, degrees = combine(run.sii, pairs)
    gaps, gap_stderr, _ = combine(run.gap, pairs, borrowed=BORROWED)
    if run.controls:
        sii_stderr = (sii_stderr.square() + torch.stack([c.sii_sampling for c in run.controls], 1)).sqrt()
    if run.controls and run.gap[0].defined is None:  # a ratio is not corrected
        gap_stderr = (gap_stderr.square() + torch.stack([c.gap_sampling for c in run.controls], 1)).sqrt()
    method = "grid residual" if run.controls else "grid"
    return Found(method, sii, sii_stderr, gaps, gap_stderr, degrees, run.contexts(pairs), noise, checks, run.others())


def _worth_repeating(pairs: torch.Tensor, pilot: Draw, left: int) -> tuple[torch.Tensor, int]:
    """Pairs to spend ``left`` evaluations on, and in how many contexts.

    Pairs are taken in the order of their variance, as many as make the expected sum of squared errors smallest: few
    pairs make contexts cheap. Every head counts alike, whatever its scale.
    """
    variance = successive_variance(pilot.total)  # (P, O)
    variance = (variance / variance.sum(0).clamp(min=torch.finfo(variance.dtype).tiny)).sum(1)
    order = variance.argsort(descending=True)
    done = len(pilot.total)
    best = (float(variance.sum()) / done, order[:0], 0)
    players: set[int] = set()
    spent = torch.zeros((), dtype=variance.dtype)
    for size, pair in enumerate(order.tolist(), start=1):
        players.update(pairs[pair].tolist())
        spent = spent + variance[pair]
        units = left // (2 * (1 + len(players) + size))
        if units < 2:
            break
        expected = float(spent / (done + units) + (variance.sum() - spent) / done)
        if expected < best[0]:
            best = (expected, order[:size], 2 * units)
    return best[1].sort().values, best[2]
