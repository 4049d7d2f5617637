"""What is prepared once: kept with the model, dropped when its weights change, never in the way of a copy."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from edge_shapes import EDGES, SPARSE_EDGES, Edge
from parity import all_of, exact, flat, relative
from transformers import ViTConfig, ViTForImageClassification

from flmoe_fast import accelerate, image_players, native
from flmoe_fast.engines.prepared import forget, prepared

EDGE = EDGES[2]
GATED = Edge("gated", (1, 1), None, generation="original", fusion="interpretcc")
BACKENDS = [
    pytest.param(
        "cpu", torch.float32, marks=pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "-")
    ),
    ("torch", torch.float32),
    ("torch", torch.float64),
    ("reference", torch.float64),
]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_second_sample_repacks_nothing(backend: str, dtype: torch.dtype, monkeypatch):
    model = EDGE.model()
    first = EDGE.game(model, backend=backend, dtype=dtype)
    coalitions = EDGE.coalitions(first.n)
    values = first(coalitions)
    if backend == "reference":
        return
    monkeypatch.setattr("flmoe_fast.engines.prepared.fold", None)
    monkeypatch.setattr("flmoe_fast.engines.cpu_model.NativeModel._set_layer", None)
    monkeypatch.setattr("flmoe_fast.engines.portable.LaidOut.of", None)
    second = EDGE.game(model, backend=backend, dtype=dtype)
    assert torch.equal(second(coalitions), values)
    assert second.engine.sample.model is first.engine.sample.model


def test_absent_tokens_are_projected_once_for_samples_filled_alike(monkeypatch):
    model, products, product = EDGE.model(), [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a, **options: products.append(1) or product(*a, **options))
    made = []
    for fill in ("zero", "zero", None):
        options = {} if fill is None else {"fill": fill}
        game, before = EDGE.game(model, backend="torch", **options), len(products)
        made.append(before - sum(made))
    assert made == [2, 1, 2]
    coalitions = EDGE.coalitions(game.n)
    assert torch.equal(game(coalitions), EDGE.game(backend="torch")(coalitions))


def written_in_place(model):
    with torch.no_grad():
        model.interaction_experts[0].fusion_model.network[0].attn.proj.weight += 0.1


def written_through_data(model):
    model.interaction_experts[0].fusion_model.network[0].attn.proj.weight.data += 0.1


def loaded(model):
    state = {key: value * 1.1 for key, value in model.state_dict().items()}
    model.load_state_dict(state)


def replaced(model):
    attention = model.interaction_experts[0].fusion_model.network[0].attn
    attention.proj.weight = torch.nn.Parameter(attention.proj.weight.detach() * 1.1)


def reconfigured(model):
    model.config = type(model.config)(**{**vars(model.config), "temperature": 0.3})
    model.reweight.temperature = 0.3


@pytest.mark.parametrize("change", [written_in_place, written_through_data, loaded, replaced, reconfigured])
def test_changed_weights_are_noticed(change):
    model = EDGE.model()
    before = EDGE.game(model)
    coalitions = EDGE.coalitions(before.n)
    old = before(coalitions)
    change(model)
    values, expected = EDGE.game(model)(coalitions), EDGE.game(model, backend="reference")(coalitions)
    assert relative(values, expected) <= 1e-10 < relative(old, expected)
    assert torch.equal(before(coalitions), old)  # a game stays the game it was


def test_the_capacity_is_no_change_of_the_model():
    edge = next(e for e in SPARSE_EDGES if e.capacity == "reference" and e.fusion == "transformer")
    model = edge.model()
    limited = edge.game(model)
    kept = prepared(model)
    model.set_capacity("none")
    free = edge.game(model)
    assert prepared(model) is kept and limited.engine.sample.room is not None and free.engine.sample.room is None


def test_what_is_kept_goes_with_the_model():
    model = EDGE.model()
    kept = weakref.ref(prepared(model))
    assert prepared(model) is kept()
    forget(model)
    gc.collect()
    assert kept() is None
    kept = weakref.ref(prepared(model))
    del model
    gc.collect()
    assert kept() is None


def pickled(game):
    return pickle.loads(pickle.dumps(game))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_games_copy_and_pickle(copied, backend: str, dtype: torch.dtype):
    """A copy gives the same bits, before and after it was used."""
    game = EDGE.game(backend=backend, dtype=dtype)
    coalitions = EDGE.coalitions(game.n, 5)
    fresh = copied(game)
    values = game(coalitions)
    assert torch.equal(fresh(coalitions), values)
    assert torch.equal(copied(game)(coalitions), values)


def test_gated_games_copy_and_pickle():
    game = GATED.game()
    coalitions = GATED.coalitions(game.n, 4)
    for twin in (copy.deepcopy(game), pickled(game)):
        assert torch.equal(twin(coalitions), game(coalitions))


def test_the_prepared_sample_is_the_reference_routing():
    """Routing is float64 from the sample on, in an engine of float32 too."""
    found = EDGE.game(dtype=torch.float32, backend="torch").engine.evaluate(all_of(EDGE))
    assert relative(found.weights, exact(EDGE)[:, -found.weights.shape[1] :]) <= 1e-12
    assert flat(found).dtype == torch.float64


def test_games_of_transformers_copy_and_pickle():
    """On the native engine where there is one: what it holds is built anew."""
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    model, pixels = ViTForImageClassification(config).eval(), torch.randn(1, 3, 16, 16)
    game = accelerate(model).game({"pixel_values": pixels}, image_players(pixels, patch=8))
    coalitions = torch.rand(6, game.n) < 0.5
    values = game(coalitions)
    for twin in (copy.deepcopy(game), pickled(game)):
        assert twin.about() == game.about() and torch.equal(twin(coalitions), values)


def test_a_game_is_checked_on_the_weights_it_is_played_with():
    """The model is changed after its game was made: the same game in float64 is still the former model's."""
    model = EDGE.model().float()
    game = EDGE.game(model, backend="torch", dtype=torch.float32)
    coalitions = EDGE.coalitions(game.n)
    before = game(coalitions)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    precise = game.precise()
    assert precise is not None and precise.engine.sample is game.engine.sample
    assert (
        relative(precise(coalitions), before) < 1e-4 < relative(EDGE.game(model, backend="torch")(coalitions), before)
    )
