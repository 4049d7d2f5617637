"""Whole games drawn from the posterior of a process, as tables of all their values.

For few players a draw is a few Walsh transforms (:mod:`flmoe_fast.probes.cube`), and any index or gap of it an average
over its table: also where values are linked (:mod:`flmoe_fast.probes.link`) or stepped, so that no index has a closed
form. Every table keeps what was evaluated.
"""

from __future__ import annotations

import torch

from flmoe_fast.probes.cube import codes, sizes, spectrum, walsh
from flmoe_fast.probes.draws import Spread
from flmoe_fast.probes.link import Logit
from flmoe_fast.probes.parity import Half, ParityProcess


class TableSource:
    """Draws tables of the heads of one process.

    Parameters
    ----------
    process : ParityProcess
        Of values, or of linked ones.
    link : Logit, optional
    values, complements : (m, O)
        What was evaluated, not linked.
    seed : int
    """

    def __init__(
        self, process: ParityProcess, link: Logit | None, values: torch.Tensor, complements: torch.Tensor, seed: int
    ):
        self.process, self.link, self._seen = process, link, (values, complements)
        self._seed = seed % 2**63
        n = process.coalitions.shape[1]
        self._size = 2**n
        here = codes(process.coalitions)
        self._at = here, self._size - 1 - here
        self._halves = process.half(1), process.half(-1)
        self._spectra = tuple(spectrum(half.scales.rate) for half in self._halves)
        self._odd = sizes(n) % 2 == 1

    def draw(self, head: int, count: int) -> torch.Tensor:
        """Values (1 + count, 2^n) of one head: of the posterior mean, then of ``count`` draws, an even number.

        The same every time, and of the same random numbers for every process and head: equal heads have equal games.
        """
        even, odd = self._halves
        prior = self._prior(head, count // 2, torch.Generator().manual_seed(self._seed))
        here, there = (prior[:, at] for at in self._at)
        solved = [
            torch.cat([half.solved[:, head, None].T, -(here + half.sign * there) / 2 @ half.inverse])
            for half in self._halves
        ]
        weights = torch.zeros(1 + len(prior), self._size, dtype=torch.float64)
        weights[:, self._at[0]] = (solved[0] + solved[1]) / 2
        weights[:, self._at[1]] = (solved[0] - solved[1]) / 2
        found = walsh(walsh(weights) * torch.where(self._odd, self._spectra[1], self._spectra[0]))
        mean, deviation = found[0] + even.mean[head] + odd.mean[head], found[1:] + prior
        tables = Spread(self.process, head).draws(mean, deviation)
        if self.link is not None:
            tables = self.link.inverse(tables)
        for at, seen in zip(self._at, self._seen):
            tables[:, at] = seen[:, head]
        return tables

    def _prior(self, head: int, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draws (count, 2^n) from the prior, their rough part included."""
        variance = [half.amplitude[head] * own for half, own in zip(self._halves, self._spectra)]
        found = torch.randn(count, self._size, generator=generator, dtype=torch.float64)
        found = walsh(found.mul_(torch.where(self._odd, variance[1], variance[0]).sqrt()))
        for half in self._halves:
            found += self._rough(half, head, count, generator)
        return found

    def _rough(self, half: Half, head: int, count: int, generator: torch.Generator) -> torch.Tensor:
        upper = torch.randn(count, self._size // 2, generator=generator, dtype=torch.float64)
        upper *= (half.amplitude[head] * half.scales.rough).sqrt()
        return torch.cat([upper, half.sign * upper.flip(1)], 1)


class TableGames:
    """Games drawn as tables, asked for values."""

    def __init__(self, tables: torch.Tensor):
        self._tables = tables  # (O, 1 + D, 2^n)

    def values(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (C, 1 + D, O) of coalitions (C, n) and of their complements: first the posterior mean, then draws."""
        here = codes(coalitions)
        there = self._tables.shape[2] - 1 - here
        return self._tables[:, :, here].permute(2, 1, 0), self._tables[:, :, there].permute(2, 1, 0)
