"""Links: scales on which bounded values are smooth, and which of them serves a game's indices better.

Values between two bounds flatten out towards both: there a smooth process errs on the wrong side of the bound, and
takes too rough a game for granted everywhere else. On the logit scale they are smooth up to the ends. Whether that
helps is told by left-out errors, of what the interactions depend on: the mean of a coalition's and its complement's
value, weighted as those coalitions enter an interaction that were not evaluated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flmoe_fast.probes.drawing import root_mean_weight
from flmoe_fast.probes.parity import ParityProcess

#: Shares of the range this close to a bound count as that close, in logits.
EDGE = 1e-6
#: Share of the values that may lie at a bound.
MOST_SATURATED = 0.1


@dataclass(frozen=True)
class Logit:
    """The log-odds of a value's place between two bounds."""

    low: float
    high: float

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Log-odds, kept finite."""
        return ((values - self.low) / (self.high - self.low)).clamp(EDGE, 1 - EDGE).logit()

    def inverse(self, odds: torch.Tensor) -> torch.Tensor:
        """Values of log-odds."""
        return self.low + (self.high - self.low) * odds.sigmoid()


def link_of(values: torch.Tensor) -> Logit | None:
    """The link that values (C,) in [0, 1] or [-1, 1] may have; None for any others."""
    least, most = float(values.min()), float(values.max())
    if most > 1.0 or least < -1.0 or least == most:
        return None
    link = Logit(0.0 if least >= 0.0 else -1.0, 1.0)
    share = (values - link.low) / (link.high - link.low)
    saturated = (share < EDGE) | (share > 1 - EDGE)
    return link if float(saturated.double().mean()) <= MOST_SATURATED else None


def left_out_error(process: ParityProcess, head: int, link: Logit | None) -> float:
    """Weighted mean square of the left-out errors of a process of linked values, in units of the values."""
    even, odd = (process.half(sign).left_out[:, head] for sign in (1, -1))
    error = even
    if link is not None:
        parts = ((process.values[:, head], even + odd), (process.complements[:, head], even - odd))
        error = sum((link.inverse(y) - link.inverse(y - left)) / 2 for y, left in parts)  # type: ignore[assignment]
    n = process.coalitions.shape[1]
    size = process.coalitions.sum(1)
    size = torch.minimum(size, n - size)
    total = 0.0
    for s in size.unique().tolist():
        rows = size == s
        seen, there = int(rows.sum()), math.comb(n, s) / (2 if 2 * s == n else 1)
        weight = (root_mean_weight(n, s) / math.comb(n, s)) ** 2 * (there - seen) / seen
        total += weight * float(error[rows].square().sum())
    return total
