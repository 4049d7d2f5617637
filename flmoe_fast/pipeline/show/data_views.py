"""Interactions over a data set: how often they occur, and where in images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from flmoe_fast.checks import one_of
from flmoe_fast.pipeline.show.look import new_figure, shortened
from flmoe_fast.probes.colours import SUBSTITUTION, SYNERGY
from flmoe_fast.probes.pictures import literal

if TYPE_CHECKING:
    import pandas


@literal
def occurrence_bars(table: pandas.DataFrame, axes: Axes | None = None) -> Axes:
    """How often pairs are synergistic or substitutable, by class, for one head.

    ``table`` has columns ``class``, ``synergy`` and ``substitution``: shares of pairs whose interval excludes zero, and
    ``pairs``, by which the standard error of a share is drawn.
    """
    axes = axes or new_figure(6.0, 0.42 * len(table) + 1.4).subplots()
    rows = np.arange(len(table))
    for shift, name, colour in ((-0.2, "synergy", SYNERGY), (0.2, "substitution", SUBSTITUTION)):
        share = table[name].to_numpy(float)
        error = np.sqrt(share * (1 - share) / np.maximum(table["pairs"].to_numpy(float), 1.0))
        bars = {"ecolor": "0.5", "capsize": 2, "linewidth": 0.9}
        axes.barh(rows + shift, 100 * share, 0.38, xerr=100 * error, color=colour, label=name, error_kw=bars)
    axes.set_yticks(rows, [shortened(name) for name in table["class"]])
    axes.set_xlim(left=0.0)
    axes.invert_yaxis()
    axes.set_xlabel("% of probed pairs whose 95 % interval excludes zero, ± s.e.")
    axes.set_title("How often interactions occur")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.75 / max(len(table), 2)), ncol=2)
    return axes


@literal
def place_map(
    values: np.ndarray, name: str, kind: str, unit: str = "units of the game", axes: Axes | None = None
) -> Axes:
    """Where in an image interactions occur: mean synergy or substitution (``kind``) of every patch (rows, columns).

    Patches in no probed pair (NaN) are grey.
    """
    one_of("kind", kind, ("synergy", "substitution"))
    colours = "Reds" if kind == "synergy" else "Blues"
    axes = axes or new_figure(3.6, 2.9).subplots()
    axes.set_facecolor("0.85")
    image = axes.imshow(values, cmap=colours, vmin=0.0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"{name}, {kind}", fontsize=9)
    axes.figure.colorbar(image, ax=axes, pad=0.02, label=f"mean, in {unit}")
    return axes
