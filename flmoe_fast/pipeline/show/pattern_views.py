"""What tells a model's experts apart: how concentrated their maps are, how much they agree, what each can alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from flmoe_fast.pipeline.show.look import CURVES, curves_of, new_figure, shortened
from flmoe_fast.probes.pictures import literal

if TYPE_CHECKING:
    import pandas


#: Agreement from which on a cell of a matrix is dark.
LIGHT = 0.75


@literal
def concentration_lines(table: pandas.DataFrame, n: float | None = None, axes: Axes | None = None) -> Axes:
    """The share of its importance that a map holds in its top K per cent, a line a map, with 95 % intervals.

    ``table`` is that of :meth:`Patterns.to_dataframe`; dashed is a flat map of ``n`` players, where that is known.
    """
    axes = axes or new_figure(5.2, 3.9).subplots()
    rows = table[(table["measure"].str.startswith("top ")) & (table["map"] != "")]
    percents = np.array([float(name.split()[1]) for name in rows["measure"].unique()])
    looks = curves_of(list(rows["map"].unique()))
    for name, own in rows.groupby("map", sort=False):
        middle = 100 * own["mean"].to_numpy(float)
        ends = np.abs(100 * own[["low", "high"]].to_numpy(float).T - middle)
        look: dict[str, Any] = dict(zip(("color", "marker"), looks[str(name)]), markersize=4)
        axes.errorbar(percents, middle, np.nan_to_num(ends), label=name, capsize=3, **look)
    if n:
        flat = 100 * np.ceil(n * percents / 100) / n
        axes.plot(percents, flat, color="0.5", linestyle="--", linewidth=1.0, label="a flat map")
    axes.set_xticks(percents, [f"{percent:g}" for percent in percents])
    axes.set_xlabel("most important tokens, %")
    axes.set_ylabel("share of the importance, %")
    axes.set_title("Concentration (95 % intervals)")
    axes.grid(axis="y", color="0.5", alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncol=2, fontsize=8)
    return axes


@literal
def overlap_matrix(matrix: np.ndarray, names: Sequence[str], title: str, axes: Axes | None = None) -> Axes:
    """How much every two maps agree, (E, E) numbers up to 1: darker is more. The diagonal is a map with itself."""
    axes = axes or new_figure(0.85 * len(names) + 2.2, 0.7 * len(names) + 1.6).subplots()
    values = np.asarray(matrix, float)
    axes.imshow(values, cmap="Greys", vmin=min(0.0, float(np.nanmin(values, initial=0.0))), vmax=1.6)
    for row, column in np.ndindex(values.shape):
        text = "–" if np.isnan(values[row, column]) else f"{values[row, column]:.2f}"
        dark = np.nan_to_num(values[row, column]) > LIGHT
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    labels = [shortened(name, 24) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(title)
    return axes


@literal
def alone_bars(tables: Mapping[str, pandas.DataFrame], axes: Axes | None = None) -> Axes:
    """Accuracy of the mixture, the plain average and every expert alone, ± s.e. of the difference to the mixture.

    ``tables`` are those of :func:`~flmoe_fast.pipeline.routing.experts_alone` by what they are of; crosses mark the
    mixture without the expert.
    """
    first = next(iter(tables.values()))
    axes = axes or new_figure(5.6, 0.4 * len(first) * len(tables) + 1.4).subplots()
    thick, rows = 0.8 / len(tables), np.arange(len(first))
    for number, ((name, table), (colour, _)) in enumerate(zip(tables.items(), CURVES * 3)):
        at = rows + (number - (len(tables) - 1) / 2) * thick
        bars = {"ecolor": "0.5", "capsize": 2, "linewidth": 0.9}
        error = np.nan_to_num(100 * table["stderr"].to_numpy(float))
        axes.barh(at, 100 * table["accuracy"], 0.9 * thick, xerr=error, color=colour, label=name, error_kw=bars)
        axes.plot(100 * table["without it"], at, "x", color=matplotlib.rcParams["text.color"], markersize=5)
    axes.set_yticks(rows, list(first["model"]))
    axes.invert_yaxis()
    axes.set_xlim(left=0.0)
    axes.set_xlabel("accuracy, %; crosses: the mixture without the expert")
    axes.set_title("Experts alone")
    if len(tables) > 1:
        axes.legend(fontsize=8)
    return axes
