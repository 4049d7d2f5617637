"""The demonstration in one picture: pairs on the image, the matrix of pairs, importance per expert, masking."""

from __future__ import annotations

import os
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from torch import Tensor

from flmoe_fast.pipeline.explain import Explanation
from flmoe_fast.pipeline.masking import MaskingCurve

#: Ends of the colour map of the matrix; told apart with any kind of colour vision.
SYNERGY, SUBSTITUTION = "#b2182b", "#2166ac"
#: One colour and one marker per ranking, likewise.
CURVES = (("#d55e00", "o"), ("#0072b2", "s"), ("#009e73", "^"))
LINKS = 12
#: Width of a link in points per |SII| / s.e., and its limits.
WIDTH, THINNEST, THICKEST = 0.32, 0.5, 6.0
GAP = 4.4  # distance of the two halves in pixels, where the links are drawn


def draw(
    path: str | os.PathLike,
    explanation: Explanation,
    halves: tuple[Tensor, Tensor],
    title: str,
    curves: Mapping[str, MaskingCurve],
) -> None:
    """Write the picture as PNG.

    Parameters
    ----------
    path
    explanation : Explanation
        Of a model whose two modalities have one token per row of ``halves``.
    halves : two tensors (T, pixels) in [0, 1]
    title : str
        What the image shows.
    curves : name of a ranking to its masking curve
    """
    style = {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(16, 5.4), dpi=150, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
        left, middle, right = figure.subfigures(1, 3, width_ratios=(1.05, 1.0, 1.15))
        _links(left.subplots(), explanation, halves, title)
        _matrix(middle.subplots(), explanation)
        above, below = right.subplots(2, 1, height_ratios=(1.0, 1.6))
        _importance(above, explanation)
        _masking(below, curves)
        figure.savefig(path)


def _links(axes: Axes, explanation: Explanation, halves: tuple[Tensor, Tensor], title: str) -> None:
    """The two halves as images, and between them the pairs with the largest interactions."""
    result, places = explanation.interactions, explanation.game.positions
    rows, width = halves[0].shape
    starts = (0.0, width + GAP)
    for start, half in zip(starts, halves):
        axes.imshow(half.numpy(), cmap="Greys", vmin=0.0, vmax=1.0, extent=(start, start + width, rows, 0.0), zorder=1)
        for row in range(rows):
            axes.add_patch(Rectangle((start, row), width, 1.0, fill=False, edgecolor="0.55", linewidth=0.8, zorder=2))
    for row in range(rows):
        axes.text(-0.25, row + 0.5, row, ha="right", va="center", fontsize=8, color="0.35")
        axes.text(starts[1] + width + 0.25, row + 0.5, row, ha="left", va="center", fontsize=8, color="0.35")

    sii, stderr = result.column("sii"), result.column("sii_stderr")
    for pair in result.order("abs_sii")[:LINKS][::-1]:
        ends = sorted(places[p] for p in result.pairs[pair])
        (_, a), (_, b) = ends
        x0, x1 = float(width), starts[1]
        bend = 0.45 * GAP
        curve = Path(
            [(x0, a + 0.5), (x0 + bend, a + 0.5), (x1 - bend, b + 0.5), (x1, b + 0.5)],
            [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
        )
        colour = SYNERGY if sii[pair] > 0 else SUBSTITUTION
        width_points = _width(abs(sii[pair]) / stderr[pair] if stderr[pair] > 0 else np.inf)
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=colour, linewidth=width_points, alpha=0.8, zorder=3))

    axes.set_xlim(-1.0, starts[1] + width + 1.0)
    axes.set_ylim(rows + 0.15, -0.75)
    axes.set_axis_off()
    axes.set_aspect(1.22, anchor="N")  # a little taller than wide, which leaves the links more room
    axes.set_title(title)
    for start, name in zip(starts, explanation.game.problem.model.config.modalities):
        axes.text(start + width / 2, -0.2, f"{name} half", ha="center", va="bottom")
    handles = [
        Line2D([], [], color=SYNERGY, linewidth=3, label="synergy (SII > 0)"),
        Line2D([], [], color=SUBSTITUTION, linewidth=3, label="substitution (SII < 0)"),
        *(Line2D([], [], color="0.3", linewidth=_width(z), label=f"|SII| = {z} s.e.") for z in (4, 12)),
    ]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncol=2,
        frameon=False,
        fontsize=8.5,
        title=f"the {min(LINKS, len(result.pairs))} largest of {len(result.pairs)} pairs",
        title_fontsize=8.5,
    )


def _matrix(axes: Axes, explanation: Explanation) -> None:
    """Interactions of all pairs."""
    explanation.interactions.plot(head=0, ax=axes)
    axes.set_title("Shapley interaction of every pair (mixture)")
    axes.set_xlabel("dot: the 95 % interval excludes zero", labelpad=7)
    axes.tick_params(length=0)


def _width(errors: float) -> float:
    """Line width for an interaction that is ``errors`` standard errors away from zero."""
    return float(np.clip(WIDTH * errors, THINNEST, THICKEST))


def _importance(axes: Axes, explanation: Explanation) -> None:
    """Importance of every token for the mixture and each expert, relative to an average token."""
    frame = explanation.importance_dataframe()
    names = [name for name in frame.columns if name not in ("player", "name")]
    share = frame[names].to_numpy().T
    share = share / share.mean(1, keepdims=True)
    image = axes.imshow(share, cmap="cividis", aspect="auto")
    axes.set_yticks(range(len(names)), names)
    positions = [position for _, position in explanation.game.positions]
    axes.set_xticks(range(len(positions)), positions, fontsize=8)
    axes.tick_params(length=0)
    for name, players in explanation.game.groups:
        axes.text(np.mean(players), len(names) - 0.5 + 0.62, f"{name} tokens", ha="center", va="top", fontsize=8.5)
        axes.axvline(players[0] - 0.5, color="white", linewidth=2.5)
    axes.set_title("Token importance (1 = average token)")
    axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=12)


def _masking(axes: Axes, curves: Mapping[str, MaskingCurve]) -> None:
    """Mean drop against the number of masked pairs, with standard errors over samples."""
    samples = 0
    for (name, curve), (colour, marker) in zip(curves.items(), CURVES):
        x = np.arange(len(curve.most))
        samples = curve.samples
        look = {"color": colour, "marker": marker, "capsize": 3}
        axes.errorbar(x, curve.top, curve.top_stderr, label=f"top pairs by {name}", **look)
        look |= {"markerfacecolor": "white", "linestyle": "--", "linewidth": 1.0}
        axes.errorbar(x, curve.random, curve.random_stderr, label=f"as many random tokens ({name})", **look)
        axes.set_xticks(x, curve.most)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlabel("pairs masked")
    axes.set_ylabel("drop of probability")
    axes.set_title(f"Masking the top pairs: mean of {samples} images ± s.e.")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncol=2, frameon=False, fontsize=8.5)
