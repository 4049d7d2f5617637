"""How concentrated an importance map is: whether few tokens, or few pairs, hold most of it.

Three measures that agree on the two ends, a flat map and a single token: the Gini coefficient, the entropy as a share
of that of a flat map, and the share held by the top K per cent. All three depend on what counts as nothing. Attention
rollouts add the identity to every layer, so that a token nobody looks at still gets about one over the number of
tokens, and all the more of the map the smaller the gradients are: an expert with a routing weight of a quarter would
look flatter than the same transformer alone. Maps are therefore measured above their own least value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from flmoe_fast.checks import ArgumentError, one_of

#: Per cent of the players whose share is measured, as for the drop curves.
DEFAULT_TOPS = (5.0, 10.0, 15.0, 20.0, 25.0)
BASELINES = ("least", "zero")


def top_count(n: int, percent: float) -> int:
    """How many of n players are the top ``percent``: at least one, rounded up."""
    return max(1, math.ceil(n * percent / 100.0)) if n else 0


def concentration(
    maps: np.ndarray, *, tops: Sequence[float] = DEFAULT_TOPS, baseline: str = "least"
) -> dict[str, np.ndarray]:
    """Concentration of maps over their last axis.

    Parameters
    ----------
    maps : (..., n) finite numbers
        Importance of n players or pairs.
    tops : sequence of float in (0, 100]
        Per cent of the players, rounded up, whose share is measured.
    baseline : "least" or "zero"
        What counts as nothing: the smallest value of each map, or zero (then no value may be negative).

    Returns
    -------
    dict from str to float64 (...)
        ``gini`` from 0 (flat) to 1 - 1/n (one player); ``entropy`` of the shares, divided by that of a flat map: 1 for
        a flat map, 0 for one player; ``top 5 %`` and so on, the shares of the largest values. NaN for a map with
        nothing above the baseline, which has no shares.

    Raises
    ------
    ArgumentError
        Values that are not finite, or negative ones above a baseline of zero.
    """
    values = np.asarray(maps, float)
    one_of("baseline", baseline, BASELINES)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ArgumentError("maps", f"shape {values.shape}", "(..., n) with n >= 1")
    if not np.isfinite(values).all():
        raise ArgumentError("maps", "values that are not finite", "finite numbers")
    if baseline == "least":
        values = values - values.min(-1, keepdims=True)
    elif (values < 0).any():
        raise ArgumentError("maps", "negative values", "none below the baseline 'zero'")
    n, total = values.shape[-1], values.sum(-1)
    known = total > 0
    shares = np.sort(values / np.where(known, total, 1.0)[..., None], axis=-1)[..., ::-1]
    # The mean absolute difference of all pairs, from the order: the largest of n is larger than n - 1 others.
    rise = (n - 1 - 2 * np.arange(n)) / n
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    found = {"gini": shares @ rise, "entropy": -(shares * logs).sum(-1) / (math.log(n) if n > 1 else 1.0)}
    for percent in percentages("tops", tops):
        found[f"top {percent:g} %"] = shares[..., : top_count(n, percent)].sum(-1)
    return {name: np.where(known, measured, np.nan) for name, measured in found.items()}


def percentages(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Percentages above 0 and up to 100 as floats, or :class:`ArgumentError` for the argument ``name``."""
    for k, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 < value <= 100:
            raise ArgumentError(f"{name}[{k}]", repr(value), "a percentage > 0 and <= 100")
    return tuple(float(value) for value in values)
