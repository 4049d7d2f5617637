"""How much of the second differences is rounding: a few of them once more, in float64.

The share of noise is the variance of their error over the variance of the second differences across contexts and
pairs. An error has a value of its own at every coalition, so few coalitions are enough; pairs that share a player have
corners in common.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.games.game import Game
from flmoe_fast.games.rounding import NOISE_LIMIT
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.run import DrawnGrid, corner_values, second_difference

#: Contexts and pairs that are looked at again: at first, and where the share is near the limit. Where a run evaluated
#: no second differences their variance is that of the few, and these are not quite as few, unless the run was short.
FEW, FEW_FRESH, MORE = (2, 2), (2, 4), (8, 4)
#: Evaluations of a short run, of which the check of as many pairs would be a large part.
SHORT = 512
#: Within this factor of the limit a few errors do not tell on which side of it the share is.
NEAR = 10.0


def noise_share(game: Game, grid: CornerGrid, draw: DrawnGrid) -> tuple[torch.Tensor, int]:
    """Share of noise (O,) of what a draw evaluated, and evaluations spent on it; NaN where there is no float64."""
    precise = game.precise()
    if precise is None:
        return torch.full((draw.second.shape[-1],), torch.nan, dtype=torch.float64), 0
    spread = _variance(draw.second)

    def measure(contexts: int, pairs: int) -> tuple[torch.Tensor, int]:
        rows = torch.linspace(0, len(draw.contexts) - 1, min(contexts, len(draw.contexts))).long()
        columns = few_pairs(grid.pairs, pairs)
        small = CornerGrid.of(grid.pairs[columns], game.n)
        error = draw.second[rows][:, columns] - _second(precise, draw.contexts[rows], small)
        return _share(error, spread), len(rows) * small.evaluations

    return _decided(measure, FEW)


def fresh_noise_share(
    game: Game, grid: CornerGrid, seed: int, evaluations: int, spread: torch.Tensor | None = None
) -> tuple[torch.Tensor, int]:
    """As :func:`noise_share`, where a run of ``evaluations`` has no second differences: a few are, in both arithmetics.

    ``spread`` (O,) is the variance of second differences where it is known; otherwise that of the few counts.
    """
    precise = game.precise()
    if precise is None:
        heads = 1 if game.heads is None else len(game.heads)
        return torch.full((heads,), torch.nan, dtype=torch.float64), 0

    def measure(contexts: int, pairs: int) -> tuple[torch.Tensor, int]:
        small = CornerGrid.of(grid.pairs[few_pairs(grid.pairs, pairs)], game.n)
        drawn = unpack(sample_contexts(game.n, contexts, seed=seed).words, game.n)
        exact = _second(precise, drawn, small)
        error = _second(game, drawn, small) - exact
        return _share(error, _variance(exact) if spread is None else spread), 2 * len(drawn) * small.evaluations

    return _decided(measure, FEW if evaluations < SHORT else FEW_FRESH)


def _decided(measure: Callable[[int, int], tuple[torch.Tensor, int]], few: tuple[int, int]) -> tuple[torch.Tensor, int]:
    """A share and its evaluations, from ``few`` contexts and pairs where these leave no doubt about the limit."""
    share, spent = measure(*few)
    worst = float(share.nan_to_num(0.0).max())
    if not NOISE_LIMIT / NEAR < worst < NOISE_LIMIT * NEAR:
        return share, spent
    share, more = measure(*MORE)
    return share, spent + more


def few_pairs(pairs: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of ``count`` pairs (P, 2) or fewer; with a player in common where some have."""
    middle = pairs[len(pairs) // 2]
    for player in middle:
        sharing = (pairs == player).any(1).nonzero()[:, 0]
        if len(sharing) >= min(count, len(pairs)):
            break
    else:
        sharing = torch.arange(len(pairs))
    return sharing[torch.linspace(0, len(sharing) - 1, min(count, len(sharing))).long()]


def _second(game: Game, contexts: torch.Tensor, grid: CornerGrid) -> torch.Tensor:
    """Second differences (K, P, O)."""
    return second_difference(grid.corners(contexts, corner_values(game, contexts, grid)))


def _variance(second: torch.Tensor) -> torch.Tensor:
    """Variance (O,) of second differences (K, P, O)."""
    return second.flatten(0, 1).var(0, correction=0)


def _share(error: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Mean square of errors (K, P, O) over the variance (O,) of second differences; zero without errors."""
    noise = error.square().mean((0, 1))
    return torch.where(noise == 0, 0.0, noise / spread.clamp(min=torch.finfo(spread.dtype).tiny))
