"""Results of coalitions that were computed before: few players, and the halves of a product design, come again soon."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

#: What is kept at most: coalitions, and numbers of their results (64 MB in float64).
MOST_ROWS, MOST_NUMBERS = 1 << 16, 1 << 23


class Remembered:
    """A function of coalitions (C, n) bool to rows (C, ...) that does not compute what it still knows.

    Attributes
    ----------
    computed : int
        Coalitions computed so far.

    Threads may share one; what two of them miss at the same time is computed twice.
    """

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]):
        self.compute, self.computed = compute, 0
        self._rows: dict[bytes, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        distinct, again = coalitions.bool().cpu().unique(dim=0, return_inverse=True)
        keys = [row.tobytes() for row in distinct.numpy()]
        rows = {key: row for key in keys if (row := self._rows.get(key)) is not None}
        missing = [i for i, key in enumerate(keys) if key not in rows]
        if missing:
            found = self.compute(distinct[missing])
            with self._lock:
                self.computed += len(missing)
                if len(self._rows) + len(missing) > min(MOST_ROWS, MOST_NUMBERS // max(1, found[0].numel())):
                    self._rows.clear()
                for i, row in zip(missing, found):
                    rows[keys[i]] = self._rows[keys[i]] = row
        return torch.stack([rows[key] for key in keys])[again]

    def forget(self) -> None:
        """Compute everything anew from here on."""
        with self._lock:
            self._rows.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def forget(game: object) -> None:
    """Let a game compute everything anew from here on, as a measurement of its speed has to."""
    for part in vars(game).values():
        for remembered in part.values() if isinstance(part, dict) else (part,):
            if isinstance(remembered, Remembered):
                remembered.forget()
