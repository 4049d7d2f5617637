"""What the process through complementary pairs says of every head: on which scale, and what has no closed form.

A head is described by the process itself where that predicts left-out values best, by a process on the logit scale
where that does (:mod:`flmoe_fast.probes.link`), or on its levels where it takes few values. Only the first has indices
in closed form; those of the others, and all gaps, are averages over games drawn from the posterior.
"""

from __future__ import annotations

import torch

from flmoe_fast.probes.cube import table_gaps, table_indices
from flmoe_fast.probes.draws import DRAWS, Drawn, GapEstimate, gap_estimate, levels_of, sampled_gaps
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.link import left_out_error, link_of
from flmoe_fast.probes.parity import ParityProcess
from flmoe_fast.probes.tables import TableGames, TableSource

#: Most players and heads whose games are drawn as tables, and values of gaps that are read off these at most.
TABLED_PLAYERS, TABLED_HEADS, WORK = 16, 8, 1 << 24
#: Draws from which the indices of a curved head are averaged.
INDEX_DRAWS = 32
#: What the variances of such indices are multiplied by, how much more for every scale that was estimated from the
#: points at hand, and the share of the pairs' mean variance in each pair's.
WIDER, SCALES, SHARED = 1.25, 4.0, 0.2


class Posterior:
    """Everything there is to know about a game from a process fitted to it.

    Parameters
    ----------
    process : ParityProcess
        Of the values themselves.
    seed : int
        Of the draws.

    Attributes
    ----------
    scales : list of str
        "identity", "logit" or "levels" for every head.
    curved : list of int
        Heads whose indices have no closed form.
    """

    def __init__(self, process: ParityProcess, seed: int):
        self.process, self.seed = process, seed
        n, self.heads = process.coalitions.shape[1], process.values.shape[1]
        self._tabled = n <= TABLED_PLAYERS and self.heads <= TABLED_HEADS
        self._sources: list[tuple[TableSource, int]] = []
        self.scales = ["identity"] * self.heads
        if self._tabled:
            plain = TableSource(process, None, process.values, process.complements, seed)
            self._sources = [self._source(head, plain) for head in range(self.heads)]
        self.curved = [head for head, scale in enumerate(self.scales) if scale != "identity"]
        self._tables = {head: self._drawn(head, INDEX_DRAWS) for head in self.curved}

    def _source(self, head: int, plain: TableSource) -> tuple[TableSource, int]:
        """Where the tables of a head come from, and which head it is there."""
        process = self.process
        seen = torch.cat([process.values[:, head], process.complements[:, head]])
        if levels_of(seen) is not None:
            self.scales[head] = "levels"
            return plain, head
        link = link_of(seen)
        if link is None:
            return plain, head
        upper, lower = process.values[:, head, None], process.complements[:, head, None]
        linked = ParityProcess(process.coalitions, link.of(upper), link.of(lower))
        if left_out_error(linked, 0, link) >= left_out_error(process, head, None):
            return plain, head
        self.scales[head] = "logit"
        return TableSource(linked, link, upper, lower, self.seed), 0

    def _drawn(self, head: int, count: int) -> torch.Tensor:
        source, own = self._sources[head]
        return source.draw(own, count)

    def index(self, head: int, members: torch.Tensor, name: str, order: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and variances (M,) of an index of ``members`` (M, order) of a curved head."""
        found = self._index(self._tables[head], members, name, order)
        mean, variance = found[:, 1:].mean(1), found[:, 1:].var(1)
        if self.scales[head] == "levels":
            mean, variance = (found[:, 0] + mean) / 2, variance + (found[:, 0] - mean).square()
        wider = WIDER * (1 + SCALES * self.process.coalitions.shape[1] / len(self.process.coalitions))
        return mean, wider * ((1 - SHARED) * variance + SHARED * variance.mean())

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
            gaps, sampling = sampled_gaps(games, grid, kind, self.seed)
            return gap_estimate(gaps, kind, self.process, sampling)
        tables = [
            self._tables[head][: 1 + DRAWS] if head in self._tables else self._drawn(head, DRAWS)
            for head in range(self.heads)
        ]
        if len(grid.pairs) * self.heads * tables[0].shape[1] // 4 * DRAWS <= WORK:
            return gap_estimate(torch.stack([table_gaps(t, grid.pairs, kind) for t in tables], 2), kind, self.process)
        gaps, sampling = sampled_gaps(TableGames(torch.stack(tables)), grid, kind, self.seed)
        return gap_estimate(gaps, kind, self.process, sampling)
