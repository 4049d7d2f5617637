"""The torch engine against the reference, which runs the model as written, one coalition at a time."""

from __future__ import annotations

import pytest
import torch
from breaks import IN_THE_ENGINE, IN_THE_MODEL
from edge_shapes import EDGES, Edge
from parity import CONTEXTS, flat, relative, toggles, tolerance, truth

from flmoe_fast.engines import portable
from flmoe_fast.engines.prepared import prepared
from flmoe_fast.engines.problem import Logits
from flmoe_fast.games.heads import Heads

FP64 = 1e-10  # promised relative difference of values in float64
PATHS = {"shared for all": 1 << 40, "as sized": 1 << 28, "direct": 0}


@pytest.fixture(params=sorted(PATHS))
def path(request, monkeypatch):
    """Every way of doing layer-1 attention, forced by the size its table may have."""
    monkeypatch.setattr(portable, "SHARED_TABLE_BYTES", PATHS[request.param])
    return request.param


@pytest.mark.parametrize("edge", EDGES, ids=lambda e: e.name)
def test_values_equal_the_reference(edge: Edge, path: str):
    game = edge.game()
    coalitions, expected = truth(edge)
    plain, corners = (
        game.engine.evaluate(coalitions),
        game.engine.evaluate_toggles(coalitions[CONTEXTS], toggles(game.n)),
    )
    ours = Logits(torch.cat([plain.experts, corners.experts]), torch.cat([plain.weights, corners.weights]))
    assert relative(ours.experts, expected.experts) <= FP64
    assert relative(ours.weights, expected.weights) <= FP64
    for value in ("prob", "logit"):
        heads = Heads(("mixture", "experts", "weighted"), value, 1)
        assert relative(heads.values(ours), heads.values(expected)) <= FP64


@pytest.mark.parametrize("edge", EDGES, ids=lambda e: e.name)
def test_context_tables_equal_the_reference(edge: Edge, monkeypatch):
    """A table per context, as large problems use it: the limit is too small for all players, not for the toggled."""
    game = edge.game()
    coalitions, expected = truth(edge)
    monkeypatch.setattr(portable, "SHARED_TABLE_BYTES", game.engine._table_bytes(min(2, game.n)))
    ours = game.engine.evaluate_toggles(coalitions[CONTEXTS], toggles(game.n))
    assert relative(flat(ours), flat(expected)[len(coalitions) :]) <= FP64


@pytest.mark.parametrize("edge", EDGES, ids=lambda e: e.name)
def test_float32_is_as_exact_as_its_arithmetic(edge: Edge, path: str):
    coalitions, exact = truth(edge)
    game = edge.game(dtype=torch.float32, backend="torch")
    values = [game.engine.evaluate(coalitions), game.engine.evaluate_toggles(coalitions[CONTEXTS], toggles(game.n))]
    error = (torch.cat([flat(v) for v in values]) - flat(exact)).abs().max()
    assert float(error) <= tolerance(edge, "fp32")


def test_full_coalition_is_the_model_itself():
    edge = EDGES[2]
    features, masks, _ = edge.sample()
    model = edge.model()
    with torch.no_grad():
        output = model([f[None] for f in features], [m[None] for m in masks])
    logits = edge.game(model).engine.evaluate(torch.ones(1, sum(edge.valid), dtype=torch.bool))
    assert relative(logits.experts, output.expert_logits) <= FP64
    assert relative(logits.weights, output.weights) <= FP64


@pytest.mark.parametrize("mistake", [*IN_THE_MODEL, *IN_THE_ENGINE])
def test_a_mistake_is_seen(mistake, path: str):
    """Negative control: each planted mistake moves values far beyond the tolerance."""
    edge = EDGES[2]
    model = edge.model()
    if mistake in IN_THE_MODEL:
        mistake(prepared(model))
    game, reference = edge.game(model), edge.game(model, backend="reference")
    if mistake in IN_THE_ENGINE:
        mistake(game.engine)
    coalitions = edge.coalitions(game.n)
    assert relative(game(coalitions), reference(coalitions)) > 1e4 * FP64


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunks_and_order_do_not_matter(dtype, tolerance, path: str):
    edge = next(e for e in EDGES if e.name == "players past a word")
    game = edge.game(dtype=dtype, backend="torch")
    coalitions = edge.coalitions(game.n, count=17)
    values = game(coalitions)
    tiny = edge.game(dtype=dtype, backend="torch", memory=1)
    assert tiny.engine.chunk == 1 and game.engine.chunk >= 17
    assert relative(tiny(coalitions), values) <= tolerance
    order = torch.randperm(17)
    assert relative(game(coalitions[order]), values[order]) <= tolerance
    twice = game(torch.cat([coalitions, coalitions]))
    assert relative(twice, torch.cat([values, values])) <= tolerance


def test_scores_that_spread_too_far_are_attended_directly():
    """Very large scores would underflow against a fixed maximum; the engine must notice and still be right."""
    edge = EDGES[0]
    model = edge.model()
    with torch.no_grad():
        for expert in model.interaction_experts:
            expert.fusion_model.network[0].attn.q.weight *= 60
    game, reference = edge.game(model), edge.game(model, backend="reference")
    coalitions = edge.coalitions(game.n)
    base = torch.ones(game.n, dtype=torch.bool)
    assert game.engine._shared_attention(base, game.engine.players) is None
    assert edge.game().engine._shared_attention(base, game.engine.players) is not None
    assert relative(game(coalitions), reference(coalitions)) <= 1e-9


def test_no_coalitions_and_no_variation():
    game = EDGES[0].game()
    assert game(torch.zeros(0, game.n, dtype=torch.bool)).shape == (0, len(game.heads))
    same = game(torch.ones(3, game.n, dtype=torch.bool))
    assert torch.equal(same[0], same[1])


def test_memory_is_bounded_by_the_chunk():
    """The largest activation of a chunk stays within the limit, whatever the number of coalitions."""
    game = EDGES[0].game(memory=1 << 20)
    engine = game.engine
    seen = []
    original = engine._after_first_attention

    def watch(tokens, attended):
        seen.append(len(tokens))
        return original(tokens, attended)

    engine._after_first_attention = watch
    game(torch.ones(5 * engine.chunk + 1, game.n, dtype=torch.bool))
    assert max(seen) == engine.chunk and len(seen) == 6


def test_weighted_logits_sum_to_the_mixture():
    edge = EDGES[2]
    game = edge.game(value="logit")
    values = game(edge.coalitions(game.n))
    experts = len(game.problem.model.config.expert_names)
    assert relative(values[:, 1 + experts :].sum(1), values[:, 0]) <= FP64


def test_multilabel_value_is_the_mean_over_classes():
    logits = Logits(torch.randn(4, 3, 5, dtype=torch.float64), torch.full((4, 3), 1 / 3, dtype=torch.float64))
    target = torch.tensor([True, False, False, True, False])
    values = Heads(("experts",), "prob", target).values(logits)
    assert torch.allclose(values, logits.experts.sigmoid()[..., [0, 3]].mean(-1), rtol=0, atol=1e-15)
