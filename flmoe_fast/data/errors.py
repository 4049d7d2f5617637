"""What is wrong with a data set, by file and line."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from flmoe_fast.checks import one_of

BROKEN = ("raise", "drop")
#: Problems that a message spells out.
SHOWN = 5


class DataError(ValueError):
    """Rows or files that cannot be used. The message reads ``file:line: got ..., expected ...``, one a problem."""

    def __init__(self, problems: Sequence[str]):
        more = f"; and {len(problems) - SHOWN} more problems" if len(problems) > SHOWN else ""
        super().__init__("; ".join(problems[:SHOWN]) + more)
        self.problems = tuple(problems)


class Problems:
    """Collects what is wrong while a reader goes on, so that one run shows everything.

    Parameters
    ----------
    broken : "raise" or "drop"
        Whether samples with a problem are an error, or left out with a warning that names them.
    """

    def __init__(self, broken: str = "raise"):
        self.broken = one_of("broken", broken, BROKEN)
        self.found: list[str] = []

    def add(self, path: str | os.PathLike, line: int | None, got: str, expected: str) -> None:
        """Note a problem; ``line`` counts from 1, None for a whole file."""
        self.found.append(problem(path, line, got, expected))

    def settle(self) -> None:
        """Raise or warn about everything that was noted."""
        if not self.found:
            return
        if self.broken == "raise":
            raise DataError(self.found)
        warnings.warn(f"left out {len(self.found)} samples: {DataError(self.found)}", stacklevel=3)


def problem(path: str | os.PathLike, line: int | None, got: str, expected: str) -> str:
    """One problem as text."""
    at = f"{os.fspath(path)}:{line}" if line is not None else os.fspath(path)
    return f"{at}: got {got}, expected {expected}"
