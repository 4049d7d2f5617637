"""Redundancy gaps under a process: averages over draws from its posterior, exact where the game was evaluated.

A gap is no linear function of values, so the gap of a mean is not the mean of gaps: values that are known too vaguely
have to vary. Whole games are drawn from the posterior (a draw from the prior, conditioned by Matheron's rule, in pairs
of opposite deviations), and every draw has its gaps. How far values deviate depends on their size: next to zero a
probability varies little. So deviations are scaled by the left-out errors of evaluated coalitions of about the same
predicted value, and draws stay within the range of the values seen; where these are a few levels, on
the levels: next to a tie, errors of any size bias a maximum.

The gaps of the posterior mean are too smooth and the mean gaps of the draws too rough. The estimate lies half way, and
the squared distance of the two is part of its variance beside that of the draws.

The prior draw is a sum of Walsh functions: the spectrum of the product kernel is a product over players, so a random
set that has player p with probability ``(1 - r_p) / 2`` is a random feature of it, and the parity of its size tells
which half it belongs to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.special import stdtrit

from flmoe_fast.coalitions import pack, sample_contexts, unpack
from flmoe_fast.probes.gap import redundancy_gap
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.moments import successive_variance
from flmoe_fast.probes.parity import Half, ParityProcess, parity_kernel
from flmoe_fast.probes.surrogate import signs

#: Random features of a prior draw.
FEATURES = 512
#: Draws, in pairs of opposite deviations.
DRAWS = 8
#: Share of the left-out errors that those of about the same prediction are.
LOCAL = 1 / 16
#: Most levels.
LEVELS = 16
#: Share of the pairs' mean variance in each pair's.
SHARED = 0.2
#: What variances are multiplied by, since a ratio's joint costs are estimated too, and how much more for every scale
#: that was estimated from the points at hand. Chosen by the coverage on tables of public models' games.
WIDER, SCALES = {"sum": 1.25, "max": 0.8, "strict": 0.65, "ratio": 1.4}, 4.0
#: Coalitions read where not all are.
READINGS, FEWEST_CONTEXTS = 1 << 14, 16
#: Contexts read for every value seen, at most: what sampling adds to a variance stays about a hundredth of it.
CONTEXTS_PER_VALUE = 2
#: These contexts are independent of all that are evaluated on the game.
REPLICATE = 1 << 31
ROWS = 1 << 13


@dataclass(frozen=True)
class GapEstimate:
    """Values and variances (P, O); the variances have room for what few draws do not tell about them."""

    value: torch.Tensor
    variance: torch.Tensor


class Games(Protocol):
    """Games drawn from a posterior, whose values can be asked for."""

    def values(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (C, 1 + D, O) of coalitions (C, n) and of their complements: first the posterior mean, then draws."""


def gap_estimate(
    gaps: torch.Tensor, kind: str, process: ParityProcess, sampling: torch.Tensor | float = 0.0
) -> GapEstimate:
    """From gaps (P, 1 + D, O) of the posterior mean and of every draw, and the variance due to sampling contexts."""
    smooth, rough = gaps[:, 0], gaps[:, 1:]
    mean = rough.mean(1)
    variance = rough.var(1) + (mean - smooth).square()
    variance = (1 - SHARED) * variance + SHARED * variance.nanmean(0)
    wider = WIDER[kind] * (1 + SCALES * process.coalitions.shape[1] / len(process.coalitions))
    few = (stdtrit(rough.shape[1], 0.975) / stdtrit(len(process.coalitions), 0.975)) ** 2
    return GapEstimate((smooth + mean) / 2, float(few) * (wider * variance + sampling))


def sampled_gaps(games: Games, grid: CornerGrid, kind: str, seed: int, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaps (P, 1 + D, O) over sampled contexts, and the variance (P, O) that is due to sampling them.

    ``seen`` values of the game are what is known of it: few of them are not worth many contexts.
    """
    n = grid.toggled.shape[1]
    contexts = max(FEWEST_CONTEXTS, min(CONTEXTS_PER_VALUE * seen, READINGS // grid.evaluations // 2 * 2))
    chosen = unpack(sample_contexts(n, contexts, seed=seed, replicate=REPLICATE).words, n)
    gaps, share = [], []
    for block in chosen[::2].split(max(1, ROWS // grid.evaluations)):
        both = games.values((block[:, None] ^ grid.toggled).flatten(0, 1))
        pair = []
        for rows, values in zip((block, ~block), both):
            v11, v10, v01, v00 = grid.corners(rows, values.unflatten(0, (len(block), -1)))
            value, defined = redundancy_gap(kind, v11, v10, v01, v00)
            pair.append((value, torch.ones_like(value) if defined is None else defined.double()))
        gaps.append(pair[0][0] + pair[1][0])
        share.append(pair[0][1] + pair[1][1])
    total, count = torch.cat(gaps), torch.cat(share)  # (units, P, 1 + D, O)
    found = total.sum(0) / count.sum(0)
    residual = (total - found * count)[:, :, 1:].mean(2)
    spread = successive_variance(residual) * len(residual) / count.sum(0)[:, 1:].mean(1).square()
    return found, spread


class Drawn:
    """Games drawn from the posterior of a process, in pairs of opposite deviations.

    Parameters
    ----------
    process : ParityProcess
    count : int
        Draws D, even.
    seed : int
    """

    def __init__(self, process: ParityProcess, count: int, seed: int):
        self.process, self.outputs = process, process.values.shape[1]
        self.generator = torch.Generator().manual_seed(seed % 2**63)
        self._halves = {sign: _DrawnHalf(process.half(sign), count // 2, self.generator) for sign in (1, -1)}
        self._seen = torch.cat([process.values, process.complements])
        self._spreads = [Spread(process, head) for head in range(self.outputs)]
        self._known = Known(torch.cat([process.coalitions, ~process.coalitions]))

    def values(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (C, 1 + D, O) of coalitions (C, n) and of their complements: first the posterior mean, then draws."""
        parts = [self._values(rows) for rows in coalitions.split(ROWS)]
        return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])

    def _values(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (even, even_by), (odd, odd_by) = (
            self._halves[sign].values(signs(coalitions), self.generator) for sign in (1, -1)
        )
        both = self._drawn(even + odd, even_by + odd_by), self._drawn(even - odd, even_by - odd_by)
        number = self._known.numbers(coalitions)
        known = (number >= 0).nonzero()[:, 0]
        if len(known):
            here, half = number[known], len(self.process.values)
            there = torch.where(here < half, here + half, here - half)
            for part, where in zip(both, (here, there)):
                part[known] = self._seen[where][:, None]
        return both

    def _drawn(self, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        """Values (C, 1 + D, O) around means (C, O) from deviations (C, D / 2, O)."""
        parts = [spread.draws(mean[:, h], deviation[:, :, h].T).T for h, spread in enumerate(self._spreads)]
        return torch.stack(parts, 2)


class Known:
    """Distinct coalitions (m, n) that others are found among."""

    def __init__(self, coalitions: torch.Tensor):
        words = pack(coalitions)
        keys, self._order = _keys(words).sort()
        self._keys, self._words = keys, words[self._order]

    def numbers(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Which of them each of some coalitions (C, n) is, (C,); -1 for others."""
        words = pack(coalitions)
        at = torch.searchsorted(self._keys, _keys(words)).clamp(max=len(self._keys) - 1)
        return torch.where((self._words[at] == words).all(1), self._order[at], -1)


def _keys(words: torch.Tensor) -> torch.Tensor:
    """One number (C,) for the words (C, W) of each coalition; equal ones of different coalitions are never met."""
    odd = torch.tensor([0x9E3779B97F4A7C15 - (1 << 64)])
    key = words[:, 0].clone()
    for column in words.T[1:]:
        key = (key ^ (key >> 29)) * odd + column
    return key


def levels_of(values: torch.Tensor) -> torch.Tensor | None:
    """The values (L,) that a game takes where these are few, as in a decision tree; None where they are not."""
    levels = values.unique()
    return levels if len(levels) <= min(LEVELS, len(values) // 8) else None


class Spread:
    """How far the values of one head deviate from their prediction, and what values there are.

    Left-out errors are compared with what the process expects of them, around every predicted value.
    """

    def __init__(self, process: ParityProcess, head: int):
        even, odd = process.half(1), process.half(-1)
        seen = torch.cat([process.values[:, head], process.complements[:, head]])
        self._least, self._most, self.levels = seen.min(), seen.max(), levels_of(seen)
        parts = even.left_out[:, head], odd.left_out[:, head]
        left_out = torch.cat([parts[0] + parts[1], parts[0] - parts[1]])
        claimed = even.amplitude[head] / even.precision + odd.amplitude[head] / odd.precision
        ratio = left_out.square() / torch.cat([claimed, claimed]).clamp(min=torch.finfo(seen.dtype).tiny)
        count = len(seen)
        reach = max(4, int(LOCAL * count / 2))
        low = (torch.arange(count) - reach).clamp(min=0)
        high = (torch.arange(count) + reach + 1).clamp(max=count)
        order = (seen - left_out).argsort()
        sums = torch.cat([torch.zeros(1, dtype=seen.dtype), ratio[order].cumsum(0)])
        self._predicted = (seen - left_out)[order].contiguous()
        self._size = ((sums[high] - sums[low]) / (high - low)).sqrt()

    def draws(self, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        """Means (C,) and draws on both sides of them, (1 + D, C), from the process's deviations (D / 2, C)."""
        at = torch.searchsorted(self._predicted, mean.contiguous()).clamp(max=len(self._predicted) - 1)
        deviation = deviation * self._size[at]
        values = torch.cat([mean[None], mean + deviation, mean - deviation]).clamp_(self._least, self._most)
        if self.levels is None:
            return values
        return self.levels[torch.bucketize(values, (self.levels[1:] + self.levels[:-1]) / 2)]


class _DrawnHalf:
    """Draws of one half: the posterior mean and, in pairs of opposite signs, deviations from it."""

    def __init__(self, half: Half, pairs: int, generator: torch.Generator):
        self.half, self.pairs = half, pairs
        n, outputs = half.x.shape[1], half.solved.shape[1]
        chance = (1 - torch.exp(-half.scales.rate)) / 2
        sets = torch.rand(FEATURES, n, generator=generator, dtype=torch.float64) < chance
        self.sets = sets[sets.sum(1) % 2 == (0 if half.sign > 0 else 1)]
        normal = torch.randn(len(self.sets), pairs * outputs, generator=generator, dtype=torch.float64)
        self.size = half.amplitude.sqrt().repeat(pairs)  # (pairs * O,)
        self.weights = normal * self.size / math.sqrt(FEATURES)
        there = self._prior(half.x) + self._rough(len(half.x), generator)
        self.solved = half.inverse @ there

    def _prior(self, x: torch.Tensor) -> torch.Tensor:
        odd = ((x < 0).float() @ self.sets.T.float()) % 2  # whether an odd number of the set's players is absent
        return (1.0 - 2.0 * odd).double() @ self.weights

    def _rough(self, count: int, generator: torch.Generator) -> torch.Tensor:
        normal = torch.randn(count, len(self.size), generator=generator, dtype=torch.float64)
        return normal * self.size * math.sqrt(self.half.scales.rough)

    def values(self, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean (C, O), and deviations (C, pairs, O), at unseen coalitions with signs x (C, n)."""
        half = self.half
        rows = parity_kernel(x, half.x, half.scales.rate, half.sign)
        deviation = self._prior(x) + self._rough(len(x), generator) - rows @ self.solved
        return rows @ half.solved + half.mean, deviation.unflatten(1, (self.pairs, -1))
