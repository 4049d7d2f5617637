"""Indices of single players and of pairs, as weighted averages of the same discrete derivatives.

With ``D_A(S)`` the discrete derivative of the value with respect to the players of A (``v(S+i) - v(S)`` for one,
the second difference for two), every index here is a sum over the coalitions S of the other players,

    index(A) = sum over s of  mass(s) * mean of D_A(S) over the S of size s.

The Shapley value and the Shapley Interaction Index give all sizes the same mass. Contexts of a corner grid follow that
law, so the other indices come from the same evaluations, weighted by their mass over that of the Shapley law:

========  =====  ============================================================================================
index     order  mass of size s among the r = n - order other players
========  =====  ============================================================================================
SV        1      1 / (r + 1)
BV, BII   1, 2   binomial(r, s) / 2^r: the Banzhaf value and interaction
STII      2      Shapley-Taylor of order 2: 2 (n - 1 - s) / (n (n - 1))
FSII      2      Faithful Shapley of order 2: 6 (s + 1) (n - 1 - s) / ((n - 1) n (n + 1))
FSII      1      (4 - 6 (s + 1) / (n + 1)) / n; some masses are negative
k-SII     2      the SII
k-SII     1      the Shapley value minus half the SII of all pairs of the player (needs every one of them)
========  =====  ============================================================================================

FSII and k-SII of both orders together with the empty coalition's value approximate the game; the SII alone does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, one_of

#: Orders of each index.
ORDERS = {"SV": (1,), "BV": (1,), "BII": (2,), "STII": (2,), "FSII": (1, 2), "k-SII": (1, 2)}


@dataclass(frozen=True)
class IndexEstimate:
    """One index of some players or pairs.

    Attributes
    ----------
    members : int64 (M, order)
        The player, or the two players, of every entry.
    values, stderr : float64 (M,) or (M, O)
    degrees : float64 (M,)
        Degrees of freedom of the standard errors.
    """

    members: np.ndarray
    values: np.ndarray
    stderr: np.ndarray
    degrees: np.ndarray


def wanted_indices(also: Sequence[str] | str) -> tuple[tuple[str, int], ...]:
    """Check the names of indices; one (name, order) each."""
    names = (also,) if isinstance(also, str) else tuple(also)
    for name in names:
        one_of("also", name, tuple(ORDERS))
    if len(set(names)) < len(names):
        raise ArgumentError("also", repr(names), "distinct names")
    return tuple((name, order) for name in names for order in ORDERS[name])


def mass(index: str, order: int, n: int) -> torch.Tensor:
    """Mass of the coalitions of size 0..n-order, float64 (n - order + 1,); sums to one.

    ``k-SII`` of order 1 is no such average, see :func:`contrast`.
    """
    others = n - order
    s = torch.arange(others + 1, dtype=torch.float64)
    if index in ("SV", "SII", "k-SII"):
        return torch.full_like(s, 1.0 / (others + 1))
    if index in ("BV", "BII"):
        logs = [math.lgamma(others + 1) - math.lgamma(k + 1) - math.lgamma(others - k + 1) for k in range(others + 1)]
        return (torch.tensor(logs, dtype=torch.float64) - others * math.log(2.0)).exp()
    if index == "STII":
        return 2.0 * (n - 1 - s) / (n * (n - 1))
    if order == 2:
        return 6.0 * (s + 1) * (n - 1 - s) / ((n - 1) * n * (n + 1))
    return (4.0 - 6.0 * (s + 1) / (n + 1)) / n


def rule(index: str, order: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quadrature of an index over u, when every other player is present with probability u: nodes and weights (Q,).

    The density is 1 for the Shapley indices, 2 (1 - u) for STII, 6 u (1 - u) for FSII of pairs, 4 - 6 u for FSII of
    single players, and a point mass at 1/2 for the Banzhaf indices. Gauss-Legendre nodes make it exact for products
    over n players up to 128 nodes; beyond 256 players 128 nodes are exact to rounding.
    """
    if index in ("BV", "BII"):
        return torch.full((1,), 0.5, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    node, weight = np.polynomial.legendre.leggauss(min(128, n // 2 + 2))
    u, weights = torch.from_numpy((node + 1) / 2), torch.from_numpy(weight / 2)
    if index == "STII":
        return u, weights * 2 * (1 - u)
    if index == "FSII":
        return u, weights * (6 * u * (1 - u) if order == 2 else 4 - 6 * u)
    return u, weights


def contrast(index: str, order: int, sizes: torch.Tensor, n: int) -> torch.Tensor:
    """Weight of a derivative at a coalition of the given sizes, drawn by the Shapley law: mass over ``1/(r + 1)``."""
    return (mass(index, order, n) * (n - order + 1))[sizes]


def complete_players(pairs: torch.Tensor, n: int) -> torch.Tensor:
    """Players all of whose n - 1 pairs are among ``pairs`` (P, 2)."""
    return (torch.bincount(pairs.flatten(), minlength=n) == n - 1).nonzero()[:, 0]
