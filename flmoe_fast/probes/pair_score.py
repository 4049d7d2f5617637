"""One pair of a result, and results as text and HTML for a person to read."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from flmoe_fast.probes.result import InteractionResult

#: Pairs that a result shows of itself, as text and in a notebook.
SHOWN, SHOWN_HTML = 5, 10


@dataclass(frozen=True)
class PairScore:
    """What one head says about one pair; ``float(...)`` is its SII.

    Attributes
    ----------
    i, j : int
        Players.
    name_i, name_j : str
    head : str or None
    sii, sii_stderr : float
    sii_interval : (float, float)
        95 % interval.
    gap, gap_stderr : float
    gap_interval : (float, float)
    gap_kind : str
    contexts : int
        Contexts averaged over.
    exact : bool
        Whether every coalition was evaluated.
    """

    i: int
    j: int
    name_i: str
    name_j: str
    head: str | None
    sii: float
    sii_stderr: float
    sii_interval: tuple[float, float]
    gap: float
    gap_stderr: float
    gap_interval: tuple[float, float]
    gap_kind: str
    contexts: int
    exact: bool

    def __float__(self) -> float:
        return self.sii

    def __repr__(self) -> str:
        head = "" if self.head is None else f" ({self.head})"
        return (
            f"{self.name_i} x {self.name_j}{head}: SII {with_error(self.sii, self.sii_stderr, self.exact)}, "
            f"{self.gap_kind} gap {with_error(self.gap, self.gap_stderr, self.exact)}"
        )


def with_error(value: float, error: float, exact: bool = False) -> str:
    """``value ± error``, as many digits as the error has two significant ones.

    An estimate whose samples were all the same has an error of zero, and yet is not ``exact``.
    """
    if not np.isfinite(value):
        return "undefined"
    decimals = int(np.clip(1 - np.floor(np.log10(error)), 3, 7)) if np.isfinite(error) and error > 0 else 4
    if exact and error == 0:
        return f"{value:+.{decimals}f} exactly"
    return f"{value:+.{decimals}f} ± " + (f"{error:.{decimals}f}" if np.isfinite(error) else "?")


def as_text(result: InteractionResult) -> str:
    """The largest interactions of the first head with their errors, and what was spent on them."""
    lines = [summary(result)]
    scores = [result.score(pair) for pair in result.order("abs_sii")[:SHOWN]]
    names = [f"{score.name_i} x {score.name_j}" for score in scores]
    for name, score in zip(names, scores):
        lines.append(
            f"  {name:<{max(map(len, names))}}  SII {with_error(score.sii, score.sii_stderr, score.exact)}"
            f"  {score.gap_kind} gap {with_error(score.gap, score.gap_stderr, score.exact)}"
        )
    if len(result) > SHOWN:
        lines.append(f"  ... {len(result) - SHOWN} more; largest |SII| first, see .top(), .to_dataframe(), .plot()")
    return "\n".join(lines)


def as_html(result: InteractionResult) -> str:
    """The same as a table."""
    rows = []
    for pair in result.order("abs_sii")[:SHOWN_HTML]:
        score = result.score(pair)
        low, high = score.sii_interval
        sure = "" if low <= 0 <= high or not np.isfinite(low) else " style='font-weight:bold'"
        cells = (
            html.escape(score.name_i),
            html.escape(score.name_j),
            with_error(score.sii, score.sii_stderr, score.exact),
            with_error(score.gap, score.gap_stderr, score.exact),
        )
        rows.append(f"<tr{sure}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{name}</th>" for name in ("player", "player", "SII ± s.e.", f"{result.gap_kind} gap ± s.e."))
    more = len(result) - len(rows)
    rest = f"; {more} more pairs in <code>.to_dataframe()</code>" if more > 0 else ""
    return (
        f"<div><p>{html.escape(summary(result))}</p><table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"</table><p>Largest |SII| first; bold: the 95 % interval excludes zero{rest}</p></div>"
    )


def summary(result: InteractionResult) -> str:
    """One line: how many pairs, of which head, at what cost, how far the rounding can be trusted."""
    heads = "" if result.heads is None else f" of {result.heads[0]!r} (first of {len(result.heads)} heads)"
    noise = np.asarray(result.noise_share)
    worst = f", rounding {np.nanmax(noise):.1e} of the variance" if np.isfinite(noise).any() else ""
    ended = f", ended by {result.about['stopped']!r}" if "stopped" in result.about else ""
    return (
        f"InteractionResult: {len(result)} pairs{heads}, {result.evaluations:,} evaluations "
        f"({result.about.get('method', 'grid')}, backend {result.backend!r}){worst}{ended}"
    )
