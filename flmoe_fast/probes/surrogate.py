"""A Gaussian-process surrogate of a game whose Shapley interactions have a closed form.

The kernel is a product over players, ``k(x, y) = a prod_p r_p^[x_p != y_p]`` with ``0 < r_p < 1``: coalitions are alike
as far as they agree, and players differ in how much agreeing on them matters. The posterior mean is a sum of such
products, one per training coalition. Its second difference at players i, j in a random coalition, each other player
present with probability u, is again a product over players; integrating over u with the density of an index gives the
index itself. The integrand is a polynomial in u, so Gauss-Legendre nodes make the integral exact, for any number of
players. (Bayesian quadrature on the hypercube: the same algebra gives the posterior variance of the index.)

Length scales and the nugget maximise the marginal likelihood; the amplitude is profiled out.

Values that are probabilities are better described on the logit scale (``link="logit"``): the surrogate is then the
sigmoid of a process, its indices are averages over contexts drawn on the surrogate (which costs no evaluation of the
game), with the closed form of a process through the same points as a control variate. The link is chosen by the
leave-one-out error of the values.

**Standard errors.** Where w are the weights with which the training values enter an index and e the leave-one-out
residuals, ``J = sum (w e)^2`` is the jackknife variance of the estimate: it sees where the surrogate actually errs. A
surrogate converges faster than an average of independent samples, which the jackknife supposes. By how much is known
for the process: its posterior variance over what J is expected to be under it. The variance reported is J times that
ratio.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.probes.search import minimum

#: Training coalitions a surrogate takes: its matrix has as many rows, 512 MB at 8,192.
MOST_POINTS = 8192
#: Coalitions from which length scales are estimated; more change them little.
FIT_POINTS = 512
FIT_STEPS = 40
#: Probabilities this close to 0 or 1 count as that close, in logits.
EDGE = 1e-7
#: Smallest nugget: keeps the factorisation accurate where a player does not matter at all.
LEAST_NUGGET = 1e-8
BLOCK = 4096


@dataclass(frozen=True)
class Scales:
    """Hyper-parameters: ``rate`` (n,) float64 with r_p = exp(-rate_p), and the nugget relative to the amplitude."""

    rate: torch.Tensor
    nugget: float


def signs(coalitions: torch.Tensor) -> torch.Tensor:
    """bool (C, n) to float64: +1 present, -1 absent."""
    return 2.0 * coalitions.double() - 1.0


def kernel(x: torch.Tensor, y: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Correlation (C, m) of two sets of coalitions given by their signs."""
    return ((x * (0.5 * rate)) @ y.T).sub_(0.5 * rate.sum()).exp_()


def fit_scales(x: torch.Tensor, y: torch.Tensor) -> Scales:
    """Hyper-parameters of largest marginal likelihood for signs x (m, n) and values y (m,).

    The amplitude and a constant mean are profiled out. A weak prior keeps the rates of players near their common level
    where the data do not tell them apart.
    """
    step = max(1, len(x) // FIT_POINTS)
    x, y = x[::step], y[::step]
    m, n = x.shape
    if float(y.var()) == 0.0:
        return Scales(torch.full((n,), math.exp(-1.5), dtype=torch.float64), LEAST_NUGGET)

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        rates = torch.from_numpy(theta[:n])
        rate, nugget = rates.exp(), math.exp(theta[n])
        correlation = kernel(x, x, rate)
        covariance = correlation.clone()
        covariance.diagonal().add_(nugget)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            return np.inf, np.zeros_like(theta)
        inverse = torch.cholesky_inverse(factor)
        residual = y - (inverse @ y).sum() / inverse.sum()
        solved = inverse @ residual
        amplitude = float(residual @ solved) / m
        level = rates.mean()
        value = 0.5 * m * math.log(amplitude) + float(factor.diagonal().log().sum())
        value += 0.5 * float((rates - level).square().sum()) + float((level + 2.0).square()) / 8.0
        slope = (inverse - torch.outer(solved, solved) / amplitude) * correlation
        differ = (slope.sum() - ((slope @ x) * x).sum(0)) / 2
        gradient = -0.5 * rate * differ + (rates - level) + (level + 2.0) / (4.0 * n)
        noise = 0.5 * nugget * (float(inverse.diagonal().sum()) - float(solved @ solved) / amplitude)
        return value, np.append(gradient.numpy(), noise)

    start = np.append(np.full(n, math.log(3.5 / n)), -6.0)
    bounds = np.array([(-9.0, 3.0)] * n + [(math.log(LEAST_NUGGET), 2.0)])
    found = minimum(objective, np.clip(start, *bounds.T), bounds, FIT_STEPS)
    return Scales(torch.from_numpy(found[:n]).exp(), math.exp(found[n]))


class Process:
    """The posterior of one output given its values at m coalitions.

    Parameters
    ----------
    x : float64 (m, n)
        Signs of the training coalitions, without repeats.
    y : float64 (m,)
    scales : Scales
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor, scales: Scales):
        self.x, self.rate = x, scales.rate
        covariance = kernel(x, x, scales.rate)
        covariance.diagonal().add_(scales.nugget)
        self.factor = torch.linalg.cholesky(covariance)
        inverse = torch.cholesky_inverse(self.factor)
        self.precision = inverse.diagonal().clone()  # of each value given the others, in units of the amplitude
        self._sums = inverse.sum(1)
        self.mean, self.weights = self.solve(y)
        self.amplitude = float((y - self.mean) @ self.weights) / len(y)
        self.loo = self.weights / self.precision  # y minus its prediction from the others

    def solve(self, y: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Constant mean, and weights (m,) of the kernel functions, for values y (m,)."""
        mean = float(self._sums @ y / self._sums.sum())
        return mean, torch.cholesky_solve((y - mean)[:, None], self.factor)[:, 0]

    def shares(self, functional: torch.Tensor) -> torch.Tensor:
        """Weights (m, M) of the training values in functionals given by their kernel columns (M, m)."""
        return torch.cholesky_solve(functional.T, self.factor)


def functionals(
    x: torch.Tensor, rate: torch.Tensor, members: torch.Tensor, rule: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Kernel columns (M, m) of the discrete derivatives of ``members`` (M, order), averaged over u.

    Parameters
    ----------
    x : (m, n)
        Signs of the training coalitions.
    rate : (n,)
    members : (M, order) players
    rule : nodes (Q,) and weights (Q,)
        A quadrature of the density of u.
    """
    present = x > 0
    low = torch.exp(-rate)
    nodes, weights = (part[:, None] for part in rule)
    # Mean of one player's factor over its presence, for a training coalition that has it and for one that has not.
    has = (nodes + (1 - nodes) * low).log()  # (Q, n)
    lacks = ((1 - nodes) + nodes * low).log()
    everyone = (present.double() @ (has - lacks).T + lacks.sum(1)).T  # (Q, m)
    column = torch.zeros(len(members), len(present), dtype=torch.float64)
    for bits in itertools.product((True, False), repeat=members.shape[1]):
        here = sum((has if bit else lacks)[:, members[:, k]] for k, bit in enumerate(bits))  # (Q, M)
        match = torch.stack([present[:, members[:, k]] == bit for k, bit in enumerate(bits)]).all(0).T  # (M, m)
        # Both factors of exp(everyone - here) are shifted per node, so that neither leaves the range of doubles.
        shift = everyone.max(1, keepdim=True).values
        product = (weights * (shift - here).exp()).T @ (everyone - shift).exp()
        column += torch.where(match, product if bits.count(False) % 2 == 0 else -product, 0.0)
    return column * (1 - low)[members].prod(1)[:, None]


def prior_variance(rate: torch.Tensor, members: torch.Tensor, rule: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Prior variance (M,) of the same functionals, in units of the amplitude."""
    low = torch.exp(-rate)
    nodes, weights = rule
    # The chance that two independent draws agree about a player is (1 + tilt) / 2.
    tilt = torch.outer(2 * nodes - 1, 2 * nodes - 1)
    logs = (((1 + low) / 2)[:, None, None] + ((1 - low) / 2)[:, None, None] * tilt).log()
    total, both = logs.sum(0), torch.outer(weights, weights)
    inner = [(both * (total - logs[member].sum(0)).exp()).sum() for member in members]
    return torch.stack(inner) * (2 * (1 - low))[members].prod(1)


def logit(values: torch.Tensor) -> torch.Tensor:
    """Log-odds of probabilities, kept finite."""
    return values.clamp(EDGE, 1 - EDGE).logit()


class Surrogate:
    """A fitted surrogate of one output.

    Parameters
    ----------
    coalitions : bool (m, n)
        Distinct, in random order; at most :data:`MOST_POINTS`.
    values : float64 (m,)
    link : "identity", "logit" or "auto"
        "auto" fits both where all values are probabilities and at most one in ten is saturated, and keeps the one with
        the smaller leave-one-out error.
    """

    def __init__(self, coalitions: torch.Tensor, values: torch.Tensor, link: str = "auto"):
        if not 4 <= len(coalitions) <= MOST_POINTS:
            raise ArgumentError("coalitions", f"{len(coalitions)} of them", f"4 to {MOST_POINTS} for a surrogate")
        x = signs(coalitions)
        links = ("identity", "logit") if link == "auto" and _probabilities(values) else (link,)
        best: tuple[float, str, Process] | None = None
        for name in ("identity",) if links == ("auto",) else links:
            y = logit(values) if name == "logit" else values
            process = Process(x, y, fit_scales(x, y))
            left_out = y - process.loo
            error = values - (left_out.sigmoid() if name == "logit" else left_out)
            if best is None or float(error.square().mean()) < best[0]:
                best = (float(error.square().mean()), name, process)
        assert best is not None  # there is at least one link
        self.loo_error, self.link, self.process = best
        self.values = values
        # The control variate: a process of the values themselves with the same scales.
        self.plain_mean, self.plain = self.process.solve(values) if self.link == "logit" else (0.0, values.new_zeros(0))
        self.spread = float(values.var())

    @property
    def explained(self) -> float:
        """Share of the values' variance that is predicted when left out."""
        return 1.0 - self.loo_error / self.spread if self.spread > 0 else 1.0

    def predict(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Values (C,) of coalitions (C, n)."""
        return torch.cat([self.evaluate(signs(rows))[1] for rows in coalitions.split(BLOCK)])

    def evaluate(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For signs (C, n): kernel rows (C, m), values (C,) and their slopes with respect to the process (C,)."""
        rows = kernel(x, self.process.x, self.process.rate)
        latent = rows @ self.process.weights + self.process.mean
        if self.link == "identity":
            return rows, latent, torch.ones_like(latent)
        value = latent.sigmoid()
        return rows, value, value * (1 - value)

    def jackknife(self, functional: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Variance J (M,) of functionals (M, m), and the degrees of freedom it is worth."""
        part = (self.process.shares(functional) * self.process.loo[:, None]).square()
        total = part.sum(0)
        return total, total.square() / part.square().sum(0).clamp(min=torch.finfo(torch.float64).tiny)

    def efficiency(
        self, members: torch.Tensor, functional: torch.Tensor, rule: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Posterior variance of indices over their expected jackknife variance (M,)."""
        shares = self.process.shares(functional)
        prior = prior_variance(self.process.rate, members, rule)
        posterior = (prior - (functional.T * shares).sum(0)).clamp(min=0.0)
        expected = (shares.square() / self.process.precision[:, None]).sum(0)
        return posterior / expected.clamp(min=torch.finfo(torch.float64).tiny)


def _probabilities(values: torch.Tensor) -> bool:
    inside = bool(((values >= 0) & (values <= 1)).all())
    return inside and float(((values < EDGE) | (values > 1 - EDGE)).double().mean()) <= 0.1
