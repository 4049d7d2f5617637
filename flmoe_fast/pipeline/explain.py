"""One call from a model and a sample to ranked, error-barred cross-modal interactions."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.games.token_game import TokenGame
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.pipeline.importance.candidates import candidate_players, cross_pairs
from flmoe_fast.pipeline.importance.tokens import METHODS, Importance, token_importance
from flmoe_fast.probes.interactions import interactions
from flmoe_fast.probes.result import InteractionResult

if TYPE_CHECKING:
    import pandas

#: Candidates per modality unless the caller says otherwise: a 10 x 10 grid for two modalities.
DEFAULT_CANDIDATES = 10


@dataclass(frozen=True)
class Explanation:
    """What a model does with one sample's tokens.

    Attributes
    ----------
    importance : Importance
        Of every token, per expert and for the mixture; it chose the candidates.
    candidates : tuple of M tuples of players
        Tokens whose pairs were probed, most important first.
    interactions : InteractionResult
        SII and redundancy gap of all cross-modal pairs of candidates, for every head.
    game : TokenGame
        The game that was played; call it to evaluate further coalitions.
    prediction : dict
        ``target``, and the mixture's value with all players present (``full``) and with none (``empty``).
    seconds : float
        Wall time of the whole call.
    """

    importance: Importance
    candidates: tuple[tuple[int, ...], ...]
    interactions: InteractionResult
    game: TokenGame
    prediction: dict[str, Any]
    seconds: float

    def top(self, k: int = 10, by: str = "sii", head: str | int | None = None) -> pandas.DataFrame:
        """See :meth:`InteractionResult.top`."""
        return self.interactions.top(k, by, head)

    def importance_dataframe(self) -> pandas.DataFrame:
        """One row per player: its name, and its importance for the mixture and every expert."""
        import pandas

        token = self.game.tokens
        columns = {"player": range(self.game.n), "name": self.game.player_names}
        columns["mixture"] = self.importance.mixture[token].cpu().numpy()
        for name, row in zip(self.game.problem.model.config.expert_names, self.importance.experts):
            columns[name] = row[token].cpu().numpy()
        return pandas.DataFrame(columns)

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``interactions.npz``, ``interactions.csv`` and ``importance.csv`` into ``folder``.

        And ``indices.csv`` where other indices were asked for.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.interactions.save(folder / "interactions.npz")
        self.interactions.to_dataframe().to_csv(folder / "interactions.csv", index=False)
        self.importance_dataframe().to_csv(folder / "importance.csv", index=False)
        if self.interactions.also:
            self.interactions.indices_dataframe().to_csv(folder / "indices.csv", index=False)


def explain(
    model: FLI2MoE,
    features: Sequence[torch.Tensor],
    *,
    masks: Sequence[torch.Tensor] | None = None,
    candidates: int | Sequence[int] = DEFAULT_CANDIDATES,
    importance: str = "attnXgrad",
    contexts: int | None = None,
    budget: int | None = None,
    method: str = "grid",
    seed: int = 0,
    gap: str = "max",
    adaptive: bool | None = None,
    also: Sequence[str] | str = (),
    progress: bool = True,
    **game_options: Any,
) -> Explanation:
    """Importance, candidates, interactions: which cross-modal token pairs of a sample work together.

    Parameters
    ----------
    model : FLI2MoE
    features : sequence of M tensors (T_m, H)
        One encoded sample (``model.encode`` makes it from raw inputs).
    masks : sequence of M tensors (T_m,), optional
    candidates : int or M ints
        How many of each modality's most important players are probed.
    importance : "attnXgrad" or "attn"
        How candidates are chosen, see :func:`token_importance`.
    contexts, budget, method, seed, gap, adaptive, also, progress
        See :func:`interactions`.
    **game_options
        ``fill``, ``players``, ``padded_lengths``, ``target``, ``value``, ``heads``, ``backend``, ``dtype``, ``device``
        and ``memory`` of :class:`TokenGame`.

    Returns
    -------
    Explanation
    """
    started = time.perf_counter()
    one_of("importance", importance, METHODS)
    game = TokenGame(model, features, masks=masks, **game_options)
    wanted = _per_modality(candidates, len(model.config.modalities))
    found = _importance(game, importance)
    score = found.mixture[game.tokens]
    chosen = candidate_players(game, score, wanted)
    result = interactions(
        game,
        pairs=cross_pairs(chosen),
        contexts=contexts,
        budget=budget,
        method=method,
        seed=seed,
        gap=gap,
        adaptive=adaptive,
        also=also,
        progress=progress,
    )
    ends = game(torch.stack([torch.ones(game.n, dtype=torch.bool), torch.zeros(game.n, dtype=torch.bool)]))[:, 0]
    prediction = {"target": game.target, "full": float(ends[0]), "empty": float(ends[1])}
    return Explanation(found, chosen, result, game, prediction, time.perf_counter() - started)


def _importance(game: TokenGame, method: str) -> Importance:
    """Importance maps on the padded sequence of the game's own problem, for the game's target."""
    problem, config = game.problem, game.problem.model.config
    parameter = next(problem.model.reweight.parameters())
    features = problem.features.to(parameter).split(problem.padded_lengths)
    mask = torch.zeros(len(problem.features), dtype=torch.bool)
    mask[problem.valid] = True
    masks = [m[None].to(parameter.device) for m in mask.split(problem.padded_lengths)] if problem.masked else None
    target = game.target
    if config.task == "multilabel":
        target = torch.zeros(config.classes, dtype=torch.long)
        target[list(game.target)] = 1
    return token_importance(problem.model, [f[None] for f in features], masks, target=target, method=method)


def _per_modality(candidates: int | Sequence[int], modalities: int) -> list[int]:
    if isinstance(candidates, int) and not isinstance(candidates, bool):
        candidates = [candidates] * modalities
    if not hasattr(candidates, "__len__") or len(candidates) != modalities:
        raise ArgumentError(
            "candidates", repr(candidates), f"an integer, or one for each of the {modalities} modalities"
        )
    return [integer(f"candidates[{m}]", count, least=1) for m, count in enumerate(candidates)]
