"""How much maps agree on what matters: the overlap of their top players, and the correlation of their ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import hypergeom, rankdata

from flmoe_fast.checks import ArgumentError
from flmoe_fast.pipeline.importance.concentration import DEFAULT_TOPS, percentages, top_count

#: What the correlation of ranks is called among the measures.
RANKS = "rank correlation"


def overlap(maps: np.ndarray, *, tops: Sequence[float] = DEFAULT_TOPS) -> dict[str, np.ndarray]:
    """Agreement of every two of E maps of the same n players or pairs.

    The top is taken over all players, whichever modality they are of: experts that each look at a modality of their own
    do not overlap.

    Parameters
    ----------
    maps : (E, n) finite numbers
    tops : sequence of float in (0, 100]
        Per cent of the players, rounded up.

    Returns
    -------
    dict from str to float64 (E, E), symmetric
        ``rank correlation``: Spearman's, of equal values the mean rank; NaN with a map that is the same everywhere.
        ``overlap 5 %`` and so on: Jaccard index of the two tops, their common players over the players in either; of
        equal values the first are in the top.
    """
    values = np.asarray(maps, float)
    if values.ndim != 2 or not values.size:
        raise ArgumentError("maps", f"shape {values.shape}", "(E, n)")
    if not np.isfinite(values).all():
        raise ArgumentError("maps", "values that are not finite", "finite numbers")
    n = values.shape[1]
    ranks = rankdata(values, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    lengths = np.sqrt((ranks**2).sum(1))
    scale = np.outer(lengths, lengths)
    correlations = np.divide(ranks @ ranks.T, scale, where=scale > 0, out=np.full(scale.shape, np.nan))
    found = {RANKS: correlations.clip(-1.0, 1.0)}
    order = np.argsort(-values, axis=1, kind="stable")
    for percent in percentages("tops", tops):
        count = top_count(n, percent)
        chosen = np.zeros(values.shape)
        np.put_along_axis(chosen, order[:, :count], 1.0, axis=1)
        common = chosen @ chosen.T
        found[f"overlap {percent:g} %"] = common / (2 * count - common)
    return found


def chance_overlap(n: int, percent: float) -> float:
    """Mean Jaccard index of the tops of two maps that have nothing to do with each other."""
    count = top_count(n, percent)
    common = np.arange(count + 1)
    return float(hypergeom.pmf(common, n, count, count) @ (common / (2 * count - common)))
