"""Importance of the players of other people's transformers, to choose which of their pairs to probe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flmoe_fast.adapt.dual_game import DualEncoderGame
from flmoe_fast.adapt.encoder_game import EncoderGame
from flmoe_fast.adapt.module_game import ModuleGame
from flmoe_fast.adapt.tower import Tower
from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.games.game import Game
from flmoe_fast.pipeline.importance.tokens import IG_STEPS, METHODS, rolled_out


def player_importance(game: Game, *, method: str = "attnXgrad", ig_steps: int = IG_STEPS) -> Tensor:
    """Importance of every player of a game that :func:`flmoe_fast.accelerate` has put on an encoder engine.

    As :func:`batch_importance` has it, of the target's logit (of the first value where the value is a function), with
    three differences: of the rolled out matrix the rows of those tokens are averaged which the model's head reads;
    integrated gradients start at what replaces absent tokens, and at zero for tokens that are removed; and a player's
    importance is the sum over its tokens. In dual encoders each side is rolled out by itself, with gradients of their
    similarity.

    Parameters
    ----------
    game : EncoderGame or DualEncoderGame
    method : "attnXgrad", "attn" or "ig"
    ig_steps : int
        Points of the integration path.

    Returns
    -------
    Tensor (n,), float64 on the CPU

    Raises
    ------
    ArgumentError
        A game of another kind, or players that share a token.
    """
    one_of("method", method, METHODS)
    steps = integer("ig_steps", ig_steps, least=1)
    found = torch.zeros(game.n, dtype=torch.float64)
    for players, tower, explained in readable_towers(game):
        problem = tower.problem
        with torch.inference_mode(False), torch.enable_grad():
            tokens = _integrated(tower, explained, steps) if method == "ig" else _attended(tower, explained, method)
        owned = problem.owner >= 0
        found.index_add_(0, players[problem.owner[owned]], tokens.detach().double().cpu()[owned])
    return found


def readable_towers(game: Game) -> list[tuple[Tensor, Tower, Callable[[Tensor], Tensor]]]:
    """The towers of a game whose attention can be read, or :class:`ArgumentError`."""
    if isinstance(game, ModuleGame) and game.slower is not None:
        game = game.slower
    if not isinstance(game, (EncoderGame, DualEncoderGame)):
        raise ArgumentError("game", type(game).__name__, "a game on an encoder engine, as accelerate(model).game makes")
    towers = game.towers()
    for _, tower, _ in towers:
        if tower.problem.mixed is not None:
            raise ArgumentError("game", f"players that share tokens of {tower.stack.name}", "whole tokens a player")
    return towers


def _attended(tower: Tower, explained: Callable[[Tensor], Tensor], method: str) -> Tensor:
    """Importance (L,) of the tokens by their attention."""
    states = _present(tower).requires_grad_()  # so that the graph reaches every attention map of a frozen model
    output, maps = tower.attended(states)
    if method == "attnXgrad":
        gradients = torch.autograd.grad(explained(output).sum(), maps)
        maps = [attention.relu() * gradient.relu() for attention, gradient in zip(maps, gradients)]
    rows = rolled_out([attention.detach().mean(dim=1) for attention in maps])[0]
    return rows[tower.problem.reads.to(rows.device)].mean(dim=0)


def _integrated(tower: Tower, explained: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Importance (L,) of the tokens by integrated gradients of the states that enter the first layer."""
    full = _present(tower)
    start = tower.problem.absent.to(full)[None].clone()
    start[:, tower.problem.removed.to(full.device)] = 0.0
    total = torch.zeros_like(full)
    for step in range(1, steps + 1):
        states = (start + step / steps * (full - start)).requires_grad_()
        output, _ = tower.attended(states)
        total += torch.autograd.grad(explained(output).sum(), states)[0]
    return ((full - start) * total / steps).abs().mean(dim=-1)[0]


def _present(tower: Tower) -> Tensor:
    """The full sample's states (1, L, H) as they enter the first layer."""
    weight = tower.stack.parts[0].out[0]
    return tower.problem.present.to(device=weight.device, dtype=weight.dtype)[None].clone()
