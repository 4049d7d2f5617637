"""Importance of a game's players, by the best that can be read of the model it plays: what chooses candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_fast.checks import ArgumentError, one_of
from flmoe_fast.games.game import Game
from flmoe_fast.games.token_game import TokenGame
from flmoe_fast.pipeline.importance.players import player_importance, readable_towers
from flmoe_fast.pipeline.importance.tokens import METHODS, Importance, token_importance

#: What :func:`player_scores` takes; "drop" asks nothing of the model but values of coalitions.
SCORES = ("auto", *METHODS, "drop")


def player_scores(game: Game, method: str = "auto") -> dict[str, Tensor]:
    """Importance of every player of a game.

    Parameters
    ----------
    game : Game
    method : "auto", "attnXgrad", "attn", "ig" or "drop"
        Attention times gradient, attention alone, integrated gradients (see :func:`token_importance` and
        :func:`player_importance`), or what is lost when a player alone leaves, for ``n + 1`` evaluations. "auto" takes
        the first of "attnXgrad", "ig" (ensembles without attention) and "drop" (games that show only their values) that
        the game has.

    Returns
    -------
    dict from str to Tensor (n,), floating point on the CPU
        Of an ensemble of experts "mixture" and every expert; of any other model "model"; by "drop" every head of the
        game. The first entry is what candidates are chosen by.

    Raises
    ------
    ArgumentError
        The method cannot be had for this game.
    """
    one_of("importance", method, SCORES)
    if method == "auto":
        method = _best(game)
    if method == "drop":
        return _drops(game)
    if not isinstance(game, TokenGame):
        return {"model": player_importance(game, method=method)}
    found = _of_tokens(game, method)
    names = ("mixture", *game.problem.model.config.expert_names)
    maps = (found.mixture, *found.experts)
    return {name: row[game.tokens.to(row.device)].cpu() for name, row in zip(names, maps)}


def _best(game: Game) -> str:
    if isinstance(game, TokenGame):
        return "ig" if game.problem.model.config.fusion == "interpretcc" else "attnXgrad"
    try:
        readable_towers(game)
    except ArgumentError:
        return "drop"
    return "attnXgrad"


def _drops(game: Game) -> dict[str, Tensor]:
    present = torch.ones(game.n + 1, game.n, dtype=torch.bool)
    present[1:].fill_diagonal_(False)
    values = game(present).reshape(game.n + 1, -1).double().cpu()
    names = game.heads or ("model",)
    return dict(zip(names, (values[:1] - values[1:]).T))


def _of_tokens(game: TokenGame, method: str) -> Importance:
    """Importance maps on the padded sequence of the game's own problem, for the game's target."""
    problem, config = game.problem, game.problem.model.config
    parameter = next(problem.model.reweight.parameters())
    features = problem.features.to(parameter).split(problem.padded_lengths)
    mask = torch.zeros(len(problem.features), dtype=torch.bool)
    mask[problem.valid] = True
    masks = [m[None].to(parameter.device) for m in mask.split(problem.padded_lengths)] if problem.masked else None
    target: int | Tensor
    if isinstance(game.target, int):
        target = game.target
    else:
        target = torch.zeros(config.classes, dtype=torch.long)
        target[list(game.target)] = 1
    return token_importance(problem.model, [f[None] for f in features], masks, target=target, method=method)
