"""The benchmark's games: what is said to be their truth is what enumeration finds."""

import numpy as np
import pytest
import torch

from bench import kinds
from flmoe_fast import exact_interactions

N = 9
PAIRS = kinds.all_pairs(N)


def _mixed_conjunctions() -> kinds.Conjunctions:
    sign = np.random.default_rng(5).choice([-1, 0, 1], (20, N))
    return kinds.Conjunctions(sign == 1, sign == -1, np.linspace(-1, 2, 20))


FAMILIES = {
    "conjunctions": _mixed_conjunctions(),
    "trees": kinds.boosted_trees(3, N, trees=8, depth=4),
    "product": kinds.Product(np.linspace(-1.5, 1, N), scale=-0.7, offset=2.0),
    "maximum": kinds.Maximum(np.array([3.0, 1, 4, 1, 5, 9, 2, 6, 5])),
    "vote": kinds.Vote(np.array([3, 1, 4, 1, 5, 9, 2, 6, 5]), 20),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_closed_form_is_what_enumeration_finds(name):
    game = FAMILIES[name]
    exact = exact_interactions(
        lambda rows: torch.from_numpy(game(rows.numpy())), n=N, pairs=PAIRS.tolist(), progress=False
    )
    assert np.abs(exact.sii).max() > 0.01
    np.testing.assert_allclose(game.sii(PAIRS), exact.sii, rtol=0, atol=1e-12 * np.abs(exact.sii).max())


def test_enumeration_here_is_enumeration_there():
    values = np.random.default_rng(0).normal(size=2**N)
    exact = exact_interactions(
        lambda rows: torch.from_numpy(values)[(rows.long() << torch.arange(N)).sum(1)],
        n=N,
        pairs=PAIRS.tolist(),
        progress=False,
    )
    np.testing.assert_allclose(kinds.by_enumeration(values, PAIRS), exact.sii, rtol=0, atol=1e-12)


def test_trees_are_the_model_s_own_predictions():
    """A leaf's path holds for one coalition of the players on it: every tree gives exactly one leaf."""
    trees = kinds.boosted_trees(3, N, trees=8, depth=4)
    ones = kinds.Conjunctions(trees.members, trees.absentees, np.ones(len(trees.weights)))
    np.testing.assert_array_equal(ones(kinds.every_coalition(N)), 8.0)


def test_the_long_average_is_within_its_own_error():
    rng = np.random.default_rng(2)
    couple = np.triu(rng.normal(size=(N, N)), 1)
    game = kinds.PairSigmoid(rng.normal(size=N), couple + couple.T)
    truth = kinds.by_enumeration(game(kinds.every_coalition(N)), PAIRS)
    mean, stderr = game.long_average(PAIRS, seed=0, contexts=2**14)
    apart = np.abs(mean - truth) / stderr
    assert apart.max() < 4  # 36 pairs: 1 in 400 by chance, were the errors independent
    assert apart.max() > 0.5 and stderr.max() < 0.05 * np.abs(truth).max()


#: Their truth takes seconds; what it is made by is checked above.
SLOW = ("sigmoid", "attention", "saturated", "boosting")


@pytest.mark.parametrize("name", [name for name in kinds.KINDS | kinds.CONTROLS if not name.startswith(SLOW)])
def test_a_seed_is_one_game(name):
    make = (kinds.KINDS | kinds.CONTROLS)[name]
    game, again, other = make(1), make(1), make(2)
    rows = np.random.default_rng(0).random((64, game.n)) < 0.5
    np.testing.assert_array_equal(game.values(rows), again.values(rows))
    assert game.values(rows).dtype == np.float64 and game.truth.shape == (len(game.pairs),)
    assert (game.pairs[:, 0] < game.pairs[:, 1]).all()
    if name in kinds.KINDS:
        assert (game.values(rows) != other.values(rows)).any() and (game.truth**2).sum() > 0
