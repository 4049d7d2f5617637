"""What a token game is: players, fills, positions, targets, and the errors for what it cannot be."""

from __future__ import annotations

import pytest
import torch
from games import H, small_model

from flmoe_fast import ArgumentError, FLI2MoE, FLI2MoEConfig, TokenGame


@pytest.fixture
def sample() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    features = [torch.randn(5, H, dtype=torch.float64), torch.randn(4, H, dtype=torch.float64)]
    return features, [torch.tensor([1, 1, 1, 0, 0]), torch.ones(4)]


def test_players_are_valid_tokens_without_the_start_symbol(sample):
    features, masks = sample
    game = TokenGame(small_model(), features, masks=masks, fill="zero")
    assert game.player_names == ("text 1", "text 2", "image 0", "image 1", "image 2", "image 3")
    assert game.groups == (("text", (0, 1)), ("image", (2, 3, 4, 5)))
    assert game.tokens.tolist() == [1, 2, 5, 6, 7, 8]
    other = TokenGame(small_model(("left", "right")), features, masks=masks, fill="zero")
    assert other.n == 7 and other.player_names[0] == "left 0"


def test_values_are_the_models_own(sample):
    """Absent tokens are replaced before positions are added; masks, positions and other tokens stay."""
    features, masks = sample
    model = small_model()
    fills = [torch.randn(H, dtype=torch.float64) for _ in range(2)]
    game = TokenGame(model, features, masks=masks, fill=fills, target=2)
    coalition = torch.tensor([[True, False, True, True, False, True]])
    by_hand = [f.clone() for f in features]
    by_hand[0][2], by_hand[1][2] = fills
    with torch.no_grad():
        output = model([f[None] for f in by_hand], [m[None] for m in masks])
    values = dict(zip(game.heads, game(coalition)[0].tolist()))
    assert values["mixture"] == pytest.approx(float(output.logits.softmax(-1)[0, 2]), abs=1e-12)
    assert values["synergy"] == pytest.approx(float(output.expert_logits.softmax(-1)[0, 2, 2]), abs=1e-12)
    weighted = output.weights[0, 3] * output.expert_logits.softmax(-1)[0, 3, 2]
    assert values["weighted redundancy"] == pytest.approx(float(weighted), abs=1e-12)


def test_a_subset_of_players_leaves_the_rest_present(sample):
    features, masks = sample
    model = small_model()
    full = TokenGame(model, features, masks=masks, fill="zero", target=0)
    some = TokenGame(model, features, masks=masks, fill="zero", target=0, players=[[2], [3, 0]])
    assert some.player_names == ("text 2", "image 0", "image 3")
    present = torch.ones(1, full.n, dtype=torch.bool)
    present[0, [1, 2, 5]] = False
    assert torch.allclose(some(torch.zeros(1, 3, dtype=torch.bool)), full(present), rtol=0, atol=1e-12)


def test_padded_lengths_move_later_modalities(sample):
    """Padding a modality further shifts the positions of those after it, exactly as padding the tensors would."""
    features, masks = sample
    model = small_model()
    z = torch.rand(5, 6) < 0.5
    plain = TokenGame(model, features, masks=masks, fill="zero", target=0)
    shifted = TokenGame(model, features, masks=masks, fill="zero", target=0, padded_lengths=(9, 6))
    padded = [torch.cat([f, f.new_full((more, H), float("nan"))]) for f, more in zip(features, (4, 2))]
    longer = [torch.cat([m, m.new_zeros(more)]) for m, more in zip(masks, (4, 2))]
    by_hand = TokenGame(model, padded, masks=longer, fill="zero", target=0)
    assert torch.allclose(shifted(z), by_hand(z), rtol=0, atol=1e-12)
    assert float((shifted(z) - plain(z)).abs().max()) > 1e-6


def test_no_masks_and_full_masks_route_differently():
    features = [torch.randn(3, H, dtype=torch.float64), torch.randn(4, H, dtype=torch.float64)]
    model = small_model(("left", "right"))
    z = torch.ones(1, 7, dtype=torch.bool)
    without = TokenGame(model, features, fill="zero", target=0)
    ones = TokenGame(model, features, masks=[torch.ones(3), torch.ones(4)], fill="zero", target=0)
    assert torch.allclose(without(z)[:, 1:5], ones(z)[:, 1:5], rtol=0, atol=1e-12)  # experts agree
    assert float((without(z)[:, 0] - ones(z)[:, 0]).abs().max()) > 1e-6  # routing does not


def test_mean_fill_is_the_models(sample):
    features, masks = sample
    model = small_model()
    with pytest.raises(ArgumentError, match="fill: got 'mean' with a model that carries no feature means"):
        TokenGame(model, features, masks=masks)
    model.set_feature_means([f[None] for f in features], [m[None] for m in masks])
    game = TokenGame(model, features, masks=masks, target=1)
    means = [features[0][1:3].mean(0), features[1].mean(0)]  # without the start symbol, which never is absent
    explicit = TokenGame(model, features, masks=masks, target=1, fill=means)
    z = torch.rand(4, 6) < 0.5
    assert torch.allclose(game(z), explicit(z), rtol=0, atol=1e-12)
    per_token = TokenGame(model, features, masks=masks, target=1, fill=[means[0].expand(5, H), means[1].expand(4, H)])
    assert torch.equal(explicit(z), per_token(z))


def test_target_defaults_to_the_prediction(sample):
    features, masks = sample
    model = small_model()
    with torch.no_grad():
        logits = model([f[None] for f in features], [m[None] for m in masks]).logits[0]
    assert TokenGame(model, features, masks=masks, fill="zero").target == int(logits.argmax())
    many = small_model(task="multilabel")
    with torch.no_grad():
        logits = many([f[None] for f in features], [m[None] for m in masks]).logits[0]
    expected = tuple((logits >= 0).nonzero()[:, 0].tolist()) or (int(logits.argmax()),)
    assert TokenGame(many, features, masks=masks, fill="zero").target == expected
    assert TokenGame(many, features, masks=masks, fill="zero", target=[3, 1]).target == (1, 3)


def test_the_model_is_left_alone(sample):
    features, masks = sample
    model = small_model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for backend in ("torch", "reference"):
        TokenGame(model, features, masks=masks, fill="zero", backend=backend)(torch.zeros(2, 6, dtype=torch.bool))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_precise_twin_is_float64_and_leaves_the_game(sample):
    features, masks = sample
    game = TokenGame(small_model(), features, masks=masks, fill="zero", dtype=torch.float32)
    twin = game.precise()
    assert twin.dtype == torch.float64 and game.dtype == torch.float32 and twin.precise() is None
    z = torch.rand(5, 6) < 0.5
    assert 0 < float((twin(z) - game(z)).abs().max()) < 1e-4


def with_nan(features):
    features[1][2, 3] = float("nan")
    return {}


def with_inf(features):
    features[0][1, 0] = float("inf")
    return {}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (with_nan, r"features\[1\]: got nan at index \(2, 3\) \(1 such values\), expected finite numbers"),
        (with_inf, r"features\[0\]: got inf at index \(1, 0\)"),
        (
            lambda f: {"features": [f[0][:, :7], f[1]]},
            r"features\[0\]: got shape \(5, 7\), expected \(T, H\) = \(any, 8\)",
        ),
        (lambda f: {"features": f[:1]}, "features: got 1 items, expected one entry for each of the 2 modalities"),
        (lambda f: {"features": f[0]}, "features: got 5 items|features: got Tensor"),
        (lambda f: {"features": [f[0].long(), f[1]]}, r"features\[0\]: got torch.int64, expected floating point"),
        (lambda f: {"features": [f[0].numpy(), f[1]]}, r"features\[0\]: got ndarray, expected a torch.Tensor"),
        (lambda f: {"masks": [torch.ones(4), torch.ones(4)]}, r"masks\[0\]: got shape \(4,\), expected \(T,\) = \(5\)"),
        (lambda f: {"masks": [torch.ones(5), torch.full((4,), 0.5)]}, r"masks\[1\]: got values other than 0 and 1"),
        (lambda f: {"masks": [torch.zeros(5), torch.zeros(4)]}, "masks: got padding only"),
        (lambda f: {"fill": "median"}, "fill: got 'median', expected one of 'mean', 'zero'"),
        (lambda f: {"fill": [torch.zeros(9), torch.zeros(8)]}, r"fill\[0\]: got shape \(9,\), expected \(H,\) = \(8\)"),
        (lambda f: {"fill": [torch.full((8,), float("nan"))] * 2}, r"fill\[0\]: got nan"),
        (lambda f: {"players": [[0, 5], []]}, r"players\[0\]: got 5, expected an integer >= 0 and <= 4"),
        (lambda f: {"players": [[3], [0]]}, r"players\[0\]: got position 3, which is padding"),
        (lambda f: {"players": [[1, 1], [0]]}, r"players\[0\]: got a position twice"),
        (lambda f: {"players": [[1], []]}, "players: got 1 players, expected at least two"),
        (lambda f: {"padded_lengths": (4, 4)}, r"padded_lengths\[0\]: got 4, expected an integer >= 5"),
        (lambda f: {"padded_lengths": (9, 4), "masks": None}, "masks: got None, expected masks, since padded_lengths"),
        (lambda f: {"target": 4}, "target: got 4, expected an integer >= 0 and <= 3"),
        (lambda f: {"target": "cat"}, "target: got 'cat'"),
        (lambda f: {"value": "odds"}, "value: got 'odds', expected one of 'prob', 'logit'"),
        (lambda f: {"heads": ("experts", "gate")}, "heads: got 'gate'"),
        (lambda f: {"heads": ()}, "heads: got nothing"),
        (lambda f: {"backend": "tpu"}, "backend: got 'tpu', expected one of 'auto'"),
        (lambda f: {"dtype": torch.float16}, "dtype: got torch.float16"),
        (lambda f: {"memory": 0}, "memory: got 0"),
        (lambda f: {"model": "model.pth"}, "model: got str, expected an FLI2MoE"),
    ],
)
def test_bad_input_is_named(sample, spoil, message):
    features, masks = sample
    options = {"model": small_model(), "features": features, "masks": masks, "fill": "zero", **spoil(features)}
    with pytest.raises(ArgumentError, match=message):
        TokenGame(options.pop("model"), options.pop("features"), **options)


def test_coalitions_of_the_wrong_width_are_named(sample):
    features, masks = sample
    game = TokenGame(small_model(), features, masks=masks, fill="zero")
    with pytest.raises(ArgumentError, match=r"coalitions: got shape \(2, 5\), expected \(C, n\) = \(any, 6\)"):
        game(torch.zeros(2, 5, dtype=torch.bool))


def test_the_original_generation_takes_no_masks():
    config = FLI2MoEConfig(
        modalities=("a", "b"), hidden=H, heads=2, layers=1, classes=3, generation="original", num_tokens=(3, 3)
    )
    features = [torch.randn(3, H), torch.randn(3, H)]
    with pytest.raises(ArgumentError, match="masks: got masks, expected None"):
        TokenGame(FLI2MoE(config), features, masks=[torch.ones(3)] * 2, fill="zero")
    with pytest.raises(ArgumentError, match=r"features: got \(2, 3\) tokens per modality"):
        TokenGame(FLI2MoE(config), [features[0][:2], features[1]], fill="zero")
