"""What a probe returns: scores of pairs with their standard errors, and how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from scipy.special import stdtrit

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.files import read_arrays, replacing
from flmoe_fast.probes.indices import IndexEstimate
from flmoe_fast.probes.naming import checked_names, head_number, player_number
from flmoe_fast.probes.pair_score import PairScore, as_html, as_text

if TYPE_CHECKING:
    import pandas

FORMAT = 1
RANKINGS = ("abs_sii", "sii", "-sii", "gap")


@dataclass(frozen=True)
class InteractionResult:
    """Shapley interactions and redundancy gaps of P pairs, for a single value or for O heads.

    ``print(result)`` shows the largest; ``result[i, j]`` (numbers or names) is one pair, ``len(result)`` how many there
    are, ``for score in result`` all of them. ``top()`` and ``to_dataframe()`` are tables, ``plot()`` is a picture,
    ``save()``, ``to_csv()`` and ``to_json()`` make files. ``head=`` says which of a game's outputs is meant.

    All arrays are float64 of shape (P,), or (P, O) when the game has heads, unless it says otherwise.

    Attributes
    ----------
    pairs : int64 (P, 2)
        Player indices.
    sii, sii_stderr
        Shapley Interaction Index and its standard error. Positive: the two work together; negative: one replaces the
        other; zero: additive. For a probability the index lies in [-2, 2].
    gap, gap_stderr
        Redundancy gap of kind ``gap_kind``; larger means that they back each other up.
    degrees : float64 (P,)
        Degrees of freedom of the standard errors, for Student's t. Infinite when exact.
    contexts : int64 (P,)
        Contexts averaged over.
    evaluations : int
        Model evaluations spent on the estimate.
    check_evaluations : int
        Further evaluations, spent on measuring ``noise_share``, and those in an arithmetic that was found too coarse.
    noise_share : float64 () or (O,)
        Rounding noise: variance of the second differences' error against float64, over their variance across contexts
        and pairs. NaN when it was not measured. Above 0.01 the ranking is partly noise.
    seed : int
    backend : str
    gap_kind : str
    heads : tuple of str or None
    player_names : tuple of str
    about : dict
        Further facts, such as the target and the kind of value. JSON types only.
    also : dict of (name, order) to IndexEstimate
        Other indices from the same evaluations, see :mod:`flmoe_fast.probes.indices`.
    """

    pairs: np.ndarray
    sii: np.ndarray
    sii_stderr: np.ndarray
    gap: np.ndarray
    gap_stderr: np.ndarray
    degrees: np.ndarray
    contexts: np.ndarray
    evaluations: int
    check_evaluations: int
    noise_share: np.ndarray
    seed: int
    backend: str
    gap_kind: str
    heads: tuple[str, ...] | None
    player_names: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)
    also: dict[tuple[str, int], IndexEstimate] = field(default_factory=dict)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PairScore]:
        """Every pair in the order of ``pairs``, for the first head."""
        return (self.score(pair) for pair in range(len(self.pairs)))

    def __getitem__(self, players: tuple[int | str, int | str]) -> PairScore:
        """The pair of two players, given by number or name in any order, for the first head."""
        return self.pair(*self._two(players))

    def __contains__(self, players: object) -> bool:
        """Whether a pair of two players, by number or name, was probed."""
        try:
            self.pair(*self._two(players))
        except ArgumentError:
            return False
        return True

    def pair(self, first: int | str, second: int | str, head: str | int | None = None) -> PairScore:
        """What a head says about the pair of two players, given by number or name in any order."""
        wanted = sorted((self.player(first), self.player(second)))
        found = np.flatnonzero((np.sort(self.pairs, 1) == wanted).all(1))
        if not len(found):
            raise ArgumentError("pair", repr((first, second)), "a pair that was probed, see result.pairs")
        return self.score(int(found[0]), head)

    def score(self, pair: int, head: str | int | None = None) -> PairScore:
        """What a head says about the pair with a number, a row of ``pairs``."""
        i, j = self.pairs[pair].tolist()
        number = self.head(head)
        values: dict[str, Any] = {}
        for of in ("sii", "gap"):
            centre, stderr = float(self.column(of, number)[pair]), float(self.column(f"{of}_stderr", number)[pair])
            half = float(half_width(np.array(stderr), self.degrees[pair], 0.95))
            values |= {of: centre, f"{of}_stderr": stderr, f"{of}_interval": (centre - half, centre + half)}
        names = {"name_i": self.player_names[i], "name_j": self.player_names[j]}
        head_name = None if self.heads is None else self.heads[number]
        return PairScore(
            i,
            j,
            head=head_name,
            gap_kind=self.gap_kind,
            contexts=int(self.contexts[pair]),
            exact=bool(np.isinf(self.degrees[pair])),
            **names,
            **values,
        )

    def player(self, player: int | str) -> int:
        """Number of a player given by name or number."""
        return player_number(player, self.player_names)

    @staticmethod
    def _two(players: object) -> tuple[int | str, int | str]:
        if not isinstance(players, tuple) or len(players) != 2:
            raise ArgumentError("pair", repr(players), "two players, by number or name: result[i, j]")
        return players

    def named(self, names: Sequence[str]) -> InteractionResult:
        """The same result with other names for its n players, such as the words of a sentence."""
        return replace(self, player_names=checked_names(names, len(self.player_names)))

    def head(self, head: str | int | None = None) -> int:
        """Column of a head given by name or number; the first by default."""
        return head_number(head, self.heads)

    def column(self, name: str, head: str | int | None = None) -> np.ndarray:
        """One head's (P,) column of ``sii``, ``sii_stderr``, ``gap`` or ``gap_stderr``."""
        one_of("name", name, ("sii", "sii_stderr", "gap", "gap_stderr"))
        return getattr(self, name).reshape(len(self.pairs), -1)[:, self.head(head)]

    def interval(
        self, level: float = 0.95, of: str = "sii", head: str | int | None = None, simultaneous: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends (P,) of the confidence interval of ``of`` ("sii" or "gap") for one head.

        ``simultaneous`` intervals hold for all P pairs at once, however they depend on each other (Bonferroni's, each
        of level ``1 - (1 - level) / P``): a ranking may be read off where they do not overlap.
        """
        one_of("of", of, ("sii", "gap"))
        if not 0.0 < level < 1.0:
            raise ArgumentError("level", repr(level), "a number between 0 and 1")
        centre, stderr = self.column(of, head), self.column(of + "_stderr", head)
        half = half_width(stderr, self.degrees, 1 - (1 - level) / len(self.pairs) if simultaneous else level)
        return centre - half, centre + half

    def order(self, by: str = "abs_sii", head: str | int | None = None) -> np.ndarray:
        """Pair numbers from the highest rank to the lowest; undefined scores come last.

        ``by`` is "abs_sii" (the strongest first, either way), "sii" (synergy first), "-sii" (substitution first) or
        "gap" (redundancy first).
        """
        one_of("by", by, RANKINGS)
        score = self.column("gap" if by == "gap" else "sii", head)
        score = {"-sii": -score, "abs_sii": np.abs(score)}.get(by, score)
        return np.argsort(-np.where(np.isnan(score), -np.inf, score), kind="stable")

    def top(self, k: int = 10, by: str = "abs_sii", head: str | int | None = None) -> pandas.DataFrame:
        """The ``k`` first pairs of a ranking (see :meth:`order`) as a table with 95 % intervals."""
        rows = self.order(by, head)[: integer("k", k, least=1)]
        return self._table(head).iloc[rows].reset_index(drop=True)

    def to_dataframe(self, head: str | int | None = None) -> pandas.DataFrame:
        """One row per pair; for all heads (``head=None`` with heads), one row per head and pair."""
        import pandas

        if head is not None or self.heads is None:
            return self._table(head)
        return pandas.concat([self._table(i) for i in range(len(self.heads))], ignore_index=True)

    def to_csv(self, path: str | os.PathLike, head: str | int | None = None) -> None:
        """Write :meth:`to_dataframe` as CSV."""
        with replacing(path, "w") as file:
            self.to_dataframe(head).to_csv(file, index=False)

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """Everything that :meth:`save` keeps, as JSON with lists for arrays; also written to ``path`` where given.

        Undefined and infinite numbers are null, since JSON has none.
        """
        arrays, rest = self.parts()
        lists = {name: jsonable(array.tolist()) for name, array in arrays.items()}
        text = json.dumps({"format": FORMAT, **jsonable(rest), **lists}, ensure_ascii=False, allow_nan=False)
        if path is not None:
            with replacing(path, "w") as file:
                file.write(text)
        return text

    def _table(self, head: str | int | None) -> pandas.DataFrame:
        import pandas

        columns: dict[str, Any] = {}
        if self.heads is not None:
            columns["head"] = self.heads[self.head(head)]
        columns["i"], columns["j"] = self.pairs.T
        columns["name_i"], columns["name_j"] = ([self.player_names[p] for p in side] for side in self.pairs.T)
        for of in ("sii", "gap"):
            columns[of], columns[of + "_stderr"] = self.column(of, head), self.column(of + "_stderr", head)
            columns[of + "_low"], columns[of + "_high"] = self.interval(of=of, head=head)
        columns["contexts"] = self.contexts
        return pandas.DataFrame(columns)

    def index(self, name: str, order: int = 2, head: str | int | None = None) -> pandas.DataFrame:
        """One of the indices asked for with ``also=``: members, value, standard error and 95 % interval, a row each."""
        import pandas

        one_of("index", (name, order), tuple(self.also))
        found = self.also[name, order]
        columns = dict(zip("ijk", found.members.T))
        value, stderr = (a.reshape(len(found.members), -1)[:, self.head(head)] for a in (found.values, found.stderr))
        half = half_width(stderr, found.degrees, 0.95)
        columns |= {"value": value, "stderr": stderr, "low": value - half, "high": value + half}
        return pandas.DataFrame(columns)

    def indices_dataframe(self) -> pandas.DataFrame:
        """All indices asked for with ``also=``: name, order and, where there are heads, head beside :meth:`index`."""
        import pandas

        parts = []
        for name, order in self.also:
            for number, head in enumerate(self.heads or (None,)):
                columns = {"index": name, "order": order} | ({} if head is None else {"head": head})
                parts.append(self.index(name, order, number).assign(**columns))
        if not parts:
            return pandas.DataFrame(columns=["index", "order", "i", "j", "value", "stderr", "low", "high"])
        table = pandas.concat(parts, ignore_index=True)
        players = [column for column in "ijk" if column in table]
        first = ["index", "order", *(["head"] if self.heads else []), *players]
        table[players] = table[players].astype("Int64")
        return table[[*first, "value", "stderr", "low", "high"]]

    def plot(self, head: str | int | None = None, of: str = "sii", kind: str = "matrix", ax=None):
        """A picture of ``of`` ("sii" or "gap"), as matplotlib Axes.

        ``kind`` is "matrix" (first player down, second across; a dot marks intervals that exclude zero) or "network"
        (players on a circle; lines are the wider the larger, and the fainter the less certain).
        """
        from flmoe_fast.probes.pictures import heatmap, network

        one_of("kind", kind, ("matrix", "network"))
        return (network if kind == "network" else heatmap)(self, head=head, of=of, ax=ax)

    def to_shapiq(self, index: str = "SII", head: str | int | None = None):
        """As ``shapiq.InteractionValues``, see :func:`flmoe_fast.probes.export.to_shapiq`."""
        from flmoe_fast.probes.export import to_shapiq

        return to_shapiq(self, index, head)

    def to_shap(self, index: str = "SII", head: str | int | None = None):
        """As a ``shap.Explanation``, see :func:`flmoe_fast.probes.export.to_shap`."""
        from flmoe_fast.probes.export import to_shap

        return to_shap(self, index, head)

    def save(self, path: str | os.PathLike) -> None:
        """Write the result to an ``.npz`` file that holds plain arrays and JSON, replacing it in one step."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ArgumentError("path", str(path), "a name ending in .npz")
        arrays, rest = self.parts()
        with replacing(path) as file:
            np.savez(file, allow_pickle=False, _json=np.array(json.dumps({"format": FORMAT, **rest})), **arrays)

    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays by name and everything else as JSON types; :meth:`from_parts` is the inverse."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), np.ndarray)}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays and f.name != "also"}
        for (name, order), estimate in self.also.items():
            for part in fields(estimate):
                arrays[f"also/{name}/{order}/{part.name}"] = getattr(estimate, part.name)
        return arrays, rest

    @classmethod
    def from_parts(cls, arrays: dict[str, np.ndarray], rest: dict[str, Any]) -> InteractionResult:
        """The result that :meth:`parts` took apart."""
        also: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        for key in [key for key in arrays if key.startswith("also/")]:
            _, name, order, part = key.split("/")
            also.setdefault((name, int(order)), {})[part] = arrays[key]
        heads = None if rest["heads"] is None else tuple(rest["heads"])
        own: dict[str, Any] = {name: array for name, array in arrays.items() if not name.startswith("also/")}
        return cls(
            **own,
            **{**rest, "heads": heads, "player_names": tuple(rest["player_names"])},
            also={key: IndexEstimate(**estimate) for key, estimate in also.items()},
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> InteractionResult:
        """Read what :meth:`save` wrote. Nothing in the file is executed."""
        expected = "a file written by InteractionResult.save"
        try:
            arrays = read_arrays(path)
            rest = json.loads(str(arrays.pop("_json")))
            if rest.pop("format") != FORMAT:
                raise ArgumentError("path", f"{path}, of another format", f"{expected}, format {FORMAT}")
            return cls.from_parts(arrays, rest)
        except FileNotFoundError:
            raise
        except (OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile) as problem:
            if isinstance(problem, ArgumentError):
                raise
            raise ArgumentError("path", f"{path} ({problem})", expected) from problem


def jsonable(value: Any) -> Any:
    """The same with None for numbers that JSON has not."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): jsonable(part) for key, part in value.items()}
    return [jsonable(part) for part in value] if isinstance(value, (list, tuple)) else value


def half_width(stderr: np.ndarray, degrees: np.ndarray, level: float) -> np.ndarray:
    """Half the width of Student's intervals: NaN without degrees of freedom, 0 where nothing is uncertain."""
    with np.errstate(invalid="ignore"):
        quantile = np.where(degrees > 0, stdtrit(np.maximum(degrees, 1e-9), 0.5 + level / 2), np.nan)
        return np.where(stderr == 0, 0.0, quantile * stderr)
