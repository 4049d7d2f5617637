"""One call from a model and a sample to ranked interactions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_token_game import H, make

from flmoe_fast import ArgumentError, InteractionResult, TokenGame, explain, interactions
from flmoe_fast.pipeline.importance.tokens import token_importance


@pytest.fixture
def sample():
    features = [torch.randn(9, H, dtype=torch.float64), torch.randn(7, H, dtype=torch.float64)]
    return features, [(torch.arange(9) < 6).long(), torch.ones(7)]


def test_candidates_are_the_most_important_players(sample):
    features, masks = sample
    model = make()
    found = explain(model, features, masks=masks, fill="zero", candidates=(2, 3), contexts=6, progress=False)
    maps = token_importance(model, [f[None] for f in features], [m[None] for m in masks], target=found.game.target)
    text = 1 + maps.mixture[1:6].argsort(descending=True)[:2]  # never the start symbol, never padding
    image = maps.mixture[9:].argsort(descending=True)[:3]
    names = [f"text {i}" for i in text.tolist()], [f"image {i}" for i in image.tolist()]
    assert [[found.game.player_names[p] for p in side] for side in found.candidates] == [*names]
    assert len(found.interactions.pairs) == 6


def test_it_is_interactions_on_those_pairs(sample):
    features, masks = sample
    model = make()
    found = explain(model, features, masks=masks, fill="zero", candidates=3, contexts=8, seed=4, progress=False)
    game = TokenGame(model, features, masks=masks, fill="zero")
    again = interactions(game, rows=found.candidates[0], cols=found.candidates[1], contexts=8, seed=4, progress=False)
    assert np.array_equal(found.interactions.sii, again.sii) and np.array_equal(found.interactions.gap, again.gap)
    full = float(game(torch.ones(1, game.n, dtype=torch.bool))[0, 0])
    assert found.prediction["full"] == full and found.prediction["target"] == game.target


def test_three_modalities_and_multilabel():
    model = make(("lab", "note", "code"), task="multilabel")
    features = [torch.randn(4, H, dtype=torch.float64) for _ in range(3)]
    masks = [torch.ones(4)] * 3
    found = explain(model, features, masks=masks, fill="zero", candidates=2, contexts=4, target=[0, 2], progress=False)
    assert len(found.interactions.pairs) == 3 * 4 and found.game.target == (0, 2)


def test_saved_files(sample, tmp_path):
    import pandas

    features, masks = sample
    found = explain(make(), features, masks=masks, fill="zero", candidates=2, contexts=4, progress=False)
    found.save(tmp_path / "out")
    loaded = InteractionResult.load(tmp_path / "out" / "interactions.npz")
    assert np.array_equal(loaded.sii, found.interactions.sii)
    table = pandas.read_csv(tmp_path / "out" / "interactions.csv")
    assert np.allclose(table["sii"], found.interactions.sii.T.ravel(), rtol=0, atol=1e-12)
    importance = pandas.read_csv(tmp_path / "out" / "importance.csv")
    assert len(importance) == found.game.n and "uniqueness: text" in importance.columns


@pytest.mark.parametrize(
    "options, message",
    [
        ({"candidates": 0}, r"candidates\[0\]: got 0, expected an integer >= 1"),
        ({"candidates": (1, 2, 3)}, r"candidates: got \(1, 2, 3\), expected an integer, or one for each"),
        ({"importance": "lime"}, "importance: got 'lime'"),
        ({"contexts": 0}, "contexts: got 0"),
        ({"players": [[], [0, 1]]}, "players: got players of a single modality"),
    ],
)
def test_bad_input_is_named(sample, options, message):
    features, masks = sample
    with pytest.raises(ArgumentError, match=message):
        explain(make(), features, masks=masks, fill="zero", progress=False, **{"candidates": 2, **options})
