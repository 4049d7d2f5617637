"""Whole modalities, or any groups of players, as the players of a game: how they interact as wholes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flmoe_fast.checks import ArgumentError, shape
from flmoe_fast.games.game import Game


class GroupedGame(Game):
    """The game whose players are groups of another game's players, present or absent together.

    With M modalities its 2^M coalitions are few enough to enumerate: ``exact_interactions(GroupedGame(game))`` is the
    exact interaction of modalities, from 2^M evaluations.

    Parameters
    ----------
    game : Game
    groups : mapping of name to players, optional
        Disjoint; the game's modalities by default. Players in no group stay present.
    """

    def __init__(self, game: Game, groups: Mapping[str, Sequence[int]] | None = None):
        self._kind = "modalities" if groups is None else "groups"
        if groups is None:
            groups = {name: players for name, players in game.groups or () if len(players)}
        if len(groups) < 2:
            raise ArgumentError("groups", f"{len(groups)} groups of players", "at least two, or a game with modalities")
        self.game = game
        self.member = torch.zeros(len(groups), game.n, dtype=torch.bool)
        for row, (name, players) in enumerate(groups.items()):
            for player in players:
                if not 0 <= player < game.n or bool(self.member[:, player].any()):
                    why = f"player {player}" if not 0 <= player < game.n else f"player {player} twice"
                    raise ArgumentError("groups", f"{why} in {name!r}", f"disjoint groups of players 0 to {game.n - 1}")
                self.member[row, player] = True
            if not len(players):
                raise ArgumentError("groups", f"{name!r} without players", "at least one player a group")
        self.n, self.player_names = len(groups), tuple(groups)
        self.backend, self.more_exact, self.block = game.backend, game.more_exact, game.block

    # Read-only, where other games have an attribute: a plain callable knows its heads from its first call on.
    @property
    def heads(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """Those of the game."""
        return self.game.heads

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        shape("coalitions", coalitions, (None, self.n), "(C, n)")
        absent = (~coalitions.bool().cpu()).double() @ self.member.double() > 0
        return self.game(~absent)

    def precise(self) -> Game | None:
        return self._of(self.game.precise())

    def finer(self) -> Game | None:
        return self._of(self.game.finer())

    @property
    def arithmetic(self) -> str:
        return self.game.arithmetic

    def _of(self, game: Game | None) -> GroupedGame | None:
        """The same groups of another game's players."""
        if game is None:
            return None
        groups = {name: row.nonzero()[:, 0].tolist() for name, row in zip(self.player_names, self.member)}
        return GroupedGame(game, groups)

    def about(self) -> dict[str, Any]:
        return {**self.game.about(), "players": self._kind}
