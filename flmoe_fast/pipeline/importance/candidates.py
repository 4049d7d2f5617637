"""Candidates: the players whose pairs are probed, because all pairs would be too many."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.games.game import Game


def candidate_players(game: Game, scores: torch.Tensor, most: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The players of every modality with the largest scores (n,), ``most`` of each, the largest first.

    All players are one modality where the game knows none.
    """
    chosen = []
    groups = game.groups or (("players", tuple(range(game.n))),)
    for (_, players), count in zip(groups, most):
        ranked = scores[list(players)].argsort(descending=True, stable=True)[:count]
        chosen.append(tuple(players[i] for i in ranked.tolist()))
    return tuple(chosen)


def cross_pairs(candidates: Sequence[Sequence[int]]) -> torch.Tensor:
    """All pairs (P, 2) of candidates of different modalities; of any two where there is only one modality."""
    if len(candidates) == 1:
        return torch.combinations(torch.tensor(candidates[0], dtype=torch.long))
    blocks = [
        torch.cartesian_prod(torch.tensor(a), torch.tensor(b)).reshape(-1, 2)
        for i, a in enumerate(candidates)
        for b in candidates[i + 1 :]
        if a and b
    ]
    if not blocks:
        raise ArgumentError("players", "players of a single modality", "players of at least two modalities")
    return torch.cat(blocks)
