"""Estimating the Shapley interactions and redundancy gaps of chosen pairs, with error bars."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from flmoe_fast.checks import integer, one_of
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.probes.by_grid import by_grid, grid_plan
from flmoe_fast.probes.by_surrogate import by_surrogate, surrogate_budget
from flmoe_fast.probes.gap import DEFAULT_GAP, GAPS
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import wanted_indices
from flmoe_fast.probes.pairs import resolve_pairs
from flmoe_fast.probes.result import InteractionResult, checked_names
from flmoe_fast.probes.run import Run, per_head

METHODS = ("grid", "surrogate", "auto")
#: Share of rounding noise in the variance of second differences above which a result warns.
NOISE_LIMIT = 0.01


def interactions(
    game: Game | Callable,
    *,
    rows: Sequence[int] | None = None,
    cols: Sequence[int] | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    n: int | None = None,
    contexts: int | None = None,
    budget: int | None = None,
    method: str = "grid",
    seed: int = 0,
    gap: str = DEFAULT_GAP,
    adaptive: bool | None = None,
    also: Sequence[str] | str = (),
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> InteractionResult:
    """Shapley Interaction Index and redundancy gap of pairs of players, estimated on shared corner grids.

    Every context costs ``1 + Q + P`` evaluations for P pairs on Q players and gives one sample for each pair. Contexts
    are stratified by size, balanced over players by a Latin hypercube and come with their complements. Standard errors
    account for that.

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
        Number of contexts K; 64 if neither this nor ``budget`` is given. Even numbers of at least 4 are drawn as
        antithetic pairs.
    budget : int, optional
        Evaluations that may be spent. Never exceeded; what does not make a whole context is left over.
    method : "grid", "surrogate" or "auto"
        "grid": averages over corner grids, unbiased for any number of players. "surrogate": a Gaussian process fitted
        to coalitions drawn at random (:mod:`flmoe_fast.probes.surrogate`); for few players it is many times closer at
        the same cost; it takes at most 8,192 evaluations, and seconds of its own for every output. "auto": a surrogate
        from part of the budget, then more of it or a grid, whichever promises the smaller error;
        ``result.about["method"]`` says which. With ``contexts`` in place of a budget these spend what that many
        contexts would.
    seed : int
        The same seed gives the same coalitions on every device.
    gap : "max", "sum", "strict" or "ratio"
        Kind of redundancy gap, see :mod:`flmoe_fast.probes.gap`.
    adaptive : bool, optional
        Spend the second half of a budget on the pairs whose estimates vary most (chosen by their variance only).
        Default: with ``budget`` yes, with ``contexts`` no. Needs a budget.
    also : sequence of "SV", "BV", "BII", "STII", "FSII", "k-SII"
        Other indices to estimate from the same evaluations (:mod:`flmoe_fast.probes.indices`): single players' for the
        players of the pairs, k-SII of single players only where all their pairs are probed. They are in
        ``result.also``; ``result.index(name, order)`` is a table.
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
        When the arithmetic's rounding makes up more than 1 % of the variance of the second differences.
    """
    game = as_game(game, n)
    one_of("method", method, METHODS)
    one_of("gap", gap, GAPS)
    integer("seed", seed, least=0, most=2**64 - 1)
    wanted = wanted_indices(also)
    called = game.player_names if names is None else checked_names(names, game.n)
    chosen = resolve_pairs(game, pairs, rows, cols)
    grid = CornerGrid.of(chosen, game.n)
    plan = grid_plan(grid, contexts, budget, adaptive) if method == "grid" else None
    total = surrogate_budget(grid, contexts, budget, method) if plan is None else budget or plan[0] * grid.evaluations
    run = Run(game, gap, seed, progress, wanted, total)
    with run.bar:
        found = by_surrogate(run, grid, total, method) if plan is None else None
        if found is None:
            left = total - run.evaluations
            found = by_grid(run, grid, left, *(plan or grid_plan(grid, None, left, adaptive)))
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
        about={**game.about(), "method": found.method, **run.facts},
        also=found.also,
    )
    worst = float(np.nanmax(result.noise_share)) if np.isfinite(result.noise_share).any() else 0.0
    if worst > NOISE_LIMIT:
        warnings.warn(
            f"rounding makes up {worst:.1%} of the variance of the second differences; use a more exact arithmetic "
            f"({game.more_exact})",
            RuntimeWarning,
            stacklevel=2,
        )
    return result
