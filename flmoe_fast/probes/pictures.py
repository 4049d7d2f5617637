"""Pictures of a result by itself: a matrix of its pairs, and a network of its players."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

import numpy as np

from flmoe_fast.checks import integer, one_of
from flmoe_fast.probes.colours import GAP_MAP, GROUND, SII_MAP, colour_of, fade_of, unit_of, width_of
from flmoe_fast.probes.fonts import make_legible
from flmoe_fast.probes.naming import head_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flmoe_fast.probes.result import InteractionResult
    from flmoe_fast.probes.value_result import PlayerValues

#: Lines of a network unless asked otherwise.
LINKS = 24
#: Players of a network whose names are written level; of more they point outwards.
LEVEL = 14
#: Players that :func:`value_bars` shows unless asked otherwise.
MOST_BARS = 20
#: Letters of a name in a network.
LETTERS = 24
#: Share of the largest effect below which an effect is not drawn: exact zeros of a game in float32 are about 1e-8.
SEEN = 1e-6
Arguments = ParamSpec("Arguments")


def literal(draw: Callable[Arguments, Axes]) -> Callable[Arguments, Axes]:
    """A picture whose texts are shown letter by letter, dollars and all, in fonts that have them."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Axes:
        import matplotlib
        from matplotlib.text import Text

        with matplotlib.rc_context({"text.parse_math": False}):
            axes = draw(*args, **kwargs)
        for text in axes.findobj(Text):  # also those that were there before
            text.set_parse_math(False)
        make_legible(axes)
        return axes

    return drawn


def title_of(result: InteractionResult, head: str | int | None, of: str) -> str:
    """What is drawn, and of which head."""
    kind = "Shapley interaction" if of == "sii" else f"redundancy gap ({result.gap_kind})"
    return kind + ("" if result.heads is None else f", {result.heads[result.head(head)]}")


@literal
def heatmap(
    result: InteractionResult, *, head: str | int | None = None, of: str = "sii", ax: Axes | None = None
) -> Axes:
    """Draw ``result`` as a matrix: first player down, second across, grey where a pair was not probed.

    The colour scale is symmetric about zero; a dot marks pairs whose 95 % interval excludes zero.
    """
    import matplotlib.pyplot as plt

    score = result.column(of, head)
    low, high = result.interval(of=of, head=head)
    rows, row = np.unique(result.pairs[:, 0], return_inverse=True)
    cols, col = np.unique(result.pairs[:, 1], return_inverse=True)
    matrix = np.full((len(rows), len(cols)), np.nan)
    matrix[row, col] = score
    if ax is None:
        _, ax = plt.subplots(figsize=(2.0 + 0.45 * len(cols), 1.5 + 0.4 * len(rows)), layout="constrained")
    bound = np.nanmax(np.abs(matrix)) if np.isfinite(matrix).any() else 1.0
    ax.set_facecolor("0.85")
    colours = SII_MAP if of == "sii" else GAP_MAP
    image = ax.imshow(matrix, cmap=colours, vmin=-bound or -1.0, vmax=bound or 1.0, aspect="auto")
    sure = ((low > 0) | (high < 0)) & (np.abs(score) > SEEN * bound)
    ax.plot(col[sure], row[sure], "o", color="black", markersize=3, markeredgecolor="white", markeredgewidth=0.5)
    ax.set_xticks(range(len(cols)), [result.player_names[p] for p in cols], rotation=90, fontsize=7)
    ax.set_yticks(range(len(rows)), [result.player_names[p] for p in rows], fontsize=7)
    ax.set_title(title_of(result, head, of), fontsize=9)
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label=unit_of(result.about))
    return ax


@literal
def network(
    result: InteractionResult,
    *,
    head: str | int | None = None,
    of: str = "sii",
    links: int = LINKS,
    ax: Axes | None = None,
) -> Axes:
    """The players of the probed pairs on a circle, and the largest interactions as lines between them.

    Lines are red for synergy and blue for substitution (ochre for a redundancy gap), the wider the larger the effect,
    and the fainter the less certain its sign.
    """
    import matplotlib.patheffects as effects
    import matplotlib.pyplot as plt

    one_of("of", of, ("sii", "gap"))
    values, errors = result.column(of, head), result.column(f"{of}_stderr", head)
    players = np.unique(result.pairs)
    longest = min(LETTERS, max(len(result.player_names[p]) for p in players.tolist()))
    level = len(players) <= LEVEL
    if ax is None:
        size = 3.4 + 0.09 * min(len(players), 40) + (0.0 if level else 0.1 * longest)
        _, ax = plt.subplots(figsize=(size + 1.2, size), layout="constrained")
    angle = dict(zip(players.tolist(), np.pi / 2 - 2 * np.pi * np.arange(len(players)) / len(players)))
    order = result.order("abs_sii" if of == "sii" else "gap", head)
    largest = float(np.abs(np.nan_to_num(values)).max(initial=0.0))
    seen = np.abs(np.nan_to_num(values[order])) > SEEN * largest
    order = order[seen][: integer("links", links, least=1)]
    for pair in order[::-1]:
        ends = np.array([(np.cos(angle[p]), np.sin(angle[p])) for p in result.pairs[pair].tolist()])
        width, opacity = width_of(values[pair], largest), fade_of(values[pair], errors[pair])
        casing = [effects.withStroke(linewidth=width + 1.6, foreground=GROUND)]
        colour = colour_of(values[pair], of)
        ax.plot(*ends.T, color=colour, linewidth=width, alpha=opacity, solid_capstyle="round", path_effects=casing)
    for player in players.tolist():
        x, y = np.cos(angle[player]), np.sin(angle[player])
        ax.plot(x, y, "o", color="0.35", markersize=6, markeredgecolor=GROUND, zorder=3)
        _name(ax, result.player_names[player][:LETTERS], angle[player], level)
    if level:
        ax.set_ylim(-1.22, 1.22)
    else:  # room for names that point up and down: letters of 8 points are about 0.07 inches wide
        inches = ax.get_window_extent().height / ax.figure.dpi
        limit = 1.1 / max(0.3, 1 - 0.14 * longest / inches)
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit))
    ax.set_aspect("equal")
    ax.set_axis_off()
    link_legend(ax, values[order], of, unit_of(result.about), f"{len(order)} of {len(result)} pairs")
    ax.set_title(title_of(result, head, of), fontsize=9)
    return ax


@literal
def value_bars(
    found: PlayerValues, *, head: str | int | None = None, most: int = MOST_BARS, ax: Axes | None = None
) -> Axes:
    """Bars of the largest values of players, red where they raise the value and blue where they lower it.

    Whiskers are 95 % intervals.
    """
    import matplotlib.pyplot as plt

    table = found.top(most, head)
    if ax is None:
        _, ax = plt.subplots(figsize=(5.2, 1.2 + 0.28 * len(table)), layout="constrained")
    values = table["value"].to_numpy(float)
    whiskers = np.nan_to_num(table["high"].to_numpy(float) - values)
    look = {"ecolor": "0.4", "capsize": 2, "linewidth": 0.9}
    rows = np.arange(len(table))
    ax.barh(rows, values, 0.62, xerr=whiskers, color=[colour_of(value, "sii") for value in values], error_kw=look)
    ax.set_yticks(rows, [name[:LETTERS] for name in table["name"]], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0.0, color="0.5", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    kind = {"SV": "Shapley value", "BV": "Banzhaf value"}[found.index]
    ax.set_xlabel(f"{kind} and 95 % interval, in {unit_of(found.about)}")
    ax.set_title(kind + ("" if found.heads is None else f", {found.heads[head_number(head, found.heads)]}"), fontsize=9)
    return ax


def _name(ax: Axes, name: str, angle: float, level: bool) -> None:
    """A player's name outside the circle, level or pointing outwards."""
    x, y, turn = np.cos(angle), np.sin(angle), np.degrees(angle) % 360
    left = 90 < turn < 270
    look: dict = {"ha": "right" if left else "left", "va": "center", "fontsize": 8}
    if not level:
        look |= {"rotation": turn - 180 if left else turn, "rotation_mode": "anchor"}
    elif abs(x) < 0.3:
        look |= {"ha": "center", "va": "bottom" if y > 0 else "top"}
    ax.text(1.08 * x, 1.08 * y, name, **look)


def link_legend(ax: Axes, values: np.ndarray, of: str, unit: str, what: str) -> None:
    """Below a picture with links: which colours occur, how wide an effect is, and what fading means."""
    from matplotlib.lines import Line2D

    names = {"sii": ("synergy (SII > 0)", "substitution (SII < 0)"), "gap": ("gap > 0", "gap < 0")}[of]
    seen = [(sign, name) for sign, name in zip((1.0, -1.0), names) if (sign * values > 0).any()]
    handles = [Line2D([], [], color=colour_of(sign, of), linewidth=3, label=name) for sign, name in seen]
    largest, symbol = float(np.abs(values).max(initial=0.0)), {"sii": "|SII|", "gap": "|gap|"}[of]
    for size in (largest, largest / 4) if largest > 0 else ():
        width = width_of(size, largest)
        handles.append(Line2D([], [], color="0.5", linewidth=width, label=f"{symbol} = {size:.2g} {unit}"))
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncol=2,
        fontsize=8,
        frameon=False,
        title=f"{what}; faint: uncertain",
        title_fontsize=8,
    )
