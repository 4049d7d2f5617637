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
BV(p)     1, 2   binomial(r, s) p^s (1 - p)^(r - s): weighted, everybody present with probability p; so does BII(p)
STII      2      Shapley-Taylor of order 2: 2 (n - 1 - s) / (n (n - 1))
FSII      2      Faithful Shapley of order 2: 6 (s + 1) (n - 1 - s) / ((n - 1) n (n + 1))
FSII      1      (4 - 6 (s + 1) / (n + 1)) / n; some masses are negative
k-SII     2      the SII
k-SII     1      the Shapley value minus half the SII of all pairs of the player (needs every one of them)
========  =====  ============================================================================================

Triples have SII, which is their k-SII, BII, STII and FSII of order 3: the latter two with the density of u below.

FSII and k-SII of both orders together with the empty coalition's value approximate the game; the SII alone does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, one_of

#: Orders of each index, and those that triples have.
ORDERS = {"SV": (1,), "BV": (1,), "BII": (2,), "STII": (2,), "FSII": (1, 2), "k-SII": (1, 2)}
OF_TRIPLES = ("SII", "BII", "STII", "FSII")


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
        one_of("also", probability(name)[0], tuple(ORDERS))
    if len(set(names)) < len(names):
        raise ArgumentError("also", repr(names), "distinct names")
    return tuple((name, order) for name in names for order in ORDERS[probability(name)[0]])


def probability(name: str) -> tuple[str, float]:
    """The index of a name and the probability p of a weighted Banzhaf index, "BV(p)" or "BII(p)"; 1/2 elsewhere."""
    base, bracket, rest = name.partition("(")
    if not bracket or base not in ("BV", "BII"):
        return name, 0.5
    try:
        p = float(rest.removesuffix(")")) if rest.endswith(")") else math.nan
    except ValueError:
        p = math.nan
    if not 0 < p < 1:
        raise ArgumentError("also", repr(name), f"{base}(p) with a p between 0 and 1, such as {base}(0.3)")
    return base, p


def mass(index: str, order: int, n: int) -> torch.Tensor:
    """Mass of the coalitions of size 0..n-order, float64 (n - order + 1,); sums to one.

    ``k-SII`` of order 1 is no such average, see :func:`contrast`.
    """
    others = n - order
    s = torch.arange(others + 1, dtype=torch.float64)
    base, p = probability(index)
    if base in ("SV", "SII", "k-SII"):
        return torch.full_like(s, 1.0 / (others + 1))
    if base in ("BV", "BII"):
        logs = [math.lgamma(others + 1) - math.lgamma(k + 1) - math.lgamma(others - k + 1) for k in range(others + 1)]
        return (torch.tensor(logs, dtype=torch.float64) + s * math.log(p) + (others - s) * math.log1p(-p)).exp()
    if base == "FSII" and order == 1:
        return (4.0 - 6.0 * (s + 1) / (n + 1)) / n
    # The density of u is that of a beta distribution, and the size's law beta-binomial.
    a, b = _beta(base, order)
    logs = [
        math.lgamma(others + 1) - math.lgamma(k + 1) - math.lgamma(others - k + 1)
        + math.lgamma(k + a) + math.lgamma(others - k + b) - math.lgamma(others + a + b)
        + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        for k in range(others + 1)
    ]  # fmt: skip
    return torch.tensor(logs, dtype=torch.float64).exp()


def _beta(index: str, order: int) -> tuple[int, int]:
    """Density of u for the top order of STII, order (1 - u)^(order - 1), and of FSII, ~ (u (1 - u))^(order - 1)."""
    return (1, order) if index == "STII" else (order, order)


def rule(index: str, order: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quadrature of an index over u, when every other player is present with probability u: nodes and weights (Q,).

    The density is 1 for the Shapley indices, that of a beta distribution for STII and FSII (2 (1 - u) and 6 u (1 - u)
    for pairs), 4 - 6 u for FSII of single players, and a point mass for the Banzhaf indices, at 1/2 or p.
    Gauss-Legendre nodes make it exact for products over n players up to 128 nodes; beyond 256 players 128 nodes are
    exact to rounding.
    """
    base, p = probability(index)
    if base in ("BV", "BII"):
        return torch.full((1,), p, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    node, weight = np.polynomial.legendre.leggauss(min(128, n // 2 + 2))
    u, weights = torch.from_numpy((node + 1) / 2), torch.from_numpy(weight / 2)
    if base == "FSII" and order == 1:
        return u, weights * (4 - 6 * u)
    if base in ("STII", "FSII"):
        a, b = _beta(base, order)
        scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
        return u, weights * scale * u ** (a - 1) * (1 - u) ** (b - 1)
    return u, weights


def contrast(index: str, order: int, sizes: torch.Tensor, n: int) -> torch.Tensor:
    """Weight of a derivative at a coalition of the given sizes, drawn by the Shapley law: mass over ``1/(r + 1)``."""
    return (mass(index, order, n) * (n - order + 1))[sizes]


def complete_players(pairs: torch.Tensor, n: int) -> torch.Tensor:
    """Players all of whose n - 1 pairs are among ``pairs`` (P, 2)."""
    return (torch.bincount(pairs.flatten(), minlength=n) == n - 1).nonzero()[:, 0]
