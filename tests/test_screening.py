"""Screening all pairs, and modalities as players."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from edge_shapes import EDGES

from flmoe_fast import ArgumentError, exact_interactions
from flmoe_fast.games.game import CallableGame
from flmoe_fast.games.grouped import GroupedGame
from flmoe_fast.probes.screening import UnresolvedError, screen

N = 40
STRONG = [(2, 31), (5, 9), (17, 38)]


def few(z: torch.Tensor) -> torch.Tensor:
    """Additive but for three pairs."""
    value = z.double() @ torch.linspace(-1, 1, N, dtype=torch.float64)
    for k, (i, j) in enumerate(STRONG):
        value = value + (2.0 - 0.5 * k) * (z[:, i] & z[:, j]).double()
    return value


def test_finds_the_pairs_that_interact():
    asked = []

    def counting(z: torch.Tensor) -> torch.Tensor:
        asked.append(len(z))
        return few(z)

    found = screen(counting, n=N, budget=1200, top=5, progress=False)
    assert found.evaluations == sum(asked) <= 1200 and len(found.pairs) == N * (N - 1) // 2
    assert {tuple(found.pairs[k]) for k in found.order()[:3]} == set(STRONG)
    assert found.reliability > 0.8 and found.agreement > 0.9
    fresh = dict(zip(map(tuple, found.checked.pairs.tolist()), found.checked.sii))
    assert [fresh[pair] for pair in STRONG] == pytest.approx([2.0, 1.5, 1.0])
    strength = {pair: 2.0 - 0.5 * k for k, pair in enumerate(STRONG)}
    truth = np.array([strength.get(tuple(pair), 0.0) for pair in found.pairs.tolist()])
    assert (np.abs(found.sii - truth) <= 4 * found.stderr).mean() > 0.9
    table = found.top(6)
    assert [*zip(table["i"], table["j"])][:3] == list(STRONG) and table["checked"].notna().tolist() == [True] * 5 + [
        False
    ]
    i, j = STRONG[0]
    assert f"  {i} x {j}  SII +" in repr(found) and ", anew +2.0" in repr(found)


def test_refuses_what_the_budget_cannot_resolve():
    """A third of the values' variance is noise of high order; too few evaluations for 780 pairs."""
    weight = torch.randn(N, N, dtype=torch.float64) / N

    def dense(z: torch.Tensor) -> torch.Tensor:
        rough = torch.sin(1e4 * (z.double() @ torch.linspace(0.1, 1, N, dtype=torch.float64)))
        return rough + 0.1 * torch.einsum("ci,ij,cj->c", z.double(), weight, z.double())

    with pytest.raises(UnresolvedError, match=r"budget: got 500 for 780 pairs \(reliability 0\.\d\d; the surrogate"):
        screen(dense, n=N, budget=500, top=4, progress=False)
    poor = screen(dense, n=N, budget=500, top=4, least=0, progress=False)
    assert poor.reliability < 0.5


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_nothing_to_find_is_refused(value):
    """Without any interaction what is estimated is rounding, whose size is no reliability."""
    with pytest.raises(UnresolvedError, match="reliability 0.00"):
        screen(lambda z: torch.full((len(z),), value, dtype=torch.float64), n=24, budget=1500, progress=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 100}, "budget: got 100, expected an integer >= "),
        ({"budget": 2000, "top": 0}, "top: got 0"),
        ({"budget": 2000, "least": 1.0}, "least: got 1.0"),
        ({"budget": 2000, "head": "x"}, "head: got 'x'"),
    ],
)
def test_bad_screening(options, message):
    with pytest.raises(ArgumentError, match=message):
        screen(few, n=N, progress=False, **options)


def test_modalities_as_players():
    """Equal to evaluating the token game with whole modalities absent."""
    edge = next(e for e in EDGES if e.name == "three modalities")
    game = edge.game(dtype=torch.float64)
    whole = GroupedGame(game)
    assert whole.n == 3 and whole.heads == game.heads and whole.player_names == tuple(n for n, _ in game.groups)
    rows = torch.tensor(list(itertools.product([True, False], repeat=3)))
    tokens = torch.ones(8, game.n, dtype=torch.bool)
    for m, (_, players) in enumerate(game.groups):
        tokens[:, list(players)] = rows[:, m : m + 1]
    assert torch.equal(whole(rows), game(tokens))
    found = exact_interactions(whole, progress=False)
    values = {tuple(row): value for row, value in zip(rows.tolist(), game(tokens).numpy())}

    def second(third: bool) -> np.ndarray:
        return (values[True, True, third] - values[True, False, third]
                - values[False, True, third] + values[False, False, third])  # fmt: skip

    assert found.evaluations == 8 and np.allclose(found.sii[0], (second(True) + second(False)) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"a": [0, 1]}, "groups: got 1 groups"),
        ({"a": [0], "b": [0]}, "groups: got player 0 twice in 'b'"),
        ({"a": [0], "b": [9]}, "groups: got player 9 in 'b'"),
        ({"a": [0], "b": []}, "groups: got 'b' without players"),
        (None, "groups: got 0 groups"),
    ],
)
def test_bad_groups(groups, message):
    with pytest.raises(ArgumentError, match=message):
        GroupedGame(CallableGame(lambda z: z.double().sum(1), 4), groups)
