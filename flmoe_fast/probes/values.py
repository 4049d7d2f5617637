"""Shapley and Banzhaf values of single players, with error bars, from contexts and their single toggles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.probes.exact import MOST_PLAYERS, enumerate_values, exact_index
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import contrast
from flmoe_fast.probes.moments import Draw, combine, unit_means
from flmoe_fast.probes.naming import checked_names
from flmoe_fast.probes.pairs import resolve_players
from flmoe_fast.probes.progress import progress_bar
from flmoe_fast.probes.value_result import PlayerValues

DEFAULT_CONTEXTS = 64


def player_values(
    game: Game | Callable,
    *,
    index: str = "SV",
    players: Sequence[int] | None = None,
    n: int | None = None,
    contexts: int | None = None,
    budget: int | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> PlayerValues:
    """Shapley values ("SV") or Banzhaf values ("BV") of players.

    A context costs ``1 + Q`` evaluations for Q players. Contexts are drawn as for :func:`interactions`. Where they
    would cost as much as all coalitions, those are evaluated instead, and the values are exact.

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
    names : sequence of n str, optional
        As for :func:`interactions`.
    progress : bool
    """
    game = as_game(game, n)
    called = game.player_names if names is None else checked_names(names, game.n)
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
    if game.n <= MOST_PLAYERS and 2**game.n <= count * grid.evaluations:
        rows = enumerate_values(game, progress)
        value = exact_index(rows if rows.dim() == 2 else rows[:, None], game.n, chosen[:, None], index, 1)
        exact = torch.full((len(chosen),), torch.inf, dtype=torch.float64)
        return _found(game, called, index, chosen, value, torch.zeros_like(value), exact, 2**game.n)
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
    return _found(game, called, index, chosen, value, stderr, degrees, count * grid.evaluations)


def _found(
    game: Game,
    names: tuple[str, ...],
    index: str,
    players: torch.Tensor,
    values: torch.Tensor,
    stderr: torch.Tensor,
    degrees: torch.Tensor,
    evaluations: int,
) -> PlayerValues:
    """The result of values and standard errors (Q, O)."""
    if game.heads is None:
        values, stderr = values[:, 0], stderr[:, 0]
    return PlayerValues(
        players.numpy(),
        values.numpy(),
        stderr.numpy(),
        degrees.numpy(),
        evaluations=evaluations,
        index=index,
        heads=game.heads,
        player_names=names,
        about=game.about(),
    )
