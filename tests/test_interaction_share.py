"""InterSHAP from the values of all coalitions, against loops straight from the published equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.pipeline.interaction_share import interaction_share


def plain(values, n):
    """Global and local share by the published sums over subsets; values[c] are those of coalition c of one sample."""

    def has(c, *players):
        return c | sum(1 << p for p in players)

    matrices = []
    for v in values.T:
        matrix = np.zeros((n, n))
        for i in range(n):
            for c in (c for c in range(2**n) if not c >> i & 1):
                size = c.bit_count()
                weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                matrix[i, i] += weight * (v[has(c, i)] - v[c])
            for j in (j for j in range(n) if j != i):
                for c in (c for c in range(2**n) if not c >> i & 1 and not c >> j & 1):
                    size = c.bit_count()
                    weight = math.factorial(size) * math.factorial(n - size - 2) / (2 * math.factorial(n - 1))
                    matrix[i, j] += weight * (v[has(c, i, j)] + v[c] - v[has(c, i)] - v[has(c, j)])
        off = matrix - np.diag(np.diag(matrix))
        matrices.append(off + np.diag(np.diag(matrix) - off.sum(1)))

    def share(matrix):
        size = np.abs(matrix)
        return (size.sum() - np.trace(size)) / size.sum()

    return share(np.mean(matrices, 0)), np.mean([share(m) for m in matrices])


@pytest.mark.parametrize("n", (2, 3, 4))
def test_shares_agree_with_the_published_sums(n):
    values = torch.rand(2**n, 7, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found = interaction_share(values, n)
    overall, local = plain(values.numpy(), n)
    assert found.overall == pytest.approx(overall, abs=1e-12) and found.local == pytest.approx(local, abs=1e-12)
    # Main effects and interactions add up to what all modalities change.
    np.testing.assert_allclose(found.main.sum(0) + found.pairs.sum(0), values[-1] - values[0], atol=1e-12)


def test_rules_that_are_known():
    """Coalitions in the order none, first, second, both."""
    for values, share in (
        ((0.5, 0.5, 0.5, 1.0), 1.0),  # exclusive or: neither says anything alone
        ((0.0, 0.0, 0.0, 1.0), 1.0),  # and
        ((0.0, 1.0, 1.0, 1.0), 1 / 3),  # or: two main effects of one, and an interaction that takes one back
        ((0.0, 0.3, 0.2, 0.5), 0.0),  # a sum
    ):
        found = interaction_share(torch.tensor(values, dtype=torch.float64)[:, None], 2)
        assert found.overall == pytest.approx(share, abs=1e-12) == found.local
    assert math.isnan(interaction_share(torch.zeros(4, 2), 2).overall)


def test_effects_of_opposite_sign_cancel_only_over_the_data_set():
    """What made a local figure look like a failed global one: here all is interaction overall, a fifth in a sample."""
    opposite = torch.tensor([[0.0, a, -a, 1.0] for a in (2.0, -2.0)], dtype=torch.float64).T
    found = interaction_share(opposite, 2)
    assert found.overall == pytest.approx(1.0) and found.local == pytest.approx(1 / 5)


def test_errors():
    for run, name in (
        (lambda: interaction_share(torch.zeros(4, 2), 3), "values"),
        (lambda: interaction_share(torch.zeros(4), 2), "values"),
        (lambda: interaction_share(torch.zeros(2, 2), 1), "n"),
    ):
        with pytest.raises(ArgumentError) as caught:
            run()
        assert caught.value.argument == name
