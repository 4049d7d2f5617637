"""Other people's models on the slow path: whatever answers alone answers here, and the same each time."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers as hf
from encoders import bert, text_inputs, words
from reference_modules import InteractionMoE, SwitchGate
from torch import nn

from flmoe_fast import ArgumentError, FLI2MoEConfig, accelerate, exact_interactions, interactions, text_players
from flmoe_fast.adapt.module_game import ModuleGame
from flmoe_fast.pipeline.importance.scores import player_scores

FP64 = 1e-10
TEXT = torch.tensor([[5, 9, 11, 7, 30]])


def mixture() -> nn.Module:
    config = hf.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    return hf.MixtralForCausalLM(config).eval()


def last(output: object) -> torch.Tensor:
    return output.logits[:, -1, :2]


def test_one_output_is_a_regression_and_not_a_probability_of_one():
    """A softmax over a single logit is one for every coalition."""
    module = InteractionMoE(classes=1).double().eval()
    fast = accelerate(module)
    assert fast.model.config.task == "regression"
    inputs = [torch.randn(1, 3, 12, dtype=torch.float64), torch.randn(1, 4, 12, dtype=torch.float64)]
    game = fast.game(inputs, fill="zero", heads=("mixture",))
    found = exact_interactions(game, progress=False)
    assert float(abs(found.sii).min()) > 1e-6
    whole = module.inference(inputs)[2].detach()
    assert float((game(torch.ones(1, game.n, dtype=torch.bool)) - whole).abs()) <= FP64
    with pytest.raises(ArgumentError, match="classes: got 1, expected 2 or more for task 'multiclass'"):
        FLI2MoEConfig(("a", "b"), hidden=4, heads=1, layers=1, classes=1)


def test_rounding_of_a_mixture_is_measured_in_float64():
    """Grouped matrix products have no float64: the copy in float64 takes expert after expert."""
    model = mixture()
    players = text_players(TEXT[:, 1:].clone(), absent=0)
    with pytest.raises(RuntimeError, match="Double"):
        mixture().double()(TEXT)
    game = ModuleGame(model, {"input_ids": TEXT[:, 1:]}, players, value=last)
    found = interactions(game, contexts=4, progress=False)
    assert float(found.noise_share.max()) < 0.01 and found.check_evaluations
    assert model.config._experts_implementation == "grouped_mm"
    exact = ModuleGame(mixture().double(), {"input_ids": TEXT[:, 1:]}, players, value=last)
    assert exact(torch.ones(1, 4, dtype=torch.bool)).isfinite().all()


class Fails(nn.Module):
    """Refuses to run in float64, as kernels of other people do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, input_ids):
        return self.linear((input_ids[:, :, None] * torch.arange(1.0, 5.0)).sin().sum(1))


def test_a_module_that_has_no_float64_is_played_all_the_same():
    game = ModuleGame(Fails(), {"input_ids": TEXT}, text_players(TEXT, absent=0))
    with pytest.warns(UserWarning, match="in float64 the module raises"):
        found = interactions(game, contexts=4, progress=False)
    assert not found.check_evaluations


class TakesApartBadly(nn.Module):
    """A stack that the engine would look at, and an error of its own when it is run without its layers."""

    def __init__(self):
        super().__init__()
        self.bert, self.calls = bert(), 0

    def forward(self, **inputs):
        states = self.bert.bert(**inputs).last_hidden_state
        if not bool((states.std(-1) > 0.1).all()) or self.bert.config._attn_implementation == "eager":
            raise RuntimeError("states of another kind")
        return self.bert.classifier(states[:, 0])


def test_errors_of_the_model_itself_take_the_slow_path():
    model = TakesApartBadly()
    with pytest.warns(UserWarning, match="taking it apart raised RuntimeError: states of another kind"):
        game = accelerate(model).game(text_inputs(), words())
    assert "slow" in game.about()["path"]
    with pytest.raises(RuntimeError, match="states of another kind"):
        accelerate(model).game(text_inputs(), words(), path="engine")


class Grids(nn.Module):
    """Reads the flattened patches of a batch by the sizes of their grids, as Qwen's vision towers do."""

    def __init__(self, ordered: bool = True):
        super().__init__()
        self.embed, self.head, self.ordered = nn.Embedding(40, 8), nn.Linear(8, 3), ordered
        self.patch = nn.Linear(6, 8)

    def forward(self, input_ids, pixel_values, grid):
        counts = (grid.prod(1)).tolist()
        assert sum(counts) == len(pixel_values), "patches that belong to nobody"
        if not self.ordered and len(grid) > 1:
            counts = counts[::-1]
            pixel_values = pixel_values.flip(0)
        images = torch.stack([p.sum(0) for p in self.patch(pixel_values).sin().split(counts)])
        return self.head((self.embed(input_ids).sum(1) + images).tanh())


@pytest.mark.parametrize("ordered", [True, False])
def test_rows_without_a_batch_axis(ordered):
    model = Grids(ordered).double()
    inputs = {"input_ids": TEXT, "pixel_values": torch.randn(6, 6).double(), "grid": torch.tensor([[2, 3]])}
    game = ModuleGame(model, inputs, text_players(TEXT, absent=0), value="logit", target=1)
    z = torch.rand(70, 5) < 0.5
    truth = []
    for row in z:
        ids = torch.where(row, TEXT, 0)
        truth.append(model(**{**inputs, "input_ids": ids})[0, 1].detach())
    assert float((game(z) - torch.stack(truth)).abs().max()) <= FP64
    assert "batch" not in game.about()


class Mixed(Grids):
    """Mixes the samples of a batch: then only one at a time gives a sample's own value."""

    def forward(self, input_ids, pixel_values, grid):
        return super().forward(input_ids, pixel_values, grid).cumsum(0)


class Noisy(Fails):
    def forward(self, input_ids):
        return super().forward(input_ids) + torch.rand(len(input_ids), 2, dtype=self.linear.weight.dtype)


@pytest.mark.parametrize(
    ("model", "inputs", "why"),
    [
        (Mixed(), {"pixel_values": torch.ones(6, 6), "grid": torch.tensor([[2, 3]])}, "mean something else in a batch"),
        (Noisy(), {}, "draws random numbers in evaluation too"),
    ],
)
def test_one_at_a_time_where_a_batch_would_change_values(model, inputs, why):
    game = ModuleGame(model, {"input_ids": TEXT, **inputs}, text_players(TEXT, absent=0), value="logit", target=1)
    assert why in game.about()["batch"]
    z = torch.rand(9, 5) < 0.5
    before = torch.random.get_rng_state()
    alone = torch.cat([game(row[None]) for row in z])
    again = ModuleGame(model, {"input_ids": TEXT, **inputs}, text_players(TEXT, absent=0), value="logit", target=1)
    assert torch.equal(again(z), alone) and torch.equal(before, torch.random.get_rng_state())


def test_the_faster_path_is_taken(monkeypatch):
    """Times are made up: of the engine, of the module for one coalition, and of both for the same coalitions."""
    asked = []

    def seconds(game, coalitions):
        asked.append((type(game).__name__, len(coalitions)))
        return overhead + speeds[type(game).__name__] * len(coalitions)

    overhead = 0.0

    monkeypatch.setattr("flmoe_fast.adapt.choice.LONG", 0.5)
    monkeypatch.setattr("flmoe_fast.adapt.choice._seconds", seconds)
    speeds = {"EncoderGame": 2e-3, "ModuleGame": 1e-3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        game = accelerate(bert()).game(text_inputs(), words())
    assert isinstance(game, ModuleGame) and "faster here, 1 ms a coalition against 2" in game.about()["path"]
    assert set(player_scores(game)) == {"model"}  # read off the attention maps of the engine all the same
    assert type(accelerate(bert()).game(text_inputs(), words(), path="engine")).__name__ == "EncoderGame"
    speeds["EncoderGame"] = 0.9e-3
    assert type(accelerate(bert()).game(text_inputs(), words())).__name__ == "EncoderGame"
    speeds, few = {"EncoderGame": 0.2, "ModuleGame": 0.1}, [("ModuleGame", 1)] * 3
    for module, expected in ((0.6, few), (0.1, few + [("ModuleGame", 4)] * 3)):  # nothing is tried that takes long
        speeds["ModuleGame"] = module
        asked.clear()
        assert type(accelerate(bert()).game(text_inputs(), words())).__name__ == "EncoderGame" and asked == expected
    overhead, speeds = 0.1, {"EncoderGame": 2e-3, "ModuleGame": 1e-3}  # calls that take long whatever is in them
    assert isinstance(accelerate(bert()).game(text_inputs(), words()), ModuleGame)


def test_copies_of_games():
    z = torch.rand(6, 4) < 0.5
    game = accelerate(bert()).game(text_inputs(), words(), path="module")
    for copied in (pickle.loads(pickle.dumps(game)), copy.deepcopy(game)):
        assert torch.equal(copied(z), game(z)) and copied.about() == game.about()


def test_dropped_tokens_are_spoken_of():
    """Switch networks with little room: inference drops tokens, a game does not, and says so."""
    module = InteractionMoE(sparse=(SwitchGate, 12), layers=1).double().eval()
    inputs = [torch.randn(1, 3, 12, dtype=torch.float64), torch.randn(1, 4, 12, dtype=torch.float64)]
    with pytest.warns(UserWarning, match=r"beyond the room of sparse blocks.*capacity='reference'"):
        accelerate(module).game(inputs, fill="zero")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(module, capacity="reference").game(inputs, fill="zero")


def test_the_mean_token_of_a_text_leaves_its_start_out():
    module = InteractionMoE().double().eval()
    fast = accelerate(module, modalities=("text", "image"))
    features = [torch.randn(5, 3, 12, dtype=torch.float64), torch.randn(5, 4, 12, dtype=torch.float64)]
    masks = [torch.ones(5, 3), torch.ones(5, 4)]
    masks[0][0, 2] = 0
    fast.model.set_feature_means(features, masks)
    rows = features[0][:, 1:][masks[0][:, 1:].bool()]
    assert torch.allclose(fast.model.feature_means[0], rows.mean(0), atol=1e-14)
    assert torch.allclose(fast.model.feature_means[1], features[1].flatten(0, 1).mean(0), atol=1e-14)
