"""shap: a model and a masker that together are one of our games, for shap's model-agnostic explainers.

Needs the extra ``shap``. The "input" that shap explains is a row of ones, one per player; what the masker returns are
coalitions, and the model is the game.

    model, masker = shap_pair(game)
    explanation = shap.explainers.Permutation(model, masker)(masker.everyone, batch_size=256)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from flmoe_fast.environment import require
from flmoe_fast.games.game import Game, as_game

shap: Any = require("shap", "shap")


class PlayerMasker(shap.maskers.Masker):
    """Players as shap's features: a masked input is the coalition itself.

    Attributes
    ----------
    everyone : float64 (1, n)
        What to explain: the coalition of all players.
    clustering : float64 (n - 1, 4)
        Only when asked for: players of one modality join before modalities do. Explainers that see it give Owen values.
    """

    def __init__(self, game: Game, clustered: bool = False):
        self.n = game.n
        self.shape = (1, game.n)
        self.immutable_outputs = True  # spares a deep copy of every coalition
        self.feature_names = [list(game.player_names)]
        self.everyone = np.ones((1, game.n))
        if not clustered:
            return
        group = np.zeros(game.n, dtype=np.int64)
        for number, (_, players) in enumerate(game.groups or ()):
            group[list(players)] = number
        distance = np.where(group[:, None] == group, 0.5, 1.0)
        np.fill_diagonal(distance, 0.0)
        self.clustering = linkage(squareform(distance), "complete")

    def __call__(self, mask: np.ndarray | bool, x: np.ndarray) -> tuple[np.ndarray]:
        """The players of x (n,) that the mask (n,) keeps, as one row."""
        keep = np.broadcast_to(self._standardize_mask(mask, x), (self.n,)).astype(bool)
        return (np.where(keep, x.reshape(1, -1), 0.0),)


def shap_pair(
    game: Game | Callable, n: int | None = None, *, clustered: bool = False
) -> tuple[Callable[[np.ndarray], np.ndarray], PlayerMasker]:
    """A model and a masker for ``shap.explainers.Exact`` and ``Permutation``, and for ``Partition`` when clustered.

    Parameters
    ----------
    game : Game or callable
        A :class:`TokenGame`, or any function from a bool tensor (C, n) to (C,) or (C, O) numbers.
    n : int, optional
        Number of players, for a callable that has no ``n``.
    clustered : bool
        Group players by modality, for Owen values; ``Partition`` needs it.
    """
    played = as_game(game, n)

    def model(coalitions: np.ndarray) -> np.ndarray:
        """Values (C,) or (C, O) of rows of zeros and ones (C, n)."""
        return played(torch.from_numpy(np.asarray(coalitions) > 0.5)).numpy()

    return model, PlayerMasker(played, clustered)
