"""Results in the containers of other packages; those are imported only here, when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flmoe_fast.checks import ArgumentError
from flmoe_fast.environment import require

if TYPE_CHECKING:
    from flmoe_fast.probes.result import InteractionResult

#: The index of single players that belongs to each index of pairs.
SINGLES = {"SII": ("SV", 1), "BII": ("BV", 1), "FSII": ("FSII", 1), "k-SII": ("k-SII", 1)}


def to_shapiq(result: InteractionResult, index: str = "SII", head: str | int | None = None) -> Any:
    """The pairs of an index, and its single players where they were estimated, as ``shapiq.InteractionValues``.

    Entries that are missing there read as 0.0 in shapiq, whether they were estimated or not.
    """
    shapiq = require("shapiq", "shapiq")
    members, values, _ = pair_index(result, index, head)
    entries = {tuple(sorted(pair)): float(value) for pair, value in zip(members.tolist(), values)}
    single = SINGLES.get(index)
    singles = None if single is None else result.also.get(single)
    if singles is not None:
        first = singles.values.reshape(len(singles.members), -1)[:, result.head(head)]
        entries |= {tuple(member): float(value) for member, value in zip(singles.members.tolist(), first)}
    return shapiq.InteractionValues(
        entries,
        index=index,
        max_order=2,
        min_order=2 if singles is None else 1,
        n_players=len(result.player_names),
        estimated=bool(np.isfinite(result.degrees).any()),
        estimation_budget=result.evaluations,
        baseline_value=0.0,
    )


def to_shap(result: InteractionResult, index: str = "SII", head: str | int | None = None) -> Any:
    """The pairs of an index as a ``shap.Explanation`` of shape (n, n), half of each interaction on either side.

    The diagonal holds the Shapley value minus the halves beside it, so that rows sum to Shapley values; it needs
    ``also=("SV",)`` and every pair of the player. What was not estimated is NaN. Standard errors are in ``error_std``.
    """
    shap = require("shap", "shap")
    n = len(result.player_names)
    members, values, stderr = pair_index(result, index, head)
    matrix, error = np.full((n, n), np.nan), np.full((n, n), np.nan)
    for first, second in ((0, 1), (1, 0)):
        matrix[members[:, first], members[:, second]] = values / 2
        error[members[:, first], members[:, second]] = stderr / 2
    singles = result.also.get(("SV", 1))
    if singles is not None:
        player = singles.members[:, 0]
        alone = singles.values.reshape(len(player), -1)[:, result.head(head)]
        beside = np.where(np.eye(n, dtype=bool), 0.0, matrix).sum(1)[player]
        matrix[player, player] = alone - beside
    return shap.Explanation(matrix, feature_names=list(result.player_names), error_std=error)


def pair_index(
    result: InteractionResult, index: str, head: str | int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (P, 2) of an index, their values and standard errors (P,)."""
    if index == "SII":
        return result.pairs, result.column("sii", head), result.column("sii_stderr", head)
    found = result.also.get((index, 2))
    if found is None:
        have = ("SII", *(name for name, order in result.also if order == 2))
        raise ArgumentError("index", repr(index), f"one of {have}, the indices of pairs this result has")
    column = result.head(head)
    values, stderr = (a.reshape(len(found.members), -1)[:, column] for a in (found.values, found.stderr))
    return found.members, values, stderr
