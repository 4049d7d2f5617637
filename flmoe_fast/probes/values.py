"""Shapley and Banzhaf values of single players, with error bars.

A value depends on the odd half of a game alone (:mod:`flmoe_fast.probes.parity`), and every evaluation says something
about every player, however many there are: the default fits a process to complementary pairs of coalitions, drawn by
the law that the value asks for. What a budget has left beyond the points that a process takes is spent on contexts and
their single toggles, whose means are unbiased, and the estimates move to these as far as they show the process wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.probes.budget import LEAST_BUDGET, LEAST_CONTEXTS, MOST_ROWS, Spending, enumerates, spend
from flmoe_fast.probes.by_points import in_batches, table_of, widened
from flmoe_fast.probes.drawing import complementary, root_mean_weights
from flmoe_fast.probes.exact import enumerate_values, exact_index
from flmoe_fast.probes.gap import DEFAULT_GAP
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import contrast
from flmoe_fast.probes.moments import Draw, chance_margin, combine, moved, unit_means
from flmoe_fast.probes.naming import checked_names
from flmoe_fast.probes.pairs import resolve_players
from flmoe_fast.probes.parity import ParityProcess
from flmoe_fast.probes.posterior import Posterior
from flmoe_fast.probes.run import Run, corner_values, per_head
from flmoe_fast.probes.stopping import Stopping
from flmoe_fast.probes.value_result import PlayerValues

VALUE_METHODS = ("auto", "grid")
#: Contexts that something else than the budget may end after.
FIRST_CONTEXTS = 8


@dataclass(frozen=True)
class _Found:
    """Values and standard errors (Q, O), their degrees of freedom (Q,), and how they were found."""

    values: torch.Tensor
    stderr: torch.Tensor
    degrees: torch.Tensor
    facts: dict[str, Any]


def player_values(
    game: Game | Callable,
    *,
    index: str = "SV",
    players: Sequence[int] | None = None,
    n: int | None = None,
    contexts: int | None = None,
    budget: int | None = None,
    method: str = "auto",
    seed: int = 0,
    until: float | str | None = None,
    seconds: float | None = None,
    on_interrupt: str = "raise",
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> PlayerValues:
    """Shapley values ("SV") or Banzhaf values ("BV") of players.

    Exact where the budget pays for every coalition. Otherwise from a process through complementary pairs of coalitions,
    and, beyond 8,192 evaluations, contexts that correct it. ``result.about`` says which, and why.

    Parameters
    ----------
    game : Game or callable
    index : "SV" or "BV"
    players : sequence of int, optional
        All by default.
    n : int, optional
        Number of players, for a callable that has no ``n``.
    contexts : int, optional
        Spend what this many contexts cost, ``1 + Q`` evaluations each for Q players; 64 if neither this nor ``budget``
        is given.
    budget : int, optional
        Evaluations that may be spent; never exceeded.
    method : "auto" or "grid"
        "grid": means over contexts and their single toggles alone, unbiased.
    seed : int
    until, seconds, on_interrupt
        What ends the evaluations before the budget is spent, as for :func:`interactions`.
    names : sequence of n str, optional
        As for :func:`interactions`.
    progress : bool
    """
    game = as_game(game, n)
    called = game.player_names if names is None else checked_names(names, game.n)
    one_of("index", index, ("SV", "BV"))
    one_of("method", method, VALUE_METHODS)
    integer("seed", seed, least=0, most=2**64 - 1)
    stopping = Stopping.of(until, seconds, on_interrupt)
    chosen = torch.arange(game.n) if players is None else resolve_players("players", players, game.n).sort().values
    grid = CornerGrid.singles(chosen, game.n)
    spending = spend(grid, contexts, budget)
    run = Run(game, DEFAULT_GAP, seed, progress, (), spending.evaluations, stopping=stopping)
    with run.bar:
        found = _estimated(run, grid, index, spending, method)
    stopped = {} if stopping.reason is None else {"stopped": stopping.reason}
    return PlayerValues(
        chosen.numpy(),
        per_head(game, found.values),
        per_head(game, found.stderr),
        found.degrees.numpy(),
        run.evaluations,
        index,
        game.heads,
        called,
        {**game.about(), **found.facts, **stopped},
    )


def _estimated(run: Run, grid: CornerGrid, index: str, spending: Spending, method: str) -> _Found:
    """By the method asked for, with the reason for the default's way."""
    total = spending.evaluations
    if method == "grid":
        return _by_contexts(run, grid, index, spending, None)
    if enumerates(run.game.n, total, run.stopping.asked):
        rows = enumerate_values(run.game)
        run.spend(2**run.game.n)
        facts = {"method": "enumeration", "why": f"all {2**run.game.n} coalitions cost no more than the budget"}
        return _exactly(rows if rows.dim() == 2 else rows[:, None], grid.players, index, facts)
    if total < LEAST_BUDGET:
        return _by_contexts(run, grid, index, spending, None)
    found = _by_points(run, grid.players, index, total)
    left = total - run.evaluations
    contexts = left // grid.evaluations // 2 * 2
    if run.stopping.reason is not None or contexts < LEAST_CONTEXTS or bool((found.degrees == torch.inf).all()):
        return found
    return _by_contexts(run, grid, index, Spending(left, contexts), found)


def _exactly(rows: torch.Tensor, players: torch.Tensor, index: str, facts: dict[str, Any]) -> _Found:
    """From all values (2^n, O)."""
    values = exact_index(rows, len(rows).bit_length() - 1, players[:, None], index, 1)
    return _Found(values, torch.zeros_like(values), torch.full((len(players),), torch.inf, dtype=torch.float64), facts)


def _by_points(run: Run, players: torch.Tensor, index: str, budget: int) -> _Found:
    """From a process fitted to complementary pairs of coalitions."""
    n, members = run.game.n, players[:, None]
    drawn = complementary(n, min(budget // 2, MOST_ROWS), run.seed, root_mean_weights(n, index, 1))
    facts = {"method": "process", "why": "every evaluation tells of every player"}

    def estimated(some: torch.Tensor, values: torch.Tensor) -> _Found:
        if len(some) == 2 ** (n - 1):
            return _exactly(table_of(some, values), players, index, facts)
        process = ParityProcess(some, values[:, 0], values[:, 1])
        found, variance = process.index(members, index, 1)
        variance = widened(variance, n / len(some))
        posterior = Posterior(process, run.seed, order=1)
        for head in posterior.curved:
            found[:, head], variance[:, head] = posterior.index(head, members, index, 1)
        variance[:, values.flatten(0, 1).var(0) == 0] = torch.nan  # nothing tells how much anything might vary
        degrees = torch.full((len(players),), float(len(some)), dtype=torch.float64)
        more = {"rough": process.half(-1).scales.rough, "logit_share": posterior.logit_share}
        return _Found(found, variance.sqrt(), degrees, {**facts, **more})

    return in_batches(run, drawn, estimated, lambda found: (found.values, found.stderr))


def _by_contexts(run: Run, grid: CornerGrid, index: str, spending: Spending, smooth: _Found | None) -> _Found:
    """Means over contexts, or, where there are values of a process, these moved to the means as far as they are off."""
    contexts = spending.contexts
    if contexts < 1:
        raise ArgumentError(
            "budget", spending.evaluations, f"at least {grid.evaluations} evaluations, the cost of one context"
        )
    draws: list[Draw] = []
    done, found = 0, smooth
    step = 2 if contexts >= 4 else 1
    for total in run.stopping.totals(min(FIRST_CONTEXTS, contexts), contexts, step):
        try:
            draws.append(_drawn(run, grid, index, total - done, len(draws)))
        except KeyboardInterrupt:
            if run.stopping.interrupted(found is not None):
                break
            raise
        done, found = total, _from_draws(draws, smooth)
        if done == contexts or run.stopping.ends(found.values, found.stderr) or run.stopping.late():
            break
    assert found is not None
    return found


def _drawn(run: Run, grid: CornerGrid, index: str, count: int, replicate: int) -> Draw:
    """Unit means of a fresh draw of contexts."""
    n, players = run.game.n, grid.players
    antithetic = count % 2 == 0 and (count >= 4 or replicate > 0)
    words = sample_contexts(n, count, seed=run.seed, antithetic=antithetic, replicate=replicate).words
    samples = []
    for block in unpack(words, n).split(max(1, run.game.block // grid.evaluations)):
        values = corner_values(run.game, block, grid)
        size = block.sum(1, keepdim=True) - block[:, players].long()
        samples.append(grid.gains(block, values) * contrast(index, 1, size, n)[..., None])
        run.spend(len(block) * grid.evaluations)
    return Draw(torch.arange(len(players)), unit_means(torch.cat(samples), 2 if antithetic else 1))


def _from_draws(draws: list[Draw], smooth: _Found | None) -> _Found:
    """Of the means over all draws."""
    values, stderr, degrees = combine(draws, draws[0].total.shape[1])
    if smooth is None:
        return _Found(values, stderr, degrees, {"method": "grid"})
    margin = chance_margin(torch.cat([draw.total for draw in draws]))
    values, variance, share = moved(smooth.values, smooth.stderr.square(), values - smooth.values, stderr, margin)
    facts = {**smooth.facts, "method": "process and grid", "unbiased_share": share.tolist()}
    return _Found(values, variance.sqrt(), degrees, facts)
