"""What a surrogate says about pairs: indices and gaps with their variances, at no evaluation of the game.

Under the identity link the indices have a closed form. Gaps, and indices under the logit link, are averages over corner
grids evaluated on the surrogate; their sampling error is part of the variance, and so is how far the surrogate itself
may be off (see :mod:`flmoe_fast.probes.surrogate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.probes.gap import redundancy_gap
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import complete_players, contrast, rule
from flmoe_fast.probes.moments import Draw, combine, successive_variance, unit_means
from flmoe_fast.probes.surrogate import Surrogate, functionals, signs

#: Coalitions evaluated on the surrogate.
READINGS = 1 << 15
FEWEST_CONTEXTS = 64
#: These contexts are independent of all that are evaluated on the game.
REPLICATE = 1 << 31


@dataclass(frozen=True)
class Estimate:
    """Estimates, their variances, the degrees of freedom of these, and the part that is due to sampling, each (M,)."""

    value: torch.Tensor
    variance: torch.Tensor
    degrees: torch.Tensor
    sampling: torch.Tensor


@dataclass(frozen=True)
class Reading:
    """All that was read off one surrogate.

    Attributes
    ----------
    sii, gap : Estimate
        Of the P pairs.
    also : dict of (name, order) to (members (M, order), Estimate)
    unit_variance : Tensor (P,)
        Variance of the mean second difference of an antithetic pair of contexts on the surrogate.
    """

    sii: Estimate
    gap: Estimate
    also: dict[tuple[str, int], tuple[torch.Tensor, Estimate]]
    unit_variance: torch.Tensor


class _Average:
    """A mean over contexts of linear functionals of the surrogate's values, with its kernel columns."""

    def __init__(self, members: int, points: int):
        self.columns = torch.zeros(members, points, dtype=torch.float64)
        self.samples: list[torch.Tensor] = []
        self.defined: list[torch.Tensor] = []
        self.bend = torch.zeros(members, dtype=torch.float64)


def read(
    surrogate: Surrogate, grid: CornerGrid, n: int, gap: str, also: tuple[tuple[str, int], ...], seed: int
) -> Reading:
    """Indices and gaps of the grid's pairs."""
    closed = _closed_forms(surrogate, grid, n, (("SII", 2), *also))
    total = max(FEWEST_CONTEXTS, READINGS // grid.evaluations)
    total += total % 2
    contexts = unpack(sample_contexts(n, total, seed=seed, replicate=REPLICATE).words, n)
    points = len(surrogate.process.x)
    gaps = _Average(len(grid.pairs), points)
    sampled = {key: _Average(len(members), points) for key, (members, _) in closed.items()}
    second = []
    generator = torch.Generator().manual_seed(seed % 2**63)
    for block in contexts.split(max(1, 8192 // grid.evaluations)):
        rows, value, slope = surrogate.evaluate(signs((block[:, None] ^ grid.toggled).flatten(0, 1)))
        rest = None
        if surrogate.link == "logit":  # what the control variate leaves
            rest = value - (rows @ surrogate.plain + surrogate.plain_mean)
        numbers = grid.corner_numbers(block)
        corners = [c[..., 0] for c in grid.corners(block, value.view(len(block), -1, 1))]
        second.append(corners[0] - corners[1] - corners[2] + corners[3])
        error = (slope * surrogate.process.loo.square().mean().sqrt()).view(len(block), -1, 1)
        doubt = [c[..., 0] for c in grid.corners(block, error * torch.randn(error.shape, generator=generator))]
        _add_gap(gaps, gap, corners, doubt, numbers, grid.evaluations, rows * slope[:, None])
        if rest is not None:
            for key, average in sampled.items():
                _add_linear(average, key, closed[key][0], grid, n, block, rest, rows * slope[:, None])
    samples = torch.cat(second)
    found = {}
    for key, (members, functional) in closed.items():
        found[key] = members, _indices(surrogate, key, members, functional, sampled[key], total, n)
    pair_functional = closed["SII", 2][1]
    efficiency = surrogate.efficiency(grid.pairs, pair_functional, rule("SII", 2, n))
    spread = successive_variance(unit_means(samples, 2)[..., None])[:, 0]
    return Reading(
        sii=found.pop(("SII", 2))[1],
        gap=_gap_estimate(surrogate, gaps, efficiency, total),
        also=found,
        unit_variance=spread,
    )


def _closed_forms(surrogate, grid, n, keys) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    """Members and kernel columns of every index."""
    found = {}
    for name, order in keys:
        if (name, order) == ("k-SII", 1):
            members = complete_players(grid.pairs, n)[:, None]
            column = functionals(surrogate.process.x, surrogate.process.rate, members, rule("SV", 1, n))
            pairs = functionals(surrogate.process.x, surrogate.process.rate, grid.pairs, rule("SII", 2, n))
            column = column - 0.5 * _of_player(grid.pairs, members) @ pairs
        else:
            members = grid.players[:, None] if order == 1 else grid.pairs
            column = functionals(surrogate.process.x, surrogate.process.rate, members, rule(name, order, n))
        if len(members):
            found[name, order] = members, column
    return found


def _of_player(pairs: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """(M, P): one where the pair has the player."""
    return (pairs[:, :, None] == members[:, 0]).any(1).double().T


def _add_gap(average, kind, corners, doubt, numbers, evaluations, slopes) -> None:
    """One block of gap samples and of their derivatives with respect to the surrogate.

    ``doubt`` are errors of the corners' usual size. A gap is not linear in the corners, so errors of mean zero shift
    it: by half the sum of what they and their negatives do, which is added up in ``bend``.
    """
    leaves = [corner.clone().requires_grad_() for corner in corners]
    value, defined = redundancy_gap(kind, *leaves)
    value.sum().backward()
    average.samples.append(value.detach())
    for sign in (1, -1):
        moved, _ = redundancy_gap(kind, *(corner + sign * by for corner, by in zip(corners, doubt)))
        average.bend += (moved - value.detach()).sum(0) / 2
    if defined is not None:
        average.defined.append(defined.double())
    contexts, pairs = value.shape
    for leaf, number in zip(leaves, numbers):
        where = number + evaluations * torch.arange(contexts)[:, None]  # rows of the block
        weight = torch.zeros(pairs, contexts * evaluations, dtype=torch.float64)
        weight.scatter_(1, where.T, leaf.grad.T)
        average.columns += weight @ slopes


def _add_linear(average, key, members, grid, n, block, rest, slopes) -> None:
    """One block of an index's samples, of what the control variate leaves, and their derivatives."""
    name, order = key
    size = block.sum(1, keepdim=True)
    values = rest.view(len(block), -1, 1)
    if order == 2:
        weight = contrast(name, 2, size - block[:, grid.pairs].sum(2), n)
        v11, v10, v01, v00 = (corner[..., 0] for corner in grid.corners(block, values))
        average.samples.append((v11 - v10 - v01 + v00) * weight)
        matrix = torch.zeros(len(members), len(rest), dtype=torch.float64)
        for number, sign in zip(grid.corner_numbers(block), (1.0, -1.0, -1.0, 1.0)):
            matrix.scatter_(1, (number + grid.evaluations * torch.arange(len(block))[:, None]).T, (sign * weight).T)
        average.columns += matrix @ slopes
        return
    chosen = torch.isin(grid.players, members[:, 0])
    player_size = size - block[:, grid.players].long()
    weight = contrast("SV" if name == "k-SII" else name, 1, player_size, n)[:, chosen]
    sign = (2.0 * block[:, grid.players].double() - 1.0)[:, chosen] * weight
    number = (1 + torch.arange(len(grid.players)))[chosen]
    start = grid.evaluations * torch.arange(len(block))[:, None]
    matrix = torch.zeros(len(members), len(rest), dtype=torch.float64)
    matrix.scatter_(1, (number + start).T, -sign.T)
    matrix.scatter_add_(1, start.expand(-1, len(members)).T, sign.T)
    samples = grid.gains(block, values)[:, chosen, 0] * weight
    if name == "k-SII":
        v11, v10, v01, v00 = (corner[..., 0] for corner in grid.corners(block, values))
        of = _of_player(grid.pairs, members)
        samples = samples - 0.5 * (v11 - v10 - v01 + v00) @ of.T
        for corner, by in zip(grid.corner_numbers(block), (-0.5, 0.5, 0.5, -0.5)):
            part = torch.zeros(len(grid.pairs), len(rest), dtype=torch.float64)
            part.scatter_(1, (corner + start).T, by)
            matrix += of @ part
    average.samples.append(samples)
    average.columns += matrix @ slopes


def _indices(surrogate, key, members, functional, average, total, n) -> Estimate:
    """An index from its closed form and, under the logit link, the sampled rest."""
    process = surrogate.process
    name, order = ("SV", 1) if key == ("k-SII", 1) else key
    nodes = rule(name, order, n)
    efficiency = surrogate.efficiency(members, functionals(process.x, process.rate, members, nodes), nodes)
    if surrogate.link == "identity":
        jackknife, degrees = surrogate.jackknife(functional)
        return Estimate(functional @ process.weights, efficiency * jackknife, degrees, torch.zeros(len(members)))
    value, stderr, _ = combine([_draw(average.samples)], len(members))
    jackknife, degrees = surrogate.jackknife(average.columns / total)
    sampling = stderr[:, 0].square()
    return Estimate(functional @ surrogate.plain + value[:, 0], efficiency * jackknife + sampling, degrees, sampling)


def _gap_estimate(surrogate, average, efficiency, total) -> Estimate:
    value, stderr, _ = combine([_draw(average.samples, average.defined)], len(efficiency))
    columns = average.columns / total
    if average.defined:
        columns = columns / torch.cat(average.defined).mean(0).clamp(min=1.0 / total)[:, None]
    jackknife, degrees = surrogate.jackknife(columns)
    sampling = stderr[:, 0].square()
    variance = efficiency * jackknife + sampling + (average.bend / total).square()
    return Estimate(value[:, 0], variance, degrees, sampling)


def _draw(samples: list[torch.Tensor], defined: Sequence[torch.Tensor] = ()) -> Draw:
    units = unit_means(torch.cat(samples), 2)[..., None]
    share = unit_means(torch.cat(list(defined)), 2)[..., None] if defined else None
    return Draw(torch.arange(units.shape[1]), units, share)
