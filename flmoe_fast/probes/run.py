"""One run of a probe: evaluates draws of contexts, counts, and keeps what the estimates are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.games.game import Game
from flmoe_fast.probes.gap import LEAST_JOINT_COST, redundancy_gap
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import IndexEstimate, complete_players, contrast
from flmoe_fast.probes.moments import Draw, combine, unit_means
from flmoe_fast.probes.reading import Control

#: Contexts and pairs that are evaluated once more in higher precision.
NOISE_CONTEXTS, NOISE_PAIRS = 4, 4


@dataclass(frozen=True)
class Found:
    """What a method found: (P, O) estimates and standard errors, and how."""

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


class DrawnGrid:
    """Samples of one draw of contexts on one grid."""

    def __init__(self, contexts: torch.Tensor, per_unit: int, second: torch.Tensor, sii: Draw):
        self.contexts = contexts  # (K, n)
        self.per_unit = per_unit
        self.second = second  # (K, P', O) second differences
        self.sii = sii


class Run:
    """Evaluates draws of contexts and keeps what the estimates are made of."""

    def __init__(self, game: Game, gap: str, seed: int, progress: bool, also: tuple[tuple[str, int], ...], total: int):
        self.game, self.gap_kind, self.seed, self.also = game, gap, seed, also
        self.bar = tqdm(total=total, unit="eval", desc="interactions", disable=not progress, leave=False)
        self.evaluations = 0
        self.sii: list[Draw] = []
        self.gap: list[Draw] = []
        self._contexts: list[tuple[torch.Tensor, int]] = []
        self.controls: list[Control] = []
        self.facts: dict[str, Any] = {}
        self._others: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {key: [] for key in also}

    def draw(self, grid: CornerGrid, chosen: torch.Tensor, count: int) -> DrawnGrid:
        """Evaluate ``grid`` in ``count`` fresh contexts; ``chosen`` are its pairs' numbers."""
        antithetic = count % 2 == 0 and count >= 4
        words = sample_contexts(
            self.game.n, count, seed=self.seed, antithetic=antithetic, replicate=len(self.sii)
        ).words
        contexts = unpack(words, self.game.n)
        second, gaps, defined, gains, less = [], [], [], [], []
        for block in contexts.split(max(1, self.game.block // grid.evaluations)):
            self.evaluations += len(block) * grid.evaluations
            self.bar.update(len(block) * grid.evaluations)
            if not (self.controls or self.also):
                difference, value, where = self._reduced(grid, block)
                second.append(difference)
                gaps.append(value)
                defined.append(where)
                continue
            values = corner_values(self.game, block, grid)
            corners = grid.corners(block, values)
            second.append(second_difference(corners))
            value, where = redundancy_gap(self.gap_kind, *corners)
            if self.controls:
                likely = torch.stack([c.surrogate.predict_grid(block, grid.toggled) for c in self.controls], 2)
                likely = grid.corners(block, likely)
                less.append(second_difference(likely))
                if where is None:
                    value = value - redundancy_gap(self.gap_kind, *likely)[0]
                    value = value + torch.stack([c.gap[chosen] for c in self.controls], 1)
            gaps.append(value)
            defined.append(where)
            if self.also:
                gains.append(grid.gains(block, values))
        per_unit = 2 if antithetic else 1
        samples = torch.cat(second)
        corrected = samples
        if self.controls:
            corrected = samples - torch.cat(less) + torch.stack([c.sii[chosen] for c in self.controls], 1)
        sii = Draw(chosen, unit_means(corrected, per_unit))
        share = None if defined[0] is None else unit_means(torch.cat(defined).double(), per_unit)
        self.sii.append(sii)
        self.gap.append(Draw(chosen, unit_means(torch.cat(gaps), per_unit), share))
        self._contexts.append((chosen, count))
        if self.also:
            self._weigh(grid, contexts, samples, torch.cat(gains), per_unit)
        return DrawnGrid(contexts, per_unit, samples, sii)

    def contexts(self, pairs: int) -> torch.Tensor:
        """Contexts per pair (P,)."""
        total = torch.zeros(pairs, dtype=torch.long)
        for chosen, count in self._contexts:
            total[chosen] += count
        return total

    def _reduced(
        self, grid: CornerGrid, contexts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Second differences and gaps (K, P, O), and where the gaps are defined; reduced where the values are."""
        asked = grid.toggled, grid.pairs, grid.single, self.gap_kind, LEAST_JOINT_COST
        found = self.game.corner_samples(contexts, *asked)
        if found is not None and all(bool(part.sum().isfinite()) for part in found[:2]):
            return found
        # Not reduced by the game, or of values that are not finite: asking for these names the coalition.
        corners = grid.corners(contexts, corner_values(self.game, contexts, grid))
        return second_difference(corners), *redundancy_gap(self.gap_kind, *corners)

    def _weigh(
        self, grid: CornerGrid, contexts: torch.Tensor, second: torch.Tensor, gains: torch.Tensor, per_unit: int
    ) -> None:
        """Keep this draw's samples of the other indices."""
        n, size = self.game.n, contexts.sum(1, keepdim=True)
        pair_size = size - contexts[:, grid.pairs].sum(2)
        player_size = size - contexts[:, grid.players].long()
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
            self._others[name, order].append((members, unit_means(samples, per_unit)))

    def others(self) -> dict[tuple[str, int], IndexEstimate]:
        """The other indices; entries in the order of the first draw, which has them all."""
        found = {}
        for key, draws in self._others.items():
            members = draws[0][0]
            row = {tuple(member): m for m, member in enumerate(members.tolist())}
            parts = [Draw(torch.tensor([row[tuple(m)] for m in some.tolist()]), units) for some, units in draws]
            if len(members):
                values, stderr, degrees = combine([part for part in parts if len(part.chosen)], len(members))
                found[key] = IndexEstimate(
                    members.numpy(), per_head(self.game, values), per_head(self.game, stderr), degrees.numpy()
                )
        return found


def noise_share(game: Game, grid: CornerGrid, draw: DrawnGrid) -> tuple[torch.Tensor, int]:
    """Rounding noise of the second differences over their variance, per head, and evaluations spent on it."""
    outputs = draw.second.shape[-1]
    precise = game.precise()
    if precise is None:
        return torch.full((outputs,), torch.nan, dtype=torch.float64), 0
    some_contexts = torch.linspace(0, len(draw.contexts) - 1, min(NOISE_CONTEXTS, len(draw.contexts))).long()
    some_pairs = torch.linspace(0, len(grid.pairs) - 1, min(NOISE_PAIRS, len(grid.pairs))).long()
    small = CornerGrid.of(grid.pairs[some_pairs], game.n)
    contexts = draw.contexts[some_contexts]
    exact = second_difference(small.corners(contexts, corner_values(precise, contexts, small)))
    error = draw.second[some_contexts][:, some_pairs] - exact
    spread = draw.second.flatten(0, 1).var(0, correction=0)
    noise = error.square().mean((0, 1))
    return torch.where(noise == 0, 0.0, noise / spread), len(contexts) * small.evaluations


def fresh_noise_share(game: Game, grid: CornerGrid, seed: int, spread: torch.Tensor) -> tuple[torch.Tensor, int]:
    """As :func:`_noise_share`, where no context was evaluated on a grid: a few are, in both precisions."""
    precise = game.precise()
    if precise is None:
        return torch.full_like(spread, torch.nan), 0
    some_pairs = torch.linspace(0, len(grid.pairs) - 1, min(NOISE_PAIRS, len(grid.pairs))).long()
    small = CornerGrid.of(grid.pairs[some_pairs], game.n)
    contexts = unpack(sample_contexts(game.n, NOISE_CONTEXTS, seed=seed).words, game.n)
    both = [second_difference(small.corners(contexts, corner_values(g, contexts, small))) for g in (game, precise)]
    noise = (both[0] - both[1]).square().mean((0, 1))
    return torch.where(noise == 0, 0.0, noise / spread), 2 * len(contexts) * small.evaluations


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
    values = values.numpy()
    return values[:, 0] if game.heads is None and values.shape[1] == 1 else values
