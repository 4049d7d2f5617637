"""Estimating the Shapley interactions and redundancy gaps of chosen pairs, with error bars."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.games.rounding import NOISE_LIMIT, percent, remember, say_moved
from flmoe_fast.probes.budget import LEAST_BUDGET, Spending, default_way, spend
from flmoe_fast.probes.by_contexts import by_contexts
from flmoe_fast.probes.by_grid import by_grid
from flmoe_fast.probes.by_points import by_enumeration, by_points
from flmoe_fast.probes.by_surrogate import LEAST_POINTS, by_surrogate
from flmoe_fast.probes.gap import DEFAULT_GAP, GAPS
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import wanted_indices
from flmoe_fast.probes.naming import checked_names
from flmoe_fast.probes.pairs import Pairs, resolve_pairs, resolve_triples
from flmoe_fast.probes.result import InteractionResult
from flmoe_fast.probes.run import Found, Run, per_head
from flmoe_fast.probes.stopping import Stopping
from flmoe_fast.probes.surrogate import MOST_POINTS

METHODS = ("auto", "grid", "surrogate")


def interactions(
    game: Game | Callable,
    *,
    rows: Sequence[int] | None = None,
    cols: Sequence[int] | None = None,
    pairs: Pairs | None = None,
    n: int | None = None,
    contexts: int | None = None,
    budget: int | None = None,
    method: str = "auto",
    seed: int = 0,
    gap: str = DEFAULT_GAP,
    adaptive: bool | None = None,
    also: Sequence[str] | str = (),
    triples: Sequence[tuple[int, int, int]] | np.ndarray | None = None,
    until: float | str | None = None,
    seconds: float | None = None,
    on_interrupt: str = "raise",
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> InteractionResult:
    """Shapley Interaction Index and redundancy gap of pairs of players, with error bars.

    Exact where the budget pays for every coalition. Otherwise a process (:mod:`flmoe_fast.probes.parity`) through all
    that was evaluated, which keeps the evaluated values exact: for few players coalitions drawn by the index's own law,
    for many players the corners of shared grids, whose unbiased means the estimates are moved to as far as
    cross-fitting finds the process wrong, and other coalitions, half of the budget where a first few of them predict
    each other. ``result.about`` says which, and why.

    Parameters
    ----------
    game : Game or callable
        A :class:`TokenGame`, or any function from a bool tensor (C, n) to (C,) or (C, O) numbers.
    rows, cols : sequences of players, optional
        Probe every pair of a row and a column player.
    pairs : (P, 2) players, optional
        Probe these pairs. Without rows, cols and pairs: all cross-modal pairs, or all pairs where there are no
        modalities.
    n : int, optional
        Number of players, for a callable that has no ``n``.
    contexts : int, optional
        Spend what this many contexts of a corner grid cost, ``1 + Q + P`` evaluations each for P pairs on Q players; 64
        if neither this nor ``budget`` is given.
    budget : int, optional
        Evaluations that may be spent. Never exceeded.
    method : "auto", "grid" or "surrogate"
        "auto": as above. "grid": averages over corner grids alone, unbiased for any number of players; what does not
        make a whole context is left over, and even numbers of at least 4 contexts are drawn as antithetic pairs.
        "surrogate": a Gaussian process with links for probabilities (:mod:`flmoe_fast.probes.surrogate`), at most 8,192
        evaluations, and seconds of its own for every output.
    seed : int
        The same seed gives the same coalitions on every device.
    gap : "max", "sum", "strict" or "ratio"
        Kind of redundancy gap, see :mod:`flmoe_fast.probes.gap`.
    adaptive : bool, optional
        Spend the second half of a budget on the pairs whose estimates vary most (chosen by their variance only).
        Only for "grid" with a budget that alone ends it; by default yes where that is at least 24 contexts.
    also : sequence of "SV", "BV", "BII", "BV(p)", "BII(p)", "STII", "FSII", "k-SII"
        Other indices to estimate from the same evaluations (:mod:`flmoe_fast.probes.indices`): single players' for the
        players of the pairs, k-SII of single players only where all their pairs are probed. They are in
        ``result.also``; ``result.index(name, order)`` is a table. "BII(0.3)": everybody else is present with
        probability 0.3.
    triples : (T, 3) players, optional
        Interactions of order 3 to estimate from the same evaluations, by the default method only:
        ``result.also["SII", 3]``, and of BII, STII and FSII where ``also`` has them.
    until : float or str, optional
        Stop before the budget is spent once no interaction's standard error exceeds this: a number, or a percentage of
        the largest interaction such as "5%". Looked at whenever evaluations have grown by half; a standard error that
        was stopped at is the smallest so far, and flatters a little.
    seconds : float, optional
        Stop evaluating after this time.
    on_interrupt : "raise" or "return"
        "return": an interrupt ends the evaluations, not the call. ``result.about["stopped"]`` says what ended a probe
        before its budget was spent: "until", "seconds" or "interrupt". What does never changes what was evaluated
        before.
    names : sequence of n str, optional
        What the players are called in tables and pictures, such as words or columns; the game's own names otherwise.
    progress : bool
        Show a progress bar.

    Returns
    -------
    InteractionResult

    Raises
    ------
    ArgumentError
        Names the argument, what came and what was expected.

    Warns
    -----
    RuntimeWarning
        When the arithmetic's rounding makes up more than 1 % of the variance of the second differences. Where the game
        has a more exact one and was not asked for this, all evaluations are made again in that, once more than the
        budget says; ``check_evaluations`` counts those that were of no use, ``about["too_coarse"]`` names them.
    """
    game = as_game(game, n)
    one_of("method", method, METHODS)
    one_of("gap", gap, GAPS)
    integer("seed", seed, least=0, most=2**64 - 1)
    wanted = wanted_indices(also)
    called = game.player_names if names is None else checked_names(names, game.n)
    chosen = resolve_pairs(game, pairs, rows, cols)
    grid = CornerGrid.of(chosen, game.n)
    three = None if triples is None else resolve_triples(triples, game.n)
    if three is not None and method != "auto":
        raise ArgumentError("triples", f'triples with method="{method}"', "the default method")
    stopping = Stopping.of(until, seconds, on_interrupt)
    if adaptive and (budget is None or method != "grid" or stopping.asked):
        expected = 'a budget to allocate, method="grid", and nothing else that may end it, or adaptive=False'
        raise ArgumentError("adaptive", True, expected)
    spending = spend(grid, contexts, budget)

    def estimated(game: Game) -> tuple[Run, Found]:
        run = Run(game, gap, seed, progress, wanted, spending.evaluations, three, stopping)
        with run.bar:
            if method == "grid":
                found = by_grid(run, grid, spending, budget is not None and adaptive is not False)
            elif method == "surrogate":
                total = integer("budget", spending.evaluations, least=LEAST_POINTS, most=MOST_POINTS)
                found = by_surrogate(run, grid, total)
            else:
                found = _by_default(run, grid, spending)
        stopped = {} if stopping.reason is None else {"stopped": stopping.reason}
        return run, replace(found, facts={**stopped, **found.facts})

    game, run, found = _steadily(game, estimated)
    result = InteractionResult(
        pairs=chosen.numpy(),
        sii=per_head(game, found.sii),
        sii_stderr=per_head(game, found.sii_stderr),
        gap=per_head(game, found.gap),
        gap_stderr=per_head(game, found.gap_stderr),
        degrees=found.degrees.numpy(),
        contexts=found.contexts.numpy(),
        evaluations=run.evaluations,
        check_evaluations=found.checks,
        noise_share=found.noise.numpy() if game.heads is not None else found.noise[0].numpy(),
        seed=seed,
        backend=game.backend,
        gap_kind=gap,
        heads=game.heads,
        player_names=called,
        about={**game.about(), "method": found.method, **found.facts},
        also=found.also,
    )
    if (worst := _worst(found)) > NOISE_LIMIT:
        warnings.warn(
            f"rounding makes up {percent(worst)} of the second differences' variance; use a more exact arithmetic "
            f"({game.more_exact})",
            RuntimeWarning,
            stacklevel=2,
        )
    return result


def _steadily(game: Game, estimated: Callable[[Game], tuple[Run, Found]]) -> tuple[Game, Run, Found]:
    """Estimates in the first arithmetic of a game whose rounding does not show, or in its last one."""
    run, found = estimated(game)
    wasted, coarse = 0, {}
    while (worst := _worst(found)) > NOISE_LIMIT and run.stopping.reason is None and (finer := game.finer()):
        say_moved(game, finer, worst)
        coarse[game.arithmetic] = worst
        wasted += run.evaluations + found.checks
        game = finer
        run, found = estimated(game)
    if found.checks:
        remember(game, worst)
    facts = {"too_coarse": coarse, **found.facts} if coarse else found.facts
    return game, run, replace(found, checks=wasted + found.checks, facts=facts)


def _worst(found: Found) -> float:
    """Share of noise of the worst head; zero where it was not measured."""
    return float(found.noise.nan_to_num(0.0).max())


def _by_default(run: Run, grid: CornerGrid, spending: Spending) -> Found:
    """The default's estimates, with the reason for the way it went."""
    way, why = default_way(run.game.n, spending, run.stopping.asked)
    if way == "enumeration":
        found = by_enumeration(run, grid)
    elif way == "points":
        found = by_points(run, grid, spending.evaluations)
    elif way == "contexts":
        found = by_contexts(run, grid, spending)
    elif run.triples is None:
        found = by_grid(run, grid, spending, adaptive=False)
    else:
        raise ArgumentError("budget", spending.evaluations, f"at least {LEAST_BUDGET} evaluations for triples")
    return replace(found, facts={"why": why, **found.facts})
