"""Single players: importance by expert, the way from nothing to the prediction, and what players do over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.pipeline.show.look import new_figure, shortened
from flmoe_fast.probes.colours import SUBSTITUTION, SYNERGY
from flmoe_fast.probes.pictures import literal

if TYPE_CHECKING:
    import pandas

#: Players of a waterfall or a beeswarm unless asked otherwise.
MOST_PLAYERS = 12
#: What raises and what lowers a value.
RAISES, LOWERS = SYNERGY, SUBSTITUTION


@literal
def importance_rows(
    frame: pandas.DataFrame, groups: Sequence[tuple[str, Sequence[int]]], axes: Axes | None = None
) -> Axes:
    """Importance of every player for the mixture and each expert, relative to an average player.

    ``frame`` is that of :meth:`Explanation.importance_dataframe`; ``groups`` are the game's.
    """
    names = [name for name in frame.columns if name not in ("player", "name")]
    if axes is None:
        axes = new_figure(float(np.clip(0.2 * len(frame) + 3.0, 5.0, 14.0)), 0.3 * len(names) + 1.9).subplots()
    share = frame[names].to_numpy(float).T
    share = share / np.maximum(share.mean(1, keepdims=True), 1e-30)
    image = axes.imshow(share, cmap="cividis", aspect="auto")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    few = len(frame) <= 60
    axes.set_xticks(range(len(frame)) if few else [], [shortened(name, 14) for name in frame["name"]] if few else [])
    axes.tick_params("x", rotation=90, labelsize=7)
    for name, players in groups:
        if players:
            axes.text(float(np.mean(players)), -0.6, name, ha="center", va="bottom", fontsize=8.5)
            axes.axvline(players[0] - 0.5, color="white", linewidth=2.5)
    axes.set_title("Importance of tokens", pad=18)
    axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=12, label="1 = average token")
    return axes


@literal
def waterfall(
    names: Sequence[str],
    values: np.ndarray,
    start: float,
    end: float,
    *,
    errors: np.ndarray | None = None,
    unit: str = "units of the game",
    most: int = MOST_PLAYERS,
    axes: Axes | None = None,
) -> Axes:
    """How players' values lead from the value with none of them to the value with all.

    Parameters
    ----------
    names, values : (Q,)
        Players and their Shapley values, of some or all players.
    start, end : float
        Value with no player present and with all; what the values do not account for is drawn as the other players'.
    errors : (Q,), optional
        Standard errors, drawn as whiskers.
    unit : str
        Of the values.
    most : int
        Players that get a bar of their own, the largest |value|.
    axes : Axes, optional
    """
    values = np.asarray(values, float)
    if len(names) != len(values):
        raise ArgumentError("values", f"{len(values)} values", f"one for each of {len(names)} names")
    order = np.argsort(-np.abs(values), kind="stable")
    shown, rest = order[: integer("most", most, least=1)], order[most:]
    bars = [(shortened(names[p], 24), values[p], 0.0 if errors is None else errors[p]) for p in shown]
    others = end - start - values[shown].sum()
    if len(rest) or abs(others) > 1e-9 * max(1.0, abs(end - start)):
        bars.append(("all others", others, 0.0))
    axes = axes or new_figure(5.6, 0.3 * len(bars) + 1.5).subplots()
    at = start
    for row, (_, value, error) in enumerate(bars):
        axes.barh(row, value, left=at, color=RAISES if value > 0 else LOWERS, height=0.62)
        if error:
            axes.errorbar(at + value, row, xerr=error, color="0.4", capsize=2, linewidth=0.9)
        at += value
        if row + 1 < len(bars):
            axes.plot([at, at], [row - 0.31, row + 1.31], color="0.5", linewidth=0.7)
        axes.annotate(
            f"{value:+.3g}", (at, row), (4 if value > 0 else -4, 0), textcoords="offset points",
            ha="left" if value > 0 else "right", va="center", fontsize=7.5,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.14)
    for value, name in ((start, "none"), (end, "all")):
        axes.axvline(value, color="0.5", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{name}: {value:.3g}", (value, 1.0), (0, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", fontsize=7.5,
        )  # fmt: skip
    axes.set_xlabel(f"value, in {unit}")
    axes.set_title("From no player to all", pad=16)
    return axes


@literal
def beeswarm(
    points: pandas.DataFrame, *, unit: str = "units of the game", most: int = MOST_PLAYERS, axes: Axes | None = None
) -> Axes:
    """What players do over many samples: a point a sample, a row a player, those that do the most first.

    Parameters
    ----------
    points : DataFrame
        ``name``, ``value`` and, where the player is a number of a table, ``feature``, which colours the point from the
        player's lowest to its highest; see :func:`flmoe_fast.pipeline.summary.player_points`.
    unit : str
        Of the values.
    most : int
        Rows.
    axes : Axes, optional
    """
    if not len(points):
        raise ArgumentError("points", "nothing", "at least one point")
    size = points.groupby("name", sort=False)["value"].agg(lambda values: values.abs().mean())
    names = size.sort_values(ascending=False, kind="stable").index[: integer("most", most, least=1)]
    axes = axes or new_figure(5.8, 0.34 * len(names) + 1.5).subplots()
    span = float(points["value"].abs().max()) or 1.0
    drawn = None
    for row, name in enumerate(names):
        some = points[points["name"] == name]
        values = some["value"].to_numpy(float)
        heights = row + _spread(values, span)
        feature = some["feature"].to_numpy(float) if "feature" in some else np.full(len(some), np.nan)
        low, high = (np.nanmin(feature), np.nanmax(feature)) if np.isfinite(feature).any() else (0.0, 0.0)
        if high > low:
            scaled = (feature - low) / (high - low)
            drawn = axes.scatter(values, heights, c=scaled, cmap="cividis", vmin=0, vmax=1, s=14, linewidths=0)
        else:
            axes.scatter(values, heights, color="0.5", s=14, linewidths=0)
    axes.axvline(0.0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(names)), [f"{shortened(name, 24)} ({(points['name'] == name).sum()})" for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(f"Shapley value, in {unit}")
    axes.set_title("What players do, a point a sample")
    if drawn is not None:
        bar = axes.figure.colorbar(drawn, ax=axes, pad=0.02, aspect=14, ticks=[0, 1], label="the column's own number")
        bar.ax.set_yticklabels(["lowest", "highest"])
    return axes


def _spread(values: np.ndarray, span: float) -> np.ndarray:
    """Offsets (N,) within a row, so that points of nearly the same value lie beside each other."""
    offsets = np.zeros(len(values))
    cells: dict[int, int] = {}
    for number in np.argsort(values, kind="stable"):
        cell = round(float(values[number]) / span * 40)
        count = cells.get(cell, 0)
        cells[cell] = count + 1
        offsets[number] = np.clip((count + 1) // 2 * (-1) ** count * 0.11, -0.38, 0.38)
    return offsets
