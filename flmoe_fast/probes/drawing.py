"""Coalitions drawn by the law that interactions ask for: complementary pairs, sizes in proportion to their weight.

The weight of a coalition in an index depends on its size and on how many of the index's players it has, and it is
largest by far at the ends: ``{i, j}`` alone weighs ``1 / (n - 1)`` in the Shapley interaction of i and j, one of middle
size next to nothing. The variance of a sum over strata is least when a stratum is sampled in proportion to its
size times the root mean square of its weights (Neyman), which for pairs is

    q_s ~ sqrt(1 / (s (s - 1)) + 1 / ((n - s)(n - s - 1)) + 2 / (s (n - s)))

and for the Shapley values of single players ``1 / sqrt(s (n - s))``. Sizes that this exhausts are taken whole and what
they leave goes to the others. Only one coalition of each complementary pair is listed; both are evaluated.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch

from flmoe_fast.probes.indices import mass

#: Strata up to this size are listed and shuffled; of larger ones, draws that repeat are drawn again.
LISTED = 1 << 16
#: Rounds of drawing again before a stratum is left with fewer coalitions than were asked for.
PATIENCE = 20


def complementary(n: int, count: int, seed: int, law: list[float] | None = None) -> torch.Tensor:
    """Bool (m, n): at most ``count`` distinct coalitions, no two of them complements, those of the ends first.

    ``law`` says how much every size 0..n is worth, by default to the SII of pairs (:func:`root_mean_weights`).
    ``m < count`` only where all ``2^(n - 1)`` pairs are taken. Every leading part is a sample of the same law among
    the sizes that are not taken whole.
    """
    generator = np.random.default_rng([0x5EED, seed])
    counts, whole = _counts(n, count, law or root_mean_weights(n, "SII", 2))
    first: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for size, wanted in enumerate(counts):
        if wanted:
            (first if whole[size] else rest).append(_stratum(n, size, wanted, generator))
    parts = [np.concatenate(part) for part in (first, rest) if part]
    if not parts:
        return torch.zeros(0, n, dtype=torch.bool)
    if rest:
        parts[-1] = generator.permutation(parts[-1])
    return torch.from_numpy(np.concatenate(parts))


def _stratum_size(n: int, size: int) -> int:
    """Complementary pairs with ``size <= n / 2`` players on the smaller side."""
    return math.comb(n, size) // 2 if 2 * size == n else math.comb(n, size)


def _counts(n: int, count: int, weights: list[float]) -> tuple[list[int], list[bool]]:
    """Pairs to take of each smaller size 0..n//2, and which sizes are taken whole."""
    sizes = range(n // 2 + 1)
    weight = [(weights[s] + weights[n - s]) / 2 * (0.5 if 2 * s == n else 1.0) for s in sizes]
    there = [_stratum_size(n, s) for s in sizes]
    counts, whole = [0] * len(weight), [False] * len(weight)
    left = min(count, sum(there))
    while left > 0:
        total = sum(w for w, w_all in zip(weight, whole) if not w_all)
        share = [0.0 if taken else left * w / total for w, taken in zip(weight, whole)]
        full = [s for s in sizes if not whole[s] and share[s] >= there[s]]
        for s in full:
            counts[s], whole[s] = there[s], True
            left -= there[s]
        if not full:
            counts = [c if taken else int(x) for c, x, taken in zip(counts, share, whole)]
            left -= sum(int(x) for x in share)
            for s in sorted(sizes, key=lambda s: int(share[s]) - share[s])[:left]:
                counts[s] += 1
            break
    return counts, whole


def root_mean_weights(n: int, index: str, order: int) -> list[float]:
    """Of every size 0..n: the number of coalitions times the root mean square of their weights in an index.

    The mean is over the sets of ``order`` players; a coalition's weight depends on how many of these it has.
    """
    masses, sets = mass(index, order, n).tolist(), math.comb(n, order)
    found = []
    for s in range(n + 1):
        total, there = 0.0, math.comb(n, s)
        for inside in range(max(0, order - (n - s)), min(order, s) + 1):
            share = math.comb(s, inside) * math.comb(n - s, order - inside) / sets
            total += share * (masses[s - inside] * (there / math.comb(n - order, s - inside))) ** 2
        found.append(math.sqrt(total))
    return found


def _stratum(n: int, size: int, wanted: int, generator: np.random.Generator) -> np.ndarray:
    """Bool (wanted, n): distinct coalitions of one size; of half the players, only those with player 0."""
    halves = 2 * size == n
    if _stratum_size(n, size) <= LISTED:
        listed = _listed(n, size)
        rows = listed[generator.permutation(len(listed))[:wanted]].astype(np.int64)
        found = np.zeros((len(rows), n), dtype=bool)
        np.put_along_axis(found, rows.reshape(len(rows), -1), True, axis=1)
        found[:, 0] |= halves
        return found
    found = np.zeros((0, n), dtype=bool)
    for _ in range(PATIENCE):
        keys = generator.random((wanted - len(found), n))
        fresh = keys.argsort(1).argsort(1) < size
        if halves:
            fresh ^= ~fresh[:, :1]
        found = np.concatenate([found, fresh])
        _, where = np.unique(np.packbits(found, axis=1), axis=0, return_index=True)
        found = found[np.sort(where)]
        if len(found) == wanted:
            break
    return found


@functools.lru_cache(maxsize=16)
def _listed(n: int, size: int) -> np.ndarray:
    """The players (C, size) of all coalitions of one size; of half the players, those beside player 0 (C, size - 1)."""
    halves = 2 * size == n
    chosen = itertools.combinations(range(1 if halves else 0, n), size - halves)
    flat = np.fromiter(itertools.chain.from_iterable(chosen), dtype=np.uint16)
    return flat.reshape(_stratum_size(n, size), size - halves)
