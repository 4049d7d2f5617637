"""Estimating the Shapley interactions and redundancy gaps of chosen pairs, with error bars."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.probes.gap import GAPS, redundancy_gap
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import IndexEstimate, complete_players, contrast, wanted_indices
from flmoe_fast.probes.moments import Draw, combine, successive_variance, unit_means
from flmoe_fast.probes.pairs import resolve_pairs
from flmoe_fast.probes.points import Points
from flmoe_fast.probes.reading import Control, Reading, read
from flmoe_fast.probes.result import InteractionResult
from flmoe_fast.probes.surrogate import MOST_POINTS, Surrogate

METHODS = ("grid", "surrogate", "auto")
DEFAULT_CONTEXTS = 64
#: Share of rounding noise in the variance of second differences above which a result warns.
NOISE_LIMIT = 0.01
#: Contexts and pairs that are evaluated once more in higher precision.
NOISE_CONTEXTS, NOISE_PAIRS = 4, 4
#: Fewest units from which a variance is worth choosing pairs by.
PILOT_UNITS = 3
#: Pairs and contexts by which "auto" tells what a grid would do.
PILOT_PAIRS, PILOT_CONTEXTS = 8, 8
#: Shares of the budget after which it looks, and by what factor a surrogate then has to be worse to be given up: early on
#: it still gains faster than a grid.
LOOKS = ((0.25, 4.0), (0.5, 1.0))
#: Its contexts are independent of all others of the same seed.
PILOT_REPLICATE = 1 << 30
#: Fewest coalitions worth fitting a surrogate to.
LEAST_POINTS = 32


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
    gap: str = "max",
    adaptive: bool | None = None,
    also: Sequence[str] | str = (),
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
        "grid": averages over corner grids, unbiased for any number of players. "surrogate": a Gaussian process fitted to
        coalitions drawn at random, see :mod:`flmoe_fast.probes.surrogate`; for few players it is many times closer at the
        same cost, it takes up to 8,192 evaluations, and it needs seconds of its own for every output. "auto": a surrogate
        from half the budget, then more of it or a grid, whichever promises the smaller error; ``result.about`` says which.
        Standard errors are of the method that was used. With ``contexts`` these spend what that many contexts would.
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
    chosen = resolve_pairs(game, pairs, rows, cols)
    grid = CornerGrid.of(chosen, game.n)
    plan = _plan(grid, contexts, budget, adaptive) if method == "grid" else None
    total = _total(grid, contexts, budget, method) if plan is None else budget or plan[0] * grid.evaluations
    run = Run(game, gap, seed, progress, wanted, total)
    with run.bar:
        found = _surrogate(run, grid, total, method) if plan is None else None
        if found is None:
            left = total - run.evaluations
            found = _grid(run, grid, left, *(plan or _plan(grid, None, left, adaptive)))
    result = InteractionResult(
        pairs=chosen.numpy(),
        sii=_heads(game, found.sii),
        sii_stderr=_heads(game, found.sii_stderr),
        gap=_heads(game, found.gap),
        gap_stderr=_heads(game, found.gap_stderr),
        degrees=found.degrees.numpy(),
        contexts=found.contexts.numpy(),
        evaluations=run.evaluations,
        check_evaluations=found.checks,
        noise_share=found.noise.numpy() if game.heads is not None else found.noise[0].numpy(),
        seed=seed,
        backend=game.backend,
        gap_kind=gap,
        heads=game.heads,
        player_names=game.player_names,
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


@dataclass(frozen=True)
class _Found:
    """What a method found: (P, O) estimates and standard errors, and how."""

    method: str
    sii: torch.Tensor
    sii_stderr: torch.Tensor
    gap: torch.Tensor
    gap_stderr: torch.Tensor
    degrees: torch.Tensor
    contexts: torch.Tensor
    noise: torch.Tensor
    checks: int
    also: dict[tuple[str, int], IndexEstimate]


def _grid(run: Run, grid: CornerGrid, left: int, count: int, adaptive: bool) -> _Found:
    """Estimates from ``count`` contexts and, where adaptive, what is left for the pairs that vary most."""
    start, pairs = run.evaluations, len(grid.pairs)
    first = run.draw(grid, torch.arange(pairs), count)
    noise, checks = _noise_share(run.game, grid, first)
    if adaptive:
        again, more = _worth_repeating(grid.pairs, first.sii, left - (run.evaluations - start))
        if more:
            run.draw(CornerGrid.of(grid.pairs[again], run.game.n), again, more)
    sii, sii_stderr, degrees = combine(run.sii, pairs)
    gaps, gap_stderr, _ = combine(run.gap, pairs)
    if run.controls:
        sii_stderr = (sii_stderr.square() + torch.stack([c.sii_sampling for c in run.controls], 1)).sqrt()
        gap_stderr = (gap_stderr.square() + torch.stack([c.gap_sampling for c in run.controls], 1)).sqrt()
    method = "grid residual" if run.controls else "grid"
    return _Found(
        method, sii, sii_stderr, gaps, gap_stderr, degrees, run.contexts(pairs), noise, checks, run.others()
    )


def _surrogate(run: Run, grid: CornerGrid, budget: int, method: str) -> _Found | None:
    """Estimates from surrogates of every output; None where a grid is expected to do better (``method="auto"``).

    "auto" fits to a quarter of the budget first, then perhaps to half, and compares the variance it claims with what a grid of the same cost would
    have, by the second differences of a few pairs in a few contexts. If the grid promises the smaller error, the rest of the
    budget goes to it, with the surrogates as control variates where they lessen the variance.
    """
    game, pairs = run.game, len(grid.pairs)
    points = Points(game, run.seed, run.bar)
    pilot = None
    if method == "auto":
        pilot = _Pilot(game, grid, run.seed)
        if pilot.evaluations > budget // 4:
            pilot = None  # a surrogate needs no whole contexts, so it makes more of the little there is
    if pilot is not None:
        pilot.evaluate(run.bar)
        for share, much_worse in LOOKS:
            points.evaluate(min(int(budget * share), MOST_POINTS))
            surrogates, readings = _read_all(run, grid, points)
            before, after = pilot.unit_variances(surrogates)
            spent = pilot.evaluations + points.spent
            claimed = torch.stack([reading.sii.variance.mean() for reading in readings])
            rival = before / max(1.0, spent / (2 * grid.evaluations))
            ratio = claimed / rival.clamp(min=torch.finfo(before.dtype).tiny)
            run.facts["surrogate_over_grid"] = ratio.tolist()
            worse = float(ratio.clamp(min=1e-30).log().mean().exp())
            affordable = budget - spent >= PILOT_UNITS * 2 * grid.evaluations
            if affordable and (worse > much_worse or budget - pilot.evaluations > MOST_POINTS):
                run.evaluations = spent
                if bool((after < before).all()):
                    run.controls = [Control(s, r) for s, r in zip(surrogates, readings)]
                return None
            if worse < 1.0:
                break
        points.add(pilot.coalitions, pilot.values)
    pilot_cost = 0 if pilot is None else pilot.evaluations
    points.evaluate(min(points.count + budget - pilot_cost - points.spent, MOST_POINTS))
    surrogates, readings = _read_all(run, grid, points)
    run.evaluations = pilot_cost + points.spent
    run.facts |= {"link": [s.link for s in surrogates], "explained": [s.explained for s in surrogates]}

    def stacked(of: str, part: str) -> torch.Tensor:
        return torch.stack([getattr(getattr(reading, of), part) for reading in readings], 1)

    also = {}
    for key, (members, _) in readings[0].also.items():
        parts = [reading.also[key][1] for reading in readings]
        value, variance, degrees = (torch.stack([getattr(p, f) for p in parts], 1) for f in ("value", "variance", "degrees"))
        also[key] = IndexEstimate(
            members.numpy(), _heads(game, value), _heads(game, variance.sqrt()), degrees.min(1).values.numpy()
        )
    spread = torch.stack([(reading.unit_variance * 2).mean() for reading in readings])
    noise, checks = _surrogate_noise(game, grid, run.seed, spread)
    return _Found(
        "surrogate",
        stacked("sii", "value"),
        stacked("sii", "variance").sqrt(),
        stacked("gap", "value"),
        stacked("gap", "variance").sqrt(),
        stacked("sii", "degrees").min(1).values,
        torch.full((pairs,), points.count),
        noise,
        checks,
        also,
    )


class _Pilot:
    """Second differences of a few pairs in a few contexts, to compare methods by."""

    def __init__(self, game: Game, grid: CornerGrid, seed: int):
        some = torch.linspace(0, len(grid.pairs) - 1, min(PILOT_PAIRS, len(grid.pairs))).long()
        self.game, self.grid = game, CornerGrid.of(grid.pairs[some], game.n)
        words = sample_contexts(game.n, PILOT_CONTEXTS, seed=seed, replicate=PILOT_REPLICATE).words
        self.contexts = unpack(words, game.n)
        self.coalitions = (self.contexts[:, None] ^ self.grid.toggled).flatten(0, 1)
        self.evaluations = len(self.coalitions)

    def evaluate(self, bar: tqdm) -> None:
        """Values (C, O) of the coalitions."""
        values = _corner_values(self.game, self.contexts, self.grid)
        self.values = values.flatten(0, 1)
        bar.update(self.evaluations)

    def unit_variances(self, surrogates: list[Surrogate]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean variance over pairs (O,) of an antithetic pair of contexts: as it is, and less what surrogates say."""

        def variance(values: torch.Tensor) -> torch.Tensor:
            second = _second(self.grid.corners(self.contexts, values.unflatten(0, (len(self.contexts), -1))))
            return successive_variance(unit_means(second, 2)).mean(0)

        said = torch.stack([s.predict(self.coalitions) for s in surrogates], 1)
        return variance(self.values), variance(self.values - said)


def _read_all(run: Run, grid: CornerGrid, points: Points) -> tuple[list[Surrogate], list[Reading]]:
    """A surrogate of every output, and what it says about the pairs."""
    surrogates = [Surrogate(points.coalitions, column) for column in points.values.T]
    return surrogates, [read(s, grid, run.game.n, run.gap_kind, run.also, run.seed) for s in surrogates]


def _total(grid: CornerGrid, contexts: int | None, budget: int | None, method: str) -> int:
    """Evaluations that a surrogate may spend."""
    if budget is None:
        return integer("contexts", DEFAULT_CONTEXTS if contexts is None else contexts, least=1) * grid.evaluations
    if contexts is not None:
        raise ArgumentError("budget", "a budget together with contexts", "one of the two")
    return integer("budget", budget, least=LEAST_POINTS, most=MOST_POINTS if method == "surrogate" else None)


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


class Run:
    """Evaluates draws of contexts and keeps what the estimates are made of."""

    def __init__(
        self, game: Game, gap: str, seed: int, progress: bool, also: tuple[tuple[str, int], ...], total: int
    ):
        self.game, self.gap_kind, self.seed, self.also = game, gap, seed, also
        self.bar = tqdm(total=total, unit="eval", desc="interactions", disable=not progress, leave=False)
        self.evaluations = 0
        self.sii: list[Draw] = []
        self.gap: list[Draw] = []
        self._contexts: list[tuple[torch.Tensor, int]] = []
        self.controls: list[Control] = []
        self.facts: dict[str, Any] = {}
        self._others: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {key: [] for key in also}

    def draw(self, grid: CornerGrid, chosen: torch.Tensor, count: int) -> _Draw:
        """Evaluate ``grid`` in ``count`` fresh contexts; ``chosen`` are its pairs' numbers."""
        antithetic = count % 2 == 0 and count >= 4
        words = sample_contexts(
            self.game.n, count, seed=self.seed, antithetic=antithetic, replicate=len(self.sii)
        ).words
        contexts = unpack(words, self.game.n)
        second, gaps, defined, gains, less = [], [], [], [], []
        for block in contexts.split(max(1, self.game.block // grid.evaluations)):
            values = _corner_values(self.game, block, grid)
            corners = grid.corners(block, values)
            second.append(_second(corners))
            value, where = redundancy_gap(self.gap_kind, *corners)
            if self.controls:
                likely = torch.stack([c.surrogate.predict_grid(block, grid.toggled) for c in self.controls], 2)
                likely = grid.corners(block, likely)
                less.append(_second(likely))
                if where is None:
                    value = value - redundancy_gap(self.gap_kind, *likely)[0]
                    value = value + torch.stack([c.gap[chosen] for c in self.controls], 1)
            gaps.append(value)
            defined.append(where)
            if self.also:
                gains.append(grid.gains(block, values))
            self.evaluations += values.shape[0] * values.shape[1]
            self.bar.update(values.shape[0] * values.shape[1])
        per_unit = 2 if antithetic else 1
        samples = torch.cat(second)
        corrected = samples
        if self.controls:
            corrected = samples - torch.cat(less) + torch.stack([c.sii[chosen] for c in self.controls], 1)
        sii = Draw(chosen, unit_means(corrected, per_unit))
        share = None if defined[0] is None else unit_means(torch.cat(defined).double(), per_unit)
        self.sii.append(sii)
        self.gap.append(Draw(chosen, unit_means(torch.cat(gaps), per_unit), share))
        self._contexts.append((chosen, count))
        if self.also:
            self._weigh(grid, contexts, samples, torch.cat(gains), per_unit)
        return _Draw(contexts, per_unit, samples, sii)

    def contexts(self, pairs: int) -> torch.Tensor:
        """Contexts per pair (P,)."""
        total = torch.zeros(pairs, dtype=torch.long)
        for chosen, count in self._contexts:
            total[chosen] += count
        return total


    def _weigh(
        self, grid: CornerGrid, contexts: torch.Tensor, second: torch.Tensor, gains: torch.Tensor, per_unit: int
    ) -> None:
        """Keep this draw's samples of the other indices."""
        n, size = self.game.n, contexts.sum(1, keepdim=True)
        pair_size = size - contexts[:, grid.pairs].sum(2)
        player_size = size - contexts[:, grid.players].long()
        for name, order in self.also:
            if (name, order) == ("k-SII", 1):
                members = complete_players(grid.pairs, n)
                of_player = (grid.pairs[:, :, None] == members).any(1).double()  # (P, M)
                samples = gains[:, torch.isin(grid.players, members)]
                samples = samples - 0.5 * torch.einsum("kpo,pm->kmo", second, of_player)
                members = members[:, None]
            elif order == 1:
                members = grid.players[:, None]
                samples = gains * contrast(name, 1, player_size, n)[..., None]
            else:
                members = grid.pairs
                samples = second * contrast(name, 2, pair_size, n)[..., None]
            self._others[name, order].append((members, unit_means(samples, per_unit)))

    def others(self) -> dict[tuple[str, int], IndexEstimate]:
        """The other indices; entries in the order of the first draw, which has them all."""
        found = {}
        for key, draws in self._others.items():
            members = draws[0][0]
            row = {tuple(member): m for m, member in enumerate(members.tolist())}
            parts = [Draw(torch.tensor([row[tuple(m)] for m in some.tolist()]), units) for some, units in draws]
            if len(members):
                values, stderr, degrees = combine([part for part in parts if len(part.chosen)], len(members))
                found[key] = IndexEstimate(
                    members.numpy(), _heads(self.game, values), _heads(self.game, stderr), degrees.numpy()
                )
        return found


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
    exact = _second(small.corners(contexts, _corner_values(precise, contexts, small)))
    error = draw.second[some_contexts][:, some_pairs] - exact
    spread = draw.second.flatten(0, 1).var(0, correction=0)
    noise = error.square().mean((0, 1))
    return torch.where(noise == 0, 0.0, noise / spread), len(contexts) * small.evaluations


def _surrogate_noise(
    game: Game, grid: CornerGrid, seed: int, spread: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """As :func:`_noise_share`, where no context was evaluated on a grid: a few are, in both precisions."""
    precise = game.precise()
    if precise is None:
        return torch.full_like(spread, torch.nan), 0
    some_pairs = torch.linspace(0, len(grid.pairs) - 1, min(NOISE_PAIRS, len(grid.pairs))).long()
    small = CornerGrid.of(grid.pairs[some_pairs], game.n)
    contexts = unpack(sample_contexts(game.n, NOISE_CONTEXTS, seed=seed).words, game.n)
    both = [_second(small.corners(contexts, _corner_values(g, contexts, small))) for g in (game, precise)]
    noise = (both[0] - both[1]).square().mean((0, 1))
    return torch.where(noise == 0, 0.0, noise / spread), 2 * len(contexts) * small.evaluations


def _second(corners: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Second differences from the corners 11, 10, 01, 00."""
    v11, v10, v01, v00 = corners
    return v11 - v10 - v01 + v00


def _corner_values(game: Game, contexts: torch.Tensor, grid: CornerGrid) -> torch.Tensor:
    """Values (K, G, O) of a grid's corners; O = 1 for a game with a single value."""
    values = game.corner_values(contexts, grid.toggled)
    return values[..., None] if values.dim() == 2 else values


def _heads(game: Game, values: torch.Tensor) -> np.ndarray:
    """(P, O) for games with heads, (P,) for a single unnamed value."""
    values = values.numpy()
    return values[:, 0] if game.heads is None and values.shape[1] == 1 else values
