"""The corner-grid estimator: unbiased, shrinking, covered, exact where it must be, and loud about bad input."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from edge_shapes import EDGES
from games import GAMES, TRUTH

from flmoe_fast import ArgumentError, InteractionResult, TokenGame, exact_interactions, interactions
from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.probes import interactions as module
from flmoe_fast.probes.gap import GAPS, redundancy_gap
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.moments import Draw, combine, successive_variance, unit_means
from flmoe_fast.probes.naive import four_corner_loop

N = 7
PAIRS = [(0, 4), (0, 5), (1, 4), (2, 6), (3, 5)]


def lookup(values: torch.Tensor):
    """A game with these 2^n values."""
    n = int(np.log2(len(values)))
    return lambda z: values[(z.long() << torch.arange(n)).sum(1)]


@pytest.fixture(scope="module")
def rough() -> torch.Tensor:
    """Values of a game with interactions of every order, of seven players."""
    generator = torch.Generator().manual_seed(3)
    size = ((torch.arange(2**N)[:, None] >> torch.arange(N)) & 1).sum(1)
    return torch.randn(2**N, dtype=torch.float64, generator=generator) + 0.4 * size


def run(game, **options) -> InteractionResult:
    return interactions(game, **{"progress": False, "n": N, "pairs": PAIRS, "method": "grid", **options})


# ---- the grid


def test_every_context_gives_every_pair_its_corners(rough):
    """Corner values equal direct evaluation of S, S+i, S+j, S+ij, whichever of them the context is."""
    grid = CornerGrid.of(torch.tensor(PAIRS), N)
    assert grid.evaluations == 1 + 7 + len(PAIRS)
    contexts = ((torch.arange(2**N)[:, None] >> torch.arange(N)) & 1).bool()
    game = lookup(rough)
    values = game((contexts[:, None] ^ grid.toggled).flatten(0, 1)).view(2**N, -1, 1)
    corners = grid.corners(contexts, values)
    for p, (i, j) in enumerate(PAIRS):
        for corner, (first, second) in zip(corners, [(1, 1), (1, 0), (0, 1), (0, 0)]):
            direct = contexts.clone()
            direct[:, i], direct[:, j] = bool(first), bool(second)
            assert torch.equal(corner[:, p, 0], game(direct))


def test_expectation_over_all_contexts_is_the_index(rough):
    """Contexts weighted by the law of sizes reproduce the enumeration exactly: the estimator is unbiased."""
    grid = CornerGrid.of(torch.tensor(PAIRS), N)
    contexts = ((torch.arange(2**N)[:, None] >> torch.arange(N)) & 1).bool()
    size = contexts.sum(1)
    law = 1.0 / ((N + 1) * torch.bincount(size).double()[size])  # size uniform on 0..n, then uniform
    values = lookup(rough)((contexts[:, None] ^ grid.toggled).flatten(0, 1)).view(2**N, -1, 1)
    v11, v10, v01, v00 = grid.corners(contexts, values)
    for gap in GAPS:
        truth = exact_interactions(lookup(rough), n=N, pairs=PAIRS, gap=gap, progress=False)
        assert np.allclose(((v11 - v10 - v01 + v00)[..., 0] * law[:, None]).sum(0), truth.sii, rtol=0, atol=1e-12)
        value, defined = redundancy_gap(gap, v11, v10, v01, v00)
        share = law[:, None] if defined is None else law[:, None] * defined[..., 0]
        mean = (law[:, None] * value[..., 0]).sum(0) / share.expand(-1, len(PAIRS)).sum(0)
        assert np.allclose(mean, truth.gap, rtol=0, atol=1e-12)
    # Negative control: contexts weighted uniformly over all coalitions give the Banzhaf index instead.
    truth = exact_interactions(lookup(rough), n=N, pairs=PAIRS, progress=False)
    assert not np.allclose((v11 - v10 - v01 + v00)[..., 0].mean(0), truth.sii, rtol=0, atol=1e-3)


@pytest.mark.parametrize("gap", GAPS)
def test_corner_games_are_exact_from_one_unit(gap):
    for name, game in GAMES.items():
        result = run(game, n=4, pairs=[(0, 1)], contexts=4, gap=gap)
        assert result.sii[0] == TRUTH[name]["sii"] and result.sii_stderr[0] == 0
        if gap != "ratio":
            assert result.gap[0] == TRUTH[name][gap]


# ---- statistics


def test_mean_over_seeds_is_the_truth(rough):
    truth = exact_interactions(lookup(rough), n=N, pairs=PAIRS, gap="strict", progress=False)
    for options in ({"contexts": 8}, {"budget": 300}):
        runs = [run(lookup(rough), seed=seed, gap="strict", **options) for seed in range(200)]
        for of in ("sii", "gap"):
            estimates = np.stack([getattr(r, of) for r in runs])
            stderr = estimates.std(0, ddof=1) / len(runs) ** 0.5
            score = np.abs(estimates.mean(0) - getattr(truth, of)) / stderr
            assert score.max() < 4.5  # 10 tests a run: chance of one beyond is below 1e-4
            assert (np.abs(estimates.mean(0) + 0.3 - getattr(truth, of)) / stderr).max() > 4.5  # an offset is seen


def test_error_shrinks_with_the_root_of_contexts(rough):
    truth = exact_interactions(lookup(rough), n=N, pairs=PAIRS, progress=False).sii
    error = [
        np.sqrt(np.mean([((run(lookup(rough), contexts=k, seed=s).sii - truth) ** 2).mean() for s in range(60)]))
        for k in (8, 32, 128)
    ]
    # The rate is -1/2; stratification over seven players only makes it steeper.
    for more, fewer in zip(error[1:], error):
        assert 0.3 < more / fewer < 0.6


@pytest.mark.parametrize("options", [{"contexts": 12}, {"contexts": 48}, {"contexts": 9}, {"budget": 400}])
def test_intervals_cover(rough, options):
    """Between 92 and 98.5 % of the 95 % intervals hold the truth, over 200 seeds."""
    truth = exact_interactions(lookup(rough), n=N, pairs=PAIRS, progress=False)
    inside, half = [], []
    for seed in range(200):
        low, high = run(lookup(rough), seed=seed, **options).interval()
        inside.append((low <= truth.sii) & (truth.sii <= high))
        centre = (low + high) / 2
        half.append((centre - (high - low) / 4 <= truth.sii) & (truth.sii <= centre + (high - low) / 4))
    assert 0.92 <= np.mean(inside) <= 0.985
    assert np.mean(half) < 0.92  # intervals of half the width do not


def test_successive_variance_ignores_a_trend():
    noise = torch.randn(4000, 1, 1, dtype=torch.float64)
    trend = torch.linspace(-50, 50, 4000, dtype=torch.float64)[:, None, None]
    assert float(successive_variance(noise + trend)[0, 0]) == pytest.approx(1, rel=0.1)
    assert float((noise + trend).var(0)) > 500
    assert torch.isnan(successive_variance(noise[:1])).all()


def test_combining_draws_pools_units():
    first, second = torch.randn(8, 3, 2, dtype=torch.float64), torch.randn(6, 1, 2, dtype=torch.float64)
    draws = [Draw(torch.arange(3), first), Draw(torch.tensor([1]), second)]
    estimate, stderr, degrees = combine(draws, 3)
    assert torch.allclose(estimate[1], torch.cat([first[:, 1], second[:, 0]]).mean(0))
    assert torch.allclose(estimate[[0, 2]], first[:, [0, 2]].mean(0))
    pooled = (7 * successive_variance(first[:, 1]) + 5 * successive_variance(second[:, 0])) / 12
    assert torch.allclose(stderr[1], (pooled / 14).sqrt())
    assert torch.allclose(degrees, torch.tensor([14 / 3, 8, 14 / 3], dtype=torch.float64))


def test_ratio_of_undefined_contexts():
    """Units without a defined context count neither in the estimate nor as zeros."""
    total = torch.tensor([[[0.5]], [[0.0]], [[0.25]]], dtype=torch.float64)
    defined = torch.tensor([[[1.0]], [[0.0]], [[0.5]]], dtype=torch.float64)
    estimate, _, _ = combine([Draw(torch.arange(1), total, defined)], 1)
    assert float(estimate) == pytest.approx(0.5)
    estimate, stderr, _ = combine([Draw(torch.arange(1), 0 * total, 0 * defined)], 1)
    assert torch.isnan(estimate).all() and torch.isnan(stderr).all()


def test_units_average_neighbours():
    assert unit_means(torch.arange(6.0), 2).tolist() == [0.5, 2.5, 4.5]


def test_agrees_with_the_naive_estimator(rough):
    ours = run(lookup(rough), contexts=200)
    sii, sii_stderr, gap, gap_stderr = four_corner_loop(lookup(rough), PAIRS, 400, n=N)
    for of, theirs, error in (("sii", sii, sii_stderr), ("gap", gap, gap_stderr)):
        score = (getattr(ours, of) - theirs[:, 0].numpy()) / np.hypot(
            getattr(ours, of + "_stderr"), error[:, 0].numpy()
        )
        assert np.abs(score).max() < 4.5


# ---- adaptive allocation


def test_adaptive_spends_on_what_varies():
    """Two noisy pairs among many constant ones get the second half of the budget."""
    values = torch.randn(2**8, dtype=torch.float64)

    def game(z):
        return values[(z[:, [0, 1, 6, 7]].long() << torch.arange(4)).sum(1)] * 10 + z[:, 2] * z[:, 3]

    pairs = list(itertools.product(range(4), range(4, 8)))
    even = interactions(game, n=8, pairs=pairs, budget=1500, method="grid", adaptive=False, progress=False)
    chosen = interactions(game, n=8, pairs=pairs, budget=1500, method="grid", progress=False)
    noisy = [p in {(0, 6), (0, 7), (1, 6), (1, 7)} for p in pairs]
    assert chosen.contexts[noisy].min() > 1.5 * even.contexts[0]
    assert chosen.contexts[np.invert(noisy)].max() < even.contexts[0]
    assert even.evaluations <= 1500 and chosen.evaluations <= 1500
    assert chosen.sii_stderr[noisy].max() < even.sii_stderr[noisy].max()


# ---- budgets and seeds


@pytest.mark.parametrize("budget", [14, 25, 60, 100, 333, 2000])
@pytest.mark.parametrize("adaptive", [True, False])
def test_budget_is_never_exceeded_and_counted_exactly(rough, budget, adaptive):
    asked = []

    def counting(z):
        asked.append(len(z))
        return lookup(rough)(z)

    result = run(counting, budget=budget, adaptive=adaptive)
    assert result.evaluations == sum(asked) <= budget
    assert budget - result.evaluations < 4 * CornerGrid.of(torch.tensor(PAIRS), N).evaluations


def test_same_seed_same_numbers(rough):
    first, second, other = (run(lookup(rough), contexts=10, seed=s) for s in (5, 5, 6))
    assert np.array_equal(first.sii, second.sii) and np.array_equal(first.gap_stderr, second.gap_stderr)
    assert not np.array_equal(first.sii, other.sii)


def test_blocks_do_not_matter(rough):
    class Small(module.Game):
        n, player_names, block = N, tuple("abcdefg"), 1

        def __call__(self, z):
            return lookup(rough)(z)

    assert np.array_equal(run(Small(), contexts=10).sii, run(lookup(rough), contexts=10).sii)


def test_pairs_are_symmetric(rough):
    forth = run(lookup(rough), contexts=10)
    back = run(lookup(rough), contexts=10, pairs=[(j, i) for i, j in PAIRS])
    assert np.allclose(forth.sii, back.sii, rtol=0, atol=1e-12)
    assert np.allclose(forth.gap, back.gap, rtol=0, atol=1e-12)


def test_contexts_are_those_of_the_seed(rough):
    seen = []

    def watching(z):
        seen.append(z)
        return lookup(rough)(z)

    run(watching, contexts=6, seed=9)
    grid = CornerGrid.of(torch.tensor(PAIRS), N)
    contexts = unpack(sample_contexts(N, 6, seed=9).words, N)
    assert torch.equal(torch.cat(seen), (contexts[:, None] ^ grid.toggled).flatten(0, 1))


# ---- token games


@pytest.fixture(scope="module")
def edge_game() -> TokenGame:
    return next(e for e in EDGES if e.name == "three modalities").game(dtype=torch.float32)


def test_token_game_end_to_end(edge_game):
    """All heads in one pass, against enumeration in float64 on the reference."""
    truth = exact_interactions(
        next(e for e in EDGES if e.name == "three modalities").game(backend="reference"), progress=False
    )
    result = interactions(edge_game, contexts=200, method="grid", progress=False)
    assert result.heads == edge_game.heads and result.sii.shape == (len(result.pairs), 11)
    score = np.abs(result.sii - truth.sii) / np.maximum(result.sii_stderr, 1e-6)
    assert np.median(score) < 1.5 and np.quantile(score, 0.99) < 5
    assert result.noise_share.shape == (11,) and 0 < result.noise_share.max() < 1e-6
    assert result.check_evaluations > 0 and result.about["dtype"] == "float32"


def test_the_check_of_a_short_run_is_short(edge_game):
    result = interactions(edge_game, budget=100, progress=False)
    assert 0 < result.check_evaluations <= 24 and 0 < result.noise_share.max() < 1e-6


def test_cross_modal_pairs_are_the_default(edge_game):
    result = interactions(edge_game, contexts=4, method="grid", progress=False)
    sizes = [len(players) for _, players in edge_game.groups]
    assert len(result.pairs) == sum(a * b for a, b in itertools.combinations(sizes, 2))
    group = {p: m for m, (_, players) in enumerate(edge_game.groups) for p in players}
    assert all(group[i] != group[j] for i, j in result.pairs.tolist())


def test_a_token_equal_to_its_fill_is_a_dummy():
    edge = EDGES[0]
    features, masks, fills = edge.sample()
    features[1][2] = fills[1]
    game = TokenGame(edge.model(), features, masks=masks, fill=fills, target=1)
    result = interactions(game, contexts=8, method="grid", progress=False)
    dummy = game.positions.index((1, 2))
    with_dummy = (result.pairs == dummy).any(1)
    assert np.abs(result.sii[with_dummy]).max() <= 1e-12 < 1e-4 < np.abs(result.sii[~with_dummy]).min(0).max()


def test_weighted_logit_heads_sum_to_the_mixture():
    game = EDGES[0].game(value="logit")
    result = interactions(game, contexts=6, method="grid", progress=False)
    experts = len(game.problem.model.config.expert_names)
    assert np.allclose(result.sii[:, 1 + experts :].sum(1), result.sii[:, 0], rtol=0, atol=1e-10)


def test_rounding_is_measured_and_warned_of():
    """A game with coarse arithmetic must be caught; an exact one must not."""
    values = torch.randn(2**N, dtype=torch.float64)

    class Coarse(module.Game):
        n, player_names = N, tuple("abcdefg")

        def __init__(self, step):
            self.step = step

        def __call__(self, z):
            exact = lookup(values)(z)
            return (exact / self.step).round() * self.step if self.step else exact

        def precise(self):
            return Coarse(0) if self.step else None

    with pytest.warns(RuntimeWarning, match="rounding makes up"):
        coarse = run(Coarse(0.5), contexts=16)
    assert coarse.noise_share > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = run(Coarse(1e-6), contexts=16)
    assert 0 < fine.noise_share < 1e-9


# ---- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pairs": [(1, 1)]}, r"pairs: got player 1 paired with itself \(pair 0\)"),
        ({"pairs": [(0, 7)]}, "pairs: got player 7, expected players 0 to 6"),
        ({"pairs": [(-1, 2)]}, "pairs: got player -1"),
        ({"pairs": [(0, 1), (1, 0)]}, r"pairs: got pair \(0, 1\) more than once"),
        ({"pairs": []}, r"pairs: got shape \(0,\), expected at least one pair"),
        ({"pairs": [(0.5, 1.0)]}, "pairs: got torch.float32, expected integers"),
        ({"pairs": [(0, 1)], "rows": [0], "cols": [1]}, "pairs: got pairs together with rows or cols"),
        ({"pairs": None, "rows": [0, 1], "cols": [1, 2]}, "rows: got player 1 paired with itself"),
        ({"pairs": None, "rows": [0]}, "cols: got None"),
        ({"pairs": None, "rows": [0, 9], "cols": [1]}, "rows: got player 9"),
        ({"contexts": 0}, "contexts: got 0, expected an integer >= 1"),
        ({"contexts": 2.5}, r"contexts: got 2.5 \(float\)"),
        ({"contexts": 4, "budget": 100}, "budget: got a budget together with contexts"),
        ({"budget": 12}, "budget: got 12, expected at least 13 evaluations, the cost of one context"),
        ({"budget": 0}, "budget: got 0"),
        ({"adaptive": True}, "adaptive: got True, expected a budget"),
        ({"gap": "mean"}, "gap: got 'mean', expected one of 'max', 'sum', 'strict', 'ratio'"),
        ({"seed": -1}, "seed: got -1"),
        ({"n": 1}, "n: got 1, expected an integer >= 2"),
        ({"n": None}, "n: got None, expected the number of players"),
    ],
)
def test_bad_input_is_named(rough, options, message):
    with pytest.raises(ArgumentError, match=message):
        run(lookup(rough), **options)


def test_bad_games_are_named(rough):
    with pytest.raises(ArgumentError, match=r"game: got a value of shape \(\) for 13 coalitions"):
        run(lambda z: torch.tensor(1.0), contexts=1)
    with pytest.raises(ArgumentError, match="game: got str"):
        run("game")


def test_one_context_has_no_standard_error(rough):
    result = run(lookup(rough), contexts=1)
    assert np.isfinite(result.sii).all() and np.isnan(result.sii_stderr).all()
    assert np.isnan(result.interval()[0]).all()
