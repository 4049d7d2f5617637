"""Heat map of pair scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flmoe_fast.probes.result import InteractionResult


def literal(text: str) -> str:
    """``text`` as matplotlib shows it letter by letter: no formula between dollars, nothing that cannot be printed."""
    return "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")


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
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-bound or -1.0, vmax=bound or 1.0, aspect="auto")
    sure = (low > 0) | (high < 0)
    ax.plot(col[sure], row[sure], "o", color="black", markersize=3, markeredgecolor="white", markeredgewidth=0.5)
    ax.set_xticks(range(len(cols)), [literal(result.player_names[p]) for p in cols], rotation=90, fontsize=7)
    ax.set_yticks(range(len(rows)), [literal(result.player_names[p]) for p in rows], fontsize=7)
    kind = "Shapley interaction" if of == "sii" else f"redundancy gap ({result.gap_kind})"
    name = "" if result.heads is None else f", {result.heads[result.head(head)]}"
    ax.set_title(kind + literal(name), fontsize=9)
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    return ax
