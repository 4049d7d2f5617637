"""Pictures of models and explanations, as matplotlib figures.

Global: routing weights, expert logits, losses, faithfulness, masking, where interactions occur. Local: what each expert
says about a sample, and the pairs of tokens between its modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from flmoe_fast.checks import one_of
from flmoe_fast.pipeline.faithful.masking import MaskingCurve
from flmoe_fast.pipeline.show.views import View
from flmoe_fast.probes.result import InteractionResult

if TYPE_CHECKING:
    import pandas

#: Told apart with any kind of colour vision, and on light and dark ground.
SYNERGY, SUBSTITUTION = "#d6453d", "#3f7fc4"
#: One colour and one marker per curve, likewise.
CURVES = (("#d55e00", "o"), ("#0072b2", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#8c6d1f", "v"))
LINKS = 12
#: Width of a link in points per |SII| / s.e., and its limits.
WIDTH, THINNEST, THICKEST = 0.32, 0.5, 6.0
#: Tokens of a text or a table that are drawn; of longer ones those with a link, and the first.
MOST_TOKENS = 36
STYLE = {"font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "legend.frameon": False}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches that belongs to no window."""
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def link_width(errors: float) -> float:
    """Line width for an interaction that is ``errors`` standard errors away from zero."""
    return float(np.clip(WIDTH * errors, THINNEST, THICKEST))


def pair_view(
    result: InteractionResult,
    places: Sequence[tuple[int, int]],
    views: Sequence[View],
    *,
    head: str | int | None = None,
    of: str = "sii",
    links: int = LINKS,
    axes: Axes | None = None,
) -> Axes:
    """Modalities side by side, and between them the pairs with the largest interactions.

    A line is red for synergy and blue for substitution (for ``of="gap"``, red where losing both costs more), and the
    wider the more standard errors the estimate is away from zero. The ends of lines are outlined.

    Parameters
    ----------
    result : InteractionResult
    places : (modality, position) of every player, as ``game.positions``
    views : M views
    head, of
        See :meth:`InteractionResult.column`.
    links : int
        Pairs that are drawn: the largest |SII|, or the largest gaps.
    axes : Axes, optional

    Returns
    -------
    Axes
    """
    one_of("of", of, ("sii", "gap"))
    if axes is None:
        tallest = max(_height(view) for view in views)
        axes = new_figure(3.2 * len(views) + 1.2, float(np.clip(0.28 * tallest + 1.4, 3.6, 11.0))).subplots()
    values, errors = result.column(of, head), result.column(f"{of}_stderr", head)
    order = result.order("abs_sii" if of == "sii" else "gap", head)
    order = order[np.nan_to_num(values[order]) != 0][:links]  # a line of no interaction would have no colour
    ends = [[tuple(places[player]) for player in result.pairs[pair]] for pair in order]
    linked = {place for pair in ends for place in pair}
    rows = max(8.0, *(min(_height(view), MOST_TOKENS) for view in views))
    anchors: dict[tuple[int, int], tuple[float, float, float]] = {}
    x = 0.0
    for m, view in enumerate(views):
        width, found = _draw_view(axes, view, x, rows, {p for owner, p in linked if owner == m})
        anchors |= {(m, position): at for position, at in found.items()}
        axes.text(x + width / 2, -0.55, view.name, ha="center", va="bottom", fontweight="bold")
        x += width + 0.55 * rows
    right = x - 0.55 * rows
    for pair, ((m1, p1), (m2, p2)) in reversed(list(zip(order, ends))):
        first, second = sorted(((m1, p1), (m2, p2)))
        if first not in anchors or second not in anchors:
            continue
        x0, y0 = anchors[first][1], anchors[first][2]
        x1, y1 = anchors[second][0], anchors[second][2]
        bend = 0.45 * (x1 - x0) if first[0] != second[0] else 0.2 * rows
        path = [(x0, y0), (x0 + bend, y0), (x1 - bend, y1), (x1, y1)]
        curve = Path(path, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
        colour = SYNERGY if values[pair] > 0 else SUBSTITUTION
        size = link_width(abs(values[pair]) / errors[pair] if errors[pair] > 0 else np.inf)
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=colour, linewidth=size, alpha=0.75, zorder=4))
    axes.set_xlim(-0.02 * right - 0.2, right + 0.02 * right + 0.2)
    axes.set_ylim(rows + 0.3, -1.6)
    axes.set_aspect("equal")
    axes.set_axis_off()
    names = ("synergy (SII > 0)", "substitution (SII < 0)") if of == "sii" else ("gap > 0", "gap < 0")
    shown = [(SYNERGY, names[0]), *([(SUBSTITUTION, names[1])] if of == "sii" or (values[order] < 0).any() else [])]
    handles = [Line2D([], [], color=colour, linewidth=3, label=name) for colour, name in shown]
    handles += [Line2D([], [], color="0.5", linewidth=link_width(z), label=f"{z} standard errors") for z in (4, 12)]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncol=2,
        fontsize=8,
        frameon=False,
        title=f"the {len(order)} largest of {len(result.pairs)} pairs",
        title_fontsize=8,
    )
    return axes


def _height(view: View) -> int:
    return 12 if view.kind == "image" else len(view.tokens)


def _draw_view(
    axes: Axes, view: View, x: float, rows: float, linked: set[int]
) -> tuple[float, dict[int, tuple[float, float, float]]]:
    """Draw one modality from ``x`` on, ``rows`` high; its width, and (left, right, y) of every drawn token."""
    if view.kind == "image":
        height, columns = view.image.shape[:2], view.grid[1]
        width = rows * height[1] / height[0]
        colours = {"cmap": "Greys", "vmin": 0.0, "vmax": 1.0} if view.image.ndim == 2 else {}
        axes.imshow(view.image, extent=(x, x + width, rows, 0.0), zorder=1, interpolation="nearest", **colours)
        down, across = rows / view.grid[0], width / columns
        found = {}
        for position in range(len(view.tokens)):
            row, column = divmod(position, columns)
            left, top = x + column * across, row * down
            marked = position in linked
            axes.add_patch(
                Rectangle(
                    (left, top),
                    across,
                    down,
                    fill=False,
                    edgecolor="#f2b632" if marked else "0.55",
                    linewidth=1.8 if marked else 0.4,
                    zorder=3 if marked else 2,
                )
            )
            # With a single column lines start at the edge; inside a grid they start in the patch.
            centre = left + across / 2
            found[position] = (
                (left, left + across, top + down / 2) if columns == 1 else (centre, centre, top + down / 2)
            )
        return width, found
    shown = list(range(len(view.tokens)))
    if len(shown) > MOST_TOKENS:
        first = [p for p in shown if p not in linked][: max(0, MOST_TOKENS - len(linked))]
        shown = sorted({*first, *linked})
    longest = max((len(view.tokens[p].strip()) for p in shown), default=1)
    width = 0.48 * min(longest, 18) + 1.0
    step = rows / max(len(shown), 1)
    found = {}
    for number, position in enumerate(shown):
        y = (number + 0.5) * step
        text = view.tokens[position].strip() or "·"
        text = text if len(text) <= 18 else text[:17] + "…"
        marked = position in linked
        if marked:
            box = Rectangle((x, y - 0.45 * step), width, 0.9 * step, fill=False, edgecolor="#f2b632", linewidth=1.4)
            axes.add_patch(box)
        axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=float(np.clip(9 * step, 4.5, 9)))
        found[position] = (x, x + width, y)
    return width, found


def routing_violins(weights: np.ndarray, expert_names: Sequence[str]) -> Figure:
    """Distribution of the routing weights (N, E) over samples, one violin an expert, with its mean."""
    figure = new_figure(1.4 * len(expert_names) + 1.5, 3.4)
    axes = figure.subplots()
    spots = range(len(expert_names))
    drawn = axes.violinplot([column for column in np.asarray(weights, float).T], positions=list(spots), showmeans=True)
    for body, (colour, _) in zip(drawn["bodies"], CURVES * 3):
        body.set_facecolor(colour)
        body.set_alpha(0.6)
    for spot, mean in zip(spots, np.asarray(weights, float).mean(0)):
        axes.annotate(f"{mean:.2f}", (spot, mean), (6, 3), textcoords="offset points", fontsize=8)
    axes.set_xticks(list(spots), [_wrapped(name) for name in expert_names])
    axes.set_ylabel("routing weight")
    axes.set_title(f"Routing weights of {len(weights)} samples")
    return figure


def logit_histograms(
    expert_logits: np.ndarray, expert_names: Sequence[str], classes: Sequence[str], most: int = 8
) -> Figure:
    """Histograms of the experts' logits (N, E, C), classes down and experts across, 20 bins."""
    shown = range(min(len(classes), most))
    figure = new_figure(1.7 * len(expert_names) + 1.0, 1.15 * len(shown) + 0.9)
    grid = figure.subplots(len(shown), len(expert_names), squeeze=False, sharex=True)
    for row, c in enumerate(shown):
        for column, (name, (colour, _)) in enumerate(zip(expert_names, CURVES * 3)):
            axes = grid[row][column]
            axes.hist(expert_logits[:, column, c], bins=20, color=colour)
            axes.tick_params(labelsize=7)
            if row == 0:
                axes.set_title(_wrapped(name), fontsize=9)
            if column == 0:
                axes.set_ylabel(_short(classes[c]), fontsize=8)
    more = f" (the first {most} of {len(classes)} classes)" if len(classes) > most else ""
    figure.suptitle(f"Expert logits{more}")
    return figure


def loss_curves(history: Sequence[Mapping], expert_names: Sequence[str]) -> Figure:
    """Total and task loss, and the interaction loss of every expert, by epoch."""
    figure = new_figure(9.0, 3.2)
    left, right = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in history]
    for name, (colour, marker) in zip(("loss", "task_loss"), CURVES):
        values = [record[name] for record in history]
        left.plot(epochs, values, color=colour, marker=marker, markersize=3, label=name.replace("_", " "))
    held = [record["validation"]["loss"] for record in history if "validation" in record]
    if len(held) == len(epochs):
        left.plot(epochs, held, color=CURVES[2][0], marker=CURVES[2][1], markersize=3, label="validation task loss")
    for number, (name, (colour, marker)) in enumerate(zip(expert_names, CURVES * 3)):
        values = [record["interaction_losses"][number] for record in history]
        right.plot(epochs, values, color=colour, marker=marker, markersize=3, label=name)
    for axes, title in ((left, "Losses"), (right, "Interaction losses")):
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.legend(fontsize=8)
    return figure


def local_bars(
    expert_logits: np.ndarray,
    weights: np.ndarray,
    expert_names: Sequence[str],
    classes: Sequence[str],
    most: int = 6,
) -> Figure:
    """One sample: every expert's logits (E, C), its routing weight (E,), their products stacked, and their sum.

    The ``most`` classes with the largest mixture logits are shown.
    """
    mixed = (weights[:, None] * expert_logits).sum(0)
    shown = np.argsort(-mixed, kind="stable")[:most]
    figure = new_figure(11.0, 3.4)
    logits, routing, stacked, final = figure.subplots(1, 4, width_ratios=(1.5, 0.9, 1.3, 0.9))
    spots = np.arange(len(shown))
    experts = len(expert_names)
    low, high = np.zeros(len(shown)), np.zeros(len(shown))
    for e, (name, (colour, _)) in enumerate(zip(expert_names, CURVES * 3)):
        offset = (e - (experts - 1) / 2) * 0.8 / experts
        logits.bar(spots + offset, expert_logits[e, shown], 0.8 / experts, color=colour, label=name)
        routing.bar(e, weights[e], color=colour)
        part = weights[e] * expert_logits[e, shown]
        base = np.where(part >= 0, high, low)
        stacked.bar(spots, part, 0.7, bottom=base, color=colour)
        high, low = high + np.maximum(part, 0), low + np.minimum(part, 0)
    final.bar(spots, mixed[shown], 0.7, color="0.5")
    for axes, title in ((logits, "Expert logits"), (stacked, "Weight x logit"), (final, "Mixture")):
        axes.set_xticks(spots, [_short(classes[c], 12) for c in shown], rotation=30, ha="right", fontsize=7.5)
        axes.axhline(0.0, color="0.5", linewidth=0.6)
        axes.set_title(title)
    routing.set_xticks(range(experts), [_short(name, 22) for name in expert_names], rotation=90, fontsize=7.5)
    routing.set_title("Routing weights")
    logits.legend(fontsize=7.5)
    return figure


def importance_maps(frame: pandas.DataFrame, groups: Sequence[tuple[str, Sequence[int]]]) -> Figure:
    """Importance of every player for the mixture and each expert, relative to an average player.

    ``frame`` is that of :meth:`Explanation.importance_dataframe`; ``groups`` are the game's.
    """
    figure = new_figure(float(np.clip(0.14 * len(frame) + 3.5, 6.0, 14.0)), 0.3 * (len(frame.columns) - 2) + 1.2)
    axes = figure.subplots()
    importance_rows(axes, frame, groups)
    return figure


def importance_rows(axes: Axes, frame: pandas.DataFrame, groups: Sequence[tuple[str, Sequence[int]]]) -> None:
    """What :func:`importance_maps` draws, on given axes."""
    names = [name for name in frame.columns if name not in ("player", "name")]
    share = frame[names].to_numpy(float).T
    share = share / np.maximum(share.mean(1, keepdims=True), 1e-30)
    image = axes.imshow(share, cmap="cividis", aspect="auto")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for name, players in groups:
        if players:
            axes.text(np.mean(players), len(names) - 0.3, f"{name} tokens", ha="center", va="top", fontsize=8.5)
            axes.axvline(players[0] - 0.5, color="white", linewidth=2.5)
    axes.set_title("Token importance (1 = average token)")
    axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=12)


def masking_lines(axes: Axes, curves: Mapping[str, MaskingCurve], what: str = "samples") -> None:
    """Mean drop against the number of masked pairs, with standard errors over samples."""
    samples = 0
    for (name, curve), (colour, marker) in zip(curves.items(), CURVES):
        x = np.arange(len(curve.most))
        samples = curve.samples
        look = {"color": colour, "marker": marker, "capsize": 3}
        axes.errorbar(x, curve.top, curve.top_stderr, label=f"top pairs by {name}", **look)
        look |= {"markerfacecolor": "none", "linestyle": "--", "linewidth": 1.0}
        axes.errorbar(x, curve.random, curve.random_stderr, label=f"as many random tokens ({name})", **look)
        axes.set_xticks(x, curve.most)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlabel("pairs masked")
    axes.set_ylabel("drop of the value")
    axes.set_title(f"Masking the top pairs: mean of {samples} {what} ± s.e.")
    axes.grid(axis="y", color="0.5", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncol=2, frameon=False, fontsize=8)


def masking_figure(curves: Mapping[str, MaskingCurve], scores: Mapping[str, pandas.DataFrame] | None = None) -> Figure:
    """Drops by number of masked pairs, and beside them the accuracy, where ``scores`` are given."""
    figure = new_figure(10.0 if scores else 5.5, 3.8)
    first, *rest = np.atleast_1d(figure.subplots(1, 2 if scores else 1))
    masking_lines(first, curves)
    for axes in rest:
        for (name, table), (colour, marker) in zip(scores.items(), CURVES):
            x = np.arange(len(table))
            look = {"color": colour, "marker": marker}
            axes.plot(x, table["accuracy_top"], label=f"top pairs by {name}", **look)
            look |= {"markerfacecolor": "none", "linestyle": "--", "linewidth": 1.0}
            spread = table["accuracy_random_std"]
            axes.errorbar(x, table["accuracy_random"], spread, label=f"random ({name})", capsize=3, **look)
            axes.set_xticks(x, table["pairs"])
        axes.set_xlabel("pairs masked")
        axes.set_ylabel("accuracy")
        axes.set_title("Accuracy ± spread over draws")
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncol=2, frameon=False, fontsize=8)
    return figure


def faithfulness_figure(tables: Mapping[str, pandas.DataFrame]) -> Figure:
    """Comprehensiveness and sufficiency by percentage, identified (solid) and random (dashed), a colour a table."""
    figure = new_figure(10.0, 3.6)
    for axes, name in zip(figure.subplots(1, 2), ("comprehensiveness", "sufficiency")):
        for (label, table), (colour, marker) in zip(tables.items(), CURVES * 3):
            look = {"color": colour, "marker": marker, "markersize": 4}
            axes.plot(table["K_percent"], table[f"{name}_prob_mean_identified"], label=label, **look)
            look |= {"markerfacecolor": "none", "linestyle": "--", "linewidth": 1.0}
            axes.plot(table["K_percent"], table[f"{name}_prob_mean_random"], label=f"{label}, random", **look)
        better = "higher is better" if name == "comprehensiveness" else "lower is better"
        axes.set_title(f"{name.capitalize()} ({better})")
        axes.set_xlabel("tokens of each modality, %")
        axes.set_ylabel("drop of the value")
        axes.legend(fontsize=8)
    return figure


def occurrence_figure(table: pandas.DataFrame) -> Figure:
    """How often pairs are synergistic or substitutable, by class, for one head.

    ``table`` has columns ``class``, ``synergy`` and ``substitution``: shares of pairs whose interval excludes zero.
    """
    figure = new_figure(7.0, 0.34 * len(table) + 1.3)
    axes = figure.subplots()
    rows = np.arange(len(table))
    axes.barh(rows - 0.2, 100 * table["synergy"], 0.38, color=SYNERGY, label="synergy")
    axes.barh(rows + 0.2, 100 * table["substitution"], 0.38, color=SUBSTITUTION, label="substitution")
    axes.set_yticks(rows, [_short(name) for name in table["class"]])
    axes.invert_yaxis()
    axes.set_xlabel("% of probed pairs whose 95 % interval excludes zero")
    axes.set_title("How often interactions occur")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def place_maps(maps: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Where synergy and substitution occur: mean positive and negative SII of every patch, one row an image modality.

    ``maps`` holds (rows, columns) of synergy and of substitution for each modality; NaN where no pair was probed.
    """
    figure = new_figure(8.0, 2.9 * len(maps))
    grid = figure.subplots(len(maps), 2, squeeze=False)
    for line, (name, both) in zip(grid, maps.items()):
        for axes, values, kind, colours in zip(line, both, ("synergy", "substitution"), ("Reds", "Blues")):
            image = axes.imshow(values, cmap=colours, vmin=0.0)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{name}, {kind}", fontsize=9)
            figure.colorbar(image, ax=axes, pad=0.02)
    return figure


def styled():
    """The style of all figures, as a context."""
    return matplotlib.rc_context(STYLE)


def _wrapped(name: str) -> str:
    return name.replace(": ", ":\n")


def _short(text: str, most: int = 20) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
