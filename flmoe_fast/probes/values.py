"""Shapley and Banzhaf values of single players, with error bars, from contexts and their single toggles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import contrast
from flmoe_fast.probes.moments import Draw, combine, unit_means
from flmoe_fast.probes.pairs import resolve_players
from flmoe_fast.probes.progress import progress_bar
from flmoe_fast.probes.result import half_width

DEFAULT_CONTEXTS = 64


@dataclass(frozen=True)
class PlayerValues:
    """Values of players with their standard errors.

    Attributes
    ----------
    players : int64 (Q,)
    values, stderr : float64 (Q,) or (Q, O)
    degrees : float64 (Q,)
    evaluations : int
    """

    players: np.ndarray
    values: np.ndarray
    stderr: np.ndarray
    degrees: np.ndarray
    evaluations: int

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of the confidence intervals, shaped like ``values``."""
        degrees = self.degrees if self.values.ndim == 1 else self.degrees[:, None]
        half = half_width(self.stderr, degrees, level)
        return self.values - half, self.values + half


def player_values(
    game: Game | Callable,
    *,
    index: str = "SV",
    players: Sequence[int] | None = None,
    n: int | None = None,
    contexts: int | None = None,
    budget: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PlayerValues:
    """Shapley values ("SV") or Banzhaf values ("BV") of players.

    A context costs ``1 + Q`` evaluations for Q players. Contexts are drawn as for :func:`interactions`.

    Parameters
    ----------
    game : Game or callable
    index : "SV" or "BV"
    players : sequence of int, optional
        All by default.
    n : int, optional
        Number of players, for a callable that has no ``n``.
    contexts : int, optional
        64 if neither this nor ``budget`` is given.
    budget : int, optional
        Evaluations that may be spent; never exceeded.
    seed : int
    progress : bool
    """
    game = as_game(game, n)
    one_of("index", index, ("SV", "BV"))
    integer("seed", seed, least=0, most=2**64 - 1)
    chosen = torch.arange(game.n) if players is None else resolve_players("players", players, game.n).sort().values
    grid = CornerGrid.singles(chosen, game.n)
    if budget is not None:
        if contexts is not None:
            raise ArgumentError("budget", "a budget together with contexts", "one of the two")
        contexts = integer("budget", budget, least=1) // grid.evaluations
        if contexts < 1:
            raise ArgumentError("budget", budget, f"at least {grid.evaluations} evaluations, the cost of one context")
        contexts -= contexts % 2 if contexts >= 4 else 0
    count = integer("contexts", DEFAULT_CONTEXTS if contexts is None else contexts, least=1)
    antithetic = count % 2 == 0 and count >= 4
    drawn = unpack(sample_contexts(game.n, count, seed=seed, antithetic=antithetic).words, game.n)
    samples = []
    with progress_bar(count * grid.evaluations, "values", progress) as bar:
        for block in drawn.split(max(1, game.block // grid.evaluations)):
            values = game.corner_values(block, grid.toggled)
            values = values[..., None] if values.dim() == 2 else values
            size = block.sum(1, keepdim=True) - block[:, chosen].long()
            samples.append(grid.gains(block, values) * contrast(index, 1, size, game.n)[..., None])
            bar.update(values.shape[0] * values.shape[1])
    units = unit_means(torch.cat(samples), 2 if antithetic else 1)
    value, stderr, degrees = combine([Draw(torch.arange(len(chosen)), units)], len(chosen))
    if game.heads is None:
        value, stderr = value[:, 0], stderr[:, 0]
    return PlayerValues(chosen.numpy(), value.numpy(), stderr.numpy(), degrees.numpy(), count * grid.evaluations)
