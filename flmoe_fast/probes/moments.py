"""Means and standard errors from dependent contexts.

Contexts come in units: an antithetic pair, or a single context. The units of one draw are stratified by coalition size
in ascending order, so they are not identically distributed, and the plain sample variance would count the trend along
the strata as noise. Half the mean squared difference of successive units leaves a smooth trend out (von Neumann's
estimator for systematic samples); it still counts what the Latin hypercube saves, so it errs on the safe side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draw:
    """Unit means of one draw for some of the pairs.

    Attributes
    ----------
    chosen : LongTensor (P',)
        Which of the P pairs.
    total : Tensor (m, P', O)
        Mean over the contexts of each unit.
    defined : Tensor (m, P', O) or None
        Share of each unit's contexts in which the quantity is defined; None where it always is.
    """

    chosen: torch.Tensor
    total: torch.Tensor
    defined: torch.Tensor | None = None


def unit_means(samples: torch.Tensor, contexts_per_unit: int) -> torch.Tensor:
    """Average consecutive contexts (K, ...) into units (K / contexts_per_unit, ...)."""
    return samples.unflatten(0, (-1, contexts_per_unit)).mean(1)


def successive_variance(units: torch.Tensor) -> torch.Tensor:
    """Variance of one unit from successive differences of units (m, ...); NaN for a single unit."""
    if len(units) < 2:
        return torch.full(units.shape[1:], torch.nan, dtype=units.dtype)
    return units.diff(dim=0).square().mean(0) / 2


def combine(draws: list[Draw], pairs: int, borrowed: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Estimate, standard error, both (P, O), and degrees of freedom (P,) from one or several independent draws.

    ``borrowed`` is how many degrees of freedom the mean variance of all pairs counts for in every pair's. A quantity
    that is zero in most contexts and large in a few has a variance of its own that is too small wherever the few were
    missed; the other pairs tell what was missed.

    Draws are weighted by their number of units. Where a quantity is not always defined, the estimate is the ratio of
    the sums and the standard error that of the ratio to first order; it is NaN where nothing was defined.
    """
    outputs = draws[0].total.shape[-1]
    dtype = draws[0].total.dtype
    numerator, denominator = torch.zeros(pairs, outputs, dtype=dtype), torch.zeros(pairs, outputs, dtype=dtype)
    units = torch.zeros(pairs, dtype=dtype)
    for draw in draws:
        share = torch.ones_like(draw.total) if draw.defined is None else draw.defined
        numerator[draw.chosen] += draw.total.sum(0)
        denominator[draw.chosen] += share.sum(0)
        units[draw.chosen] += len(draw.total)
    estimate = torch.where(denominator > 0, numerator / denominator, torch.nan)

    squares, freedom = torch.zeros(pairs, outputs, dtype=dtype), torch.zeros(pairs, dtype=dtype)
    for draw in draws:
        if len(draw.total) < 2:
            continue
        residual = draw.total
        if draw.defined is not None:
            residual = residual - estimate[draw.chosen] * draw.defined
        squares[draw.chosen] += (len(residual) - 1) * successive_variance(residual)
        freedom[draw.chosen] += len(residual) - 1
    unit_variance = squares / freedom[:, None]  # 0 / 0 = NaN where there was a single unit
    if borrowed:
        weight = borrowed / (freedom + borrowed)[:, None]
        unit_variance = (1 - weight) * unit_variance + weight * unit_variance.nanmean(0)
    scale = torch.where(denominator > 0, units[:, None] / denominator, torch.nan)
    stderr = (unit_variance / units[:, None]).sqrt() * scale
    # m - 1 successive differences overlap; they are worth 2/3 of as many independent ones.
    return estimate, stderr, freedom * (2.0 / 3.0)


def moved(
    smooth: torch.Tensor,
    claimed: torch.Tensor,
    excess: torch.Tensor,
    stderr: torch.Tensor,
    margin: torch.Tensor | float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Estimates (P, O) of a model moved to unbiased ones as far as these show it off; variances, and the share (O,).

    ``claimed`` is the model's own variance, ``excess`` what the unbiased estimates are over it, ``stderr`` their
    standard errors. Where the excess is larger over all pairs than its own standard errors explain, the model is off by
    the rest, and the estimate moves by the share of that in the whole (an empirical Bayes rule; the positive part of
    Stein's). An excess whose mean square is above the explained one by no more than ``margin`` of it is chance.
    """
    doubt, whole = stderr.square().mean(0), excess.square().mean(0)
    share = torch.where(whole > (1 + margin) * doubt, 1 - doubt / whole, 0.0)
    return smooth + share * excess, torch.maximum(claimed, share * stderr.square()), share


def chance_margin(units: torch.Tensor) -> torch.Tensor:
    """Standard deviation (O,), relative to its mean, of the mean square over pairs of the mean of units (m, P, O).

    Pairs that share their contexts err together: it is that of a mean over as many independent squares as the units'
    deviations have directions.
    """
    deviation = (units - units.mean(0)).permute(2, 0, 1)
    gram = deviation @ deviation.mT
    total, squares = gram.diagonal(dim1=1, dim2=2).sum(1), gram.square().sum((1, 2))
    return torch.where(total > 0, (2 * squares).sqrt() / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
