"""Games that answer with NaN, infinity or complex numbers are refused where they answer, with the coalition named."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from edge_shapes import EDGES
from encoders import IDS, VALID, bert, clip, patches, pixels
from torch import nn

import flmoe_fast
from flmoe_fast import ArgumentError, exact_interactions, interactions, text_players
from flmoe_fast.adapt.dual_game import DualEncoderGame
from flmoe_fast.adapt.encoder_game import EncoderGame
from flmoe_fast.adapt.module_game import ModuleGame
from flmoe_fast.games.game import CallableGame, Game
from flmoe_fast.games.grouped import GroupedGame
from flmoe_fast.scale.group import Group, SharedGame

N = 5
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def spoiled(value: float) -> Callable:
    """The number of players present, and ``value`` for players 1 and 3 alone."""
    at = torch.tensor([False, True, False, True, False])
    return lambda z: torch.where((z == at).all(1), value, z.double().sum(1))


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("method", ["grid", "surrogate", "auto"])
def test_the_first_coalition_is_named(method, value):
    """Whatever asks, before anything is estimated; and nothing is refused where all is finite."""
    expected = (
        rf"game: got {value} for the coalition of players \{{1, 3\}} \(\d+ such values in this call\), expected fin"
    )
    with pytest.raises(ArgumentError, match=expected):
        interactions(spoiled(value), n=N, budget=400, method=method, progress=False)
    with pytest.raises(ArgumentError, match=expected):
        exact_interactions(spoiled(value), n=N, progress=False)
    exact_interactions(spoiled(0.0), n=N, progress=False)


def test_a_skipped_check_is_seen(monkeypatch):
    """Negative control: NaN passes, and the average of everything is NaN."""
    monkeypatch.setattr("flmoe_fast.games.game._wrong", lambda values: False)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_the_first_coalition_is_named("grid", BAD["nan"])


def test_heads_corners_and_overflowing_sums():
    class Own(Game):
        n, player_names, heads = 20, tuple(map(str, range(20))), ("a", "b")

        def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
            size = coalitions.double().sum(1)
            return torch.stack([size, torch.where(size > 18, torch.nan, 1e308 + 0 * size)], 1)

        def corner_values(self, contexts: torch.Tensor, toggled: torch.Tensor) -> torch.Tensor:
            return torch.full((len(contexts), len(toggled)), torch.nan) if len(toggled) == 3 else torch.zeros(2, 2)

    rows = torch.ones(3, 20, dtype=torch.bool)
    rows[0, :9] = False
    rows[1, 4] = False
    with pytest.raises(ArgumentError, match=r"nan of head 'b' for .*\{0, 1, 2, 3, 5, .* 16, \.\.\. \(19 in all\)"):
        Own()(rows)
    assert float(Own()(rows[:1].expand(9, -1)).sum(0)[1]) == float("inf")  # finite values, though not their sum
    toggled = torch.eye(20, dtype=torch.bool)
    with pytest.raises(ArgumentError, match=r"players \{1, 2, 3"):
        Own().corner_values(rows[2:], toggled[:3])
    Own().corner_values(rows[:2], toggled[:2])


def test_complex_values_are_refused():
    with pytest.raises(ArgumentError, match=r"game: got torch.complex64 values, expected real numbers"):
        CallableGame(lambda z: torch.full((len(z),), 1 + 2j), N)(torch.zeros(2, N, dtype=torch.bool))


def ruined(model: nn.Module) -> nn.Module:
    """The model with NaN in all its matrices, as a diverged training leaves it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.nan if parameter.dim() > 1 else 1.0)
    return model


def failing_later(build: Callable[[Callable[[Any], torch.Tensor]], Game]) -> Game:
    """A game of a model whose value is finite while the game is built and checked, and NaN from then on."""
    factor = [1.0]
    game = build(lambda output: output.logits[:, 0] * factor[0])
    factor[0] = torch.nan
    return game


def dual_encoder() -> Game:
    model = clip()
    game = DualEncoderGame(model, TEXT | {"pixel_values": pixels()}, [WORDS, patches(0.25)], target=0)
    with torch.no_grad():
        model.logit_scale.fill_(torch.nan)
    return game


def nothing(coalitions: torch.Tensor) -> torch.Tensor:
    return torch.full((len(coalitions),), torch.nan)


TEXT = {"input_ids": IDS, "attention_mask": VALID}
WORDS = text_players(IDS[0], special=[2, 3, 0], absent=4)
#: One game of every kind whose function or model fails.
GAMES: dict[str, Callable[[], Game]] = {
    "callable": lambda: CallableGame(nothing, N),
    "grouped": lambda: GroupedGame(CallableGame(nothing, N), {"a": [0, 1], "b": [2, 3]}),
    "shared": lambda: SharedGame(CallableGame(nothing, N), Group()),
    "tokens": lambda: EDGES[0].game(ruined(EDGES[0].model())),
    "tokens, reference": lambda: EDGES[0].game(ruined(EDGES[0].model()), backend="reference"),
    "encoder": lambda: failing_later(lambda value: EncoderGame(bert(), TEXT, WORDS, value=value)),
    "module": lambda: ModuleGame(ruined(bert()), TEXT, WORDS, target=0),
    "dual encoder": dual_encoder,
}


@pytest.mark.parametrize("make", GAMES.values(), ids=GAMES)
def test_every_kind_of_game_refuses(make):
    game = make()
    rows = torch.ones(3, game.n, dtype=torch.bool)
    rows[0, :2] = False
    with pytest.raises(ArgumentError, match=r"game: got nan .*for the coalition of players \{"):
        game(rows)
    with pytest.raises(ArgumentError, match="game: got nan"):
        game.corner_values(rows, torch.eye(game.n, dtype=torch.bool)[:2])


def test_every_class_of_game_is_checked():
    """No class of the package answers unchecked, and none inherits an unchecked answer."""
    for module in pkgutil.walk_packages(flmoe_fast.__path__, "flmoe_fast."):
        if module.name.rpartition(".")[2] not in ("_C", "__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:
                continue  # an optional requirement
    found = [Game]
    for cls in found:
        found += [sub for sub in cls.__subclasses__() if sub.__module__.startswith("flmoe_fast")]
    assert len(set(found)) > 8
    for cls in found[1:]:
        if cls.__call__ is Game.__call__:
            continue  # says what its subclasses have, and answers nothing itself
        assert hasattr(cls.__call__, "__wrapped__"), cls
        own = cls.corner_values
        assert own is Game.corner_values or hasattr(own, "__wrapped__"), cls
