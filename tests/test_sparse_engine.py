"""Sparse models and other back-ends on the torch engine, against the reference: one coalition at a time."""

from __future__ import annotations

import pytest
import torch
from edge_shapes import BACKEND_EDGES, Edge
from parity import FP64, all_of, exact, flat, named, relative

from flmoe_fast import ArgumentError, TokenGame, exact_interactions, explain, interactions
from flmoe_fast.engines import portable, sparse_rows
from flmoe_fast.engines.sparse_rows import combine, pool
from flmoe_fast.pipeline.importance.tokens import batch_importance

SWITCH = named("padded, switch of 12, capacity reference")
DEEP = named("three layers, gshard of 10, capacity reference")


@pytest.mark.parametrize("limit", (0, 1 << 40), ids=("direct", "shared"))
@pytest.mark.parametrize("edge", (SWITCH, DEEP), ids=lambda e: e.name)
def test_layer_1_attention_is_shared_or_not(edge: Edge, limit: int, monkeypatch):
    monkeypatch.setattr(portable, "SHARED_TABLE_BYTES", limit)
    engine = edge.game().engine
    used = []
    monkeypatch.setattr(engine, "_attend_shared", lambda *a: used.append(1) or type(engine)._attend_shared(engine, *a))
    assert relative(flat(engine.evaluate(all_of(edge))), exact(edge)) <= FP64
    assert bool(used) == bool(limit)


@pytest.mark.parametrize("name", ("gshard, capacity of none", DEEP.name))
def test_dropped_tokens_get_zeros_not_what_memory_holds(name, monkeypatch):
    edge = named(name)
    engine = edge.game().engine
    monkeypatch.setattr(engine, "_buffer", lambda name, *shape: torch.full(shape, float("nan"), dtype=torch.float64))
    assert relative(flat(engine.evaluate(all_of(edge))), exact(edge)) <= FP64


def test_dispatch_is_a_partition():
    """Every slot is served once, in order, or was dropped because its queue was full."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(2, 30, 5, generator=generator).argsort(-1)[..., :2]  # (E, R, k)
    block = torch.arange(30) // 10
    free = sparse_rows.dispatch(chosen, 5, block, 3, None)
    assert free.slot.sort().values.equal(torch.arange(120))
    assert free.bounds[0] == 0 and free.bounds[-1] == 120 == int(free.lengths.sum())
    room = torch.tensor([3, 0, 100])
    sent = sparse_rows.dispatch(chosen, 5, block, 3, room)
    served = set(sent.slot.tolist())
    used: dict = {}
    for slot, network in enumerate(chosen.flatten().tolist()):
        expert, row = slot // 60, slot % 60 // 2
        run = used.setdefault((expert, network, int(block[row])), [])
        run.append(slot)
        assert (slot in served) == (len(run) <= int(room[block[row]]))
    for group, (start, stop) in enumerate(zip(sent.bounds, sent.bounds[1:])):
        members = sent.slot[start:stop]
        assert bool((members // 60 == group // 5).all()) and bool((chosen.flatten()[members] == group % 5).all())
    scores = torch.rand(2, 30, 2, generator=generator, dtype=torch.float64)
    rows = torch.randn(len(sent.slot), 4, generator=generator, dtype=torch.float64)
    by_token, by_run = torch.zeros(60, 4, dtype=torch.float64), torch.zeros(30, 4, dtype=torch.float64)
    for row, slot in zip(rows, sent.slot.tolist()):
        by_token[slot // 2] += scores.flatten()[slot] * row
        network = int(chosen.flatten()[slot])
        by_run[(slot // 60 * 5 + network) * 3 + int(block[slot % 60 // 2])] += scores.flatten()[slot] * row
    torch.testing.assert_close(combine(rows, sent, scores), by_token, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pool(rows, sent, scores)[0].flatten(0, 1), by_run, rtol=1e-12, atol=1e-12)


def sample(edge: Edge):
    features, masks, fills = edge.sample()
    return edge.model(), [f.float() for f in features], masks, [f.float() for f in fills]


def test_auto_says_why_the_native_engine_does_not_run():
    edge = BACKEND_EDGES[0]
    game = edge.game(dtype=torch.float32)
    assert game.backend == "torch" and game.about()["backend"] == "torch"
    assert "no transformers (fusion 'moepp')" in game.about()["reason"]
    with pytest.raises(ArgumentError, match="backend: got 'cpu', but the model's experts are no transformers"):
        edge.game(dtype=torch.float32, backend="cpu")
    assert "reason" not in SWITCH.game(dtype=torch.float32).about()


def test_padding_before_valid_tokens_is_left_to_the_reference():
    """With a capacity it takes slots, and the other engines leave padding out."""
    model, features, masks, fills = sample(SWITCH)
    masks[0] = masks[0].flip(0)
    features[0] = features[0].flip(0)
    options = {"masks": masks, "fill": [f.double() for f in fills], "target": 1}
    features = [f.double() for f in features]
    game = TokenGame(model, features, **options)
    assert game.backend == "reference" and "padding precedes" in game.about()["reason"]
    with pytest.raises(ArgumentError, match="padding precedes valid tokens, expected backend='auto'"):
        TokenGame(model, features, **options, backend="torch")
    single = TokenGame(model.float(), features, **options)
    assert single.backend == single.precise().backend == "reference"
    model = model.double()
    model.set_capacity("none")
    assert TokenGame(model, features, **options).backend == "torch"


def test_probes_of_a_sparse_model():
    """Estimates agree with enumeration; explain() runs and knows its noise."""
    edge = named("gshard of 4, capacity")
    game = edge.game(heads=("mixture",))
    every = exact_interactions(game, progress=False)
    found = interactions(game, contexts=48, progress=False)
    low, high = found.interval(0.95)
    order = [every.pairs.tolist().index(pair) for pair in found.pairs.tolist()]
    truth = every.sii[order, 0]
    assert ((low <= truth) & (truth <= high)).mean() > 0.8
    model, features, masks, fills = sample(SWITCH)
    result = explain(model.float(), features, masks=masks, fill=fills, candidates=2, contexts=8, progress=False)
    assert result.interactions.check_evaluations > 0


def test_interpretcc_players_are_modalities():
    edge = named("InterpretCC, four modalities")
    game = edge.game(heads=("mixture",))
    assert game.n == 4
    fast = exact_interactions(game, progress=False)
    slow = exact_interactions(edge.game(heads=("mixture",), backend="reference"), progress=False)
    assert abs(fast.sii - slow.sii).max() <= FP64
    features, _, fills = edge.sample()
    with pytest.raises(ArgumentError, match="'ig' for InterpretCC"):
        explain(edge.model(), features, fill=fills, importance="attn", progress=False)
    found = explain(edge.model(), features, fill=fills, contexts=4, progress=False)
    assert len(found.interactions.pairs) == 6


def test_a_game_keeps_the_capacity_it_was_made_with():
    model = SWITCH.model()
    games = [SWITCH.game(model), SWITCH.game(model, backend="reference")]
    model.set_capacity("none")
    for game in games:
        assert relative(flat(game.engine.evaluate(all_of(SWITCH))), exact(SWITCH)) <= FP64


def test_importance_of_a_batch_is_that_of_its_samples():
    """Samples do not compete for capacity."""
    model = SWITCH.model()
    features, masks, _ = SWITCH.sample()
    features = [torch.cat([f[None], torch.randn(2, *f.shape, dtype=f.dtype)]) for f in features]
    masks = [m.expand(3, -1) for m in masks]
    for method in ("attnXgrad", "ig"):
        whole = batch_importance(model, features, masks, method=method)
        for b in range(3):
            own = [[part[b : b + 1] for part in parts] for parts in (features, masks)]
            one = batch_importance(model, *own, method=method)
            torch.testing.assert_close(whole.experts[b], one.experts[0], rtol=1e-10, atol=1e-12)
