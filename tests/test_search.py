"""The search for scales finds a minimum, with other libraries' threads out of the way."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from flmoe_fast.probes.search import minimum


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_a_search_ends_at_the_minimum_within_bounds_and_leaves_threads_as_they_were():
    seen = set()

    def objective(theta):
        seen.update(blas_threads())
        return float(((theta - [1.0, 3.0]) ** 2).sum()), 2 * (theta - [1.0, 3.0])

    with threadpool_limits(2, user_api="blas"):
        assert blas_threads() == {2}
        found = minimum(objective, np.zeros(2), np.array([[-5.0, 5.0], [-5.0, 2.0]]), 50)
        np.testing.assert_allclose(found, [1.0, 2.0], atol=1e-6)
        assert seen == {1} and blas_threads() == {2}

        def refuses(theta):
            raise KeyError

        with pytest.raises(KeyError):
            minimum(refuses, np.zeros(1), np.array([[-1.0, 1.0]]), 5)
        assert blas_threads() == {2}
