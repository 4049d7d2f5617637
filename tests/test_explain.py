"""One call from a model and a sample to ranked interactions."""

from __future__ import annotations

import inspect

import encoders
import numpy as np
import pytest
import reference_modules
import torch
from games import H, small_model

import flmoe_fast
from flmoe_fast import ArgumentError, InteractionResult, TokenGame, exact_interactions, explain, interactions
from flmoe_fast.games.game import as_game
from flmoe_fast.pipeline.importance.tokens import token_importance
from flmoe_fast.pipeline.show.text import report
from flmoe_fast.probes.gap import DEFAULT_GAP
from flmoe_fast.probes.naive import four_corner_loop
from flmoe_fast.runs.settings import ExplainSettings


@pytest.fixture
def sample():
    features = [torch.randn(9, H, dtype=torch.float64), torch.randn(7, H, dtype=torch.float64)]
    return features, [(torch.arange(9) < 6).long(), torch.ones(7)]


def test_candidates_are_the_most_important_players(sample):
    features, masks = sample
    model = small_model()
    found = explain(model, features, masks=masks, fill="zero", candidates=(2, 3), contexts=6, progress=False)
    maps = token_importance(model, [f[None] for f in features], [m[None] for m in masks], target=found.game.target)
    text = 1 + maps.mixture[1:6].argsort(descending=True)[:2]  # never the start symbol, never padding
    image = maps.mixture[9:].argsort(descending=True)[:3]
    names = [f"text {i}" for i in text.tolist()], [f"image {i}" for i in image.tolist()]
    assert [[found.game.player_names[p] for p in side] for side in found.candidates] == [*names]
    assert len(found.interactions.pairs) == 6


def test_it_is_interactions_on_those_pairs(sample):
    features, masks = sample
    model = small_model()
    found = explain(model, features, masks=masks, fill="zero", candidates=3, contexts=8, seed=4, progress=False)
    game = TokenGame(model, features, masks=masks, fill="zero")
    again = interactions(game, rows=found.candidates[0], cols=found.candidates[1], contexts=8, seed=4, progress=False)
    assert np.array_equal(found.interactions.sii, again.sii) and np.array_equal(found.interactions.gap, again.gap)
    full = float(game(torch.ones(1, game.n, dtype=torch.bool))[0, 0])
    assert found.prediction["full"] == full and found.prediction["target"] == game.target


def test_three_modalities_and_multilabel():
    model = small_model(("lab", "note", "code"), task="multilabel")
    features = [torch.randn(4, H, dtype=torch.float64) for _ in range(3)]
    masks = [torch.ones(4)] * 3
    found = explain(model, features, masks=masks, fill="zero", candidates=2, contexts=4, target=[0, 2], progress=False)
    assert len(found.interactions.pairs) == 3 * 4 and found.game.target == (0, 2)


def modules():
    """Models that accelerate takes, and a sample of each with its players, as explain takes them."""
    text, image = {**encoders.text_inputs()}, {"pixel_values": encoders.pixels()}
    tokens = [torch.randn(t, 12, dtype=torch.float64) for t in (3, 2)]
    return {
        "one text": (encoders.bert(), (text, encoders.words("remove")), {}),
        "text and image": (encoders.vilt(), (text | image, [encoders.words(), encoders.patches()]), {"value": "logit"}),
        "dual encoder": (encoders.clip(), (text | image, [encoders.words(), encoders.patches()]), {}),
        "slow path": (encoders.bert(), (text, encoders.words()), {"path": "module"}),
        "reference layout": (reference_modules.InteractionMoE().double().eval(), (tokens,), {"fill": "zero"}),
    }


@pytest.mark.parametrize("name", modules())
def test_any_model_that_accelerate_takes(name, tmp_path):
    """The same pairs and numbers as its steps one by one; a model read before is taken as well."""
    model, sample, options = modules()[name]
    ready = flmoe_fast.accelerate(model)
    found = explain(model, *sample, candidates=2, contexts=4, seed=3, progress=False, **options)
    game = ready.game(*sample, **options)
    scores = next(iter(flmoe_fast.player_scores(game).values()))
    pairs = flmoe_fast.cross_pairs(flmoe_fast.candidate_players(game, scores, [2] * len(found.candidates)))
    steps = interactions(game, pairs=pairs, contexts=4, seed=3, progress=False)
    again = explain(ready, *sample, candidates=2, contexts=4, seed=3, progress=False, **options)
    for result in (steps, again.interactions):
        assert result.pairs.tolist() == found.interactions.pairs.tolist()
        assert np.allclose(result.sii, found.interactions.sii, rtol=0, atol=1e-12)
    assert len(pairs) == (1 if len(found.candidates) == 1 else 4)
    full = game(torch.ones(1, game.n, dtype=torch.bool)).reshape(-1)[0]
    assert found.prediction["full"] == pytest.approx(float(full), abs=1e-12)
    assert found.prediction["target"] == game.target
    text = report(found, 1)
    assert f"{game.n} tokens" in text and found.game.player_names[found.candidates[0][0]] in text
    found.save(tmp_path)
    assert len((tmp_path / "importance.csv").read_text().splitlines()) == 1 + game.n


def test_importance_by_drops():
    """What is lost without a player alone, of every head; the players of a sum are worth their terms."""
    worth = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    scores = flmoe_fast.player_scores(as_game(lambda present: present.double() @ worth, 3), "drop")
    assert torch.equal(scores["model"], worth)
    game = TokenGame(small_model(), [torch.randn(3, H).double()] * 2, fill="zero")
    scores = flmoe_fast.player_scores(game, "drop")
    present = torch.ones(2, game.n, dtype=torch.bool)
    present[1, 2] = False
    values = game(present)
    assert tuple(scores) == game.heads
    assert [float(s[2]) for s in scores.values()] == pytest.approx((values[0] - values[1]).tolist(), abs=1e-14)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"players: got nothing for AcceleratedModel\(BertFor.*\), expected what takes part"),
        ({"players": encoders.words(), "masks": [torch.ones(8)]}, "masks: got a value, expected nothing"),
        (
            {"players": encoders.words(), "importance": "ig", "path": "module"},
            "game: got ModuleGame, expected a game on",
        ),
    ],
)
def test_what_other_models_need_is_named(options, message):
    with pytest.raises(ArgumentError, match=message):
        explain(encoders.bert(), encoders.text_inputs(), progress=False, **options)


def test_saved_files(sample, tmp_path):
    import pandas

    features, masks = sample
    found = explain(small_model(), features, masks=masks, fill="zero", candidates=2, contexts=4, progress=False)
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
        explain(small_model(), features, masks=masks, fill="zero", progress=False, **{"candidates": 2, **options})


def test_every_gap_is_the_same_kind_unless_asked():
    calls = (explain, interactions, flmoe_fast.exact_interactions, flmoe_fast.screen, four_corner_loop)
    kinds = {inspect.signature(call).parameters["gap"].default for call in calls}
    assert kinds == {ExplainSettings().gap, DEFAULT_GAP}
    added = exact_interactions(lambda present: present.double().sum(1), n=3, progress=False)
    assert np.array_equal(added.gap, np.zeros(3))  # players that add up do not stand in for one another
