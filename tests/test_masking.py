"""Pair-level masking: which coalitions it evaluates, what it makes of their values, and two controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from flmoe_fast import TokenGame
from flmoe_fast.checks import ArgumentError
from flmoe_fast.games.game import Game
from flmoe_fast.pipeline.faithful.masking import MaskedPairs, mask_pairs, masking_curve, masking_scores
from tests.edge_shapes import EDGES

GROUPS = (("a", (0, 1, 2, 3, 4)), ("b", (5, 6, 7)), ("c", (8, 9)))
PAIRS = [(0, 5), (5, 1), (8, 0), (3, 9)]  # 2, 3, 4 and 6 distinct players


class Recorded(Game):
    """A game of three modalities with two heads that remembers what it was asked."""

    n, heads, groups = 10, ("first", "second"), GROUPS

    def __init__(self, function):
        self.function = function
        self.player_names = tuple(map(str, range(self.n)))
        self.asked: list[torch.Tensor] = []

    def __call__(self, coalitions):
        self.asked.append(coalitions.clone())
        return self.function(coalitions.double())


WEIGHTS = torch.tensor([[2.0**p, -(3.0**p)] for p in range(10)], dtype=torch.float64)


def additive() -> Recorded:
    """Every set of players has a value of its own, so values tell which players were present."""
    return Recorded(lambda z: z @ WEIGHTS)


def test_one_batch_of_matched_nested_controls():
    game = additive()
    most, repeats = (1, 2, 4), 7
    found = mask_pairs(game, PAIRS, most=most, repeats=repeats, seed=5)
    (asked,) = game.asked
    assert asked.shape == (1 + len(most) * (1 + repeats), game.n)
    assert asked[0].all()
    absent = ~asked[1:].unflatten(0, (len(most), 1 + repeats))
    for b, count in enumerate(most):
        assert set(absent[b, 0].nonzero()[:, 0].tolist()) == {p for pair in PAIRS[:count] for p in pair}
    counts = torch.stack([absent[..., list(players)].sum(-1) for _, players in GROUPS], dim=-1)
    assert (counts == counts[:, :1]).all()  # as many of each modality as the top pairs
    assert found.tokens.tolist() == [[1, 1, 0], [2, 1, 0], [3, 1, 2]]
    assert torch.equal(counts[:, 0], torch.tensor(found.tokens))
    for smaller, larger in zip(absent[:-1, 1:], absent[1:, 1:]):
        assert (larger | ~smaller).all()
    assert len({tuple(row) for row in absent[2, 1:].tolist()}) > 1


def test_values_are_those_of_the_coalitions():
    game = additive()
    found = mask_pairs(game, PAIRS, most=(1, 3), repeats=4)
    values = game.asked[0].double() @ WEIGHTS
    assert found.heads == game.heads and found.most == (1, 3)
    assert np.array_equal(found.full, values[0])
    assert np.array_equal(found.top, values[[1, 6]])
    assert np.array_equal(found.random, values[torch.tensor([[2, 3, 4, 5], [7, 8, 9, 10]])])
    masked = torch.tensor([[p in (0, 5) for p in range(10)], [p in (0, 1, 5, 8) for p in range(10)]])
    assert np.array_equal(found.top_drop, masked.double() @ WEIGHTS)
    assert np.array_equal(found.random_drop, found.full - found.random)


def test_controls_among_the_candidates():
    game = additive()
    found = mask_pairs(game, PAIRS[:2], most=(1, 2), repeats=200, universe="candidates")
    drawn = (~game.asked[0][1:]).any(0)
    assert drawn.nonzero().flatten().tolist() == [0, 1, 5]
    # Two of two candidates of the first modality, and the only one of the second: nothing is left to chance.
    assert (found.random[1] == found.top[1]).all() and (found.random[0] != found.top[0]).any()
    with pytest.raises(ArgumentError, match="universe"):
        mask_pairs(game, PAIRS, most=(1,), universe="everything")


def test_scores_of_masked_models():
    edge = next(edge for edge in EDGES if edge.name == "padded")
    model = edge.model()
    samples, scores = [], {"top": [], "random": [[], [], []]}
    rng = np.random.default_rng(0)
    targets = torch.tensor(rng.integers(0, 5, 6))
    features, masks, fills = edge.sample()
    for seed in range(6):
        own = [f + 0.8 * torch.randn(f.shape, dtype=f.dtype) for f in features]
        game = TokenGame(model, own, masks=masks, fill=fills)
        pairs = [(0, 3), (1, 4)]
        samples.append(mask_pairs(game, pairs, most=(1, 2), repeats=3, seed=seed))

        def logits(absent, own=own, game=game):
            changed = [f.clone() for f in own]
            for p in absent:
                m, position = game.positions[p]
                changed[m][position] = fills[m]
            with torch.no_grad():
                return model([f[None] for f in changed], [m[None] for m in masks]).logits[0]

        np.testing.assert_allclose(samples[-1].top_logits[1], logits([0, 1, 3, 4]), atol=1e-10)
        scores["top"].append(int(logits([0, 1, 3, 4]).argmax()))
        for r in range(3):
            scores["random"][r].append(int(samples[-1].random_logits[1, r].argmax()))
    table = masking_scores(samples, targets, "multiclass")
    assert table["pairs"].tolist() == [0, 1, 2]
    wanted = targets.numpy()
    assert table["accuracy_top"][2] == np.mean(np.array(scores["top"]) == wanted)
    each = [np.mean(np.array(own) == wanted) for own in scores["random"]]
    assert table["accuracy_random"][2] == pytest.approx(np.mean(each))
    assert table["accuracy_random_std"][2] == pytest.approx(np.std(each, ddof=1))
    assert table["macro_f1_top"][0] == table["macro_f1_random"][0]
    with pytest.raises(ArgumentError, match="masked"):
        masking_scores(samples, targets[:3], "multiclass")
    with pytest.raises(ArgumentError, match="without a model"):
        masking_scores([mask_pairs(additive(), PAIRS, most=(1,))], targets[:1], "multiclass")


def test_controls_are_uniform_over_the_players_of_a_modality():
    game = additive()
    mask_pairs(game, [(0, 5)], most=(1,), repeats=3000)
    drawn = (~game.asked[0][2:]).double().mean(0)
    for _, players in GROUPS[:2]:
        expected = 1 / len(players)
        error = (expected * (1 - expected) / 3000) ** 0.5
        assert ((drawn[list(players)] - expected).abs() < 4.5 * error).all()
    assert (drawn[8:] == 0).all()


def test_seed():
    draws = [mask_pairs(additive(), PAIRS, most=(2,), seed=seed).random for seed in (1, 1, 2)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])


def test_plain_callable_is_one_group_with_one_value():
    found = mask_pairs(lambda z: z.double().sum(1), [(0, 1), (1, 2)], n=5, most=(1, 2), repeats=3)
    assert found.heads is None and found.tokens.tolist() == [[2], [3]]
    assert found.top_drop.tolist() == [[2.0], [3.0]] and (found.random_drop[..., 0].T == [2.0, 3.0]).all()


def sample(rng: np.random.Generator) -> MaskedPairs:
    return MaskedPairs(
        most=(1, 2),
        heads=("p", "q"),
        tokens=rng.integers(1, 4, (2, 2)),
        full=rng.normal(size=2),
        top=rng.normal(size=(2, 2)),
        random=rng.normal(size=(2, 5, 2)),
    )


def test_curve_is_the_paired_comparison():
    samples = [sample(np.random.default_rng(seed)) for seed in range(12)]
    for head, column in ((None, 0), ("q", 1), (1, 1)):
        curve = masking_curve(samples, head)
        top = np.array([s.full[column] - s.top[:, column] for s in samples])
        random = np.array([(s.full[column] - s.random[:, :, column]).mean(1) for s in samples])
        np.testing.assert_allclose(curve.top, top.mean(0))
        np.testing.assert_allclose(curve.random, random.mean(0))
        np.testing.assert_allclose(curve.top_stderr, top.std(0, ddof=1) / 12**0.5)
        np.testing.assert_allclose(curve.random_stderr, random.std(0, ddof=1) / 12**0.5)
        np.testing.assert_allclose(curve.difference / curve.difference_stderr, ttest_rel(top, random).statistic)
        assert curve.share.tolist() == [sum(t > r for t, r in zip(*both)) / 12 for both in zip(top.T, random.T)]
        assert curve.tokens.tolist() == np.mean([s.tokens.sum(1) for s in samples], axis=0).tolist()
    table = masking_curve(samples).to_dataframe()
    assert list(table["pairs"]) == [1, 2] and (table["samples"] == 12).all()
    np.testing.assert_array_equal(table["difference"], masking_curve(samples).difference)


def planted(seed: int) -> tuple[Recorded, tuple[int, int]]:
    """A noisy additive game in which one pair of players carries most of the value."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.1 * torch.randn(10, generator=generator, dtype=torch.float64)
    pair = (int(torch.randint(0, 5, (), generator=generator)), int(torch.randint(5, 8, (), generator=generator)))
    return Recorded(lambda z: (z @ weights + z[:, pair[0]] * z[:, pair[1]])[:, None].expand(-1, 2)), pair


def test_pairs_that_matter_drop_more_and_random_pairs_do_not():
    right, wrong = [], []
    for seed in range(60):
        game, pair = planted(seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        other = (int(torch.randint(0, 5, (), generator=generator)), int(torch.randint(5, 8, (), generator=generator)))
        right.append(mask_pairs(game, [pair], most=(1,), seed=seed))
        wrong.append(mask_pairs(game, [other], most=(1,), seed=seed))
    right, wrong = masking_curve(right), masking_curve(wrong)
    assert right.difference[0] > 8 * right.difference_stderr[0] and right.share[0] > 0.9
    assert abs(wrong.difference[0]) < 3.5 * wrong.difference_stderr[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"pairs_ranked": [(0, 10)]}, "pairs"),
        ({"pairs_ranked": [(0, 0)]}, "pairs"),
        ({"pairs_ranked": [(0, 5), (5, 0)]}, "pairs"),
        ({"pairs_ranked": []}, "pairs"),
        ({"most": (1, 5)}, "most"),
        ({"most": (0,)}, "most"),
        ({"most": ()}, "most"),
        ({"repeats": 0}, "repeats"),
        ({"seed": -1}, "seed"),
        ({"n": 9}, "n"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ArgumentError, match=rf"^{named}\b"):
        mask_pairs(additive(), **{"pairs_ranked": PAIRS, "most": (1, 2), **arguments})


def test_curve_refuses_what_does_not_match():
    one, two = (sample(np.random.default_rng(seed)) for seed in range(2))
    other = MaskedPairs((1, 3), two.heads, two.tokens, two.full, two.top, two.random)
    for masked, head, named in (([one], None, "masked"), ([one, other], None, "masked"), ([one, two], "r", "head")):
        with pytest.raises(ArgumentError, match=f"^{named}"):
            masking_curve(masked, head)
    with pytest.raises(ArgumentError, match="^head"):
        masking_curve([one, two], 2)
