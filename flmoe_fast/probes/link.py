"""Links: scales on which bounded values are smooth, and how far they serve a game's indices.

Values between two bounds flatten out towards both: there a smooth process errs on the wrong side of the bound, and
takes too rough a game for granted everywhere else. On the logit scale they are smooth up to the ends. How far
that helps is told by left-out errors of what the interactions depend on: the mean of a coalition's and its complement's
value. The linked prediction and the plain one are mixed so that these are least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flmoe_fast.probes.drawing import root_mean_weights
from flmoe_fast.probes.parity import ParityProcess

#: Shares of the range this close to a bound count as that close, in logits.
EDGE = 1e-6
#: Share of the values that may lie at a bound.
MOST_SATURATED = 0.7


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


def left_out(process: ParityProcess, head: int, link: Logit | None = None, sign: int = 1) -> torch.Tensor:
    """Left-out errors (m,) of one half, for a process of linked values or of plain ones."""
    if link is None:
        return process.half(sign).left_out[:, head]
    even, odd = (process.half(side).left_out[:, head] for side in (1, -1))
    upper, lower = process.values[:, head], process.complements[:, head]
    found = link.inverse(upper) - link.inverse(upper - even - odd)
    return (found + sign * (link.inverse(lower) - link.inverse(lower - even + odd))) / 2


def share_of_link(process: ParityProcess, head: int, linked: ParityProcess, link: Logit, order: int = 2) -> float:
    """Share of the linked prediction in the mixture with the plain one that errs least where values are left out.

    Squares are weighted as the coalitions that were not evaluated enter a Shapley index of an order, by how many are
    left of a size: an even order depends on the even half, an odd one on the odd half.
    """
    sign = (-1) ** order
    plain, other = left_out(process, head, sign=sign), left_out(linked, 0, link, sign)
    weight = unseen_weights(process.coalitions, order)
    change = plain - other
    total = float((weight * change.square()).sum())
    return min(1.0, max(0.0, float((weight * plain * change).sum()) / total)) if total > 0 else 0.0


def unseen_weights(coalitions: torch.Tensor, order: int = 2) -> torch.Tensor:
    """Weights (m,) of the squared errors of complementary pairs of coalitions (m, n) for those that were not evaluated.

    Where every value errs by the same e, independently, the weights times e^2 sum up to the variance of a Shapley index
    of that order, as a mean over all sets of as many players.
    """
    n = coalitions.shape[1]
    weights = root_mean_weights(n, "SV" if order == 1 else "SII", order)
    size = coalitions.sum(1)
    size = torch.minimum(size, n - size)
    found = torch.zeros(len(size), dtype=torch.float64)
    for s in size.unique().tolist():
        rows = size == s
        seen, there = int(rows.sum()), math.comb(n, s) / (2 if 2 * s == n else 1)
        mean_square = (weights[s] / math.comb(n, s)) ** 2
        found[rows] = 4 * mean_square * (there - seen) / seen  # a value and its complement's weigh the same
    return found
