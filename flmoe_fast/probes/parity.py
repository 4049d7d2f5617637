"""A Gaussian process of a game in two halves, even and odd, that keeps every evaluated value exact.

Write a game as ``v = e + o`` with ``e(T) = (v(T) + v(N - T)) / 2`` even under complements and ``o`` odd. A pair of
evaluations, of a coalition and its complement, gives one value of each. The Shapley interaction of two players depends
on ``e`` alone and the Shapley value of one on ``o`` alone. Under a prior that treats a coalition and its complement
alike the halves are independent: two matrices of half the side in place of one.

Each half is ``f + d``: a smooth part f with the product kernel of :mod:`flmoe_fast.probes.surrogate`, made even or odd,
and a rough part d, independent from coalition to coalition. d is part of the game, not noise of a measurement: where a
coalition was evaluated its value is known exactly, and enters an index with its own exact weight. With c the smooth
part's kernel columns, w the exact weights, tau^2 the variance of d and K the matrix of f + d at the evaluated
coalitions,

    index = (c + tau^2 w) K^-1 y,     variance = prior - (c + tau^2 w) K^-1 (c + tau^2 w)^T.

When every coalition is evaluated the index is exact and the variance zero. All outputs of a game share one kernel and
one factorisation; each has an amplitude of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack

from flmoe_fast.probes.indices import mass, rule
from flmoe_fast.probes.search import minimum
from flmoe_fast.probes.surrogate import functionals, signs

#: Complementary pairs from which scales are estimated; more change them little. The search begins with fewer.
FIT_POINTS, FIRST_POINTS = 256, 256
FIRST_STEPS, FIT_STEPS = 30, 12
#: Half the sum of rates up to which one exponential gives both halves of a kernel.
LARGEST_SHIFT = 150.0
#: Bounds of the logarithms of a player's rate and of the rough part's share.
RATES, ROUGH = (-9.0, 3.0), (math.log(1e-8), 3.0)
#: Indices read at a time.
MEMBERS_BLOCK = 2048


def parity_kernel(x: torch.Tensor, y: torch.Tensor, rate: torch.Tensor, sign: int) -> torch.Tensor:
    """Even (``sign`` 1) or odd (-1) part (C, m) of the product kernel, for coalitions given by their signs."""
    same, other = _both(x, y, rate)
    return (same + other) if sign > 0 else (same - other)


def _both(x: torch.Tensor, y: torch.Tensor, rate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the correlation of x with y, and of x with the complement of y."""
    product, shift = (x * (0.5 * rate)) @ y.T, 0.5 * float(rate.sum())
    same = product.sub_(shift).exp_().mul_(0.5)
    if shift < LARGEST_SHIFT:  # the two multiply to exp(-2 shift) / 4, which is far from underflow
        return same, same.reciprocal().mul_(0.25 * math.exp(-2 * shift))
    return same, ((x * (-0.5 * rate)) @ y.T).sub_(shift).exp_().mul_(0.5)


@dataclass(frozen=True)
class Scales:
    """``rate`` (n,) of the product kernel, and the variance of the rough part relative to the smooth one's."""

    rate: torch.Tensor
    rough: float


def fit_scales(x: torch.Tensor, y: torch.Tensor, sign: int, start: Scales | None = None) -> Scales:
    """Scales of largest marginal likelihood for signs x (m, n) and values y (m, O) of one half.

    The search begins at ``start``, where that is given.

    Amplitudes and, in the even half, constant means are profiled out; the heads count alike. A weak prior keeps the
    rates of players near their common level where the data do not tell them apart.
    """
    y = y[:, y.var(0) > 0] if len(y) > 1 else y[:, :0]
    n = x.shape[1]
    bounds = np.array([RATES] * n + [ROUGH])
    theta = np.append(np.full(n, math.log(3.5 / n)), -4.0)
    if start is not None:
        theta = np.append(start.rate.log().numpy(), math.log(start.rough))
    theta = np.clip(theta, *bounds.T)
    if y.shape[1]:
        step = -(-len(x) // FIRST_POINTS)
        stages = [(x[::step], y[::step], FIRST_STEPS)]
        if step > 1 and (sign > 0 or start is None):
            stages.append((x, y, FIT_STEPS))
        for points, values, steps in stages:
            theta = minimum(_Likelihood(points, values, sign), theta, bounds, steps)
    return Scales(torch.from_numpy(theta[:n]).exp(), math.exp(theta[n]))


class _Likelihood:
    """Minus the logarithm of the penalised marginal likelihood of one half, with its gradient.

    Matrices of some dozen rows are computed faster than a tensor's operations are called, so all but the inverse is
    NumPy; :func:`minimum` keeps that to one thread.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor, sign: int):
        self.x, self.y, self.sign = x.numpy(), y.numpy(), sign

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        x, y, sign = self.x, self.y, self.sign
        m, n = x.shape
        rates, rate, rough = theta[:n], np.exp(theta[:n]), math.exp(theta[n])
        product, shift = (x * (0.5 * rate)) @ x.T, 0.5 * float(rate.sum())
        same, other = 0.5 * np.exp(product - shift), 0.5 * np.exp(-product - shift)
        covariance = same + other if sign > 0 else same - other
        covariance.flat[:: m + 1] += rough
        factor, failed = lapack.dpotrf(covariance, lower=1, clean=0)
        if failed:
            return np.inf, np.zeros_like(theta)
        inverse = torch.cholesky_inverse(torch.from_numpy(factor)).numpy()
        residual = y - (inverse.sum(0) @ y) / inverse.sum() if sign > 0 else y
        solved = inverse @ residual
        amplitude = (residual * solved).sum(0) / m  # (O,)
        if not (amplitude > 0).all():
            return np.inf, np.zeros_like(theta)
        level = float(rates.mean())
        value = 0.5 * m * float(np.log(amplitude).mean()) + float(np.log(factor.diagonal()).sum())
        value += 0.5 * float(np.square(rates - level).sum()) + (level + 2.0) ** 2 / 8.0
        scaled = solved / np.sqrt(amplitude * len(amplitude))
        slope = inverse - scaled @ scaled.T
        noise = rough * float(slope.diagonal().sum())
        total = float((slope * covariance).sum()) - noise
        slope *= same - other if sign > 0 else same + other
        differ = total - ((slope @ x) * x).sum(0)
        gradient = -0.25 * rate * differ + (rates - level) + (level + 2.0) / (4.0 * n)
        return value, np.append(gradient, 0.5 * noise)


@dataclass(frozen=True)
class Functional:
    """Linear functionals of a half: weights (M, m) of ``K^-1 y``, and prior variances (M,) in units of amplitudes."""

    columns: torch.Tensor
    prior: torch.Tensor


class Half:
    """The posterior of one half of a game.

    Parameters
    ----------
    x : float64 (m, n)
        Signs of the evaluated coalitions, one of each complementary pair.
    y : float64 (m, O)
    sign : 1 (even) or -1 (odd)
    fitted : LongTensor, optional
        Rows from which the scales are estimated.
    start : Scales, optional
        Where the search for scales begins.

    Attributes
    ----------
    mean, amplitude : (O,)
    solved : (m, O)
        ``K^-1 (y - mean)``.
    left_out : (m, O)
        What is left of every value after predicting it from the others.
    """

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        sign: int,
        fitted: torch.Tensor | None = None,
        start: Scales | None = None,
    ):
        rows = torch.arange(len(x))[:: -(-len(x) // FIT_POINTS)] if fitted is None else fitted
        self.x, self.sign, self.scales = x, sign, fit_scales(x[rows], y[rows], sign, start)
        covariance = parity_kernel(x, x, self.scales.rate, sign)
        covariance.diagonal().add_(self.scales.rough)
        self.factor = _factor(covariance)
        self.inverse = torch.cholesky_inverse(self.factor)
        sums = self.inverse.sum(0)
        self.mean = sums @ y / sums.sum() if sign > 0 else torch.zeros(y.shape[1], dtype=y.dtype)
        self.solved = self.inverse @ (y - self.mean)
        self.amplitude = ((y - self.mean) * self.solved).sum(0).clamp(min=0.0) / len(y)
        self.precision = self.inverse.diagonal()
        self.left_out = self.solved / self.precision[:, None]

    def functional(self, members: torch.Tensor, name: str, order: int) -> Functional:
        """Columns and prior variance of an index of ``members`` (M, order)."""
        n = self.x.shape[1]
        nodes = rule(name, order, n)
        turn = self.sign * (-1) ** order
        columns = functionals(self.x, self.scales.rate, members, nodes)
        weights = exact_weights(self.x, members, name, order)
        if _symmetric(nodes):
            columns, weights = columns * (1 + turn) / 2, weights * (1 + turn)
        else:
            columns = (columns + self.sign * functionals(-self.x, self.scales.rate, members, nodes)) / 2
            weights = weights + self.sign * exact_weights(-self.x, members, name, order)
        prior = _prior(self.scales.rate, members, nodes, self.sign)
        others = n - order
        share = mass(name, order, n) / torch.tensor([float(math.comb(others, s)) for s in range(others + 1)])
        count = torch.tensor([float(math.comb(others, s)) for s in range(others + 1)], dtype=torch.float64)
        squares = 2**order * float((count * share.square()).sum() + turn * (count * share * share.flip(0)).sum())
        return Functional(columns + self.scales.rough * weights, prior + self.scales.rough * squares)

    def read(self, functional: Functional) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values (M, O), their variances (M, O), and the weights (m, M) with which values enter."""
        shares = torch.cholesky_solve(functional.columns.T, self.factor)
        unit = (functional.prior - (functional.columns.T * shares).sum(0)).clamp(min=0.0)
        unit = torch.where(unit > 1e-12 * functional.prior, unit, 0.0)  # rounding of a difference of equal numbers
        return functional.columns @ self.solved, unit[:, None] * self.amplitude, shares

    def surprise(self, shares: torch.Tensor) -> torch.Tensor:
        """Squared left-out errors over what the process expects (O,), as far as they enter the functionals."""
        weight = shares.square().sum(1) @ self.left_out.square()
        expected = shares.square().sum(1) @ (1.0 / self.precision) * self.amplitude
        return torch.where(expected > 0, weight / expected.clamp(min=torch.finfo(weight.dtype).tiny), 1.0)


class ParityProcess:
    """Both halves of a game given its values at complementary pairs of coalitions.

    Parameters
    ----------
    coalitions : bool (m, n)
        One of each pair; distinct.
    values, complements : float64 (m, O)
    fitted : LongTensor, optional
        Rows from which the scales are estimated.
    """

    def __init__(
        self,
        coalitions: torch.Tensor,
        values: torch.Tensor,
        complements: torch.Tensor,
        fitted: torch.Tensor | None = None,
    ):
        self.coalitions, self.values, self.complements, self.fitted = coalitions, values, complements, fitted
        self._halves: dict[int, Half] = {}

    def half(self, sign: int) -> Half:
        """The even (1) or odd (-1) half, fitted when it is first asked for."""
        if sign not in self._halves:
            y = (self.values + sign * self.complements) / 2
            start = self._halves[1].scales if 1 in self._halves else None
            self._halves[sign] = Half(signs(self.coalitions), y, sign, self.fitted, start)
        return self._halves[sign]

    def index(self, members: torch.Tensor, name: str, order: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and variances (M, O) of an index of ``members`` (M, order)."""
        n = self.coalitions.shape[1]
        both = (1, -1) if not _symmetric(rule(name, order, n)) else ((-1) ** order,)
        parts = [self._index(block, name, order, both) for block in members.split(MEMBERS_BLOCK)]
        return torch.cat([value for value, _ in parts]), torch.cat([variance for _, variance in parts])

    def _index(
        self, members: torch.Tensor, name: str, order: int, halves: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        value = variance = torch.zeros(len(members), self.values.shape[1], dtype=torch.float64)
        for sign in halves:
            half = self.half(sign)
            found, claimed, shares = half.read(half.functional(members, name, order))
            value, variance = value + found, variance + claimed * half.surprise(shares).clamp(min=1.0)
        return value, variance


def exact_weights(x: torch.Tensor, members: torch.Tensor, name: str, order: int) -> torch.Tensor:
    """Weights (M, m) of the coalitions with signs x (m, n) in an index of ``members`` (M, order)."""
    n = x.shape[1]
    others = n - order
    share = mass(name, order, n)
    share = torch.tensor([float(share[s]) / math.comb(others, s) for s in range(others + 1)], dtype=torch.float64)
    present = x > 0
    inside = present[:, members].sum(2).T  # (M, m)
    sign = 1.0 - 2.0 * ((order - inside) % 2).double()
    return sign * share[present.sum(1) - inside]


def _symmetric(nodes: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether present and absent count alike, so that an index depends on one half only."""
    u, weights = nodes
    return bool(torch.allclose(weights, weights.flip(0)) and torch.allclose(u, 1 - u.flip(0)))


def _prior(
    rate: torch.Tensor, members: torch.Tensor, nodes: tuple[torch.Tensor, torch.Tensor], sign: int
) -> torch.Tensor:
    """Prior variance (M,) of derivatives of a half, averaged over u, in units of the amplitude."""
    low = torch.exp(-rate)
    u, weights = nodes
    both = torch.outer(weights, weights)
    # The chance that two independent draws agree about a player is (1 + tilt) / 2; with a complement, (1 - tilt) / 2.
    tilt = torch.outer(2 * u - 1, 2 * u - 1)
    found = torch.zeros(len(members), dtype=torch.float64)
    for turn, part in ((tilt, 0.5), (-tilt, 0.5 * sign * (-1) ** members.shape[1])):
        logs = (((1 + low) / 2)[:, None, None] + ((1 - low) / 2)[:, None, None] * turn).log()
        total = logs.sum(0)
        for row, member in enumerate(members):
            found[row] += part * float((both * (total - logs[member].sum(0)).exp()).sum())
    return (found * (2 * (1 - low))[members].prod(1)).clamp(min=0.0)


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """Cholesky factor, with the least that has to be added to the diagonal where rounding forbids it."""
    for extra in (0.0, 1e-10, 1e-8, 1e-6):
        covariance.diagonal().add_(extra)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not int(failed):
            return factor
    return torch.linalg.cholesky(covariance)
