"""A sample's modalities side by side, and the interactions between their tokens as lines."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from flmoe_fast.checks import one_of
from flmoe_fast.pipeline.show.look import new_figure, shortened
from flmoe_fast.pipeline.show.views import ADDED, View
from flmoe_fast.probes.colours import GROUND, MARK, colour_of, fade_of, unit_of, width_of
from flmoe_fast.probes.pictures import link_legend, literal
from flmoe_fast.probes.result import InteractionResult

LINKS = 12
#: Tokens of a text or a table that are drawn; of longer ones those with a link, and the first.
MOST_TOKENS = 36
#: Letters of a token that are drawn.
LETTERS = 18

#: Where lines leave a token on the left and on the right, and at what height.
Anchor = tuple[float, float, float]


@literal
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

    A line is red for synergy and blue for substitution (ochre for a positive gap), the wider the larger the effect, and
    the fainter the fewer standard errors it is away from zero. The ends of lines are outlined.

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
    ends = [sorted(tuple(places[player]) for player in result.pairs[pair].tolist()) for pair in order]
    linked = {place for pair in ends for place in pair}
    rows = max(8.0, *(min(_height(view), MOST_TOKENS) for view in views))
    anchors, right = _draw_views(axes, views, rows, linked)
    largest = float(np.abs(values[order]).max(initial=0.0))
    for pair, (first, second) in reversed(list(zip(order, ends))):
        if first in anchors and second in anchors:
            curve = _curve(anchors[first], anchors[second], 0.0 if first[0] != second[0] else 0.2 * rows)
            width = width_of(values[pair], largest)
            line = PathPatch(
                curve,
                fill=False,
                edgecolor=colour_of(values[pair], of),
                linewidth=width,
                alpha=fade_of(values[pair], errors[pair]),
                zorder=4,
            )
            line.set_path_effects([effects.withStroke(linewidth=width + 1.8, foreground=GROUND)])
            axes.add_patch(line)
    axes.set_xlim(-0.02 * right - 0.2, right + 0.02 * right + 0.2)
    axes.set_ylim(rows + 0.3, -1.6)
    axes.set_aspect("equal")
    axes.set_axis_off()
    what = f"the {len(order)} largest of {len(result.pairs)} pairs"
    link_legend(axes, values[order], of, unit_of(result.about), what)
    return axes


def _curve(first: Anchor, second: Anchor, aside: float) -> Path:
    """From the right of one token to the left of another, or in an arc ``aside`` of both."""
    (x0, y0), (x1, y1) = first[1:], (second[0], second[2])
    bend = aside or 0.45 * (x1 - x0)
    return Path([(x0, y0), (x0 + bend, y0), (x1 - bend, y1), (x1, y1)], [Path.MOVETO, *[Path.CURVE4] * 3])


def _height(view: View) -> int:
    return 12 if view.kind == "image" else len(view.tokens)


def _draw_views(
    axes: Axes, views: Sequence[View], rows: float, linked: set[tuple[int, int]]
) -> tuple[dict[tuple[int, int], Anchor], float]:
    """All modalities with their names from left to right; where their tokens are, and where the last one ends."""
    anchors: dict[tuple[int, int], Anchor] = {}
    x, gap = 0.0, 0.55 * rows
    for m, view in enumerate(views):
        draw = _draw_image if view.kind == "image" else _draw_tokens
        width, found = draw(axes, view, x, rows, {position for owner, position in linked if owner == m})
        anchors |= {(m, position): at for position, at in found.items()}
        axes.text(x + width / 2, -0.55, view.name, ha="center", va="bottom", fontweight="bold")
        x += width + gap
    return anchors, x - gap


def _draw_image(axes: Axes, view: View, x: float, rows: float, linked: set[int]) -> tuple[float, dict[int, Anchor]]:
    """An image from ``x`` on, ``rows`` high; its width, and where its patches are."""
    assert view.image is not None and view.grid is not None  # checked when it was made
    height, columns = view.image.shape[:2], view.grid[1]
    width = rows * height[1] / height[0]
    extent = (x, x + width, rows, 0.0)
    if view.image.ndim == 2:
        axes.imshow(view.image, extent=extent, zorder=1, interpolation="nearest", cmap="Greys", vmin=0.0, vmax=1.0)
    else:
        axes.imshow(view.image, extent=extent, zorder=1, interpolation="nearest")
    down, across = rows / view.grid[0], width / columns
    found = {}
    for position in range(len(view.tokens)):
        row, column = divmod(position, columns)
        left, top = x + column * across, row * down
        patch = Rectangle((left, top), across, down, fill=False, edgecolor="0.55", linewidth=0.4, zorder=2)
        if position in linked:
            patch.set(edgecolor=MARK, linewidth=1.8, zorder=3)
        axes.add_patch(patch)
        # With a single column lines start at the edge; inside a grid they start in the patch.
        centre = left + across / 2
        found[position] = (left, left + across, top + down / 2) if columns == 1 else (centre, centre, top + down / 2)
    return width, found


def _draw_tokens(axes: Axes, view: View, x: float, rows: float, linked: set[int]) -> tuple[float, dict[int, Anchor]]:
    """A text or a table from ``x`` on, a token a line; its width, and where its tokens are."""
    shown = [p for p, token in enumerate(view.tokens) if p in linked or not ADDED.fullmatch(token)]
    if len(shown) > MOST_TOKENS:
        first = [p for p in shown if p not in linked][: max(0, MOST_TOKENS - len(linked))]
        shown = sorted({*first, *linked})
    longest = max((len(view.tokens[p].strip()) for p in shown), default=1)
    width = 0.48 * min(longest, LETTERS) + 1.0
    step = rows / max(len(shown), 1)
    found = {}
    for number, position in enumerate(shown):
        y = (number + 0.5) * step
        if position in linked:
            high = min(0.9 * step, 1.1)
            outline = Rectangle((x, y - 0.5 * high), width, high, fill=False, edgecolor=MARK, linewidth=1.4)
            axes.add_patch(outline)
        text = shortened(view.tokens[position].strip() or "·", LETTERS)
        axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=float(np.clip(9 * step, 4.5, 9)))
        found[position] = (x, x + width, y)
    return width, found
