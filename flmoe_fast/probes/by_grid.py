"""Estimates from corner grids, with or without a second stage for the pairs that vary most."""

from __future__ import annotations

import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.probes.budget import Spending
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.moments import Draw, combine, successive_variance
from flmoe_fast.probes.noise import noise_share
from flmoe_fast.probes.run import BORROWED, DrawnGrid, Found, Run, contexts_of, others_of

#: Fewest units of a first draw whose variances are worth choosing pairs by: the pairs that by chance vary little are
#: those that by chance are small, and with fewer units that shrinks the estimates.
PILOT_UNITS = 12
#: Contexts of the first batch, where something else than the budget may end a probe.
FIRST_CONTEXTS = 8


def by_grid(run: Run, grid: CornerGrid, spending: Spending, adaptive: bool) -> Found:
    """Estimates from whole contexts; where ``adaptive``, half of a budget goes to the pairs that vary most.

    Nothing is where something else than the budget may end it: then contexts come in batches for all pairs.
    """
    if not spending.contexts:
        least = f"at least {grid.evaluations} evaluations, the cost of one context"
        raise ArgumentError("budget", spending.evaluations, least)
    pairs, pilot = len(grid.pairs), 2 * max(PILOT_UNITS, spending.contexts // 4)
    adaptive = adaptive and spending.contexts > pilot and not run.stopping.asked
    draws = _in_batches(run, grid, pilot if adaptive else spending.contexts)
    noise, checks = noise_share(run.game, grid, draws[0])
    if adaptive:
        again, more = _worth_repeating(grid.pairs, draws[0].sii, spending.evaluations - run.evaluations)
        if more:
            draws.append(run.draw(CornerGrid.of(grid.pairs[again], run.game.n), again, more, replicate=1))
    sii, sii_stderr, degrees = combine([draw.sii for draw in draws], pairs, borrowed=BORROWED)
    gaps, gap_stderr, _ = combine([draw.gap for draw in draws], pairs, borrowed=BORROWED)
    return Found(
        "grid",
        sii,
        sii_stderr,
        gaps,
        gap_stderr,
        degrees,
        contexts_of(draws, pairs),
        noise,
        checks,
        others_of(run.game, draws),
    )


def _in_batches(run: Run, grid: CornerGrid, contexts: int) -> list[DrawnGrid]:
    """Draws of so many contexts together, or of fewer if something ends them; a single one where nothing may."""
    pairs = torch.arange(len(grid.pairs))
    draws: list[DrawnGrid] = []
    done = 0
    for total in run.stopping.totals(min(FIRST_CONTEXTS, contexts), contexts, step=2):
        try:
            draws.append(run.draw(grid, pairs, total - done, replicate=len(draws)))
        except KeyboardInterrupt:
            if run.stopping.interrupted(len(draws) > 0):
                break
            raise
        done = total
        if done == contexts:
            break
        if run.stopping.until is not None:
            sii, stderr, _ = combine([draw.sii for draw in draws], len(pairs), borrowed=BORROWED)
            if run.stopping.ends(sii, stderr):
                break
        if run.stopping.late():
            break
    return draws


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
