"""What the process through complementary pairs says of every head: on which scale, and what has no closed form.

A head is described by the process itself, mixed with one on the logit scale as far as that predicts left-out values
better (:mod:`flmoe_fast.probes.link`), or on its levels where it takes few values. Only the process itself has indices
in closed form; those of the others, and all gaps, are averages over games drawn from the posterior.
"""

from __future__ import annotations

import torch

from flmoe_fast.probes.cube import table_gaps, table_indices
from flmoe_fast.probes.draws import DRAWS, Drawn, GapEstimate, gap_estimate, levels_of, sampled_gaps
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.link import Logit, link_of, share_of_link, unseen_weights
from flmoe_fast.probes.parity import ParityProcess
from flmoe_fast.probes.tables import TableGames, TableSource

#: Most players and heads whose games are drawn as tables, and values of gaps that are read off these at most.
TABLED_PLAYERS, TABLED_HEADS, WORK = 16, 8, 1 << 24
#: Share of the logit scale that is worth leaving the closed form for.
LEAST_SHARE = 0.05
#: Draws from which the indices of a curved head are averaged.
INDEX_DRAWS = 32
#: What the variances of such indices are multiplied by, how much more for every scale that was estimated from the
#: points at hand, and the share of the pairs' mean variance in each pair's.
WIDER, SCALES, SHARED = 1.5, 4.0, 0.2
#: Share of the values' range that is lost to rounding where a smooth process makes equations nearly singular.
ROUNDING = 2e-7


class Posterior:
    """Everything there is to know about a game from a process fitted to it.

    Parameters
    ----------
    process : ParityProcess
        Of the values themselves.
    seed : int
        Of the draws.
    order : int
        Of the indices that the scale is chosen for.

    Attributes
    ----------
    logit_share : list of float
        How much of every head's prediction is made on the logit scale.
    levels : list of bool
        Whether a head takes but a few values.
    curved : list of int
        Heads whose indices have no closed form.
    """

    def __init__(self, process: ParityProcess, seed: int, order: int = 2):
        self.process, self.seed, self.order = process, seed, order
        n, self.heads = process.coalitions.shape[1], process.values.shape[1]
        self._tabled = n <= TABLED_PLAYERS and self.heads <= TABLED_HEADS
        seen = torch.cat([process.values, process.complements])
        self._seen = len(seen)
        self.levels = [self._tabled and levels_of(column) is not None for column in seen.T]
        self.logit_share = [0.0] * self.heads
        self._linked: dict[int, TableSource] = {}
        if self._tabled:
            self._plain = TableSource(process, None, process.values, process.complements, seed)
            for head, column in enumerate(seen.T):
                link = None if self.levels[head] else link_of(column)
                if link is not None:
                    self._try(head, link)
        self.curved = [head for head in range(self.heads) if self.levels[head] or self.logit_share[head] > 0]
        self._tables = {head: self._drawn(head, INDEX_DRAWS) for head in self.curved}
        self._apart = {head: self._difference(head) for head in self._linked}

    def _try(self, head: int, link: Logit) -> None:
        process = self.process
        upper, lower = process.values[:, head, None], process.complements[:, head, None]
        linked = ParityProcess(process.coalitions, link.of(upper), link.of(lower))
        share = share_of_link(process, head, linked, link, self.order)
        if share >= LEAST_SHARE:
            self.logit_share[head] = share
            self._linked[head] = TableSource(linked, link, upper, lower, self.seed)

    def _drawn(self, head: int, count: int) -> torch.Tensor:
        share = self.logit_share[head]
        if share == 1:
            return self._linked[head].draw(0, count)
        found = self._plain.draw(head, count)
        # The same random numbers on both scales, so that what is not known does not average out.
        return torch.lerp(found, self._linked[head].draw(0, count), share) if share > 0 else found

    def _difference(self, head: int) -> torch.Tensor:
        """What the two predictions (1, 2^n) of a head differ by, times the geometric mean of their shares."""
        share = self.logit_share[head]
        plain, linked = self._plain.draw(head, 2)[:1], self._linked[head].draw(0, 2)[:1]
        return (share * (1 - share)) ** 0.5 * (plain - linked)

    def index(self, head: int, members: torch.Tensor, name: str, order: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and variances (M,) of an index of ``members`` (M, order) of a curved head."""
        found = self._index(self._tables[head], members, name, order)
        mean, variance = found[:, 1:].mean(1), found[:, 1:].var(1)
        if self.levels[head]:
            mean, variance = (
                (found[:, 0] + mean) / 2,
                variance + (found[:, 0] - mean).square() + self._missed(head, order),
            )
        if head in self._apart:
            variance = variance + self._index(self._apart[head], members, name, order)[:, 0].square()
            variance = variance + (ROUNDING * self._span(head)) ** 2
        wider = WIDER * (1 + SCALES * self.process.coalitions.shape[1] / len(self.process.coalitions))
        return mean, wider * ((1 - SHARED) * variance + SHARED * variance.mean())

    def _missed(self, head: int, order: int) -> float:
        """Variance of an index of that order that a step adds which none of the evaluated values shows.

        By Laplace's rule of succession an unseen value is wrong with a chance of one in as many as were seen, and then
        by up to the range of the values. No estimate of a stepped game is exact before everything is seen.
        """
        chance = 1 / (2 * len(self.process.values) + 2)
        return float(chance * self._span(head) ** 2 / 2 * unseen_weights(self.process.coalitions, order).sum())

    def _span(self, head: int) -> float:
        """Range of the values seen."""
        upper, lower = self.process.values[:, head], self.process.complements[:, head]
        return float(torch.maximum(upper.max(), lower.max()) - torch.minimum(upper.min(), lower.min()))

    def _index(self, tables: torch.Tensor, members: torch.Tensor, name: str, order: int) -> torch.Tensor:
        if (name, order) != ("k-SII", 1):
            return table_indices(tables, members, name, order)
        n = self.process.coalitions.shape[1]
        pairs = torch.combinations(torch.arange(n), 2)
        of = (pairs[:, :, None] == members[:, 0]).any(1).double().T
        return table_indices(tables, members, "SV", 1) - 0.5 * of @ table_indices(tables, pairs, "SII", 2)

    def gaps(self, grid: CornerGrid, kind: str) -> GapEstimate:
        """Gaps of the grid's pairs: over every context where these are few, over sampled ones elsewhere."""
        if not self._tabled:
            games = Drawn(self.process, DRAWS, self.seed)
            gaps, sampling = sampled_gaps(games, grid, kind, self.seed, self._seen)
            return gap_estimate(gaps, kind, self.process, sampling)
        tables = [
            self._tables[head][: 1 + DRAWS] if head in self._tables else self._drawn(head, DRAWS)
            for head in range(self.heads)
        ]
        if len(grid.pairs) * self.heads * tables[0].shape[1] // 4 * DRAWS <= WORK:
            return gap_estimate(torch.stack([table_gaps(t, grid.pairs, kind) for t in tables], 2), kind, self.process)
        gaps, sampling = sampled_gaps(TableGames(torch.stack(tables)), grid, kind, self.seed, self._seen)
        return gap_estimate(gaps, kind, self.process, sampling)
