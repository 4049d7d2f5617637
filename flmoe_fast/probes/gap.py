"""Redundancy gaps: how far two tokens back each other up, from the four corners of one context.

With ``v11`` the value when both players are present, ``v10`` only i, ``v01`` only j, ``v00`` neither, losing one player
costs ``d_i = v11 - v01`` or ``d_j = v11 - v10`` and losing both costs ``d_ij = v11 - v00``.

========  =============================================  ===========================================================
kind      gap                                            reading
========  =============================================  ===========================================================
max       d_ij - max(0, d_i, d_j)                        cost of losing both beyond losing the worse one
sum       d_ij - d_i - d_j                               minus the second difference; its mean is minus the SII
strict    max(0, min(max gap, sum gap))                  positive only where each stands in for the other
ratio     sum gap / d_ij, clipped to [-1, 1]             share of the joint cost that is saved while one remains;
                                                         undefined where d_ij <= 1e-6
========  =============================================  ===========================================================

``max`` is also positive for two additive players (neither backs the other up, yet both gone is worse than one), which
``strict`` excludes. Gaps are taken per context and then averaged.
"""

from __future__ import annotations

import torch

GAPS = ("max", "sum", "strict", "ratio")
#: Zero for two players that merely add up, where "max" finds half of what they are worth: a ranking by it is one by
#: substitution. "sum" is the SII once more, and "ratio" is undefined in places.
DEFAULT_GAP = "strict"
#: Joint costs up to this are rounding, and a ratio to them means nothing.
LEAST_JOINT_COST = 1e-6


def redundancy_gap(
    kind: str, v11: torch.Tensor, v10: torch.Tensor, v01: torch.Tensor, v00: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gap of each context, and where it is defined (None: everywhere). Undefined gaps are returned as zero."""
    total = v10 + v01 - v11 - v00  # d_ij - d_i - d_j
    if kind == "sum":
        return total, None
    if kind == "ratio":
        both = v11 - v00
        defined = both > LEAST_JOINT_COST
        ratio = (total / torch.where(defined, both, torch.ones_like(both))).clamp(-1.0, 1.0)
        return torch.where(defined, ratio, torch.zeros_like(ratio)), defined
    worst = torch.minimum(torch.minimum(v10, v01), v11) - v00  # d_ij - max(0, d_i, d_j)
    if kind == "max":
        return worst, None
    return torch.minimum(worst, total).clamp(min=0.0), None
