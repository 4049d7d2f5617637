"""The default estimates where players are many: corner grids, a process through all their values, and a blend.

With many players a coalition drawn at random says nothing about a pair, so the evaluations are those of a corner grid,
which gives every pair's second difference in every context. Their means are unbiased. The process that is fitted to the
same values knows more where the game is smooth, and it may be wrong where it is not; how wrong is measured by
cross-fitting: every unit of contexts is predicted from all the others, and what is left of its second differences is
averaged. That mean is the unbiased estimate less the process's, and the estimate moves by a share of it
(:func:`flmoe_fast.probes.moments.moved`).
"""

from __future__ import annotations

import torch

from flmoe_fast.coalitions import pack
from flmoe_fast.probes.budget import LEAST_CONTEXTS, MOST_ROWS, Spending
from flmoe_fast.probes.by_points import estimate_of, evaluate_pairs, widened
from flmoe_fast.probes.drawing import complementary
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.moments import Draw, combine, moved
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

#: Fewest complementary pairs, over what whole contexts leave of a budget, that are worth evaluating.
LEAST_EXTRA = 4
#: Values that are predicted at a time.
ROWS = 1 << 12


def by_contexts(run: Run, grid: CornerGrid, spending: Spending) -> Found:
    """Estimates from antithetic contexts on a corner grid, and what is left of the budget at random."""
    draws: list[DrawnGrid] = []
    done, found = 0, None
    for total in run.stopping.totals(LEAST_CONTEXTS, spending.contexts // 2 * 2, step=2):
        try:
            draws.append(run.draw(grid, torch.arange(len(grid.pairs)), total - done, replicate=len(draws), keep=True))
        except KeyboardInterrupt:
            if run.stopping.interrupted(len(draws) > 0):
                break
            raise
        done, found = total, None
        if done == spending.contexts // 2 * 2:
            break
        if run.stopping.until is not None:
            found = _from_grid(run, grid, joined(draws), 0)
            if run.stopping.ends(found.sii, found.sii_stderr):
                break
        if run.stopping.late():
            break
    left = 0 if run.stopping.asked else (spending.evaluations - run.evaluations) // 2
    return found or _from_grid(run, grid, joined(draws), left)


def _from_grid(run: Run, grid: CornerGrid, draw: DrawnGrid, more: int) -> Found:
    """Estimates from one draw and ``more`` complementary pairs of coalitions at random."""
    pairs = len(grid.pairs)
    noise, checks = noise_share(run.game, grid, draw)
    extra = complementary(run.game.n, more, run.seed)
    rows = _Rows(draw, grid, extra, evaluate_pairs(run, extra) if len(extra) >= LEAST_EXTRA else None)
    process = ParityProcess(rows.coalitions, rows.values[:, 0], rows.values[:, 1], rows.fitted)
    smooth, claimed = process.index(grid.pairs, "SII", 2)
    left = _left_of_units(process, rows, draw, grid)  # (units, P, O)
    excess, stderr, degrees = combine([Draw(torch.arange(pairs), left)], pairs, borrowed=BORROWED)
    sii, variance, share = moved(smooth, widened(claimed), excess, stderr)
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

    def __init__(self, draw: DrawnGrid, grid: CornerGrid, extra: torch.Tensor, extra_values: torch.Tensor | None):
        assert draw.values is not None
        units, corners = len(draw.contexts) // 2, grid.evaluations
        taken = torch.linspace(0, units - 1, min(units, max(1, MOST_ROWS // corners))).long().unique()
        coalitions = (draw.contexts[::2][taken, None] ^ grid.toggled).flatten(0, 1)
        values = torch.stack([draw.values[::2][taken], draw.values[1::2][taken]], 2).flatten(0, 1)
        if extra_values is not None:
            coalitions, values = torch.cat([coalitions, extra]), torch.cat([values, extra_values])
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
