"""Estimating the Shapley interactions and redundancy gaps of chosen pairs, with error bars."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.probes.gap import GAPS, LEAST_JOINT_COST, redundancy_gap
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.moments import Draw, combine, successive_variance, unit_means
from flmoe_fast.probes.pairs import resolve_pairs
from flmoe_fast.probes.result import InteractionResult

DEFAULT_CONTEXTS = 64
#: Share of rounding noise in the variance of second differences above which a result warns.
NOISE_LIMIT = 0.01
#: Contexts and pairs that are evaluated once more in higher precision.
NOISE_CONTEXTS, NOISE_PAIRS = 4, 4
#: Fewest units from which a variance is worth choosing pairs by.
PILOT_UNITS = 3


def interactions(
    game: Game | Callable,
    *,
    rows: Sequence[int] | None = None,
    cols: Sequence[int] | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    n: int | None = None,
    contexts: int | None = None,
    budget: int | None = None,
    seed: int = 0,
    gap: str = "max",
    adaptive: bool | None = None,
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
    seed : int
        The same seed gives the same coalitions on every device.
    gap : "max", "sum", "strict" or "ratio"
        Kind of redundancy gap, see :mod:`flmoe_fast.probes.gap`.
    adaptive : bool, optional
        Spend the second half of a budget on the pairs whose estimates vary most (chosen by their variance only).
        Default: with ``budget`` yes, with ``contexts`` no. Needs a budget.
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
    one_of("gap", gap, GAPS)
    integer("seed", seed, least=0, most=2**64 - 1)
    chosen = resolve_pairs(game, pairs, rows, cols)
    grid = CornerGrid.of(chosen, game.n)
    count, adaptive = _plan(grid, contexts, budget, adaptive)

    run = _Run(game, gap, seed, progress, total=budget if budget is not None else count * grid.evaluations)
    with run.bar:
        first = run.draw(grid, torch.arange(len(chosen)), count)
        noise, checks = _noise_share(game, grid, first)
        if adaptive:
            again, more = _worth_repeating(chosen, first.sii, budget - run.evaluations)
            if more:
                run.draw(CornerGrid.of(chosen[again], game.n), again, more)
    sii, sii_stderr, degrees = combine(run.sii, len(chosen))
    gaps, gap_stderr, _ = combine(run.gap, len(chosen))
    result = InteractionResult(
        pairs=chosen.numpy(),
        sii=_heads(game, sii),
        sii_stderr=_heads(game, sii_stderr),
        gap=_heads(game, gaps),
        gap_stderr=_heads(game, gap_stderr),
        degrees=degrees.numpy(),
        contexts=run.contexts(len(chosen)).numpy(),
        evaluations=run.evaluations,
        check_evaluations=checks,
        noise_share=noise.numpy() if game.heads is not None else noise[0].numpy(),
        seed=seed,
        backend=game.backend,
        gap_kind=gap,
        heads=game.heads,
        player_names=game.player_names,
        about=game.about(),
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


def _plan(grid: CornerGrid, contexts: int | None, budget: int | None, adaptive: bool | None) -> tuple[int, bool]:
    """Contexts of the first draw, and whether a second one follows."""
    if budget is None:
        if adaptive:
            raise ArgumentError("adaptive", True, "a budget to allocate, or adaptive=False")
        return integer("contexts", DEFAULT_CONTEXTS if contexts is None else contexts, least=1), False
    if contexts is not None:
        raise ArgumentError("budget", "a budget together with contexts", "one of the two")
    affordable = integer("budget", budget, least=1) // grid.evaluations
    if affordable < 1:
        raise ArgumentError("budget", budget, f"at least {grid.evaluations} evaluations, the cost of one context")
    half = 2 * max(PILOT_UNITS, affordable // 4)
    if adaptive is not False and affordable > half:
        return half, True
    return affordable - affordable % 2 if affordable >= 4 else affordable, False


class _Draw:
    """Samples of one draw of contexts on one grid."""

    def __init__(self, contexts: torch.Tensor, per_unit: int, second: torch.Tensor, sii: Draw):
        self.contexts = contexts  # (K, n)
        self.per_unit = per_unit
        self.second = second  # (K, P', O) second differences
        self.sii = sii


class _Run:
    """Evaluates draws of contexts and keeps what the estimates are made of."""

    def __init__(self, game: Game, gap: str, seed: int, progress: bool, total: int):
        self.game, self.gap_kind, self.seed = game, gap, seed
        self.bar = tqdm(total=total, unit="eval", desc="interactions", disable=not progress, leave=False)
        self.evaluations = 0
        self.sii: list[Draw] = []
        self.gap: list[Draw] = []
        self._contexts: list[tuple[torch.Tensor, int]] = []

    def draw(self, grid: CornerGrid, chosen: torch.Tensor, count: int) -> _Draw:
        """Evaluate ``grid`` in ``count`` fresh contexts; ``chosen`` are its pairs' numbers."""
        antithetic = count % 2 == 0 and count >= 4
        words = sample_contexts(
            self.game.n, count, seed=self.seed, antithetic=antithetic, replicate=len(self.sii)
        ).words
        contexts = unpack(words, self.game.n)
        second, gaps, defined = [], [], []
        for block in contexts.split(max(1, self.game.block // grid.evaluations)):
            difference, value, where = _samples(self.game, block, grid, self.gap_kind)
            second.append(difference)
            gaps.append(value)
            defined.append(where)
            self.evaluations += len(block) * grid.evaluations
            self.bar.update(len(block) * grid.evaluations)
        per_unit = 2 if antithetic else 1
        samples = torch.cat(second)
        sii = Draw(chosen, unit_means(samples, per_unit))
        share = None if defined[0] is None else unit_means(torch.cat(defined).double(), per_unit)
        self.sii.append(sii)
        self.gap.append(Draw(chosen, unit_means(torch.cat(gaps), per_unit), share))
        self._contexts.append((chosen, count))
        return _Draw(contexts, per_unit, samples, sii)

    def contexts(self, pairs: int) -> torch.Tensor:
        """Contexts per pair (P,)."""
        total = torch.zeros(pairs, dtype=torch.long)
        for chosen, count in self._contexts:
            total[chosen] += count
        return total


def _worth_repeating(pairs: torch.Tensor, pilot: Draw, left: int) -> tuple[torch.Tensor, int]:
    """Pairs to spend ``left`` evaluations on, and in how many contexts.

    Pairs are taken in the order of their variance, as many as make the expected sum of squared errors smallest: few
    pairs make contexts cheap. Every head counts alike, whatever its scale.
    """
    variance = successive_variance(pilot.total)  # (P, O)
    variance = (variance / variance.sum(0).clamp(min=torch.finfo(variance.dtype).tiny)).sum(1)
    order = variance.argsort(descending=True)
    done = len(pilot.total)
    best = (float(variance.sum()) / done, order[:0], 0)
    players: set[int] = set()
    spent = torch.zeros((), dtype=variance.dtype)
    for size, pair in enumerate(order.tolist(), start=1):
        players.update(pairs[pair].tolist())
        spent = spent + variance[pair]
        units = left // (2 * (1 + len(players) + size))
        if units < 2:
            break
        expected = float(spent / (done + units) + (variance.sum() - spent) / done)
        if expected < best[0]:
            best = (expected, order[:size], 2 * units)
    return best[1].sort().values, best[2]


def _noise_share(game: Game, grid: CornerGrid, draw: _Draw) -> tuple[torch.Tensor, int]:
    """Rounding noise of the second differences over their variance, per head, and evaluations spent on it."""
    outputs = draw.second.shape[-1]
    precise = game.precise()
    if precise is None:
        return torch.full((outputs,), torch.nan, dtype=torch.float64), 0
    some_contexts = torch.linspace(0, len(draw.contexts) - 1, min(NOISE_CONTEXTS, len(draw.contexts))).long()
    some_pairs = torch.linspace(0, len(grid.pairs) - 1, min(NOISE_PAIRS, len(grid.pairs))).long()
    small = CornerGrid.of(grid.pairs[some_pairs], game.n)
    contexts = draw.contexts[some_contexts]
    v11, v10, v01, v00 = small.corners(contexts, _corner_values(precise, contexts, small))
    error = draw.second[some_contexts][:, some_pairs] - (v11 - v10 - v01 + v00)
    spread = draw.second.flatten(0, 1).var(0, correction=0)
    noise = error.square().mean((0, 1))
    return torch.where(noise == 0, 0.0, noise / spread), len(contexts) * small.evaluations


def _samples(
    game: Game, contexts: torch.Tensor, grid: CornerGrid, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Second differences and gaps (K, P, O) of a block of contexts, and where the gaps are defined."""
    reduced = game.corner_samples(contexts, grid.toggled, grid.pairs, grid.single, LEAST_JOINT_COST)
    if reduced is not None:
        second, gaps, defined = reduced
        return second, gaps[GAPS.index(kind)], defined if kind == "ratio" else None
    v11, v10, v01, v00 = grid.corners(contexts, _corner_values(game, contexts, grid))
    return v11 - v10 - v01 + v00, *redundancy_gap(kind, v11, v10, v01, v00)


def _corner_values(game: Game, contexts: torch.Tensor, grid: CornerGrid) -> torch.Tensor:
    """Values (K, G, O) of a grid's corners; O = 1 for a game with a single value."""
    values = game.corner_values(contexts, grid.toggled)
    return values[..., None] if values.dim() == 2 else values


def _heads(game: Game, values: torch.Tensor) -> np.ndarray:
    """(P, O) for games with heads, (P,) for a single unnamed value."""
    values = values.numpy()
    return values[:, 0] if game.heads is None and values.shape[1] == 1 else values
