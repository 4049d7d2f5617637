"""Microbenchmarks for pytest-benchmark: one call of every candidate at the reference shapes.

    python -m pytest bench --benchmark-only [--benchmark-group-by=group]

Every case first checks that it computes what the others compute. For ratios with their spread, measured in turns,
use ``python -m bench.cpu``; these cases are for comparing one candidate with itself over time.
"""

from __future__ import annotations

import pytest
import torch

from bench.baselines import BatchedSDPA
from bench.shapes import SHAPES
from flmoe_fast import interactions
from flmoe_fast.coalitions import sample_contexts

pytest.importorskip("pytest_benchmark")


@pytest.fixture(params=sorted(SHAPES))
def shape(request):
    return SHAPES[request.param]


def few(n: int, count: int) -> torch.Tensor:
    return torch.rand(count, n, generator=torch.Generator().manual_seed(0)) < 0.5


def test_naive_loop(benchmark, shape):
    game = shape.game(heads=("experts",), value="logit", backend="reference", dtype=torch.float32)
    benchmark.group = f"{shape.name}, one call"
    benchmark.extra_info["coalitions"] = 1
    benchmark.pedantic(game, args=(few(game.n, 1),), rounds=3, warmup_rounds=1)


def test_batched_pytorch(benchmark, shape):
    game = shape.game(heads=("experts",), value="logit")
    batched, coalitions = BatchedSDPA(game), few(game.n, 8)
    logits, weights = batched(coalitions)
    ours = game.engine.evaluate(coalitions)
    assert torch.allclose(ours.experts.float(), logits, rtol=1e-3, atol=1e-3)
    assert torch.allclose(ours.weights.float(), weights, rtol=1e-3, atol=1e-3)
    benchmark.group = f"{shape.name}, one call"
    benchmark.extra_info["coalitions"] = 8
    benchmark.pedantic(batched, args=(coalitions,), rounds=3, warmup_rounds=1)


def test_engine_grid(benchmark, shape):
    game = shape.game(heads=("experts",), value="logit")
    corners = shape.corners(5)
    context = few(game.n, 1)
    plain = game((context[:, None] ^ corners.toggled).flatten(0, 1))
    assert torch.allclose(game.corner_values(context, corners.toggled)[0], plain, rtol=1e-3, atol=1e-3)
    benchmark.group = f"{shape.name}, one call"
    benchmark.extra_info["coalitions"] = corners.evaluations
    benchmark.pedantic(game.corner_values, args=(context, corners.toggled), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("players", [16, 516])
def test_drawing_contexts(benchmark, players):
    benchmark.group = "host"
    benchmark(sample_contexts, players, 64, seed=0)


def test_estimator_overhead(benchmark):
    """Everything but the model: 100 pairs, 64 contexts, nine heads."""
    values = torch.randn(2, 9, dtype=torch.float64)
    benchmark.group = "host"
    benchmark(
        interactions,
        lambda z: values[z[:, 0].long()],
        n=40,
        rows=range(10),
        cols=range(10, 20),
        contexts=64,
        progress=False,
    )
