"""Importance of players of other people's transformers, against the models' own attentions and gradients."""

from __future__ import annotations

import copy

import encoders
import pytest
import torch
from encoders import CLS, END, IDS, MASK, PAD, patches, pixels, text_inputs, words

from flmoe_fast import ArgumentError, accelerate, interactions, text_players
from flmoe_fast.pipeline.importance.candidates import candidate_players, cross_pairs
from flmoe_fast.pipeline.importance.players import player_importance

#: Relative to the largest importance; vision models of transformers take their softmax in float32 whatever they are in.
DOUBLE, SINGLE = 1e-9, 1e-6
WORDS, PATCHES = slice(1, 5), slice(1, 10)  # where the players' tokens are


def own_attentions(model, inputs, score, methods, at=lambda output: output.attentions):
    """Rolled out attention (L, L) by the model's own attentions, and their gradients, for each method."""
    model.set_attn_implementation("eager")
    with torch.enable_grad():
        output = model(**inputs, output_attentions=True)
        maps = list(at(output))
        gradients = torch.autograd.grad(score(output), maps)
    found = []
    for method in methods:
        rolled = torch.eye(maps[0].shape[-1], dtype=torch.float64)
        for attention, gradient in zip(maps, gradients):
            relevance = attention if method == "attn" else attention.clamp(min=0) * gradient.clamp(min=0)
            matrix = relevance[0].mean(0) + torch.eye(len(rolled), dtype=torch.float64)
            rolled = matrix / matrix.sum(1, keepdim=True) @ rolled
        found.append(rolled.detach())
    return found


def apart(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


CASES = {
    "bert, removed": (encoders.bert, "remove", None),
    "bert, replaced": (encoders.bert, MASK, None),
    "pre-norm roberta": (encoders.prelayernorm, "remove", None),
    "vit": (encoders.vit, None, 0.0),
}


@pytest.mark.parametrize(("make", "text", "image"), CASES.values(), ids=CASES)
def test_attention_methods(make, text, image):
    model = make()
    inputs = text_inputs() if image is None else {"pixel_values": pixels()}
    players, at = ([words(text)], WORDS) if image is None else ([patches(image)], PATCHES)
    game = accelerate(model).game(inputs, players, target=1, path="engine")
    methods, twin = ("attn", "attnXgrad"), copy.deepcopy(model)
    attention, weighted = own_attentions(twin, inputs, lambda out: out.logits[0, 1], methods)
    for method, expected in (("attn", attention), ("attnXgrad", weighted)):
        found = player_importance(game, method=method)
        assert apart(found, expected[0, at]) < (DOUBLE if image is None else SINGLE)
    other = accelerate(model).game(inputs, players, target=0, path="engine")
    assert apart(player_importance(other), weighted[0, at]) > 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("text", [MASK, "remove"])
def test_integrated_gradients(text):
    """Along the line from what replaces the words, or from zero where they are removed, into the first layer."""
    model, inputs, steps = encoders.bert(), text_inputs(), 5
    game = accelerate(model).game(inputs, [words(text)], target=1, path="engine")
    blank = IDS.clone()
    blank[0, WORDS] = MASK
    entering = {}

    def states(ids):
        def keep(module, args):
            entering["states"] = args[0]

        hook = model.bert.encoder.layer[0].register_forward_pre_hook(keep)
        with torch.no_grad():
            model(**{**inputs, "input_ids": ids})
        hook.remove()
        return entering["states"]

    full, start = states(IDS), states(blank)
    if text == "remove":
        start = full.clone()
        start[0, WORDS] = 0.0
    total = torch.zeros_like(full)
    for step in range(1, steps + 1):
        point = (start + step / steps * (full - start)).requires_grad_()
        hook = model.bert.encoder.layer[0].register_forward_pre_hook(
            lambda module, args, point=point: (point, *args[1:])
        )
        total += torch.autograd.grad(model(**inputs).logits[0, 1], point)[0]
        hook.remove()
    expected = ((full - start) * total / steps).abs().mean(2)[0, WORDS]
    assert apart(player_importance(game, method="ig", ig_steps=steps), expected) < DOUBLE
    assert apart(player_importance(game, method="ig", ig_steps=2), expected) > 1e-3


def test_dual_encoders():
    model = encoders.clip()
    ids = torch.tensor([[CLS, 9, 11, 7, END, PAD, PAD]])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels()}
    text = text_players(ids, special=[CLS, END, PAD])
    game = accelerate(model).game(inputs, [text, patches(0.25)], path="engine")
    found = player_importance(game)
    sides = []
    for name, row, at in (("text", 4, slice(1, 4)), ("vision", 0, PATCHES)):
        [rolled] = own_attentions(
            copy.deepcopy(model), inputs, lambda out: out.logits_per_image[0, 0], ("attnXgrad",),
            lambda out, name=name: out[f"{name}_model_output"].attentions,
        )  # fmt: skip
        sides.append(rolled[row, at])
    assert apart(found, torch.cat(sides)) < SINGLE
    candidates = candidate_players(game, found, (2, 3))
    assert [len(part) for part in candidates] == [2, 3]
    assert found[list(candidates[1])].min() >= found[3:].sort(descending=True).values[2]
    result = interactions(game, pairs=cross_pairs(candidates), contexts=4, progress=False)
    assert {tuple(pair) for pair in result.pairs.tolist()} == {(a, b) for a in candidates[0] for b in candidates[1]}


def test_words_add_up_their_tokens_and_others_are_refused():
    model, inputs = encoders.bert(), text_inputs()
    single = accelerate(model).game(inputs, [words("remove")], target=1, path="engine")
    pairs = text_players(IDS, by="word", word_ids=[None, 0, 0, 1, 1, *[None] * (IDS.shape[1] - 5)])
    joined = accelerate(model).game(inputs, [pairs], target=1, path="engine")
    tokens = player_importance(single)
    assert apart(player_importance(joined), tokens.view(2, 2).sum(1)) < DOUBLE
    slow = accelerate(model).game(inputs, [words("remove")], target=1, path="module")
    with pytest.raises(ArgumentError, match="game: got ModuleGame"):
        player_importance(slow)
    with pytest.raises(ArgumentError, match="method: got 'guess'"):
        player_importance(single, method="guess")
    with pytest.raises(ArgumentError, match="players of a single modality"):
        cross_pairs([(0, 1), ()])
