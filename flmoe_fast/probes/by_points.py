"""The default estimates where players are few: one process through everything that was evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from flmoe_fast.games.game import Game
from flmoe_fast.probes.budget import LEAST_BUDGET, MOST_ROWS
from flmoe_fast.probes.cube import codes
from flmoe_fast.probes.drawing import complementary
from flmoe_fast.probes.draws import SHARED
from flmoe_fast.probes.exact import enumerate_values, exact_index, pair_interaction
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import IndexEstimate, complete_players
from flmoe_fast.probes.noise import fresh_noise_share
from flmoe_fast.probes.parity import ParityProcess
from flmoe_fast.probes.posterior import Posterior
from flmoe_fast.probes.run import Found, Run, per_head

T = TypeVar("T")
#: What the variances of indices are multiplied by, and how much more for every scale that few points tell of.
WIDER, SCALES = 1.25, 5.0
#: Complementary pairs of the first batch, where something else than the budget may end a probe.
FIRST_ROWS = 64


def by_enumeration(run: Run, grid: CornerGrid) -> Found:
    """Exact indices and gaps from all 2^n values."""
    values = enumerate_values(run.game)
    run.spend(2**run.game.n)
    return _from_table(run, grid, values if values.dim() == 2 else values[:, None])


def _from_table(run: Run, grid: CornerGrid, rows: torch.Tensor) -> Found:
    """From all values (2^n, O)."""
    game, n, pairs = run.game, run.game.n, len(grid.pairs)
    both = [pair_interaction(rows, n, i, j, run.gap_kind) for i, j in grid.pairs.tolist()]
    sii, gaps = torch.stack([s for s, _ in both]), torch.stack([g for _, g in both])
    exact = torch.full((pairs,), torch.inf, dtype=torch.float64)
    also = {}
    for (name, order), members in wanted_members(run, grid).items():
        found = exact_index(rows, n, members, name, order)
        also[name, order] = estimate_of(game, members, found, torch.zeros_like(found), float("inf"))
    noise, checks = fresh_noise_share(game, grid, run.seed, run.evaluations)
    zero = torch.zeros_like(sii)
    return Found("enumeration", sii, zero, gaps, zero, exact, torch.full((pairs,), 2 ** (n - 2)), noise, checks, also)


def by_points(run: Run, grid: CornerGrid, budget: int) -> Found:
    """Estimates from a process fitted to complementary pairs of coalitions, drawn by the law that the SII asks for."""
    drawn = complementary(run.game.n, min(budget // 2, MOST_ROWS), run.seed)

    def estimated(some: torch.Tensor, values: torch.Tensor) -> Found:
        if len(some) == 2 ** (run.game.n - 1):
            return _from_table(run, grid, table_of(some, values))
        return _from_points(run, grid, some, values)

    return in_batches(run, drawn, estimated, lambda found: (found.sii, found.sii_stderr))


def in_batches(
    run: Run,
    drawn: torch.Tensor,
    estimated: Callable[[torch.Tensor, torch.Tensor], T],
    errors: Callable[[T], tuple[torch.Tensor, torch.Tensor]],
) -> T:
    """What is ``estimated`` of coalitions (m, n) and values (m, 2, O) once nothing more of ``drawn`` is asked for.

    ``errors``: the numbers and their standard errors that have to be good enough.
    """
    parts: list[torch.Tensor] = []
    done, found = 0, None
    for total in run.stopping.totals(min(FIRST_ROWS, len(drawn)), len(drawn)):
        try:
            parts.append(evaluate_pairs(run, drawn[done:total]))
        except KeyboardInterrupt:
            if run.stopping.interrupted(done >= LEAST_BUDGET // 2):
                break
            raise
        done, found = total, None
        if done == len(drawn):
            break
        if run.stopping.until is not None:
            found = estimated(drawn[:done], torch.cat(parts))
            if run.stopping.ends(*errors(found)):
                break
        if run.stopping.late():
            break
    return estimated(drawn[:done], torch.cat(parts)) if found is None else found


def table_of(drawn: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """All values (2^n, O) from those of every complementary pair."""
    found = torch.empty(2 * len(drawn), values.shape[2], dtype=values.dtype)
    found[codes(drawn)], found[codes(~drawn)] = values[:, 0], values[:, 1]
    return found


def _from_points(run: Run, grid: CornerGrid, drawn: torch.Tensor, values: torch.Tensor) -> Found:
    """Estimates from coalitions (m, n) with the values (m, 2, O) of these and of their complements."""
    game, pairs, scales = run.game, len(grid.pairs), run.game.n / len(drawn)
    process = ParityProcess(drawn, values[:, 0], values[:, 1])
    sii, variance = process.index(grid.pairs, "SII", 2)
    variance = widened(variance, scales)
    also = {}
    for key, members in wanted_members(run, grid).items():
        found, claimed = process.index(members, *shapley_base(key))
        if key == ("k-SII", 1):  # the halves are independent: the Shapley value is odd, the SII even
            of = (grid.pairs[:, :, None] == members[:, 0]).any(1).double().T
            found, claimed = found - 0.5 * of @ sii, claimed + 0.25 * (of @ variance.sqrt()).square()
        also[key] = members, found, widened(claimed, scales)
    posterior = Posterior(process, run.seed)
    for head in posterior.curved:
        sii[:, head], variance[:, head] = posterior.index(head, grid.pairs, "SII", 2)
        for key, (members, found, claimed) in also.items():
            found[:, head], claimed[:, head] = posterior.index(head, members, *key)
    if run.gap_kind == "sum":
        gaps, gap_variance = -sii, variance
    else:
        estimate = posterior.gaps(grid, run.gap_kind)
        gaps, gap_variance = estimate.value, estimate.variance
    flat = values.flatten(0, 1).var(0) == 0  # where nothing varied, nothing tells how much anything might
    variance[:, flat] = gap_variance[:, flat] = torch.nan
    noise, checks = fresh_noise_share(game, grid, run.seed, run.evaluations)
    return Found(
        "process",
        sii,
        variance.sqrt(),
        gaps,
        gap_variance.sqrt(),
        torch.full((pairs,), float(len(drawn))),
        torch.full((pairs,), 2 * len(drawn)),
        noise,
        checks,
        {key: estimate_of(game, m, found, v.sqrt(), float(len(drawn))) for key, (m, found, v) in also.items()},
        {"rough": process.half(1).scales.rough, "logit_share": posterior.logit_share, "levels": posterior.levels},
    )


def shapley_base(key: tuple[str, int]) -> tuple[str, int]:
    """The index that another is read from: k-SII of single players is the Shapley value less half the SII."""
    return ("SV", 1) if key == ("k-SII", 1) else key


def evaluate_pairs(run: Run, drawn: torch.Tensor) -> torch.Tensor:
    """Values (m, 2, O) of coalitions (m, n) and of their complements, pair after pair."""
    blocks = []
    for rows in drawn.split(max(1, run.game.block // 2)):
        values = run.game(torch.stack([rows, ~rows], 1).flatten(0, 1))
        run.spend(2 * len(rows))
        blocks.append((values[:, None] if values.dim() == 1 else values).unflatten(0, (-1, 2)))
    return torch.cat(blocks)


def widened(variance: torch.Tensor, scales: float = 0.0) -> torch.Tensor:
    """Variances (M, O) that hold: with a share of their mean in each, and room for so many ``scales`` a point."""
    return WIDER * (1 + SCALES * scales) * ((1 - SHARED) * variance + SHARED * variance.mean(0))


def wanted_members(run: Run, grid: CornerGrid) -> dict[tuple[str, int], torch.Tensor]:
    """Members (M, order) of every other index asked for; what has none is left out."""
    found = {}
    for name, order in run.also:
        if (name, order) == ("k-SII", 1):
            members = complete_players(grid.pairs, run.game.n)[:, None]
        else:
            members = grid.players[:, None] if order == 1 else grid.pairs
        if len(members):
            found[name, order] = members
    return found | run.members_of_triples()


def estimate_of(
    game: Game, members: torch.Tensor, values: torch.Tensor, stderr: torch.Tensor, degrees: float
) -> IndexEstimate:
    """What is said of an index of ``members`` (M, order) with values and standard errors (M, O)."""
    freedom = torch.full((len(members),), degrees, dtype=torch.float64)
    return IndexEstimate(members.numpy(), per_head(game, values), per_head(game, stderr), freedom.numpy())
