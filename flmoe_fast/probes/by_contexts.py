"""The default estimates where players are many: corner grids, a process through all their values, and a blend.

With many players a coalition drawn at random says nothing about a pair unless the game is smooth. A few are evaluated
first: where a process that is fitted to these predicts them from each other, half of the budget goes to such
coalitions. All else goes to a corner grid, which gives every pair's second difference in every context. Their means are
unbiased. The process that is fitted to the same values knows more where the game is smooth, and it may be wrong where
it is not; how wrong is measured by cross-fitting: every unit of contexts is predicted from all the others, and what is
left of its second differences is averaged. That mean is the unbiased estimate less the process's, and the estimate
moves by a share of it (:func:`flmoe_fast.probes.moments.moved`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from flmoe_fast.coalitions import pack
from flmoe_fast.probes.budget import LEAST_CONTEXTS, MOST_PLAYERS, MOST_ROWS, Spending
from flmoe_fast.probes.by_points import estimate_of, evaluate_pairs, widened
from flmoe_fast.probes.drawing import complementary
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.moments import Draw, chance_margin, combine, moved
from flmoe_fast.probes.noise import noise_share
from flmoe_fast.probes.parity import FIT_POINTS, ParityProcess, parity_kernel
from flmoe_fast.probes.run import (
    BORROWED,
    DrawnGrid,
    Found,
    Run,
    contexts_of,
    joined,
    others_of,
    second_difference,
)
from flmoe_fast.probes.surrogate import signs

#: Complementary pairs that are evaluated first, at most so many and such a share of a budget, if there are so many; and
#: the share of their variance that has to be predicted from each other for a game to be smooth.
PILOT_ROWS, PILOT_SHARE, LEAST_PILOT, SMOOTH = 32, 0.25, 24, 0.85
#: The pilot is independent of what else is drawn.
PILOT_SEED = 0x9E3779B97F4A7C15
#: Fewest complementary pairs, over what whole contexts leave of a budget, that are worth evaluating.
LEAST_EXTRA = 4
#: Values that are predicted at a time.
ROWS = 1 << 12


@dataclass(frozen=True)
class Evaluated:
    """Coalitions (m, n), one of each complementary pair, with the values (m, 2, O) of them and of their complements."""

    coalitions: torch.Tensor
    values: torch.Tensor

    def with_others(self, run: Run, drawn: torch.Tensor) -> Evaluated:
        """These and those of ``drawn`` (C, n) that are not among them, which are evaluated."""
        seen = set(map(tuple, pack(torch.cat([self.coalitions, ~self.coalitions])).tolist()))
        fresh = torch.tensor([tuple(row) not in seen for row in pack(drawn).tolist()], dtype=torch.bool)
        values = evaluate_pairs(run, drawn[fresh]) if bool(fresh.any()) else self.values[:0]
        return Evaluated(torch.cat([self.coalitions, drawn[fresh]]), torch.cat([self.values, values]))


def by_contexts(run: Run, grid: CornerGrid, spending: Spending) -> Found:
    """Estimates from antithetic contexts on a corner grid and from coalitions at random, few or half of all.

    What whole contexts leave of a budget is spent at random.
    """
    total = spending.evaluations
    pilot, predicted = _pilot(run, total)
    if pilot is None:
        return _by_grid(run, grid, spending.contexts // 2 * 2, spending, None)
    if predicted >= SMOOTH and (more := min(total // 2, total - 2 * grid.evaluations) // 2 - len(pilot.values)) > 0:
        pilot = pilot.with_others(run, complementary(run.game.n, more, run.seed))
    found = _by_grid(run, grid, (total - run.evaluations) // grid.evaluations // 2 * 2, spending, pilot)
    return replace(found, facts={**found.facts, "predicted": predicted})


def _pilot(run: Run, budget: int) -> tuple[Evaluated | None, float]:
    """A few complementary pairs, and the share of the variance of their means that they predict when left out."""
    count = min(PILOT_ROWS, int(budget * PILOT_SHARE) // 2)
    if count < LEAST_PILOT or run.game.n <= MOST_PLAYERS or budget > 2 * MOST_ROWS:
        return None, math.nan
    drawn = complementary(run.game.n, count, run.seed ^ PILOT_SEED)
    pilot = Evaluated(drawn, evaluate_pairs(run, drawn))
    even = pilot.values.mean(1)
    left_out = ParityProcess(drawn, pilot.values[:, 0], pilot.values[:, 1]).half(1).left_out
    varies = even.var(0, correction=0) > 0
    share = left_out.square().mean(0)[varies] / even.var(0, correction=0)[varies]
    return pilot, 1.0 - float(share.mean()) if len(share) else 0.0


def _by_grid(run: Run, grid: CornerGrid, contexts: int, spending: Spending, pilot: Evaluated | None) -> Found:
    """Estimates from so many antithetic contexts, and what is left of the budget at random."""
    draws: list[DrawnGrid] = []
    done, found = 0, None
    for total in run.stopping.totals(min(LEAST_CONTEXTS, contexts), contexts, step=2):
        try:
            fresh = run.draw(
                grid, torch.arange(len(grid.pairs)), total - done, replicate=len(draws), keep=True, paired=True
            )
            draws.append(fresh)
        except KeyboardInterrupt:
            if run.stopping.interrupted(len(draws) > 0):
                break
            raise
        done, found = total, None
        if done == contexts:
            break
        if run.stopping.until is not None:
            found = _from_grid(run, grid, joined(draws), 0, pilot)
            if run.stopping.ends(found.sii, found.sii_stderr):
                break
        if run.stopping.late():
            break
    left = 0 if run.stopping.asked else (spending.evaluations - run.evaluations) // 2
    return found or _from_grid(run, grid, joined(draws), left, pilot)


def _from_grid(run: Run, grid: CornerGrid, draw: DrawnGrid, more: int, pilot: Evaluated | None) -> Found:
    """Estimates from one draw, the pilot, and ``more`` complementary pairs of coalitions at random."""
    pairs = len(grid.pairs)
    noise, checks = noise_share(run.game, grid, draw)
    rows = _Rows(draw, grid, _extra(run, more, pilot))
    process = ParityProcess(rows.coalitions, rows.values[:, 0], rows.values[:, 1], rows.fitted)
    smooth, claimed = process.index(grid.pairs, "SII", 2)
    left = _left_of_units(process, rows, draw, grid)  # (units, P, O)
    excess, stderr, degrees = combine([Draw(torch.arange(pairs), left)], pairs, borrowed=BORROWED)
    if len(left) > 1:
        sii, variance, share = moved(smooth, widened(claimed), excess, stderr, chance_margin(left))
    else:  # nothing tells how far the unbiased estimate is to be trusted, but what it leaves is a floor
        sii, share = smooth, torch.zeros(smooth.shape[1], dtype=torch.float64)
        variance, degrees = torch.maximum(widened(claimed), excess.square().mean(0)), torch.full_like(degrees, pairs)
    gaps, gap_stderr, _ = combine([draw.gap], pairs, borrowed=BORROWED)
    also = others_of(run.game, [draw])
    for key, members in run.members_of_triples().items():
        values, square = process.index(members, *key)
        also[key] = estimate_of(run.game, members, values, widened(square).sqrt(), float(len(rows.coalitions)))
    return Found(
        "process and grid",
        sii,
        variance.sqrt(),
        gaps,
        gap_stderr,
        degrees,
        contexts_of([draw], pairs),
        noise,
        checks,
        also,
        {"unbiased_share": share.tolist(), "rough": process.half(1).scales.rough},
    )


def _extra(run: Run, more: int, pilot: Evaluated | None) -> Evaluated | None:
    """The pilot with ``more`` pairs that are evaluated now, if there are any worth it."""
    drawn = complementary(run.game.n, more, run.seed)
    if len(drawn) < LEAST_EXTRA:
        return pilot
    return Evaluated(drawn, evaluate_pairs(run, drawn)) if pilot is None else pilot.with_others(run, drawn)


class _Rows:
    """The distinct complementary pairs among a draw's coalitions and extra ones, the former unit by unit.

    Attributes
    ----------
    coalitions : bool (m, n)
        One of each pair: the one that has player 0.
    values : (m, 2, O)
        Its value and its complement's.
    number : LongTensor (units, G)
        The row of every corner of every unit; -1 where its unit was left out because the process takes no more rows.
    fitted : LongTensor
        Rows of the whole units from which scales are estimated.
    """

    def __init__(self, draw: DrawnGrid, grid: CornerGrid, extra: Evaluated | None):
        assert draw.values is not None
        units, corners = len(draw.contexts) // 2, grid.evaluations
        taken = torch.linspace(0, units - 1, min(units, max(1, MOST_ROWS // corners))).long().unique()
        coalitions = (draw.contexts[::2][taken, None] ^ grid.toggled).flatten(0, 1)
        values = torch.stack([draw.values[::2][taken], draw.values[1::2][taken]], 2).flatten(0, 1)
        if extra is not None:
            coalitions, values = torch.cat([coalitions, extra.coalitions]), torch.cat([values, extra.values])
        turned = ~coalitions[:, 0]
        coalitions = torch.where(turned[:, None], ~coalitions, coalitions)
        values = torch.where(turned[:, None, None], values.flip(1), values)
        first: dict[tuple[int, ...], int] = {}
        rows = [first.setdefault(row, len(first)) for row in map(tuple, pack(coalitions).tolist())]
        number = torch.tensor(rows)
        where = torch.zeros(len(first), dtype=torch.long).scatter_(0, number.flip(0), torch.arange(len(rows)).flip(0))
        self.coalitions, self.values = coalitions[where], values[where]
        self.number = torch.full((units, corners), -1)
        self.number[taken] = number[: len(taken) * corners].view(-1, corners)
        some = torch.linspace(0, len(taken) - 1, max(1, min(len(taken), FIT_POINTS // corners))).long()
        self.fitted = torch.cat([self.number[taken[some]].flatten(), number[len(taken) * corners :]]).unique()
        if len(self.fitted) > 2 * FIT_POINTS:
            self.fitted = self.fitted[:: -(-len(self.fitted) // (2 * FIT_POINTS))]


def _left_of_units(process: ParityProcess, rows: _Rows, draw: DrawnGrid, grid: CornerGrid) -> torch.Tensor:
    """Second differences (units, P, O) of what predicting each unit from all others leaves."""
    assert draw.values is not None
    half = process.half(1)
    left = []
    for unit, numbers in enumerate(rows.number):
        if int(numbers[0]) >= 0:
            own = numbers.unique()
            rest = torch.zeros(len(rows.coalitions), half.solved.shape[1], dtype=torch.float64)
            rest[own] = torch.linalg.solve(half.inverse[own][:, own], half.solved[own])
            left.append(rest[numbers])
            continue
        coalitions = draw.contexts[2 * unit] ^ grid.toggled
        even = draw.values[2 * unit : 2 * unit + 2].mean(0)
        said = parity_kernel(signs(coalitions), half.x, half.scales.rate, 1) @ half.solved + half.mean
        left.append(even - said)
    return second_difference(grid.corners(draw.contexts[::2], torch.stack(left)))
