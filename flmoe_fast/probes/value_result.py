"""What :func:`player_values` returns: values of single players with their standard errors."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.files import replacing
from flmoe_fast.probes.naming import head_number, player_number
from flmoe_fast.probes.pair_score import SHOWN, SHOWN_HTML, with_error
from flmoe_fast.probes.result import half_width, jsonable

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class PlayerScore:
    """What one head says about one player; ``float(...)`` is its value.

    Attributes
    ----------
    player : int
    name : str
    head : str or None
    index : str
        "SV" or "BV".
    value, stderr : float
    interval : (float, float)
        95 % interval.
    exact : bool
        Whether every coalition was evaluated.
    """

    player: int
    name: str
    head: str | None
    index: str
    value: float
    stderr: float
    interval: tuple[float, float]
    exact: bool

    def __float__(self) -> float:
        return self.value

    @property
    def said(self) -> str:
        """The value and its standard error as text."""
        return with_error(self.value, self.stderr, self.exact)

    def __repr__(self) -> str:
        head = "" if self.head is None else f" ({self.head})"
        return f"{self.name}{head}: {self.index} {self.said}"


@dataclass(frozen=True)
class PlayerValues:
    """Values of Q players with their standard errors, for a single value or for O heads.

    ``print(values)`` shows the largest; ``values[player]`` (number or name) is one, ``len(values)`` how many there are,
    ``for score in values`` all of them. ``top()`` and ``to_dataframe()`` are tables, ``plot()`` is a picture,
    ``to_csv()`` and ``to_json()`` make files. ``head=`` says which of a game's outputs is meant.

    Attributes
    ----------
    players : int64 (Q,)
    values, stderr : float64 (Q,) or (Q, O)
    degrees : float64 (Q,)
        Degrees of freedom of the standard errors, for Student's t.
    evaluations : int
    index : str
        "SV" or "BV".
    heads : tuple of str or None
    player_names : tuple of n str
    about : dict
        What was done and why, and facts such as the target and the kind of value. JSON types only.
    """

    players: np.ndarray
    values: np.ndarray
    stderr: np.ndarray
    degrees: np.ndarray
    evaluations: int
    index: str
    heads: tuple[str, ...] | None
    player_names: tuple[str, ...]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.players)

    def __iter__(self) -> Iterator[PlayerScore]:
        """Every player in the order of ``players``, for the first head."""
        return (self.score(row) for row in range(len(self)))

    def __getitem__(self, player: int | str) -> PlayerScore:
        """One player by number or name, for the first head."""
        row = np.flatnonzero(self.players == player_number(player, self.player_names))
        if not len(row):
            raise ArgumentError("player", repr(player), "one whose value was estimated, see .players")
        return self.score(int(row[0]))

    def __repr__(self) -> str:
        scores = [self.score(row) for row in self.order()[:SHOWN]]
        width = max((len(score.name) for score in scores), default=0)
        lines = [self._summary()]
        lines += [f"  {score.name:<{width}}  {self.index} {score.said}" for score in scores]
        if len(self) > SHOWN:
            lines.append(f"  ... {len(self) - SHOWN} more; largest first, see .top(), .to_dataframe(), .plot()")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = []
        for score in (self.score(row) for row in self.order()[:SHOWN_HTML]):
            cells = (html.escape(score.name), score.said)
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        head = f"<thead><tr><th>player</th><th>{self.index} ± s.e.</th></tr></thead>"
        return f"<div><p>{html.escape(self._summary())}</p><table>{head}<tbody>{''.join(rows)}</tbody></table></div>"

    def _summary(self) -> str:
        heads = "" if self.heads is None else f" of {self.heads[0]!r} (first of {len(self.heads)} heads)"
        spent = f"{self.evaluations:,} evaluations ({self.about['method']})"
        return f"PlayerValues: {self.index} of {len(self)} players{heads}, {spent}"

    def score(self, row: int, head: str | int | None = None) -> PlayerScore:
        """What a head says about the player in a row of ``players``."""
        column, player = head_number(head, self.heads), int(self.players[row])
        parts = self._columns(*self.interval())
        value, error, low, high = (float(part.reshape(len(self), -1)[row, column]) for part in parts)
        name = None if self.heads is None else self.heads[column]
        exact = bool(np.isinf(self.degrees[row]))
        return PlayerScore(player, self.player_names[player], name, self.index, value, error, (low, high), exact)

    def _columns(self, *more: np.ndarray) -> tuple[np.ndarray, ...]:
        return (self.values, self.stderr, *more)

    def interval(self, level: float = 0.95, simultaneous: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of the confidence intervals, shaped like ``values``.

        ``simultaneous`` intervals hold for all Q players at once (Bonferroni's).
        """
        degrees = self.degrees if self.values.ndim == 1 else self.degrees[:, None]
        half = half_width(self.stderr, degrees, 1 - (1 - level) / len(self.players) if simultaneous else level)
        return self.values - half, self.values + half

    def order(self, head: str | int | None = None) -> np.ndarray:
        """Rows from the largest absolute value to the smallest."""
        values = self.values.reshape(len(self), -1)[:, head_number(head, self.heads)]
        return np.argsort(-np.abs(values), kind="stable")

    def top(self, k: int = 10, head: str | int | None = None) -> pandas.DataFrame:
        """The ``k`` players with the largest absolute values as a table with 95 % intervals."""
        rows = self.order(head)[: integer("k", k, least=1)]
        return self._table(head).iloc[rows].reset_index(drop=True)

    def to_dataframe(self, head: str | int | None = None) -> pandas.DataFrame:
        """One row per player; for all heads (``head=None`` with heads), one row per head and player."""
        import pandas

        if head is not None or self.heads is None:
            return self._table(head)
        return pandas.concat([self._table(column) for column in range(len(self.heads))], ignore_index=True)

    def _table(self, head: str | int | None) -> pandas.DataFrame:
        import pandas

        column = head_number(head, self.heads)
        columns: dict[str, Any] = {} if self.heads is None else {"head": self.heads[column]}
        columns |= {"player": self.players, "name": [self.player_names[player] for player in self.players]}
        for name, part in zip(("value", "stderr", "low", "high"), self._columns(*self.interval())):
            columns[name] = part.reshape(len(self), -1)[:, column]
        return pandas.DataFrame(columns)

    def to_csv(self, path: str | os.PathLike, head: str | int | None = None) -> None:
        """Write :meth:`to_dataframe` as CSV."""
        with replacing(path, "w") as file:
            self.to_dataframe(head).to_csv(file, index=False)

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """All attributes as JSON with lists for arrays; also written to ``path`` where given."""
        found = {name: part.tolist() if isinstance(part, np.ndarray) else part for name, part in vars(self).items()}
        text = json.dumps(jsonable(found), ensure_ascii=False, allow_nan=False)
        if path is not None:
            with replacing(path, "w") as file:
                file.write(text)
        return text

    def plot(self, head: str | int | None = None, most: int = 20, ax: Axes | None = None) -> Axes:
        """Bars of the largest values with 95 % intervals, as matplotlib Axes."""
        from flmoe_fast.probes.pictures import value_bars

        return value_bars(self, head=head, most=most, ax=ax)
