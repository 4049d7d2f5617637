"""Which pairs of players a probe is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.games.game import Game

#: Pairs (P, 2) of players as they are given.
Pairs: TypeAlias = Sequence[tuple[int, int]] | np.ndarray | torch.Tensor


def resolve_pairs(
    game: Game,
    pairs: Pairs | None,
    rows: Sequence[int] | torch.Tensor | None = None,
    cols: Sequence[int] | torch.Tensor | None = None,
) -> torch.Tensor:
    """The pairs (P, 2) asked for: an explicit list, all of rows x cols, or by default all cross-modal pairs.

    A game without modalities defaults to all pairs.
    """
    if pairs is not None:
        if rows is not None or cols is not None:
            raise ArgumentError("pairs", "pairs together with rows or cols", "either pairs, or rows and cols")
        chosen = _integers("pairs", pairs)
        if chosen.dim() != 2 or chosen.shape[1] != 2 or not len(chosen):
            raise ArgumentError("pairs", f"shape {tuple(chosen.shape)}", "at least one pair, shape (P, 2)")
        _in_range("pairs", chosen, game.n)
    elif rows is not None or cols is not None:
        if rows is None or cols is None:
            raise ArgumentError("rows" if rows is None else "cols", None, "players, since rows and cols go together")
        rows, cols = resolve_players("rows", rows, game.n), resolve_players("cols", cols, game.n)
        chosen = torch.cartesian_prod(rows, cols).reshape(-1, 2)
    else:
        chosen = _default_pairs(game)
    equal = (chosen[:, 0] == chosen[:, 1]).nonzero()
    if len(equal):
        name = "pairs" if pairs is not None else "rows"
        at = int(equal[0])
        raise ArgumentError(
            name, f"player {int(chosen[at, 0])} paired with itself (pair {at})", "two different players"
        )
    ordered = chosen.sort(dim=1).values
    _, count = ordered.unique(dim=0, return_counts=True)
    if int(count.max()) > 1:
        twice = next(tuple(p) for i, p in enumerate(ordered.tolist()) if p in ordered[:i].tolist())
        raise ArgumentError("pairs", f"pair {twice} more than once", "distinct pairs")
    return chosen


def resolve_triples(triples: object, n: int) -> torch.Tensor:
    """Distinct triples (T, 3) of distinct players, each in ascending order."""
    chosen = _integers("triples", triples)
    if chosen.dim() != 2 or chosen.shape[1] != 3 or not len(chosen):
        raise ArgumentError("triples", f"shape {tuple(chosen.shape)}", "at least one triple, shape (T, 3)")
    _in_range("triples", chosen, n)
    chosen = chosen.sort(dim=1).values
    if bool((chosen.diff(dim=1) == 0).any()):
        raise ArgumentError("triples", "a player more than once in a triple", "three different players")
    if len(chosen.unique(dim=0)) < len(chosen):
        raise ArgumentError("triples", "a triple more than once", "distinct triples")
    return chosen


def _default_pairs(game: Game) -> torch.Tensor:
    if game.groups is None:
        return torch.combinations(torch.arange(game.n), 2)
    groups = [torch.tensor(players, dtype=torch.long) for _, players in game.groups if players]
    blocks = [torch.cartesian_prod(a, b).reshape(-1, 2) for i, a in enumerate(groups) for b in groups[i + 1 :]]
    if not blocks:
        raise ArgumentError("pairs", None, "pairs, since all players of this game are of one modality")
    return torch.cat(blocks)


def _integers(name: str, values: object) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ArgumentError(name, f"{values!r} ({problem})", "integers") from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        if tensor.numel():
            raise ArgumentError(name, tensor.dtype, "integers")
    return tensor.long()


def _in_range(name: str, players: torch.Tensor, n: int) -> None:
    outside = players[(players < 0) | (players >= n)]
    if len(outside):
        raise ArgumentError(name, f"player {int(outside[0])}", f"players 0 to {n - 1}")


def resolve_players(name: str, values: object, n: int) -> torch.Tensor:
    """Distinct players (Q,) of 0..n-1, at least one, in the order given; ``name`` is the argument's."""
    players = _integers(name, values)
    if players.dim() != 1 or not len(players):
        raise ArgumentError(name, f"shape {tuple(players.shape)}", "a list of at least one player")
    _in_range(name, players, n)
    if len(players.unique()) < len(players):
        raise ArgumentError(name, "a player more than once", "distinct players")
    return players
