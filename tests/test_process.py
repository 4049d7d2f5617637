"""The default estimator: exact where it has seen everything, covered where it has not, and never over its budget."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from flmoe_fast import ArgumentError, exact_interactions, interactions
from flmoe_fast.games.game import CallableGame
from flmoe_fast.probes.budget import MOST_PLAYERS
from flmoe_fast.probes.drawing import complementary
from flmoe_fast.probes.draws import Known, sampled_gaps
from flmoe_fast.probes.exact import enumerate_values, exact_index
from flmoe_fast.probes.gap import GAPS
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import mass, rule
from flmoe_fast.probes.parity import ParityProcess, fit_scales
from flmoe_fast.probes.surrogate import signs

N = 10
BITS = 1 << torch.arange(N)
EVERY = ((torch.arange(2**N)[:, None] >> torch.arange(N)) & 1).bool()


def smooth(z: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A saturating network of the players, between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    n = z.shape[1]
    weight = torch.randn(n, 6, generator=generator, dtype=torch.float64) * 1.5 / n**0.5
    return ((z.double() @ weight).tanh() @ torch.randn(6, generator=generator, dtype=torch.float64)).sigmoid()


def process_of(values: torch.Tensor, count: int, n: int, seed: int = 0) -> ParityProcess:
    """Fitted to ``count`` complementary pairs of a game with these 2^n values."""
    z = complementary(n, count, seed)
    bits = 1 << torch.arange(n)
    return ParityProcess(z, *(values[(part * bits).sum(1)][:, None] for part in (z, ~z)))


def by_definition(values: torch.Tensor, n: int, members: tuple[int, ...], name: str) -> float:
    """An index of one set of players from the definition: masses of sizes times mean derivatives."""
    order = len(members)
    others = [p for p in range(n) if p not in members]
    weights = mass(name, order, n)
    total = 0.0
    for size in range(n - order + 1):
        for inside in itertools.combinations(others, size):
            base = sum(1 << p for p in inside)
            derivative = sum(
                (-1) ** (order - len(part)) * float(values[base + sum(1 << p for p in part)])
                for count in range(order + 1)
                for part in itertools.combinations(members, count)
            )
            total += float(weights[size]) / math.comb(n - order, size) * derivative
    return total


# ---- the scales


def unlikelihood(x: torch.Tensor, y: torch.Tensor, sign: int, theta: torch.Tensor) -> torch.Tensor:
    """Minus the logarithm of the penalised likelihood of one half, term by term."""
    rates, rough = theta[:-1], theta[-1]
    differ = (x[:, None] != x).double()
    same, other = (0.5 * (-(part * rates.exp()).sum(2)).exp() for part in (differ, 1 - differ))
    covariance = same + sign * other + rough.exp() * torch.eye(len(x), dtype=torch.float64)
    ones, solved = torch.ones(len(x), dtype=torch.float64), torch.linalg.inv(covariance)
    residual = y - (ones @ solved @ y) / (ones @ solved @ ones) if sign > 0 else y
    amplitude = (residual * (solved @ residual)).mean(0)
    prior = 0.5 * (rates - rates.mean()).square().sum() + (rates.mean() + 2).square() / 8
    return 0.5 * len(x) * amplitude.log().mean() + 0.5 * torch.logdet(covariance) + prior


@pytest.mark.parametrize("sign", [1, -1])
def test_scales_are_the_most_likely_ones(sign):
    """No slope is left at the scales found, but for those at a bound."""
    x, y = signs(complementary(8, 40, 0)), torch.stack([smooth(complementary(8, 40, 0), seed) for seed in (0, 1)], 1)
    found = fit_scales(x, y, sign)
    theta = torch.cat([found.rate.log(), torch.tensor([math.log(found.rough)])]).requires_grad_()
    start = torch.tensor([math.log(3.5 / 8)] * 8 + [-4.0], dtype=torch.float64, requires_grad=True)
    (slope,), (before,) = (torch.autograd.grad(unlikelihood(x, y, sign, at), at) for at in (theta, start))
    inside = (theta > math.log(2e-8)) & (theta < 2.9)
    assert float(slope[inside].abs().max()) < 0.01 * float(before.abs().max())


# ---- the draw


@pytest.mark.parametrize("n, count", [(2, 9), (5, 7), (9, 100), (12, 2048), (40, 300), (300, 50)])
def test_pairs_of_complements_are_distinct(n, count):
    z = complementary(n, count, 3)
    assert len(z) == min(count, 2 ** (n - 1))
    both = torch.cat([z, ~z])
    assert len(both.unique(dim=0)) == len(both)
    assert torch.equal(z, complementary(n, count, 3))
    assert count >= 2 ** (n - 1) or not torch.equal(z, complementary(n, count, 4))


def test_ends_are_taken_whole_and_first():
    z = complementary(14, 256, 0)
    smaller = torch.minimum(z.sum(1), (~z).sum(1))
    assert sorted(smaller[:15].tolist()) == [0] + [1] * 14
    counts = smaller.bincount()
    # Neither the share of a uniform draw over sizes (1 in 7.5) nor of one over coalitions (3 in 1,000).
    assert 70 <= counts[2] <= 91 and counts[2] > counts[3] > counts[4] > counts[6]


# ---- the process


@pytest.mark.parametrize(
    "name, order",
    [
        *(("SII", 2), ("STII", 2), ("FSII", 2), ("BII", 2), ("SV", 1), ("FSII", 1), ("BV(0.7)", 1), ("BII(0.3)", 2)),
        *(("SII", 3), ("STII", 3), ("FSII", 3), ("BII", 3)),
    ],
)
def test_exact_once_everything_is_seen(name, order):
    """Any game, any index: the closed form, the enumeration and the definition agree, and no variance is left."""
    n = 6
    values = torch.randn(2**n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    members = list(itertools.combinations(range(n), order))
    truth = [by_definition(values, n, member, name) for member in members]
    found, variance = process_of(values, 2 ** (n - 1), n).index(torch.tensor(members), name, order)
    assert np.allclose(found[:, 0], truth, rtol=0, atol=1e-12) and float(variance.max()) == 0
    enumerated = exact_index(values[:, None], n, torch.tensor(members), name, order)
    assert np.allclose(enumerated[:, 0], truth, rtol=0, atol=1e-12)
    # One pair of coalitions fewer, and it is neither exact nor claims to be.
    found, variance = process_of(values, 2 ** (n - 1) - 1, n).index(torch.tensor(members), name, order)
    assert np.abs(found[:, 0] - torch.tensor(truth)).max() > 1e-6 and float(variance.max()) > 0


def test_heads_share_one_fit_and_keep_their_scales():
    def three(z: torch.Tensor) -> torch.Tensor:
        constant = torch.full((len(z),), 2.0, dtype=torch.float64)
        return torch.stack([3 * smooth(z), 300 * smooth(z), constant], 1)  # none between bounds that have a link

    found = interactions(three, n=N, budget=200, progress=False)
    assert np.allclose(found.sii[:, 1], 100 * found.sii[:, 0], rtol=1e-6)
    assert np.allclose(found.sii_stderr[:, 1], 100 * found.sii_stderr[:, 0], rtol=1e-6)
    assert np.abs(found.sii[:, 2]).max() < 1e-12


# ---- the default call


@pytest.mark.parametrize("gap", GAPS)
def test_intervals_cover_indices_and_gaps(gap):
    """At least 90 % over games and seeds; half as wide they would not."""
    inside, half, gaps = [], [], []
    for seed in range(8):
        truth = exact_interactions(lambda z: smooth(z, seed), n=N, gap=gap, progress=False)  # noqa: B023
        found = interactions(lambda z: smooth(z, seed), n=N, budget=128, gap=gap, seed=seed, progress=False)  # noqa: B023
        low, high = found.interval()
        inside.append((low <= truth.sii) & (truth.sii <= high))
        half.append(np.abs(truth.sii - found.sii) <= (high - low) / 4)
        low, high = found.interval(of="gap")
        defined = ~np.isnan(truth.gap)  # a ratio is not where no context has a joint cost
        gaps += ((low <= truth.gap) & (truth.gap <= high))[defined].tolist()
    assert np.mean(inside) >= 0.9 > np.mean(half)
    assert np.mean(gaps) >= 0.9


def test_closer_than_the_methods_it_replaces():
    error = {}
    for method in ("auto", "grid", "surrogate"):
        squares = []
        for seed in range(4):
            truth = exact_interactions(lambda z: smooth(z, seed), n=N, progress=False).sii  # noqa: B023
            found = interactions(lambda z: smooth(z, seed), n=N, budget=256, method=method, progress=False)  # noqa: B023
            squares.append(np.square(found.sii - truth).sum() / np.square(truth).sum())
        error[method] = np.mean(squares)
    assert error["auto"] < 0.25 * error["grid"] and error["auto"] < 1.5 * error["surrogate"]


FACTORIAL = math.factorial


@pytest.mark.parametrize(
    "name, order, weight",
    [
        ("STII", 3, lambda n, s: 3 / n * FACTORIAL(s) * FACTORIAL(n - 1 - s) / FACTORIAL(n - 1)),
        ("FSII", 3, lambda n, s: 30 * FACTORIAL(s + 2) * FACTORIAL(n - s - 1) / FACTORIAL(n + 2)),
        ("BII(0.3)", 2, lambda n, s: 0.3**s * 0.7 ** (n - 2 - s)),
    ],
)
def test_masses_of_published_weights(name, order, weight):
    """Weights of one coalition as published, against masses of sizes and against the quadrature."""
    n = 9
    nodes, weights = rule(name, order, n)
    for s, share in enumerate(mass(name, order, n).tolist()):
        assert share == pytest.approx(math.comb(n - order, s) * weight(n, s), rel=1e-12)
        assert float((weights * nodes**s * (1 - nodes) ** (n - order - s)).sum()) == pytest.approx(weight(n, s))


def test_triples_come_from_the_same_evaluations():
    """Exact at full budget; close to the truth and covered below; refused where no estimate would be made."""
    triples = [(7, 3, 5), *itertools.combinations(range(5), 3)]
    game = functools.partial(smooth, seed=1)
    values = enumerate_values(CallableGame(game, N))
    full = interactions(game, n=N, budget=2**N, triples=triples, also=("STII", "FSII", "BII(0.4)"), progress=False)
    for name in ("SII", "STII", "FSII", "BII(0.4)"):
        truth = [by_definition(values, N, tuple(sorted(three)), name) for three in triples]
        assert full.also[name, 3].values == pytest.approx(truth, abs=1e-10)
    some = interactions(game, n=N, budget=300, triples=triples, progress=False)
    found, truth = some.also["SII", 3], full.also["SII", 3].values
    assert (np.abs(found.values - truth) <= 4 * found.stderr).all() and (found.stderr > 0).all()
    assert np.square(found.values - truth).sum() < 0.25 * np.square(truth).sum()
    assert list(some.index("SII", 3)["k"])[:2] == [7, 2]
    for wrong in ({"method": "grid"}, {"budget": 10}, {"triples": [(0, 1, 1)]}, {"triples": [(0, 1, N)]}):
        with pytest.raises(ArgumentError, match="triples|budget"):
            interactions(game, n=N, **{"budget": 300, "triples": triples, "progress": False, **wrong})


def test_simultaneous_intervals_hold_for_all_pairs_at_once():
    """In nine games of ten; the intervals of single pairs, of the same estimates, hardly ever all hold."""
    drawn = np.random.default_rng(0).normal(size=(400, 45))
    found = interactions(smooth, n=N, budget=100, progress=False)
    every = {True: 0.0, False: 0.0}
    for errors in drawn:
        one = replace(found, sii=errors, sii_stderr=np.ones(45), degrees=np.full(45, np.inf))
        for simultaneous in every:
            low, high = one.interval(0.9, simultaneous=simultaneous)
            every[simultaneous] += float(((low <= 0) & (0 <= high)).all()) / len(drawn)
    assert 0.86 < every[True] < 0.95 and every[False] < 0.05  # 1 - 0.1 to two standard errors; 0.9^45


def test_enumeration_takes_over_where_it_is_cheaper():
    truth = exact_interactions(smooth, n=8, progress=False)
    found = interactions(smooth, n=8, budget=300, also=("SV", "STII", "k-SII"), progress=False)
    assert found.evaluations == 256 and found.about["method"] == "enumeration" and "256" in found.about["why"]
    assert np.array_equal(found.sii, truth.sii) and not found.sii_stderr.any() and not found.gap_stderr.any()
    assert np.array_equal(found.interval()[0], found.sii)
    values = enumerate_values(CallableGame(smooth, 8))
    assert found.also["SV", 1].values == pytest.approx([by_definition(values, 8, (p,), "SV") for p in range(8)])


@pytest.mark.parametrize("n", [N, 40])
@pytest.mark.parametrize("budget", [75, 128, 301])
def test_budget_is_never_exceeded_and_counted_exactly(n, budget):
    asked = []

    def counting(z: torch.Tensor) -> torch.Tensor:
        asked.append(len(z))
        return torch.stack([smooth(z), smooth(z, 1)], 1)

    options = {"rows": [0, 1], "cols": [2, 3], "also": ("SV", "STII"), "progress": False}
    found = interactions(counting, n=n, budget=budget, **options)
    assert found.evaluations == sum(asked) <= budget and budget - found.evaluations <= 8
    assert found.about["method"] == ("process" if n <= MOST_PLAYERS else "process and grid")
    assert found.sii.shape == found.also["SV", 1].values.shape == (4, 2) and np.isfinite(found.sii_stderr).all()
    again = interactions(lambda z: torch.stack([smooth(z), smooth(z, 1)], 1), n=n, budget=budget, **options)
    assert np.array_equal(found.sii, again.sii) and np.array_equal(found.gap_stderr, again.gap_stderr)


# ---- many players


def many(z: torch.Tensor) -> torch.Tensor:
    """Forty players of whom some interact."""
    generator = torch.Generator().manual_seed(5)
    n = z.shape[1]
    weight = torch.randn(n, n, generator=generator, dtype=torch.float64).triu(1) / n
    return torch.einsum("ci,ij,cj->c", z.double(), weight, z.double()).tanh() + 0.2 * (z[:, 0] & z[:, 30]).double()


def rough(z: torch.Tensor) -> torch.Tensor:
    """No two coalitions alike, and one strong pair."""
    noise = torch.sin(1e4 * (z.double() @ torch.linspace(0.1, 1, z.shape[1], dtype=torch.float64)))
    return noise + 3.0 * (z[:, 0] & z[:, 30]).double()


@pytest.mark.parametrize("game", [many, rough])
def test_many_players_are_no_worse_than_the_grid(game):
    """Against a long run of the unbiased grid; and the intervals hold."""
    pairs = [(i, j) for i in range(4) for j in range(30, 34)]
    options = {"n": 40, "pairs": pairs, "progress": False}
    truth = interactions(game, contexts=6000, method="grid", seed=99, **options)
    error, inside = {"auto": 0.0, "grid": 0.0}, []
    for seed in range(6):
        for method in error:
            found = interactions(game, budget=500, method=method, seed=seed, **options)
            error[method] += float(np.square(found.sii - truth.sii).sum())
            if method == "auto":
                inside.append(np.abs(found.sii - truth.sii) <= np.diff(found.interval(), axis=0)[0] / 2)
    assert error["auto"] < 1.2 * error["grid"]
    assert np.mean(inside) >= 0.9


def test_a_smooth_game_of_many_players_is_told_from_a_rough_one():
    """A few coalitions that predict each other decide how many more there are, beside contexts in any case."""
    pairs = [(i, j) for i in range(22, 26) for j in range(26, 30)]
    gain = torch.linspace(0.01, 0.2, 30, dtype=torch.float64)
    weights = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    some = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(k))[:3] for k in range(60)])

    def probe(game, method="auto", seed=0):
        return interactions(game, n=30, pairs=pairs, budget=600, method=method, seed=seed, progress=False)

    def noisy_or(z):
        return 1 - torch.where(z, 1 - gain, 1.0).prod(1)

    u, share = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(20))
    factor = 1 - gain[:, None] * (u + 1) / 2
    true = [float(-gain[i] * gain[j] * (factor.prod(0) / factor[i] / factor[j]) @ share / 2) for i, j in pairs]
    error = {m: sum(np.square(probe(noisy_or, m, s).sii - true).sum() for s in range(3)) for m in ("auto", "grid")}
    assert error["auto"] < error["grid"]
    found, rough = probe(noisy_or), probe(lambda z: z[:, some].all(2).double() @ weights)
    assert found.about["predicted"] >= 0.85 > rough.about["predicted"]
    assert found.contexts[0] < rough.contexts[0] and 590 <= rough.evaluations <= 600
    assert np.isfinite(rough.sii_stderr).all() and (rough.sii_stderr > 0).all()


def test_one_pair_of_contexts_is_a_pair_of_complements():
    """No interaction among additive players, where a budget pays for three contexts, and two are evaluated."""
    pairs = [(0, 1), (2, 3)]
    weights = torch.arange(30, dtype=torch.float64)
    found = interactions(lambda z: z.double() @ weights, n=30, pairs=pairs, budget=21, progress=False)
    assert found.contexts.tolist() == [2, 2] and np.abs(found.sii).max() < 1e-9


def test_nothing_smooth_is_known_better_than_it_is_computed():
    found = interactions(smooth, n=N, budget=1000, progress=False)
    assert 0.5 < found.about["logit_share"][0] and found.sii_stderr.min() > 1e-7 * float(smooth(EVERY).std())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 8}, "budget: got 8, expected at least 16 evaluations"),
        ({"budget": 100, "adaptive": True}, "adaptive: got True"),
        ({"budget": 100, "contexts": 3}, "budget: got a budget together with contexts"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ArgumentError, match=message):
        interactions(smooth, n=N, progress=False, **options)


# ---- gaps of many heads


@pytest.mark.parametrize("n", [5, 64, 130])
def test_coalitions_are_found_among_known_ones(n):
    generator = torch.Generator().manual_seed(n)
    rows = (torch.rand(60, n, generator=generator) < 0.5).unique(dim=0)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    known, asked = rows[: len(rows) // 2], rows[torch.randperm(len(rows), generator=generator)]
    where = {tuple(row): number for number, row in enumerate(known.tolist())}
    assert Known(known).numbers(asked).tolist() == [where.get(tuple(row), -1) for row in asked.tolist()]


@pytest.mark.parametrize(("seen", "contexts"), [(4, 16), (100, 200), (1 << 20, (1 << 14) // 4 // 2 * 2)])
def test_few_values_are_read_in_few_contexts(seen, contexts):
    class Counted:
        read = 0

        def values(self, coalitions):
            self.read += 2 * len(coalitions)
            value = coalitions.double().sum(1)[:, None, None].expand(-1, 3, 1)
            return value, coalitions.shape[1] - value

    games, grid = Counted(), CornerGrid.of(torch.tensor([[0, 7]]), 12)
    found, variance = sampled_gaps(games, grid, "max", 0, seen)
    assert games.read == contexts * grid.evaluations
    assert (
        torch.allclose(found, torch.ones_like(found)) and float(variance.max()) < 1e-20
    )  # additive: what one is worth
