"""shapiq: our games for its estimators, and our estimators in its explainers.

Needs the extra ``shapiq``. Written against 1.4 to 1.8, whose interfaces used here are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.environment import require
from flmoe_fast.games.game import CallableGame, Game, as_game
from flmoe_fast.probes.exact import MOST_PLAYERS, enumerate_values
from flmoe_fast.probes.export import SINGLES, to_shapiq
from flmoe_fast.probes.interactions import interactions
from flmoe_fast.probes.result import InteractionResult
from flmoe_fast.probes.value_result import PlayerValues
from flmoe_fast.probes.values import player_values

shapiq: Any = require("shapiq", "shapiq")
base: Any = require("shapiq.approximator.base", "shapiq")


class ShapiqGame(shapiq.Game):
    """One head of a game as a ``shapiq.Game``, for any of shapiq's approximators, explainers and plots.

    Parameters
    ----------
    game : Game or callable
        A :class:`TokenGame`, or any function from a bool tensor (C, n) to (C,) or (C, O) numbers.
    n : int, optional
        Number of players, for a callable that has no ``n``.
    head : str or int, optional
        Which output; the first by default.
    normalize : bool
        Subtract the value of the empty coalition, as shapiq does by default. Costs one evaluation.
    """

    def __init__(
        self, game: Game | Callable, *, n: int | None = None, head: str | int | None = None, normalize: bool = True
    ):
        self.game = as_game(game, n)
        empty = self.game(torch.zeros(1, self.game.n, dtype=torch.bool))  # also names the heads of a callable
        self.head = _head(self.game, head)
        super().__init__(
            n_players=self.game.n,
            normalize=normalize,
            normalization_value=float(empty.reshape(1, -1)[0, self.head]) if normalize else None,
            player_names=list(self.game.player_names),
        )

    def value_function(self, coalitions: np.ndarray) -> np.ndarray:
        """Values (m,) float64 of coalitions (m, n), of any dtype of zeros and ones."""
        values = self.game(torch.from_numpy(np.atleast_2d(np.asarray(coalitions)).astype(bool)))
        return values.reshape(len(values), -1)[:, self.head].numpy()


def from_shapiq(game: Callable, n: int | None = None) -> Game:
    """A ``shapiq.Game``, imputer, or function of a bool array (m, n), as a game of ours."""
    if n is None:
        n = getattr(game, "n_players", None)
        if n is None:
            raise ArgumentError("n", None, "the number of players, since this game does not say it")
    return CallableGame(lambda coalitions: torch.from_numpy(np.array(game(coalitions.numpy()), dtype=np.float64)), n)


class ShapiqApproximator(base.Approximator):
    """Our estimators as a shapiq approximator: pass an instance to ``TabularExplainer`` or ``AgnosticExplainer``.

    The budget is never exceeded and includes the empty coalition; one that pays for all 2^n coalitions gives the exact
    index. What shapiq's container has no room for, the standard
    errors above all, is in :attr:`results` after a call.

    Parameters
    ----------
    n : int
        Players.
    max_order : 1 or 2
    index : "SII", "k-SII", "STII", "FSII", "BII", or "SV", "BV" with ``max_order=1``
    pairs : (P, 2) players, optional
        Estimate only these pairs, which leaves more of the budget to each; all pairs by default. Not for k-SII.
    random_state : int, optional
        Seed. The same object gives different numbers when called again, as shapiq's own do.
    **options
        ``method``, ``gap`` and ``adaptive`` of :func:`interactions`.

    Attributes
    ----------
    results : InteractionResult, PlayerValues or None
        Of the last call; None after an exact one.
    """

    valid_indices = ("SV", "BV", "SII", "k-SII", "STII", "FSII", "BII")

    def __init__(
        self,
        n: int,
        max_order: int = 2,
        index: str = "SII",
        *,
        pairs: Sequence[tuple[int, int]] | None = None,
        random_state: int | None = None,
        **options: Any,
    ):
        integer("max_order", max_order, least=1, most=2)
        if index in ("SII", "BII") and max_order == 1:
            index = {"SII": "SV", "BII": "BV"}[index]
        expected = ("SV", "BV") if max_order == 1 else self.valid_indices[2:]
        one_of("index", index, expected)
        if index == "k-SII" and pairs is not None:
            raise ArgumentError("pairs", "some pairs", "None for k-SII, whose single players need all pairs")
        # shapiq would list every pair in a dictionary that nothing here reads.
        super().__init__(
            n=integer("n", n, least=2), max_order=max_order, index=index, random_state=random_state,
            initialize_dict=False,
        )  # fmt: skip
        self.pairs, self.options = pairs, options
        self.results: InteractionResult | PlayerValues | None = None

    def approximate(self, budget: int, game: Callable, *args: Any, **kwargs: Any) -> Any:
        """``shapiq.InteractionValues`` from at most ``budget`` evaluations of ``game``.

        Raises
        ------
        ArgumentError
            A budget that does not pay for an estimate of every value asked for.
        """
        budget = integer("budget", budget, least=2)
        ours = from_shapiq(game, self.n)
        if self.n <= MOST_PLAYERS and budget >= 2**self.n:
            return self._exact(ours)
        empty = float(ours(torch.zeros(1, self.n, dtype=torch.bool))[0])
        seed = int(self._rng.integers(2**63))
        singles, spent = {}, 1
        found: PlayerValues | InteractionResult
        if self.max_order == 1:
            found = player_values(ours, index=self.index, budget=budget - spent, seed=seed, progress=False)
            pairs = {(player,): float(v) for player, v in zip(found.players.tolist(), found.values)}
        else:
            if self.index == "STII":  # of single players it is what each is worth alone
                alone = ours(torch.eye(self.n, dtype=torch.bool)) - empty
                singles, spent = {(i,): float(value) for i, value in enumerate(alone)}, 1 + self.n
            also = {name for name in (self.index, SINGLES.get(self.index, ("",))[0]) if name not in ("SII", "")}
            every = [(i, j) for i in range(self.n) for j in range(i + 1, self.n)]
            probed = found = interactions(
                ours, pairs=every if self.pairs is None else self.pairs, budget=budget - spent, seed=seed,
                also=sorted(also), progress=False, **self.options,
            )  # fmt: skip
            pairs = to_shapiq(probed, self.index).dict_values
        self.results = found
        return shapiq.InteractionValues(
            {(): empty, **singles, **pairs},
            index=self.index,
            max_order=self.max_order,
            min_order=0,
            n_players=self.n,
            estimated=True,
            estimation_budget=spent + found.evaluations,
            baseline_value=empty,
        )

    def _exact(self, game: Game) -> Any:
        """Every coalition is paid for: the index itself, by shapiq's own computer."""
        values = enumerate_values(game)

        def looked_up(coalitions: np.ndarray) -> np.ndarray:
            rows = torch.from_numpy(np.atleast_2d(np.asarray(coalitions)).astype(bool))
            return values[(rows.long() << torch.arange(self.n)).sum(1)].numpy()

        exact = shapiq.ExactComputer(n_players=self.n, game=looked_up)(self.index, order=self.max_order)
        wanted = None if self.pairs is None else {tuple(sorted(pair)) for pair in self.pairs}
        found = {k: v for k, v in exact.dict_values.items() if len(k) < 2 or wanted is None or k in wanted}
        self.results = None
        return shapiq.InteractionValues(
            {**found, (): float(values[0])}, index=self.index, max_order=self.max_order, min_order=0,
            n_players=self.n, estimated=False, estimation_budget=2**self.n, baseline_value=float(values[0]),
        )  # fmt: skip


def _head(game: Game, head: str | int | None) -> int:
    """Number of a head given by name or number."""
    if game.heads is None:
        if head not in (None, 0):
            raise ArgumentError("head", repr(head), "None, since this game has a single value")
        return 0
    if isinstance(head, str):
        return game.heads.index(one_of("head", head, game.heads))
    return integer("head", 0 if head is None else head, least=0, most=len(game.heads) - 1)
