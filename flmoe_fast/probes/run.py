"""One run of a probe: evaluates draws of contexts and counts what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.engines.engine import Reduction
from flmoe_fast.games.game import Game
from flmoe_fast.probes.gap import LEAST_JOINT_COST, redundancy_gap
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import OF_TRIPLES, IndexEstimate, complete_players, contrast, probability
from flmoe_fast.probes.moments import Draw, combine, unit_means
from flmoe_fast.probes.progress import progress_bar
from flmoe_fast.probes.stopping import Stopping

#: Degrees of freedom that every variance borrows from those of the other pairs.
BORROWED = 1.0


@dataclass(frozen=True)
class Found:
    """What a method found: (P, O) estimates and standard errors, and how.

    ``facts`` are what a result says about the way beside the method's name; JSON types only.
    """

    method: str
    sii: torch.Tensor
    sii_stderr: torch.Tensor
    gap: torch.Tensor
    gap_stderr: torch.Tensor
    degrees: torch.Tensor
    contexts: torch.Tensor
    noise: torch.Tensor
    checks: int
    also: dict[tuple[str, int], IndexEstimate]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DrawnGrid:
    """Samples of one draw of contexts on one grid.

    Attributes
    ----------
    chosen : LongTensor (P',)
        The grid's pairs among all that were asked for.
    contexts : BoolTensor (K, n)
    per_unit : int
        Contexts of a unit: 2 where they come with their complements.
    second : Tensor (K, P', O)
        Second differences.
    sii, gap : Draw
    others : dict of (name, order) to (members, unit means (m, M, O))
        Samples of the other indices.
    values : Tensor (K, G, O) or None
        All values, where they were asked for.
    """

    chosen: torch.Tensor
    contexts: torch.Tensor
    per_unit: int
    second: torch.Tensor
    sii: Draw
    gap: Draw
    others: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]
    values: torch.Tensor | None


def joined(draws: list[DrawnGrid]) -> DrawnGrid:
    """Draws on one grid, all with their values, as one."""
    if len(draws) == 1:
        return draws[0]
    first = draws[0]

    def both(parts: list[Draw]) -> Draw:
        defined = [part.defined for part in parts if part.defined is not None]
        return Draw(first.chosen, torch.cat([part.total for part in parts]), torch.cat(defined) if defined else None)

    values = [draw.values for draw in draws if draw.values is not None]
    return DrawnGrid(
        first.chosen,
        torch.cat([draw.contexts for draw in draws]),
        first.per_unit,
        torch.cat([draw.second for draw in draws]),
        both([draw.sii for draw in draws]),
        both([draw.gap for draw in draws]),
        {
            key: (members, torch.cat([draw.others[key][1] for draw in draws]))
            for key, (members, _) in first.others.items()
        },
        torch.cat(values) if values else None,
    )


class Run:
    """Evaluates for one call and counts what it costs."""

    def __init__(
        self,
        game: Game,
        gap: str,
        seed: int,
        progress: bool,
        also: tuple[tuple[str, int], ...],
        total: int,
        triples: torch.Tensor | None = None,
        stopping: Stopping | None = None,
    ):
        self.game, self.gap_kind, self.seed, self.also, self.triples = game, gap, seed, also, triples
        self.stopping = stopping or Stopping()
        self.bar = progress_bar(total, "interactions", progress)
        self.evaluations = 0

    def members_of_triples(self) -> dict[tuple[str, int], torch.Tensor]:
        """Members (T, 3) of every index of order 3 that was asked for."""
        if self.triples is None:
            return {}
        names = ["SII", *(name for name, order in self.also if order == 2 and probability(name)[0] in OF_TRIPLES)]
        return {(name, 3): self.triples for name in names}

    def spend(self, count: int) -> None:
        """Count evaluations that were made."""
        self.evaluations += count
        self.bar.update(count)

    def draw(
        self,
        grid: CornerGrid,
        chosen: torch.Tensor,
        count: int,
        *,
        replicate: int = 0,
        keep: bool = False,
        paired: bool = False,
    ) -> DrawnGrid:
        """Evaluate ``grid`` in ``count`` fresh contexts; ``chosen`` are its pairs' numbers.

        Draws of different ``replicate`` are independent. ``keep`` keeps all values. Contexts that are even in number
        come with their complements; two by themselves, which would be a single unit, only where ``paired``.
        """
        antithetic = count % 2 == 0 and (paired or count >= 4 or replicate > 0)
        words = sample_contexts(self.game.n, count, seed=self.seed, antithetic=antithetic, replicate=replicate).words
        contexts = unpack(words, self.game.n)
        second, gaps, defined, gains, kept = [], [], [], [], []
        for block in contexts.split(max(1, self.game.block // grid.evaluations)):
            if not (self.also or keep):
                difference, value, where = self._reduced(grid, block)
            else:
                values = corner_values(self.game, block, grid)
                corners = grid.corners(block, values)
                difference = second_difference(corners)
                value, where = redundancy_gap(self.gap_kind, *corners)
                gains.append(grid.gains(block, values))
                kept.append(values)
            second.append(difference)
            gaps.append(value)
            defined.append(where)
            self.spend(len(block) * grid.evaluations)
        per_unit = 2 if antithetic else 1
        samples = torch.cat(second)
        known = [part for part in defined if part is not None]
        share = unit_means(torch.cat(known).double(), per_unit) if known else None
        return DrawnGrid(
            chosen,
            contexts,
            per_unit,
            samples,
            Draw(chosen, unit_means(samples, per_unit)),
            Draw(chosen, unit_means(torch.cat(gaps), per_unit), share),
            self._weighed(grid, contexts, samples, torch.cat(gains), per_unit) if self.also else {},
            torch.cat(kept) if keep else None,
        )

    def _reduced(
        self, grid: CornerGrid, contexts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Second differences and gaps (K, P, O), and where the gaps are defined; reduced where the values are."""
        reduction = Reduction(grid.pairs, grid.single, self.gap_kind, LEAST_JOINT_COST)
        found = self.game.corner_samples(contexts, grid.toggled, reduction)
        if found is not None and all(math.isfinite(part.sum()) for part in (found.second, found.gap)):
            return found.second, found.gap, found.defined
        # Not reduced by the game, or of values that are not finite: asking for these names the coalition.
        corners = grid.corners(contexts, corner_values(self.game, contexts, grid))
        return second_difference(corners), *redundancy_gap(self.gap_kind, *corners)

    def _weighed(
        self, grid: CornerGrid, contexts: torch.Tensor, second: torch.Tensor, gains: torch.Tensor, per_unit: int
    ) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
        """Members and unit means of the other indices."""
        n, size = self.game.n, contexts.sum(1, keepdim=True)
        pair_size = size - contexts[:, grid.pairs].sum(2)
        player_size = size - contexts[:, grid.players].long()
        found = {}
        for name, order in self.also:
            if (name, order) == ("k-SII", 1):
                members = complete_players(grid.pairs, n)
                of_player = (grid.pairs[:, :, None] == members).any(1).double()  # (P, M)
                samples = gains[:, torch.isin(grid.players, members)]
                samples = samples - 0.5 * torch.einsum("kpo,pm->kmo", second, of_player)
                members = members[:, None]
            elif order == 1:
                members = grid.players[:, None]
                samples = gains * contrast(name, 1, player_size, n)[..., None]
            else:
                members = grid.pairs
                samples = second * contrast(name, 2, pair_size, n)[..., None]
            found[name, order] = members, unit_means(samples, per_unit)
        return found


def contexts_of(draws: list[DrawnGrid], pairs: int) -> torch.Tensor:
    """Contexts per pair (P,)."""
    total = torch.zeros(pairs, dtype=torch.long)
    for draw in draws:
        total[draw.chosen] += len(draw.contexts)
    return total


def others_of(game: Game, draws: list[DrawnGrid]) -> dict[tuple[str, int], IndexEstimate]:
    """The other indices; entries in the order of the first draw, which has them all."""
    found = {}
    for key, (members, _) in draws[0].others.items():
        row = {tuple(member): m for m, member in enumerate(members.tolist())}
        parts = []
        for draw in draws:
            some, units = draw.others[key]
            if len(some):
                parts.append(Draw(torch.tensor([row[tuple(m)] for m in some.tolist()]), units))
        if parts:
            values, stderr, degrees = combine(parts, len(members), borrowed=BORROWED)
            found[key] = IndexEstimate(members.numpy(), per_head(game, values), per_head(game, stderr), degrees.numpy())
    return found


def second_difference(corners: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Second differences from the corners 11, 10, 01, 00."""
    v11, v10, v01, v00 = corners
    return v11 - v10 - v01 + v00


def corner_values(game: Game, contexts: torch.Tensor, grid: CornerGrid) -> torch.Tensor:
    """Values (K, G, O) of a grid's corners; O = 1 for a game with a single value."""
    values = game.corner_values(contexts, grid.toggled)
    return values[..., None] if values.dim() == 2 else values


def per_head(game: Game, values: torch.Tensor) -> np.ndarray:
    """(P, O) for games with heads, (P,) for a single unnamed value."""
    found = values.numpy()
    return found[:, 0] if game.heads is None and found.shape[1] == 1 else found
