"""Values of single players: exact where everything is seen, close and covered where it is not, ended in good order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flmoe_fast import ArgumentError, player_values
from flmoe_fast.probes.exact import exact_index
from flmoe_fast.probes.moments import chance_margin, moved

N = 8
EVERY = ((torch.arange(2**N)[:, None] >> torch.arange(N)) & 1).bool()


def smooth(z: torch.Tensor) -> torch.Tensor:
    """A saturating network of the players."""
    generator = torch.Generator().manual_seed(2)
    n = z.shape[1]
    weight = torch.randn(n, 6, generator=generator, dtype=torch.float64) * 2.5 / n**0.5
    return 3 * (z.double() @ weight).tanh() @ torch.randn(6, generator=generator, dtype=torch.float64)


def truth(index: str) -> np.ndarray:
    return exact_index(smooth(EVERY)[:, None], N, torch.arange(N)[:, None], index, 1)[:, 0].numpy()


def valued(game=smooth, n: int = N, **options):
    return player_values(game, n=n, progress=False, **options)


@pytest.mark.parametrize("index", ["SV", "BV"])
def test_everything_seen_is_exact(index):
    found = valued(index=index, budget=2**N)
    assert np.allclose(found.values, truth(index), rtol=0, atol=1e-12) and not found.stderr.any()
    assert found.evaluations == 2**N and found.about["method"] == "enumeration"
    ended = valued(index=index, budget=2**N, until=1e-300)  # the same by points
    assert np.allclose(ended.values, truth(index), rtol=0, atol=1e-12) and "stopped" not in ended.about
    assert np.abs(valued(index=index, budget=2**N - 2).values - truth(index)).max() > 1e-9


@pytest.mark.parametrize("index", ["SV", "BV"])
def test_closer_than_contexts_and_covered(index):
    """A third of the grid's squared error from as many evaluations, and intervals that hold."""
    error, inside, half = {"auto": 0.0, "grid": 0.0}, [], []
    for seed in range(6):
        for method in error:
            found = valued(index=index, budget=100, seed=seed, method=method)
            error[method] += float(((found.values - truth(index)) ** 2).sum())
            assert 70 < found.evaluations <= 100
            if method == "auto":
                low, high = found.interval()
                inside.append((low <= truth(index)) & (truth(index) <= high))
                half.append(np.abs(found.values - truth(index)) <= (high - low) / 8)
    assert error["auto"] < error["grid"] / 3
    assert np.mean(inside) >= 0.9 > np.mean(half)


def test_many_players_of_many_heads():
    """Weights of 300 additive players from fewer evaluations than a single context costs, but for what is not seen."""
    weights = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = valued(lambda z: z.double() @ weights, n=60, players=[3, 50, 7], budget=300)
    assert found.players.tolist() == [3, 7, 50] and found.values.shape == (3, 2)
    assert np.abs(found.values - weights[[3, 7, 50]].numpy()).max() < 1e-3


def test_what_is_left_of_a_budget_corrects(monkeypatch):
    """Beyond the points that a process takes, contexts tell whether it is off."""
    monkeypatch.setattr("flmoe_fast.probes.values.MOST_ROWS", 16)
    n = 12
    every = ((torch.arange(2**n)[:, None] >> torch.arange(n)) & 1).bool()
    true = exact_index(smooth(every)[:, None], n, torch.arange(n)[:, None], "SV", 1)[:, 0].numpy()
    found, short = valued(n=n, budget=2000), valued(n=n, budget=32)
    assert found.about["method"] == "process and grid" and 1900 < found.evaluations <= 2000
    assert np.abs((found.values - true) / found.stderr).max() < 4
    assert np.abs(found.values - true).max() < np.abs(short.values - true).max() / 2


def test_nothing_is_moved_by_chance():
    stderr = torch.ones(8, 1, dtype=torch.float64)
    chance = torch.full_like(stderr, 1.2)
    assert float(moved(0 * chance, 0 * chance, chance, stderr, margin=1.0)[2]) == 0
    assert 0 < float(moved(0 * chance, 0 * chance, chance, stderr)[2]) < 0.5
    value, variance, share = moved(0 * chance, 0 * chance, 10 * chance, stderr, margin=1.0)
    assert share > 0.95 and torch.equal(
        chance_margin(torch.randn(9, 1, 1).double()), torch.tensor([2.0]).double().sqrt()
    )
    alone, together = torch.randn(50, 20, 1).double(), torch.randn(50, 1, 1).double().expand(50, 20, 1)
    assert float(chance_margin(alone)) < 0.45 < 1.4 < float(chance_margin(together))
    assert torch.allclose(value, share * 12 * stderr) and torch.allclose(variance, share * stderr)


@pytest.mark.parametrize("method", ["auto", "grid"])
def test_ends_when_it_is_good_enough_or_interrupted(method):
    calls = []

    def counted(z: torch.Tensor) -> torch.Tensor:
        calls.append(len(z))
        if sum(calls) > 200:
            raise KeyboardInterrupt
        return smooth(z)

    whole = valued(n=12, budget=250, method=method)
    bound = 2 * float(whole.stderr.max())
    found = valued(n=12, budget=250, method=method, until=bound)
    assert found.about["stopped"] == "until" and found.stderr.max() <= bound and found.evaluations < whole.evaluations
    found = valued(n=12, budget=250, method=method, seconds=1e-9)
    assert found.about["stopped"] == "seconds" and found.evaluations < 150
    found = valued(counted, 12, budget=255, method=method, on_interrupt="return")
    assert found.about["stopped"] == "interrupt" and np.isfinite(found.stderr).all() and found.evaluations <= 200
    with pytest.raises(KeyboardInterrupt):
        valued(counted, 12, budget=255, method=method)


def test_refusals():
    for wrong in ({"index": "SII"}, {"method": "surrogate"}, {"players": [N]}, {"until": -1.0}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            valued(**{"budget": 100, **wrong})
    with pytest.raises(ArgumentError, match="budget: got 5"):
        valued(budget=5)
