"""Coalitions that a surrogate is fitted to: drawn by the Shapley law of sizes, each evaluated once."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from flmoe_fast.coalitions import pack, sample_contexts, unpack
from flmoe_fast.games.game import Game

#: Draws without anything new after which the game counts as exhausted.
PATIENCE = 4


class Points:
    """A growing set of distinct coalitions with their values.

    Attributes
    ----------
    coalitions : bool (m, n)
        In random order.
    values : float64 (m, O)
    spent : int
        Evaluations made here.
    """

    def __init__(self, game: Game, seed: int, bar: tqdm):
        self.game, self.seed, self.bar = game, seed, bar
        self.coalitions = torch.zeros(0, game.n, dtype=torch.bool)
        self.values = torch.zeros(0, 0, dtype=torch.float64)
        self.spent = 0
        self._replicate = 0

    @property
    def count(self) -> int:
        """Coalitions evaluated so far, m."""
        return len(self.coalitions)

    def evaluate(self, count: int) -> None:
        """Grow to ``count`` coalitions, or to all there are."""
        fresh = self._fresh(min(count, 2**self.game.n))
        blocks = []
        for block in fresh.split(max(1, self.game.block)):
            values = self.game(block)
            blocks.append(values[:, None] if values.dim() == 1 else values)
            self.spent += len(block)
            self.bar.update(len(block))
        if blocks:
            self.add(fresh, torch.cat(blocks))

    def add(self, coalitions: torch.Tensor, values: torch.Tensor) -> None:
        """Take in coalitions (C, n) with their values (C, O); what is there already is left out."""
        seen = set(map(tuple, pack(self.coalitions).tolist()))
        new = []
        for number, row in enumerate(map(tuple, pack(coalitions).tolist())):
            if row not in seen:
                seen.add(row)
                new.append(number)
        values = torch.cat([*([self.values] if self.count else []), values[new]])
        coalitions = torch.cat([self.coalitions, coalitions[new]])
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(self.seed % 2**63))
        self.coalitions, self.values = coalitions[order], values[order]

    def _fresh(self, count: int) -> torch.Tensor:
        """Coalitions (count - m, n) that were not evaluated before."""
        n = self.game.n
        seen = set(map(tuple, pack(self.coalitions).tolist()))
        found: list[tuple[int, ...]] = []
        idle = 0
        while len(seen) < count and idle < PATIENCE:
            draw = 2 * max(2, (count - len(seen) + 1) // 2)
            words = sample_contexts(n, draw, seed=self.seed, replicate=self._replicate).words
            self._replicate += 1
            # A draw is a sample only as a whole: an even share of its pairs is kept, not its first rows.
            keep = torch.randperm(draw // 2, generator=torch.Generator().manual_seed(self._replicate))
            before = len(seen)
            for k in keep.tolist():
                for row in (tuple(words[2 * k].tolist()), tuple(words[2 * k + 1].tolist())):
                    if row not in seen and len(seen) < count:
                        seen.add(row)
                        found.append(row)
            idle = idle + 1 if len(seen) == before else 0
        if len(seen) < count and n <= 16:  # the draws avoid what is left: take it in order
            rows = unpack(torch.arange(2**n)[:, None], n)
            for row in map(tuple, pack(rows).tolist()):
                if row not in seen and len(seen) < count:
                    seen.add(row)
                    found.append(row)
        if not found:
            return torch.zeros(0, n, dtype=torch.bool)
        return unpack(torch.tensor(found, dtype=torch.int64).view(len(found), -1), n)
