"""Which of all pairs interact: a surrogate's closed forms for every pair, checked on fresh contexts, or a refusal.

All n (n - 1) / 2 interactions are read off one surrogate of the values themselves. What share of their variance across
pairs is real is estimated from their standard errors: with m the mean square of the estimates and e that of their
standard errors, ``reliability = 1 - e / m``. A quarter of the budget is kept back and spent on the pairs that rank
first, on a corner grid with contexts of their own, so that the numbers reported for them are not those they were chosen
by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.probes.by_surrogate import LEAST_POINTS
from flmoe_fast.probes.gap import DEFAULT_GAP
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.indices import rule
from flmoe_fast.probes.interactions import interactions
from flmoe_fast.probes.naming import checked_names, head_number
from flmoe_fast.probes.pair_score import SHOWN, with_error
from flmoe_fast.probes.points import Points
from flmoe_fast.probes.progress import progress_bar
from flmoe_fast.probes.result import InteractionResult
from flmoe_fast.probes.surrogate import MOST_POINTS, Surrogate, functionals

if TYPE_CHECKING:
    import pandas

#: Share of the budget for the check.
CHECKED = 0.25
#: Contexts of the check below which its standard errors say little.
LEAST_CONTEXTS = 6
PAIR_BLOCK = 1 << 12
#: Interactions up to this share of the largest value are rounding, whose size says nothing about a ranking.
ROUNDING = 1e-13
#: The check's contexts are those of another seed.
CHECK_SEED = 0x9E3779B97F4A7C15


class UnresolvedError(ArgumentError):
    """A budget that does not tell interacting pairs from others."""


@dataclass(frozen=True)
class Screening:
    """All pairs, ranked, and the first of them measured anew.

    ``print(found)`` shows the first ones, ``found.top()`` and ``found.to_dataframe()`` are tables, ``found.checked`` is
    a result.

    Attributes
    ----------
    pairs : int64 (P, 2)
        All pairs of the game's players.
    sii, stderr : float64 (P,)
        Of the surrogate, for one head.
    reliability : float
        Estimated share of the variance of ``sii`` across pairs that is real; 1 is perfect, 0 or less is noise.
    explained : float
        Share of the values' variance that the surrogate predicts when left out.
    checked : InteractionResult
        The pairs that rank first by size, on a corner grid, with intervals free of the luck of being chosen.
    agreement : float
        Correlation of the surrogate's numbers for them with the fresh ones; NaN for fewer than three.
    evaluations : int
    head : str, int or None
        Which output was screened.
    """

    pairs: np.ndarray
    sii: np.ndarray
    stderr: np.ndarray
    reliability: float
    explained: float
    checked: InteractionResult
    agreement: float
    evaluations: int
    head: str | int | None

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        lines = [
            f"Screening: {len(self)} pairs, {self.evaluations:,} evaluations; {self.reliability:.0%} of what tells "
            f"them apart is real; the first {len(self.checked)} measured anew"
        ]
        table = self.top(SHOWN)
        for name_i, name_j, *numbers in table[list(table.columns[2:])].itertuples(index=False):
            old, new = with_error(*numbers[:2]), with_error(*numbers[2:])
            lines.append(f"  {name_i} x {name_j}  SII {old}" + ("" if new == "undefined" else f", anew {new}"))
        if len(self) > SHOWN:
            lines.append(f"  ... {len(self) - SHOWN} more; see .top(), .to_dataframe(), .checked")
        return "\n".join(lines)

    def order(self) -> np.ndarray:
        """Pair numbers by the size of their interaction, largest first."""
        return np.argsort(-np.abs(self.sii), kind="stable")

    def top(self, k: int = 10) -> pandas.DataFrame:
        """The ``k`` first pairs as a table."""
        return self.to_dataframe().iloc[: integer("k", k, least=1)]

    def to_dataframe(self) -> pandas.DataFrame:
        """All pairs, the first of the ranking first; ``checked`` is NaN where a pair was not measured anew."""
        import pandas

        order = self.order()
        pairs, names = self.pairs[order], self.checked.player_names
        fresh = [self.checked.pair(i, j, self.head) if (i, j) in self.checked else None for i, j in pairs.tolist()]
        columns: dict = {"i": pairs[:, 0], "j": pairs[:, 1]}
        columns |= {f"name_{side}": [names[p] for p in pairs[:, n]] for n, side in enumerate("ij")}
        columns |= {"sii": self.sii[order], "stderr": self.stderr[order]}
        columns["checked"] = [np.nan if score is None else score.sii for score in fresh]
        columns["checked_stderr"] = [np.nan if score is None else score.sii_stderr for score in fresh]
        return pandas.DataFrame(columns)


def screen(
    game: Game | Callable,
    *,
    budget: int,
    n: int | None = None,
    top: int = 16,
    head: str | int | None = None,
    least: float = 0.5,
    seed: int = 0,
    gap: str = DEFAULT_GAP,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> Screening:
    """Screen all pairs of players with at most ``budget`` evaluations.

    Parameters
    ----------
    game : Game or callable
    budget : int
        A quarter of it is kept for the check; a surrogate takes at most 8,192.
    n : int, optional
        Number of players, for a callable that has no ``n``.
    top : int
        Pairs to check.
    head : str or int, optional
        Which output; the first by default.
    least : float
        Reliability below which the result is refused; 0 takes whatever there is.
    seed : int
    gap : "max", "sum", "strict" or "ratio"
        For the pairs that are checked.
    names : sequence of n str, optional
        As for :func:`interactions`.
    progress : bool

    Raises
    ------
    UnresolvedError
        The estimated reliability is below ``least``. Nothing is lost on a game that remembers its values.
    ArgumentError
        A budget too small to fit anything or to check the pairs in six contexts.
    """
    game = as_game(game, n)
    names = game.player_names if names is None else checked_names(names, game.n)
    if not 0 <= least < 1:
        raise ArgumentError("least", repr(least), "a number of at least 0 and below 1")
    pairs = torch.combinations(torch.arange(game.n), 2)
    top = integer("top", top, least=1, most=len(pairs))
    seed = integer("seed", seed, least=0, most=2**64 - 1)
    # The check costs at most 1 + 2 top + top evaluations a context.
    costs = 1 + min(2 * top, game.n) + top
    needed = max(int(LEAST_CONTEXTS * costs / CHECKED), 2 * LEAST_POINTS)
    budget = integer("budget", budget, least=needed)
    with progress_bar(budget, "screening", progress) as bar:
        points = Points(game, seed, bar)
        points.evaluate(min(int(budget * (1 - CHECKED)), MOST_POINTS))
    column = points.values[:, head_number(head, game.heads)]
    surrogate = Surrogate(points.coalitions, column, "identity")
    sii, variance = _every_pair(surrogate, pairs, game.n)
    size = float(sii.square().mean())
    rounding = ROUNDING * float(column.abs().max())
    reliability = 1.0 - float(variance.mean()) / size if size > rounding**2 else 0.0
    if least > 0 and reliability < least:
        raise UnresolvedError(
            "budget",
            f"{budget} for {len(pairs)} pairs (reliability {max(reliability, 0.0):.2f}; the surrogate explains "
            f"{surrogate.explained:.0%} of the values' variance)",
            f"more evaluations, fewer players, or chosen pairs with interactions(...): reliability {least:.2f} or more",
        )
    first = sii.abs().argsort(descending=True)[:top]
    chosen = pairs[first]
    left = budget - points.spent
    checked = interactions(
        game, pairs=chosen, seed=seed ^ CHECK_SEED, gap=gap, method="grid", names=names, progress=progress,
        contexts=2 * (left // CornerGrid.of(chosen, game.n).evaluations // 2),
    )  # fmt: skip
    fresh = checked.column("sii", head)
    agree = float(np.corrcoef(sii[first].numpy(), fresh)[0, 1]) if top >= 3 and fresh.std() > 0 else float("nan")
    return Screening(
        pairs=pairs.numpy(),
        sii=sii.numpy(),
        stderr=variance.sqrt().numpy(),
        reliability=reliability,
        explained=surrogate.explained,
        checked=checked,
        agreement=agree,
        evaluations=points.spent + checked.evaluations,
        head=head,
    )


def _every_pair(surrogate: Surrogate, pairs: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """SII and its variance (P,) of all pairs."""
    nodes = rule("SII", 2, n)
    sii, variance = [], []
    for block in pairs.split(PAIR_BLOCK):
        column = functionals(surrogate.process.x, surrogate.process.rate, block, nodes)
        sii.append(column @ surrogate.process.weights)
        jackknife, _ = surrogate.jackknife(column)
        variance.append(surrogate.efficiency(block, column, nodes) * jackknife)
    return torch.cat(sii), torch.cat(variance)
