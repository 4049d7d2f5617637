"""What benches put into the cells of their tables."""

from __future__ import annotations

import statistics

#: Columns, lines and a note.
Table = tuple[list[str], list[list[str]], str]


def markdown(columns: list[str], lines: list[list[str]]) -> str:
    """A table as pages have it."""
    head, *body = ["| " + " | ".join(line) + " |" for line in (columns, *lines)]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def quartiles(values: dict, digits: int) -> str:
    """The median, and the quartiles in brackets."""
    return f"{values['median']:.{digits}f} ({values['q1']:.{digits}f}–{values['q3']:.{digits}f})"


def times(ratio: dict) -> str:
    """The same of a ratio."""
    return f"{ratio['median']:.1f}x ({ratio['q1']:.1f}–{ratio['q3']:.1f})"


def over_seeds(values: list[float], digits: int, sign: str = "") -> str:
    """Mean and spread; of a single seed the value, since its spread is not known."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
