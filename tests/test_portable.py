"""The torch engine against the reference, which runs the model as written, one coalition at a time."""

from __future__ import annotations

import torch
from edge_shapes import EDGES
from parity import FP64, relative

from flmoe_fast.engines.problem import Logits
from flmoe_fast.games.heads import Heads


def test_full_coalition_is_the_model_itself():
    edge = EDGES[2]
    features, masks, _ = edge.sample()
    model = edge.model()
    with torch.no_grad():
        output = model([f[None] for f in features], [m[None] for m in masks])
    logits = edge.game(model).engine.evaluate(torch.ones(1, sum(edge.valid), dtype=torch.bool))
    assert relative(logits.experts, output.expert_logits) <= FP64
    assert relative(logits.weights, output.weights) <= FP64


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
