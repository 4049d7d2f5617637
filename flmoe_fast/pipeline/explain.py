"""One call from a model and a sample to ranked, error-barred cross-modal interactions."""

from __future__ import annotations

import html
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flmoe_fast.adapt.accelerate import AcceleratedModel, accelerate
from flmoe_fast.adapt.players import Players
from flmoe_fast.adapt.reference_layout import AcceleratedMoE
from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.games.game import Game
from flmoe_fast.pipeline.importance.candidates import candidate_players, cross_pairs
from flmoe_fast.pipeline.importance.scores import player_scores
from flmoe_fast.probes.gap import DEFAULT_GAP
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
    importance : dict from str to Tensor (n,)
        Of every player, see :func:`player_scores`; the first entry chose the candidates.
    candidates : tuple of M tuples of players
        Those whose pairs were probed, most important first.
    interactions : InteractionResult
        SII and redundancy gap of all cross-modal pairs of candidates, for every head.
    game : Game
        The game that was played; call it to evaluate further coalitions.
    prediction : dict
        ``target``, and the first head's value with all players present (``full``) and with none (``empty``).
    seconds : float
        Wall time of the whole call.
    """

    importance: Mapping[str, Tensor]
    candidates: tuple[tuple[int, ...], ...]
    interactions: InteractionResult
    game: Game
    prediction: dict[str, Any]
    seconds: float

    def __repr__(self) -> str:
        return f"{self._about()}\n{self.interactions!r}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._about())}</p>{self.interactions._repr_html_()}"

    def _about(self) -> str:
        """What was explained, in one line."""
        said = self.prediction
        of = "" if said["target"] is None else f" of target {said['target']}"
        return (
            f"Explanation{of}: {said['full']:.4f} with all {self.game.n} players present, {said['empty']:.4f} with none"
        )

    def top(self, k: int = 10, by: str = "abs_sii", head: str | int | None = None) -> pandas.DataFrame:
        """See :meth:`InteractionResult.top`."""
        return self.interactions.top(k, by, head)

    def importance_dataframe(self) -> pandas.DataFrame:
        """One row per player: its name, and its importance in a column for every entry of ``importance``."""
        import pandas

        columns: dict[str, Any] = {"player": range(self.game.n), "name": self.game.player_names}
        return pandas.DataFrame(columns | {name: scores.numpy() for name, scores in self.importance.items()})

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
    model: nn.Module | AcceleratedMoE | AcceleratedModel | str | os.PathLike,
    inputs: Sequence[Tensor] | Mapping[str, Tensor],
    players: Players | Sequence[Players] | Sequence[Sequence[int]] | None = None,
    *,
    masks: Sequence[Tensor] | None = None,
    candidates: int | Sequence[int] = DEFAULT_CANDIDATES,
    importance: str = "auto",
    contexts: int | None = None,
    budget: int | None = None,
    method: str = "auto",
    seed: int = 0,
    gap: str = DEFAULT_GAP,
    adaptive: bool | None = None,
    also: Sequence[str] | str = (),
    names: Sequence[str] | None = None,
    progress: bool = True,
    **game_options: Any,
) -> Explanation:
    """Importance, candidates, interactions: which cross-modal token pairs of a sample work together.

    Parameters
    ----------
    model : FLI2MoE, any other nn.Module, path of a checkpoint, AcceleratedMoE or AcceleratedModel
        What :func:`accelerate` takes, or what it returned: the latter saves reading the model again for every sample.
    inputs : sequence of M tensors (T_m, H), or mapping of str to Tensor
        One sample. For an ensemble of interaction experts its encoded modalities (:meth:`FLI2MoE.encode` makes them
        from raw inputs); for any other model what its tokenizer or processor makes, with a batch axis of 1.
    players : optional
        For an ensemble of interaction experts M sequences of positions, by default all valid tokens; for any other
        model :func:`text_players` and :func:`image_players`, which have to be given.
    masks : sequence of M tensors (T_m,), optional
        Of an ensemble of interaction experts; any other model has its masks among its inputs.
    candidates : int or M ints
        How many of each modality's most important players are probed. Of a single modality all pairs of candidates are.
    importance : "auto", "attnXgrad", "attn", "ig" or "drop"
        How candidates are chosen, see :func:`player_scores`.
    contexts, budget, method, seed, gap, adaptive, also, names, progress
        See :func:`interactions`.
    **game_options
        ``target``, ``value``, ``heads``, ``backend``, ``dtype`` and ``memory``, and what else :class:`TokenGame`
        (``fill``, ``padded_lengths``, ``precision``, ``device``) or :meth:`AcceleratedModel.game` (``path``, ``batch``)
        takes.

    Returns
    -------
    Explanation

    Raises
    ------
    ArgumentError
        Names the argument, what came and what was expected.
    """
    started = time.perf_counter()
    game = _game(model, inputs, players, masks, game_options)
    wanted = _per_modality(candidates, len(game.groups or (None,)))
    scores = player_scores(game, importance)
    chosen = candidate_players(game, next(iter(scores.values())), wanted)
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
        names=names,
        progress=progress,
    )
    ends = game(torch.stack([torch.ones(game.n, dtype=torch.bool), torch.zeros(game.n, dtype=torch.bool)]))
    full, empty = ends.reshape(2, -1)[:, 0].tolist()
    prediction = {"target": getattr(game, "target", None), "full": full, "empty": empty}
    return Explanation(scores, chosen, result, game, prediction, time.perf_counter() - started)


def _game(model: Any, inputs: Any, players: Any, masks: Any, options: Mapping[str, Any]) -> Game:
    """The game of a sample, of whichever kind the model is."""
    ready = model if isinstance(model, (AcceleratedMoE, AcceleratedModel)) else accelerate(model)
    if isinstance(ready, AcceleratedMoE):
        return ready.game(inputs, masks, players=players, **options)
    if masks is not None:
        raise ArgumentError("masks", "a value", "nothing: the masks of this model are among its inputs")
    if players is None:
        expected = "what takes part: text_players(...), image_players(...), or both in a list"
        raise ArgumentError("players", f"nothing for {ready!r}", expected)
    return ready.game(inputs, players, **options)


def _per_modality(candidates: int | Sequence[int], modalities: int) -> list[int]:
    if isinstance(candidates, int) and not isinstance(candidates, bool):
        candidates = [candidates] * modalities
    if isinstance(candidates, bool) or not hasattr(candidates, "__len__") or len(candidates) != modalities:
        raise ArgumentError(
            "candidates", repr(candidates), f"an integer, or one for each of the {modalities} modalities"
        )
    return [integer(f"candidates[{m}]", count, least=1) for m, count in enumerate(candidates)]
