"""Dual encoders: towers encoded apart score like the model itself, with a + b encodings instead of a x b."""

from __future__ import annotations

import encoders
import pytest
import torch
from encoders import CLS, END, MASK, PAD, patches, pixels

from flmoe_fast import ArgumentError, accelerate, interactions, text_players
from flmoe_fast.adapt.dual_game import DualEncoderGame
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.probes.grid import CornerGrid

FP64 = 1e-10
IDS = torch.tensor([[CLS, 9, 11, 7, END, PAD, PAD], [CLS, 30, 8, END, PAD, PAD, PAD], [CLS, 5, 5, 6, 12, END, PAD]])
VALID = torch.tensor([[1] * 5 + [0] * 2, [1] * 4 + [0] * 3, [1] * 6 + [0]])
MODELS = {"clip": encoders.clip, "siglip": encoders.siglip}


def inputs(*texts: int) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS[list(texts)], "attention_mask": VALID[list(texts)], "pixel_values": pixels()}


def tokens(text: int, absent: int | str):
    return text_players(IDS[text], special=[CLS, END, PAD], absent=absent)


def by_hand(model, text: int, coalitions: torch.Tensor, absent: int | str, image: float) -> torch.Tensor:
    """Scaled similarity of coalitions of the text's tokens, then the nine patches: one forward pass each."""
    scores = []
    own = [position for position, token in enumerate(IDS[text].tolist()) if token not in (CLS, END, PAD)]
    for coalition in coalitions.tolist():
        given = {name: value.clone() for name, value in inputs(text).items()}
        for position, present in zip(own, coalition):
            if not present and absent == "remove":
                given["attention_mask"][0, position] = 0
            elif not present:
                given["input_ids"][0, position] = absent
        for patch, present in enumerate(coalition[len(own) :]):
            top, left = 4 * (patch // 3), 4 * (patch % 3)
            if not present:
                given["pixel_values"][0, :, top : top + 4, left : left + 4] = image
        with torch.no_grad():
            scores.append(model(**given).logits_per_image[0, 0])
    return torch.stack(scores)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("absent", [MASK, "remove"], ids=["replaced", "removed"])
@pytest.mark.parametrize("text", [0, 1])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_values_are_the_models(make, text, absent):
    model = make()
    game = DualEncoderGame(model, inputs(0, 1), [tokens(text, absent), patches(0.25)], target=text)
    z = torch.rand(9, game.n) < torch.linspace(0, 1, 9)[:, None]
    expected = by_hand(model, text, z, absent, 0.25)
    assert relative(game(z), expected) <= FP64
    assert relative(game(z.flip(1)), expected) > 1e-4  # negative control
    slow = accelerate(model).game(inputs(text), [tokens(text, absent), patches(0.25)], path="module")
    assert slow.backend == "module (slow path)" and relative(slow(z), expected) <= FP64


def test_a_grid_costs_a_plus_b_encodings():
    """One context on a 3 x 9 grid: 1 + 3 texts and 1 + 9 images, for 40 scores."""
    game = accelerate(encoders.clip()).game(inputs(0), [tokens(0, MASK), patches()])
    assert isinstance(game, DualEncoderGame)
    before = game.encodings
    pairs = torch.cartesian_prod(torch.arange(3), 3 + torch.arange(9))
    grid = CornerGrid.of(pairs, game.n)
    context = torch.tensor([[False, False, True] + [True, False, False] * 3])  # nothing the game has seen yet
    values = game.corner_values(context, grid.toggled)
    spent = {side: game.encodings[side] - before[side] for side in before}
    assert values.shape == (1, 40) and spent == {"image": 10, "text": 4}
    images, texts = (context ^ grid.toggled[[0, *singles]] for singles in (range(4, 13), range(1, 4)))
    product = game.product(images, texts)
    assert product.shape == (10, 4) and game.encodings == {side: before[side] + spent[side] for side in before}
    assert torch.allclose(product.flatten().sort().values, values[0].sort().values, rtol=1e-10)
    again = torch.stack([game(context ^ toggled[None])[0] for toggled in grid.toggled])
    assert torch.allclose(values[0], again, rtol=1e-10)
    result = interactions(game, contexts=4, progress=False)
    assert result.backend == "dual encoder" and len(result.pairs) == 27 and result.evaluations == 160


def test_probabilities():
    clip = encoders.clip()
    both = [tokens(1, MASK), patches()]
    game = DualEncoderGame(clip, inputs(0, 1, 2), both, target=1, value="prob")
    z = torch.rand(6, game.n) < 0.5
    own = by_hand(clip, 1, z, MASK, 0.0)
    with torch.no_grad():
        others = []
        for coalition in z:
            image = patches().fill(pixels(), coalition[None, 2:])
            others.append(clip(**{**inputs(0, 2), "pixel_values": image}).logits_per_image[0])
    expected = torch.cat([own[:, None], torch.stack(others)], 1).softmax(1)[:, 0]
    assert relative(game(z), expected) <= FP64
    siglip = encoders.siglip()
    alone = DualEncoderGame(siglip, inputs(1), both, value="prob")
    assert relative(alone(z), by_hand(siglip, 1, z, MASK, 0.0).sigmoid()) <= FP64
    with pytest.raises(ArgumentError, match="value: got 'prob' with a single text, expected several texts"):
        DualEncoderGame(clip, inputs(1), both, value="prob")


def test_players_of_one_side_only():
    model = encoders.clip()
    game = DualEncoderGame(model, inputs(0), patches())
    z = torch.rand(5, 9) < 0.5
    everything = torch.cat([torch.ones(5, 3).bool(), z], 1)
    assert relative(game(z), by_hand(model, 0, everything, MASK, 0.0)) <= FP64
    assert game.groups is None and "text" not in game.encodings


def test_causal_text_ends_where_it_is_read():
    game = DualEncoderGame(encoders.clip(), inputs(0), [tokens(0, "remove"), patches()])
    engine = game._towers["text"][1].engine
    assert engine.causal and engine.problem.length == 5 and engine.reads.tolist() == [4] and engine.packed


def test_float32_and_its_float64_twin():
    game = DualEncoderGame(encoders.clip().float(), inputs(0), [tokens(0, MASK), patches()])
    precise = game.precise()
    z = torch.rand(7, game.n) < 0.5
    assert precise.dtype == torch.float64 and precise.precise() is None
    assert 0 < relative(game(z), precise(z)) < 1e-4 and precise.encodings["image"] <= 7
    assert torch.equal(game(z), game(z))


def test_what_is_no_dual_encoder():
    with pytest.raises(Unsupported, match="without get_text_features, get_image_features and logit_scale"):
        DualEncoderGame(encoders.vit(), inputs(0), patches())
    other = encoders.clip()

    def shifted(model, args, output):
        output.logits_per_image = output.logits_per_image + 1
        return output

    other.register_forward_hook(shifted)
    with pytest.raises(Unsupported, match="a CLIPModel that scores .* where scaled similarity is"):
        DualEncoderGame(other, inputs(0), [tokens(0, MASK), patches()])
    with pytest.raises(ArgumentError, match="target: got 3"):
        DualEncoderGame(encoders.clip(), inputs(0, 1), patches(), target=3)
    with pytest.raises(ArgumentError, match="inputs: got keys"):
        DualEncoderGame(encoders.clip(), {"pixel_values": pixels()}, patches())
