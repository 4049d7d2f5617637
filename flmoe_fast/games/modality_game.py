"""The game whose players are whole modalities."""

from __future__ import annotations

from typing import Any

import torch

from flmoe_fast.checks import ArgumentError, shape
from flmoe_fast.games.game import Game
from flmoe_fast.games.token_game import TokenGame


class ModalityGame(Game):
    """Which modalities a model needs: a modality is present with all its players or absent with all of them.

    Parameters
    ----------
    tokens : TokenGame
        Its tokens that are no players stay present. Modalities without a player are no players here.
    """

    def __init__(self, tokens: TokenGame):
        groups = [(name, players) for name, players in tokens.groups if players]
        if len(groups) < 2:
            raise ArgumentError("tokens", f"players of {len(groups)} modalities", "players of at least two modalities")
        self.tokens = tokens
        self.n, self.heads, self.backend = len(groups), tokens.heads, tokens.backend
        self.player_names = tuple(name for name, _ in groups)
        self.more_exact, self.block = tokens.more_exact, tokens.block
        self._expand = torch.zeros(self.n, tokens.n, dtype=torch.bool)
        for row, (_, players) in zip(self._expand, groups):
            row[list(players)] = True

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        shape("coalitions", coalitions, (None, self.n), "(C, n)")
        return self.tokens((coalitions[:, :, None].cpu() & self._expand).any(1))

    def precise(self) -> ModalityGame | None:
        precise = self.tokens.precise()
        return None if precise is None else ModalityGame(precise)

    def about(self) -> dict[str, Any]:
        return {**self.tokens.about(), "players": "modalities"}
