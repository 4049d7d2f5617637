"""Layers beyond the plain one: rotations, biases, relative positions, gates, other norms, layers that run again.

The module itself, one masked input at a time, is the truth; that path is compared with inputs masked by hand in
test_encoder_game.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as hf
from decoders import AllDouble
from encoders import TEXT, ready, text_inputs, words
from torch import nn
from zoo import CASES, Case

from flmoe_fast import accelerate
from flmoe_fast.adapt.encoder_game import EncoderGame
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.remember import forget
from flmoe_fast.games.game import Game
from flmoe_fast.pipeline.importance.players import player_importance

FP64 = 1e-10
#: What each of them has that a plain layer has not.
FORMS = {
    "ModernBERT": "rotations, local and global layers, a gated block, a first layer without a norm, one projection",
    "NomicBERT": "rotations, a gated block, norms after the residual",
    "EuroBERT": "rotations, RMSNorm, keys shared by queries",
    "Llama, classifier": "the same, causal",
    "DeBERTa": "contents with relative positions, one projection by heads",
    "DeBERTa-v2": "contents with relative positions in buckets",
    "MPNet": "a bias from buckets for all layers",
    "ALBERT": "one layer three times",
    "T5, classifier": "no scale, RMSNorm, a bias of the first layer, a decoder behind",
    "mT5, classifier": "the same with a gated block",
    "BART, classifier": "names that do not say where norms are, a decoder behind",
    "XLM-R XL": "norms before",
    "DINOv2, SwiGLU": "a gated block",
    "DINOv3": "rotations of some tokens, registers, layer scales",
    "DINOv3, gated": "the same with a gated block",
    "BEiT, relative": "a bias of every layer",
    "data2vec vision": "a bias of every attention",
    "LayoutLMv3": "two biases, scaled as scores are",
    "SigLIP2, any size": "patches in rows",
    "VisualBERT": "a head that reads another token for every mask",
    "LXMERT": "two stacks, one of them behind",
    "FLAVA": "three stacks, two of them behind or beside",
    "BLIP, matching": "words that enter the head alone",
    "Whisper": "an encoder before convolutions, words that enter the head alone",
}


def on_both(name: str) -> tuple[Game, Game, torch.Tensor]:
    case: Case = CASES[name]
    model, inputs = case.make(), case.inputs()
    game, slow = (
        accelerate(model).game(inputs, case.players(inputs), path=path, batch=3, **case.options)
        for path in ("engine", "module")
    )
    z = torch.rand(12, game.n) < torch.linspace(0, 1, 12)[:, None]
    return game, slow, z


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", FORMS)
def test_values_are_the_models(name):
    with AllDouble():
        game, slow, z = on_both(name)
        expected = slow(z)
        assert isinstance(game, EncoderGame)
        assert relative(game(z), expected) <= FP64
        assert relative(game(~z), expected) > 1e-4  # other coalitions have other values


def test_single_precision_is_as_exact_as_the_model_in_it():
    case = CASES["ModernBERT"]
    model, inputs = case.make(), case.inputs()
    with AllDouble():
        exact, _, z = on_both("ModernBERT")
        truth = exact(z)
    single = model.float()
    ours, theirs = (
        accelerate(single).game(inputs, case.players(inputs), path=path, target=exact.target)
        for path in ("engine", "module")
    )
    assert relative(ours(z), truth) <= 2 * relative(theirs(z), truth) + 1e-6
    assert ours.precise().dtype == torch.float64


# ---- planted mistakes ------------------------------------------------------------------------------------------------


def _replaced(engine, **changes):
    """All kinds of places with some of their tables changed."""
    made = {
        id(one): dataclasses.replace(one, **{k: f(getattr(one, k)) for k, f in changes.items()})
        for one in engine.places
    }
    engine.places = [made[id(one)] for one in engine.places]


def _far(relative_tables):
    return dataclasses.replace(relative_tables, of_keys=relative_tables.of_keys.T)


MISTAKES = {
    "rotation": ("ModernBERT", lambda engine: _replaced(engine, sin=torch.neg)),
    "places move when others are left out": ("NomicBERT", lambda engine: _replaced(engine, cos=lambda t: t.roll(1, 0))),
    "window": ("ModernBERT", lambda engine: _replaced(engine, allowed=lambda _: None)),
    "bias": ("MPNet", lambda engine: _replaced(engine, bias=lambda t: t.transpose(1, 2))),
    "relative": ("DeBERTa-v2", lambda engine: _replaced(engine, relative=_far)),
    "gate": ("DINOv2, SwiGLU", lambda engine: engine.layers[1].up.copy_(engine.layers[1].up.roll(1, 1))),
    "key bias": ("DeBERTa", lambda engine: engine.layers[1].qkv_bias.zero_()),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake):
    name, spoil = MISTAKES[mistake]
    with AllDouble():
        game, slow, z = on_both(name)
        expected = slow(z)
        spoil(game.tower.engine)
        forget(game)
        assert relative(game(z), expected) > 1e-6


# ---- what is shared, and what is refused -----------------------------------------------------------------------------


def test_an_encoder_runs_once_for_what_enters_it():
    """Nine coalitions of two words behind the encoder and two of its four sounds: three states of the sound."""
    with AllDouble():
        game, slow, _ = on_both("Whisper")
        counted = []
        evaluate = game.tower.engine.evaluate
        game.tower.engine.evaluate = lambda z: counted.append(len(z)) or evaluate(z)
        z = torch.ones(9, game.n, dtype=torch.bool)
        z[:, 0] = torch.arange(9) % 3 != 0
        z[:, 1] = torch.arange(9) % 3 != 1
        z[:, -1] = torch.arange(9) // 3 != 0
        z[:, -2] = torch.arange(9) // 3 != 1
        assert relative(game(z), slow(z)) <= FP64 and sum(counted) == 3


def test_only_what_follows_itself_may_run_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, embedding_size=16))

        def forward(self, input_ids, attention_mask):
            first = self.model(input_ids, attention_mask).logits
            return first + self.model(input_ids.flip(1), attention_mask).logits

    model = ready(Twice())
    with pytest.raises(Unsupported, match="which runs 6 times in one forward pass"):
        EncoderGame(model, text_inputs(), words())


def test_a_convolution_is_refused_with_that_reason():
    case = CASES["ConvBERT"]
    inputs = case.inputs()
    with pytest.raises(Unsupported, match="no convolution over neighbouring tokens, which sees tokens that attention"):
        accelerate(case.make()).game(inputs, case.players(inputs), path="engine")


@pytest.mark.parametrize("name", ["ModernBERT", "DeBERTa-v2", "T5, classifier"])
def test_attention_can_be_read(name):
    """The layers written out for gradients give what the engine gives."""
    with AllDouble():
        game, _, _ = on_both(name)
        tower = game.tower
        output, maps = tower.attended(tower.problem.present[None])
        everyone = torch.ones(1, game.n, dtype=torch.bool)
        assert relative(output, tower.encode(everyone)) <= FP64 and len(maps) == len(tower.stack.run)
        assert player_importance(game).shape == (game.n,)
