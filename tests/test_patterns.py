"""Concentration and overlap of importance maps: known maps, plain loops, noise, and controls where nothing is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from flmoe_fast import FLI2MoE, FLI2MoEConfig, interactions
from flmoe_fast.checks import ArgumentError
from flmoe_fast.pipeline.importance.concentration import concentration
from flmoe_fast.pipeline.importance.overlap import RANKS, chance_overlap, overlap
from flmoe_fast.pipeline.importance.patterns import (
    ITSELF,
    Patterns,
    collect,
    compare_patterns,
    map_measures,
    pair_patterns,
)
from flmoe_fast.pipeline.importance.tokens import batch_importance, head_importance

TOPS = (10.0, 25.0)


def plain_gini(values):
    """Half the mean absolute difference of all pairs over the mean."""
    return sum(abs(a - b) for a, b in itertools.product(values, values)) / (2 * len(values) ** 2 * np.mean(values))


def test_concentration_of_known_maps():
    one, flat = np.eye(10)[3], np.ones(10)
    found = concentration(np.stack([one, flat]), tops=TOPS, baseline="zero")
    np.testing.assert_allclose(found["gini"], [0.9, 0.0], atol=1e-12)
    np.testing.assert_allclose(found["entropy"], [0.0, 1.0], atol=1e-12)
    np.testing.assert_allclose(found["top 25 %"], [1.0, 0.3], atol=1e-12)  # ceil(2.5) players
    # A flat map has nothing above its least value, and a map of zeros nothing at all.
    assert np.isnan(concentration(flat)["gini"]) and np.isnan(concentration(0 * flat, baseline="zero")["top 5 %"])


def test_concentration_agrees_with_plain_loops():
    values = np.random.default_rng(0).random((4, 3, 13)) ** 3
    found = concentration(values, tops=TOPS, baseline="zero")
    for place in np.ndindex(4, 3):
        own = values[place]
        share = own / own.sum()
        assert found["gini"][place] == pytest.approx(plain_gini(own), abs=1e-12)
        assert found["entropy"][place] == pytest.approx(-sum(p * math.log(p) for p in share) / math.log(13), abs=1e-12)
        assert found["top 10 %"][place] == pytest.approx(sum(sorted(share)[-2:]), abs=1e-12)


def test_identity_of_rollouts_does_not_count():
    """What every token has is taken off, and the scale of the rest does not matter."""
    values = np.random.default_rng(1).random(16)
    weak, strong = concentration(1 / 16 + 1e-3 * values), concentration(1 / 16 + values)
    for name in weak:
        assert weak[name] == pytest.approx(strong[name], abs=1e-9)
    raw = [concentration(1 / 16 + scale * values, baseline="zero")["gini"] for scale in (1e-3, 1.0)]
    assert raw[0] < 0.01 < 0.1 < raw[1]


def test_overlap_agrees_with_plain_loops():
    values = np.random.default_rng(2).integers(0, 6, (4, 20)).astype(float)  # with ties
    found = overlap(values, tops=TOPS)
    for e, f in itertools.product(range(4), range(4)):
        assert found[RANKS][e, f] == pytest.approx(spearmanr(values[e], values[f]).statistic, abs=1e-12)
        for percent, count in ((10, 2), (25, 5)):
            tops = [set(sorted(range(20), key=lambda p, m=m: (-values[m, p], p))[:count]) for m in (e, f)]
            assert found[f"overlap {percent} %"][e, f] == len(tops[0] & tops[1]) / len(tops[0] | tops[1])
    same = overlap(np.stack([values[0], np.ones(20)]), tops=TOPS)
    assert same[RANKS][0, 0] == 1.0 and np.isnan(same[RANKS][0, 1])


def test_unrelated_maps_overlap_by_chance():
    random = np.random.default_rng(3)
    drawn = [overlap(random.random((2, 16)), tops=TOPS)["overlap 25 %"][0, 1] for _ in range(4000)]
    assert abs(np.mean(drawn) - chance_overlap(16, 25)) < 4 * np.std(drawn) / math.sqrt(len(drawn))
    assert chance_overlap(16, 100) == 1.0 and chance_overlap(10, 10) == pytest.approx(0.1)


def of_maps(maps, errors=None, names=("whole", "a", "b", "c"), whole="whole", baseline="least"):
    """Patterns of samples' maps (N, E, n), measured with TOPS."""
    given = [None] * len(maps) if errors is None else errors
    rows = [map_measures(m, e, tops=TOPS, seed=k, baseline=baseline) for k, (m, e) in enumerate(zip(maps, given))]
    return collect(rows, names, [f"s{k}" for k in range(len(maps))], whole=whole)


def test_tables_are_means_over_samples_maps_and_pairs():
    maps = np.random.default_rng(4).random((6, 4, 16))
    patterns = of_maps(maps)
    table = patterns.to_dataframe()
    ginis = concentration(maps)["gini"]
    row = table[(table["measure"] == "gini") & (table["map"] == "b")].iloc[0]
    assert row["mean"] == pytest.approx(ginis[:, 2].mean()) and row["samples"] == 6
    assert (
        row["stderr"] == pytest.approx(ginis[:, 2].std(ddof=1) / math.sqrt(6))
        and row["low"] < row["mean"] < row["high"]
    )
    pairs = [[overlap(m)[RANKS][e, f] for e, f in ((1, 2), (1, 3), (2, 3))] for m in maps]  # without the whole
    by_sample = patterns.by_sample()
    np.testing.assert_allclose(by_sample[RANKS], np.mean(pairs, 1), atol=1e-12)
    np.testing.assert_allclose(by_sample["specificity"], 1 - np.mean(pairs, 1), atol=1e-12)
    np.testing.assert_allclose(by_sample["gini of whole"], ginis[:, 0], atol=1e-12)
    np.testing.assert_allclose(by_sample["gini"], ginis[:, 1:].mean(1), atol=1e-12)
    matrix = patterns.matrix()
    assert np.array_equal(np.diag(matrix), np.ones(4)) and matrix[1, 3] == pytest.approx(np.mean(pairs, 0)[1])
    apart = table[(table["measure"] == "overlap 25 %") & (table["map"] == "a") & (table["other"] == "c")].iloc[0]
    assert apart["chance"] == pytest.approx(chance_overlap(16, 25)) and apart["itself"] == 1.0


def test_noise_is_not_specificity():
    """Independent noisy estimates of one map: it overlaps as little with itself. A noiseless difference stays."""
    random = np.random.default_rng(5)
    truth = random.random((40, 1, 30))
    errors = np.full((40, 3, 30), 0.3)
    names = {"names": ("a", "b", "c"), "whole": None}
    noisy = of_maps(truth + errors * random.standard_normal(errors.shape), errors, **names).by_sample()
    blind = of_maps(truth + errors * random.standard_normal(errors.shape), **names).by_sample()
    assert blind["specificity"].mean() > 0.4
    # An estimate stands for the truth when it is drawn anew; its own noise makes it a little too sure of itself.
    assert -0.05 < noisy["specificity"].mean() < 0.2
    apart = of_maps(random.random((40, 3, 30)), 0 * errors, **names).by_sample()
    assert apart["specificity"].mean() > 0.9


def test_comparison_is_paired_and_finds_nothing_where_nothing_is():
    random = np.random.default_rng(6)
    shared = random.random((30, 4, 16))
    first, same = of_maps(shared), of_maps(shared[:, [0, 2, 3, 1]], names=("dense", "h1", "h2", "h3"), whole="dense")
    table = compare_patterns(first, same).set_index("measure")
    assert table["difference"].abs().max() < 1e-12 and table.loc["gini of the whole", "samples"] == 30
    alike = shared.copy()
    alike[:, 1:] = shared[:, 1:2] + 0.1 * random.random((30, 3, 16))
    table = compare_patterns(first, of_maps(alike)).set_index("measure").loc["specificity"]
    assert table["low"] > 0.5 and table["difference"] == pytest.approx(table["first"] - table["second"])
    with pytest.raises(ArgumentError, match="second"):
        compare_patterns(first, Patterns(same.names, "dense", tuple("x" * 30), same.measures))


def test_which_expert_ranks_which_pairs():
    """Two heads with their own pair and one with noise alone, from estimates with standard errors."""

    def game(z):
        z = z.double()
        return torch.stack([z[:, 0] * z[:, 3], z[:, 1] * z[:, 4], 0 * z[:, 0]], dim=1) + 0.01 * z.sum(1, keepdim=True)

    pairs = list(itertools.product(range(3), range(3, 6)))
    results = [interactions(game, n=6, pairs=pairs, contexts=8, seed=s, progress=False) for s in range(4)]
    heads = (0, 1)
    found = pair_patterns(results, heads, tops=(10.0,))
    assert found.matrix("overlap 10 %")[0, 1] == 0.0 and found.by_sample()["gini"].min() > 0.8
    assert found.measures[ITSELF + "overlap 10 %"].min() == 1.0


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    config = FLI2MoEConfig(("a", "b"), 16, 4, 2, 3, dropout=0.0, roles=("dense",), reweight_hidden=8)
    model = FLI2MoE(config).double().eval()
    features = [torch.randn(3, t, 16, dtype=torch.float64) for t in (3, 4)]
    masks = [torch.ones(3, 3), torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])]
    return model, features, masks


@pytest.mark.parametrize("method", ("attnXgrad", "attn"))
def test_heads_of_a_plain_transformer(dense, method):
    """Each by a backward pass of its own, from the attention maps that the model gives."""
    model, features, masks = dense
    found = head_importance(model, features, masks, method=method)
    np.testing.assert_allclose(
        found.mixture, batch_importance(model, features, masks, method=method).mixture, atol=1e-12
    )
    for row in range(3):
        leaves = [f[row : row + 1].clone().requires_grad_() for f in features]
        kept: list = []
        own = [m[row : row + 1] for m in masks]
        logits = model.interaction_experts[0](leaves, own, kept)[0]
        slopes = torch.autograd.grad(logits.max(), kept)
        layers = [a.relu() * g.relu() if method == "attnXgrad" else a for a, g in zip(kept, slopes)]

        def step(matrix):
            matrix = matrix + torch.eye(7, dtype=torch.float64)
            return matrix / matrix.sum(-1, keepdim=True)

        for h in range(4):
            expected = (step(layers[1][0, h]) @ step(layers[0][0].mean(0))).mean(0)
            np.testing.assert_allclose(found.experts[row, h], expected.detach(), atol=1e-12)
    assert (found.experts[:, 0] - found.experts[:, 1]).abs().max() > 1e-6


def test_errors(dense):
    model, features, masks = dense
    two = FLI2MoE(FLI2MoEConfig(("a", "b"), 16, 4, 2, 3, reweight_hidden=8))
    good = map_measures(np.random.default_rng(0).random((2, 5)))
    for run, name in (
        (lambda: concentration(np.array([1.0, math.nan])), "maps"),
        (lambda: concentration(np.array([1.0, -1.0]), baseline="zero"), "maps"),
        (lambda: concentration(np.ones(3), baseline="none"), "baseline"),
        (lambda: concentration(np.ones(3), tops=(0,)), "tops[0]"),
        (lambda: overlap(np.ones(3)), "maps"),
        (lambda: overlap(np.ones((2, 3)), tops=(5, 101)), "tops[1]"),
        (lambda: map_measures(np.ones((2, 5)), np.ones((2, 4))), "errors"),
        (lambda: collect([], ("a",), ()), "samples"),
        (lambda: collect([good], ("a", "b", "c"), ("s",)), "samples[0]"),
        (lambda: collect([good], ("a", "b"), ("s",), whole="c"), "whole"),
        (lambda: head_importance(two, features, masks), "model"),
        (lambda: head_importance(model, features, masks, method="ig"), "method"),
    ):
        with pytest.raises(ArgumentError) as caught:
            run()
        assert caught.value.argument == name
