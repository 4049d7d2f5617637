"""Random games of few players, probed and enumerated."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from flmoe_fast import exact_interactions, interactions

#: What float64 sums of 2^n values may lose, relative to the largest value.
ROUNDING = 1e-12


def table_game(seed: int) -> tuple[int, torch.Tensor]:
    """Number of players, and values (2^n,): random, additive, or a sparse Boolean formula."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 8))
    masks = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    kind = seed % 3
    if kind == 0:
        values = rng.normal(size=2**n)
    elif kind == 1:
        values = masks @ rng.normal(size=n)
    else:
        values = np.zeros(2**n)
        for _ in range(int(rng.integers(1, 4))):
            members = rng.choice(n, size=int(rng.integers(1, min(n, 4) + 1)), replace=False)
            values += rng.choice([-1.0, 1.0]) * masks[:, members].all(1)
    return n, torch.from_numpy(values)


def shapley_interaction(values: torch.Tensor, n: int, i: int, j: int) -> float:
    """The index by its definition: a sum over coalitions without both."""
    total = 0.0
    others = [p for p in range(n) if p not in (i, j)]
    for size in range(n - 1):
        weight = math.factorial(size) * math.factorial(n - size - 2) / math.factorial(n - 1)
        for members in itertools.combinations(others, size):
            s = sum(1 << p for p in members)
            total += weight * float(values[s | 1 << i | 1 << j] - values[s | 1 << i] - values[s | 1 << j] + values[s])
    return total


def run(seed: int) -> dict:
    """One case: enumeration against the definition, and whether sampled intervals hold the truth."""
    n, values = table_game(seed)

    def game(coalitions: torch.Tensor) -> torch.Tensor:
        return values[(coalitions.long() << torch.arange(n)).sum(1)]

    exact = exact_interactions(game, n=n, progress=False)
    scale = float(values.abs().max()) or 1.0
    truth = np.array([shapley_interaction(values, n, int(i), int(j)) for i, j in exact.pairs])
    errors = np.abs(np.asarray(exact.sii).reshape(len(truth), -1)[:, 0] - truth) / scale
    wrong = [] if errors.max() <= ROUNDING else [f"seed {seed}: enumeration differs by {errors.max():.2e}"]
    contexts = (4, 8, 16)[seed // 3 % 3]
    # By grids: by itself the default enumerates games of few players, and its intervals hold the truth without width.
    options = {"pairs": exact.pairs.tolist(), "contexts": contexts, "method": "grid", "seed": seed, "progress": False}
    found, again = (interactions(game, n=n, **options) for _ in range(2))
    if not np.array_equal(found.sii, again.sii):
        wrong.append(f"seed {seed}: the same seed gave other numbers")
    low, high = found.interval()
    kind = ("random", "additive", "sparse Boolean")[seed % 3]
    inside = int(((truth >= low - ROUNDING * scale) & (truth <= high + ROUNDING * scale)).sum())
    return {
        "cases": 1,
        "comparisons": len(truth),
        "worst": {"enumeration": float(errors.max() / ROUNDING)},
        "wrong": wrong,
        "coverage": {f"{kind}, {contexts} contexts of grids": [inside, len(truth)]},
    }
