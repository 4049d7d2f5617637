"""Exact interactions against closed forms, and the redundancy gaps' truth table."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import factorial

import numpy as np
import pytest
import torch
from games import GAMES, TRUTH

from flmoe_fast import ArgumentError, exact_interactions
from flmoe_fast.probes.exact import size_law


def table(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return z[:, 0], z[:, 1]


def sii(game, n: int, pairs) -> np.ndarray:
    return exact_interactions(game, n=n, pairs=pairs, progress=False).sii


def by_definition(value, n: int, i: int, j: int) -> Fraction:
    """The defining sum, over sets, in exact fractions; ``value`` maps a frozenset to a Fraction."""
    others = [p for p in range(n) if p not in (i, j)]
    total = Fraction(0)
    for s in range(n - 1):
        weight = Fraction(factorial(s) * factorial(n - s - 2), factorial(n - 1))
        for chosen in itertools.combinations(others, s):
            base = frozenset(chosen)
            total += weight * (value(base | {i, j}) - value(base | {i}) - value(base | {j}) + value(base))
    return total


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("n", [2, 5])
def test_truth_table(name: str, n: int):
    for gap in ("max", "sum", "strict"):
        result = exact_interactions(GAMES[name], n=n, pairs=[(0, 1)], gap=gap, progress=False)
        assert result.sii[0] == pytest.approx(TRUTH[name]["sii"], abs=1e-12)
        assert result.gap[0] == pytest.approx(TRUTH[name][gap], abs=1e-12)


def test_ratio_gap_is_a_share_where_the_joint_cost_is_positive():
    assert exact_interactions(GAMES["or"], n=3, pairs=[(0, 1)], gap="ratio", progress=False).gap[0] == pytest.approx(1)
    assert exact_interactions(GAMES["and"], n=3, pairs=[(0, 1)], gap="ratio", progress=False).gap[0] == pytest.approx(
        -1
    )
    # XOR: losing both costs nothing, so there is nothing to take a share of.
    assert np.isnan(exact_interactions(GAMES["xor"], n=3, pairs=[(0, 1)], gap="ratio", progress=False).gap[0])


def test_random_game_against_the_definition():
    n = 6
    values = torch.randint(-50, 50, (2**n,)).double()

    def value(members: frozenset) -> Fraction:
        return Fraction(int(values[sum(1 << p for p in members)]))

    pairs = list(itertools.combinations(range(n), 2))
    ours = sii(lambda z: values[(z.long() << torch.arange(n)).sum(1)], n, pairs)
    expected = [float(by_definition(value, n, i, j)) for i, j in pairs]
    assert np.allclose(ours, expected, rtol=0, atol=1e-10)
    assert not np.allclose(ours, np.roll(expected, 1), rtol=0, atol=1.0)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_unanimity(size: int):
    """v = 1[T in S]: 1 / (t - 1) inside T, zero elsewhere."""
    result = sii(lambda z: z[:, :size].all(1).double(), 8, [(0, 1), (0, 7), (6, 7)])
    assert np.allclose(result, [1 / (size - 1), 0, 0], rtol=0, atol=1e-12)


def test_airport():
    costs = torch.tensor([1.0, 2.0, 4.0, 7.0, 11.0], dtype=torch.float64)
    result = exact_interactions(lambda z: (z * costs).amax(1), n=5, progress=False)
    by_smaller = {0: -1 / 4, 1: -7 / 12, 2: -19 / 12, 3: -55 / 12}
    assert np.allclose(result.sii, [by_smaller[min(p)] for p in result.pairs.tolist()], rtol=0, atol=1e-12)


def test_weighted_majority():
    votes = torch.tensor([4, 2, 1, 1])
    result = exact_interactions(lambda z: ((z * votes).sum(1) >= 5).double(), n=4, progress=False)
    expected = [1 / 3 if 0 in p else -1 / 6 for p in result.pairs.tolist()]
    assert np.allclose(result.sii, expected, rtol=0, atol=1e-12)


def test_security_council():
    """Five permanent members, ten others, nine votes with no veto: a tiny negative number beside a large one."""

    def passes(z: torch.Tensor) -> torch.Tensor:
        return (z[:, :5].all(1) & (z.sum(1) >= 9)).double()

    result = sii(passes, 15, [(0, 1), (0, 14), (13, 14)])
    assert np.allclose(result, [69 / 286, 1 / 286, -5 / 2574], rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [2, 3, 16, 24])
def test_size_law_sums_to_one(n: int):
    from math import comb

    counts = torch.tensor([comb(n - 2, s) for s in range(n - 1)], dtype=torch.float64)
    assert float((size_law(n) * counts).sum()) == pytest.approx(1, abs=1e-12)


def test_axioms_two_sided():
    n, scale = 6, torch.randn(6, dtype=torch.float64)
    pairs = list(itertools.combinations(range(n), 2))
    table_a, table_b = torch.randn(2, 2**n, dtype=torch.float64)

    def look(values):
        return lambda z: values[(z.long() << torch.arange(n)).sum(1)]

    additive = sii(lambda z: z.double() @ scale, n, pairs)
    assert np.abs(additive).max() <= 1e-12
    a, b = sii(look(table_a), n, pairs), sii(look(table_b), n, pairs)
    assert np.allclose(sii(look(2 * table_a - 3 * table_b), n, pairs), 2 * a - 3 * b, rtol=0, atol=1e-10)
    assert np.allclose(sii(look(table_a + 1e6), n, pairs), a, rtol=0, atol=1e-8)
    # A null player: the game ignores player 5.
    null = sii(lambda z: table_a[(z[:, :5].long() << torch.arange(5)).sum(1)], n, pairs)
    assert max(abs(v) for v, p in zip(null, pairs) if 5 in p) <= 1e-12 < max(np.abs(null))
    # Relabelling the players relabels the pairs.
    order = torch.randperm(n)
    moved = sii(lambda z: look(table_a)(z[:, order]), n, [(int(order[i]), int(order[j])) for i, j in pairs])
    assert np.allclose(moved, a, rtol=0, atol=1e-10)


def test_vector_values_equal_their_components():
    tables = torch.randn(3, 2**5, dtype=torch.float64)

    def index(z):
        return (z.long() << torch.arange(5)).sum(1)

    together = exact_interactions(lambda z: tables[:, index(z)].T, n=5, progress=False)
    assert together.heads == ("output 0", "output 1", "output 2")
    for o in range(3):
        alone = exact_interactions(lambda z, o=o: tables[o, index(z)], n=5, progress=False)
        assert np.array_equal(together.sii[:, o], alone.sii) and np.array_equal(together.gap[:, o], alone.gap)


def test_sum_gap_is_minus_the_index():
    values = torch.randn(2**6, dtype=torch.float64)
    result = exact_interactions(lambda z: values[(z.long() << torch.arange(6)).sum(1)], n=6, gap="sum", progress=False)
    assert np.allclose(result.gap, -result.sii, rtol=0, atol=1e-12)


def test_too_many_players_is_refused():
    with pytest.raises(ArgumentError, match="game: got 25 players, expected at most 24"):
        exact_interactions(lambda z: z[:, 0].double(), n=25)
