"""The surrogate: closed forms against enumeration, and intervals that cover."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from flmoe_fast import ArgumentError, exact_interactions, interactions
from flmoe_fast.games.game import Game
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import ORDERS, mass, rule
from flmoe_fast.probes.reading import Estimate, read
from flmoe_fast.probes.surrogate import Process, Scales, Surrogate, functionals, kernel, prior_variance, signs

N = 7
ALL = ((torch.arange(2**N)[:, None] >> torch.arange(N)) & 1).bool()
PAIRS = torch.combinations(torch.arange(N), 2)


def smooth(z: torch.Tensor) -> torch.Tensor:
    """A saturating score of seven players, two of them in concert."""
    weight = torch.tensor([1.0, -0.5, 0.8, 0.3, -0.2, 0.6, 0.1], dtype=torch.float64)
    return torch.tanh(z.double() @ weight + 0.7 * (z[:, 0] & z[:, 3]).double() - 0.4)


def likely(z: torch.Tensor) -> torch.Tensor:
    """A probability that is nearly 0 or 1 for most coalitions."""
    weight = torch.tensor([4.0, -2.0, 3.0, 1.5, -1.0, 2.5, 1.0], dtype=torch.float64)
    return torch.sigmoid(z.double() @ weight + 2.0 * (z[:, 0] & z[:, 3]).double() - 5.0)


def contrast_matrix(name: str, members: torch.Tensor) -> torch.Tensor:
    """Index (M,) = matrix (M, 2^N) @ values of all coalitions, straight from the definition."""
    order = members.shape[1]
    weight = mass(name, order, N)
    rows = torch.zeros(len(members), 2**N, dtype=torch.float64)
    for m, some in enumerate(members.tolist()):
        inside = ALL[:, some].sum(1)
        size = ALL.sum(1) - inside
        ways = torch.tensor([math.comb(N - order, s) for s in range(N - order + 1)], dtype=torch.float64)
        rows[m] = (-1.0) ** (order - inside) * (weight / ways)[size]
    return rows


@pytest.fixture(scope="module")
def process() -> Process:
    generator = torch.Generator().manual_seed(1)
    some = torch.randperm(2**N, generator=generator)[:40]
    rate = 0.05 + torch.rand(N, dtype=torch.float64, generator=generator)
    return Process(signs(ALL[some]), smooth(ALL[some]), Scales(rate, 1e-6))


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "k-SII"] + ["SII"])
def test_closed_forms_are_those_of_the_surrogates_values(process, name):
    """Every index of the posterior mean, and its prior variance, by enumeration."""
    for order in ORDERS.get(name, (2,)):
        members = PAIRS if order == 2 else torch.arange(N)[:, None]
        matrix = contrast_matrix(name, members)
        between = kernel(signs(ALL), process.x, process.rate)
        column = functionals(process.x, process.rate, members, rule(name, order, N))
        assert torch.allclose(column, matrix @ between, rtol=0, atol=1e-12)
        whole = kernel(signs(ALL), signs(ALL), process.rate)
        variance = prior_variance(process.rate, members, rule(name, order, N))
        assert torch.allclose(variance, (matrix @ whole * matrix).sum(1), rtol=1e-10, atol=1e-14)
        assert not torch.allclose(column.flip(0), matrix @ between, rtol=0, atol=1e-3)


def test_closed_form_of_many_players():
    """One training coalition of 300 players: the quadrature is the integral."""
    n = 300
    generator = torch.Generator().manual_seed(2)
    x = signs(torch.rand(2, n, generator=generator) < 0.4)
    rate = 0.2 * torch.rand(n, dtype=torch.float64, generator=generator)
    process = Process(x, torch.tensor([0.0, 1.0], dtype=torch.float64), Scales(rate, 1e-6))
    column = functionals(process.x, process.rate, torch.tensor([[3, 250]]), rule("SII", 2, n))[0]
    for row, have in enumerate((x > 0).numpy()):
        low = torch.exp(-rate).numpy()
        others = np.delete(np.arange(n), [3, 250])

        def integrand(u: float, have=have, low=low, others=others) -> float:
            return np.prod(np.where(have, u + (1 - u) * low, (1 - u) + u * low)[others])

        value = quad(integrand, 0, 1, epsabs=0, epsrel=1e-10)[0] * (1 - low[3]) * (1 - low[250])
        assert float(column[row]) == pytest.approx(value * (1 if have[3] == have[250] else -1), rel=1e-6)


def test_leave_one_out_is_leaving_one_out(process):
    y = smooth(process.x > 0)
    for out in (0, 17):
        rest = torch.arange(40) != out
        within = kernel(process.x[rest], process.x[rest], process.rate)
        within.diagonal().add_(1e-6)
        across = kernel(process.x[out : out + 1], process.x[rest], process.rate)
        prediction = process.mean + across @ torch.linalg.solve(within, y[rest] - process.mean)
        assert float(y[out] - prediction) == pytest.approx(float(process.loo[out]), abs=1e-9)


def test_link_follows_the_values():
    rows = ALL[torch.randperm(2**N)[:60]]
    assert Surrogate(rows, likely(rows)).link == "logit"
    assert Surrogate(rows, smooth(rows)).link == "identity"  # negative values are no probabilities
    assert Surrogate(rows, 0.3 + 0.05 * rows.double().sum(1)).link == "identity"  # exact as it is


@pytest.mark.parametrize("gap", ["max", "strict", "sum", "ratio"])
@pytest.mark.parametrize("game", [smooth, likely])
def test_reading_is_what_the_surrogate_says(game, gap):
    """Indices and gaps of the surrogate's own values by enumeration, to within the sampling error."""
    rows = ALL[torch.randperm(2**N)[:60]]
    surrogate = Surrogate(rows, game(rows))
    truth = exact_interactions(surrogate.predict, n=N, gap=gap, progress=False)
    found = read(surrogate, CornerGrid.of(PAIRS, N), N, gap, (("STII", 2), ("SV", 1), ("k-SII", 1)), 3)
    for estimate, exact in ((found.sii, truth.sii), (found.gap, truth.gap)):
        exact = torch.from_numpy(exact)
        error = (estimate.value - exact).nan_to_num(nan=math.inf)[~exact.isnan()].abs()
        estimate = Estimate(*(part[~exact.isnan()] for part in vars(estimate).values()))
        assert bool((error <= 4.5 * estimate.sampling.sqrt() + 1e-6).all())
        assert float((error + 0.5).min()) > 4.5 * float(estimate.sampling.sqrt().max())
    members, stii = found.also["STII", 2]
    exact = contrast_matrix("STII", members) @ surrogate.predict(ALL)
    assert bool(((stii.value - exact).abs() <= 4.5 * stii.sampling.sqrt() + 1e-6).all())
    values = contrast_matrix("SV", torch.arange(N)[:, None]) @ surrogate.predict(ALL)
    single = found.also["SV", 1][1]
    assert bool(((single.value - values).abs() <= 4.5 * single.sampling.sqrt() + 1e-6).all())
    of_player = (PAIRS[:, :, None] == torch.arange(N)).any(1).double().T
    adjusted = values - 0.5 * of_player @ torch.from_numpy(truth.sii)
    error = (found.also["k-SII", 1][1].value - adjusted).abs()
    assert bool((error <= 4.5 * found.also["k-SII", 1][1].sampling.sqrt() + 1e-6).all())


def test_far_closer_than_the_grid_at_the_same_cost():
    truth = exact_interactions(smooth, n=N, progress=False).sii
    error = {
        method: np.mean([
            ((interactions(smooth, n=N, budget=100, method=method, seed=s, progress=False).sii - truth) ** 2).sum()
            for s in range(4)
        ])
        for method in ("grid", "surrogate")
    }  # fmt: skip
    assert error["surrogate"] < 0.1 * error["grid"]


def test_intervals_cover():
    """Of the 95 % intervals of two games of eight players, over 16 seeds each."""
    for game in (smooth, likely):

        def eight(z: torch.Tensor, game=game) -> torch.Tensor:
            return game(z[:, :N]) + 0.1 * z[:, N] * (z[:, 2] & z[:, 4])

        truth = exact_interactions(eight, n=8, progress=False)
        inside, half, gaps = [], [], []
        for seed in range(16):
            found = interactions(eight, n=8, budget=72, method="surrogate", seed=seed, progress=False)
            low, high = found.interval()
            inside.append((low <= truth.sii) & (truth.sii <= high))
            half.append(np.abs(found.sii - truth.sii) <= (high - low) / 8)
            low, high = found.interval(of="gap")
            gaps.append((low <= truth.gap) & (truth.gap <= high))
        assert 0.88 <= np.mean(inside) and np.mean(half) < 0.88  # intervals of a quarter of the width do not
        assert 0.85 <= np.mean(gaps)


@pytest.mark.parametrize("budget", [32, 75, 128, 300])
def test_budget_is_never_exceeded_and_counted_exactly(budget):
    asked = []

    def counting(z: torch.Tensor) -> torch.Tensor:
        asked.append(len(z))
        return torch.stack([smooth(z), likely(z)], 1)

    options = {"rows": [0, 1], "cols": [2, 3], "also": "SV", "progress": False}
    found = interactions(counting, n=N, budget=budget, method="surrogate", **options)
    assert found.evaluations == sum(asked) <= budget
    assert found.sii.shape == found.also["SV", 1].values.shape == (4, 2) and np.isfinite(found.sii_stderr).all()
    assert found.evaluations > 0.6 * min(budget, 2**N)


def test_all_coalitions_give_the_truth():
    """A surrogate that has seen everything is nearly exact, and says so."""
    truth = exact_interactions(smooth, n=N, progress=False)
    found = interactions(smooth, n=N, budget=2**N, method="surrogate", progress=False)
    assert np.abs(found.sii - truth.sii).max() < 0.01 * np.abs(truth.sii).max()
    assert found.sii_stderr.max() < 0.02 * np.abs(truth.sii).max()


def test_seeds_and_rounding():
    class Coarse(Game):
        n, player_names = N, tuple("abcdefg")

        def __call__(self, z: torch.Tensor) -> torch.Tensor:
            return (smooth(z) * 4).round() / 4

        def precise(self) -> Game:
            exact = Coarse()
            exact.__class__ = type("Fine", (Coarse,), {"__call__": lambda self, z: smooth(z)})
            return exact

    options = {"n": N, "budget": 64, "method": "surrogate", "progress": False}
    first, second, other = (interactions(smooth, seed=s, **options) for s in (1, 1, 2))
    assert np.array_equal(first.sii, second.sii) and not np.array_equal(first.sii, other.sii)
    assert np.isnan(first.noise_share)
    with pytest.warns(RuntimeWarning, match="rounding makes up"):
        coarse = interactions(Coarse(), **options)
    assert coarse.noise_share > 0.01 and coarse.check_evaluations > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "magic"}, "method: got 'magic'"),
        ({"method": "surrogate", "budget": 9000}, "budget: got 9000, expected an integer >= 32 and <= 8192"),
        ({"method": "surrogate", "budget": 3}, "budget: got 3, expected an integer >= 32"),
        ({"also": ("SV", "magic")}, "also: got 'magic'"),
        ({"also": ("SV", "SV")}, "also: got .*distinct"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ArgumentError, match=message):
        interactions(smooth, n=N, progress=False, **options)


def test_unused_pairs_do_not_matter():
    """Closed forms of a pair do not depend on which other pairs are asked for."""
    rows = ALL[torch.randperm(2**N)[:50]]
    surrogate = Surrogate(rows, smooth(rows))
    some = read(surrogate, CornerGrid.of(PAIRS[:3], N), N, "max", (), 0).sii
    every = read(surrogate, CornerGrid.of(PAIRS, N), N, "max", (), 0).sii
    assert torch.allclose(some.value, every.value[:3], rtol=0, atol=1e-12)
    assert torch.allclose(some.variance, every.variance[:3], rtol=1e-9, atol=0)
    assert list(itertools.combinations(range(N), 2)) == [tuple(p) for p in PAIRS.tolist()]
