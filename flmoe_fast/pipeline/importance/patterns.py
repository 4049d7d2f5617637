"""Importance patterns of a model over a data set: how concentrated its maps are, and how specific each is.

A mixture's experts are specific where their maps disagree, a plain transformer's attention heads likewise. Two figures
keep that honest. Two estimates of the *same* map disagree too, by the noise of the estimate: where maps have standard
errors the overlap of a map with itself, estimated anew, stands beside the overlap with others. And two maps that have
nothing to do with each other share some of their top by chance.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.files import read_arrays, replacing
from flmoe_fast.pipeline.importance.concentration import DEFAULT_TOPS, concentration, percentages
from flmoe_fast.pipeline.importance.overlap import RANKS, chance_overlap, overlap
from flmoe_fast.probes.result import InteractionResult

#: How often a map with standard errors is drawn anew to be compared with itself, twice each time.
REDRAWS = 8
#: How often samples are drawn with replacement for an interval of a mean.
RESAMPLES = 1000
LEVEL = 0.95
#: Before the name of a measure of overlap: that of a map with itself, estimated anew.
ITSELF = "itself, "


@dataclass(frozen=True)
class Patterns:
    """Measures of E maps in N samples.

    Attributes
    ----------
    names : tuple of E str
        The maps: experts, attention heads.
    whole : str or None
        One of the names, the model's own map, of which the others are parts. It takes no part in :attr:`specificity`.
    ids : tuple of N str
        The samples.
    measures : dict from str to float64
        (N, E) for the measures of :func:`concentration`; (N, E, E) for those of :func:`overlap`; (N, E) for these of a
        map with itself, estimated anew (``itself, ...``; 1 without standard errors); (N,) for ``chance, overlap ...``.
    """

    names: tuple[str, ...]
    whole: str | None
    ids: tuple[str, ...]
    measures: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.whole is not None and self.whole not in self.names:
            raise ArgumentError("whole", repr(self.whole), f"None or one of {', '.join(self.names)}")

    @property
    def parts(self) -> tuple[int, ...]:
        """Numbers of the maps that are compared with each other."""
        return tuple(e for e, name in enumerate(self.names) if name != self.whole)

    def by_sample(self) -> pandas.DataFrame:
        """A row a sample, a column a measure: means over the parts, or over pairs of different parts.

        And over the whole, as ``... of <whole>``; ``specificity``: how much less two parts' ranks agree than two
        estimates of the same part's.
        """
        parts, columns = list(self.parts), {}
        apart = ~np.eye(len(parts), dtype=bool)
        for name, values in self.measures.items():
            if values.ndim == 3:
                columns[name] = _means(values[:, parts][:, :, parts][:, apart])
            elif values.ndim == 2:
                columns[name] = _means(values[:, parts])
                if self.whole is not None and not name.startswith(ITSELF):
                    columns[f"{name} of {self.whole}"] = values[:, self.names.index(self.whole)]
            else:
                columns[name] = values
        columns["specificity"] = columns[ITSELF + RANKS] - columns[RANKS]
        return pandas.DataFrame(columns, index=pandas.Index(self.ids, name="sample"))

    def to_dataframe(self, seed: int = 0) -> pandas.DataFrame:
        """Means over samples, a row a measure and map, or two maps.

        Returns
        -------
        DataFrame
            ``measure``, ``map``, ``other`` (of an overlap, otherwise empty), ``mean``, its standard error over samples
            ``stderr``, ``low`` and ``high`` (95 %, from samples drawn with replacement), ``itself`` and ``chance`` (the
            same overlap of the map with itself estimated anew, and of unrelated maps), ``samples`` (those with a
            value). Rows whose ``map`` is empty are those of :meth:`by_sample`.
        """
        rows = []
        for name, values in self.measures.items():
            if name.startswith((ITSELF, "chance, ")):
                continue
            chance = self.measures.get(f"chance, {name}")
            more = {"chance": math.nan if chance is None else float(chance.mean())}
            for e, first in enumerate(self.names):
                if values.ndim == 2:
                    rows.append({"measure": name, "map": first, "other": "", **_summary(values[:, e], seed), **more})
                    continue
                for f, second in enumerate(self.names[:e]):
                    own = self.measures[ITSELF + name][:, [e, f]]
                    row = {"measure": name, "map": second, "other": first, **_summary(values[:, e, f], seed)}
                    rows.append({**row, "itself": float(_means(_means(own)[None])[0]), **more})
        for name, column in self.by_sample().items():
            rows.append({"measure": name, "map": "", "other": "", **_summary(column.to_numpy(), seed)})
        columns = ["measure", "map", "other", "mean", "stderr", "low", "high", "itself", "chance", "samples"]
        return pandas.DataFrame(rows).reindex(columns=columns)

    def save(self, path: str | os.PathLike) -> None:
        """Write ``path``, an .npz file."""
        about = json.dumps({"names": self.names, "whole": self.whole, "ids": self.ids})
        memory = io.BytesIO()
        arrays: dict[str, Any] = dict(self.measures)
        np.savez(memory, _json=np.array(about), **arrays)
        with replacing(path) as file:
            file.write(memory.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Patterns:
        """Read what :meth:`save` wrote. Nothing in the file is executed."""
        try:
            arrays = read_arrays(path)
            about = json.loads(str(arrays.pop("_json")))
            return cls(tuple(about["names"]), about["whole"], tuple(about["ids"]), arrays)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as problem:
            raise ArgumentError("path", f"{path} ({problem})", "a file written by Patterns.save") from problem

    def matrix(self, measure: str = RANKS) -> np.ndarray:
        """(E, E): mean overlap over samples; on the diagonal that of a map with itself, estimated anew."""
        found = _means(np.moveaxis(self.measures[measure], 0, -1))
        np.fill_diagonal(found, _means(self.measures[ITSELF + measure].T))
        return found


def map_measures(
    maps: np.ndarray,
    errors: np.ndarray | None = None,
    *,
    tops: Sequence[float] = DEFAULT_TOPS,
    baseline: str = "least",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """What :class:`Patterns` holds of one sample.

    Parameters
    ----------
    maps : (E, n) finite numbers
        Importance of n players or pairs in each of E maps.
    errors : (E, n), optional
        Standard errors of the maps, where they are estimates.
    tops, baseline
        See :func:`concentration`.
    seed : int
        Of the maps drawn anew.
    """
    maps = np.asarray(maps, float)
    found = concentration(maps, tops=tops, baseline=baseline)
    agreed = overlap(maps, tops=tops)
    found |= agreed
    own = {name: np.where(np.isfinite(values.diagonal()), 1.0, np.nan) for name, values in agreed.items()}
    if errors is not None and len(maps):
        errors = np.asarray(errors, float)
        if errors.shape != maps.shape or not (errors >= 0).all():
            raise ArgumentError("errors", f"shape {errors.shape}", f"numbers >= 0 of shape {maps.shape}")
        random = np.random.default_rng(integer("seed", seed, least=0))
        drawn = []
        for _ in range(REDRAWS):
            two = maps + errors * random.standard_normal((2, *maps.shape))
            # Sizes of signed values, whose noise is symmetric, stay sizes.
            drawn.append(overlap((np.abs(two) if baseline == "zero" else two).reshape(-1, maps.shape[1]), tops=tops))
        for name in own:
            own[name] = _means(np.stack([one[name].diagonal(len(maps)) for one in drawn]).T)
    found |= {ITSELF + name: values for name, values in own.items()}
    for percent in percentages("tops", tops):
        found[f"chance, overlap {percent:g} %"] = np.array(chance_overlap(maps.shape[1], percent))
    return found


def collect(
    samples: Sequence[Mapping[str, np.ndarray]],
    names: Sequence[str],
    ids: Sequence[str],
    *,
    whole: str | None = None,
) -> Patterns:
    """Patterns of N samples, each measured by :func:`map_measures` with the same maps.

    Raises
    ------
    ArgumentError
        No sample, or samples of different measures or maps.
    """
    if not samples or len(samples) != len(ids):
        raise ArgumentError("samples", f"{len(samples)} for {len(ids)} ids", "at least one, and an id for each")
    shapes = {name: np.shape(values) for name, values in samples[0].items()}
    for number, sample in enumerate(samples):
        if {name: np.shape(values) for name, values in sample.items()} != shapes or shapes["gini"] != (len(names),):
            raise ArgumentError(f"samples[{number}]", "other measures or maps", f"those of sample 0, {len(names)} maps")
    stacked = {name: np.stack([np.asarray(sample[name], float) for sample in samples]) for name in shapes}
    return Patterns(tuple(names), whole, tuple(ids), stacked)


def pair_patterns(
    results: Sequence[InteractionResult],
    heads: Sequence[str],
    ids: Sequence[str] | None = None,
    *,
    of: str = "sii",
    tops: Sequence[float] = DEFAULT_TOPS,
    whole: str | None = None,
    seed: int = 0,
) -> Patterns:
    """Which pairs each expert ranks first, how concentrated its interactions are, and how much experts agree.

    Parameters
    ----------
    results : N results of one model
        With these heads; the samples' pairs may differ.
    heads : sequence of E str
    ids : N str, optional
    of : "sii" or "gap"
        Pairs are ranked by the size of this column, whichever its sign. Its standard errors give the overlap of a head
        with itself. Heads are estimated from the same coalitions, so that equal heads agree fully: the comparison errs
        on the side of too little specificity.
    tops, seed
        See :func:`map_measures`.
    whole
        See :class:`Patterns`.
    """
    names = tuple(str(n) for n in range(len(results))) if ids is None else tuple(ids)
    samples = []
    for number, result in enumerate(results):
        values = np.stack([np.nan_to_num(np.abs(result.column(of, head))) for head in heads])
        errors = np.stack([np.nan_to_num(result.column(f"{of}_stderr", head)) for head in heads])
        samples.append(map_measures(values, errors, tops=tops, baseline="zero", seed=seed + number))
    return collect(samples, heads, names, whole=whole)


def compare_patterns(first: Patterns, second: Patterns, seed: int = 0) -> pandas.DataFrame:
    """Two models' patterns on the same samples, paired.

    Samples are matched by their id; those that only one has are left out. The whole is compared with the whole,
    whatever the two are called.

    Returns
    -------
    DataFrame
        ``measure``, ``first``, ``second``, ``difference``, ``stderr``, ``low``, ``high`` (of the difference, over
        samples, as :meth:`Patterns.to_dataframe`) and ``samples``.

    Raises
    ------
    ArgumentError
        No sample in both.
    """
    tables = []
    for patterns in (first, second):
        table = patterns.by_sample()
        tables.append(table.rename(columns=lambda name, of=patterns.whole: name.replace(f" of {of}", " of the whole")))
    common = tables[0].index.intersection(tables[1].index)
    if not len(common):
        raise ArgumentError("second", "no sample of the first", "patterns of the same samples")
    rows = []
    for name in tables[0].columns.intersection(tables[1].columns):
        one, two = (table.loc[common, name].to_numpy(float) for table in tables)
        both = np.isfinite(one) & np.isfinite(two)
        about = _summary(np.where(both, one - two, np.nan), seed)
        about["difference"] = about.pop("mean")
        means = [float(_means(np.where(both, values, np.nan)[None])[0]) for values in (one, two)]
        rows.append({"measure": name, "first": means[0], "second": means[1], **about})
    columns = ["measure", "first", "second", "difference", "stderr", "low", "high", "samples"]
    return pandas.DataFrame(rows)[columns]


def _means(values: np.ndarray) -> np.ndarray:
    """Means over the last axis of what is known; NaN where nothing is."""
    known = np.isfinite(values)
    return np.where(known, values, 0.0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)


def _summary(values: np.ndarray, seed: int) -> dict[str, float]:
    """Mean over samples with its standard error and an interval; NaN where too few samples have a value."""
    known = values[np.isfinite(values)]
    count = len(known)
    found = {"mean": float(known.mean()) if count else math.nan, "stderr": math.nan, "low": math.nan, "high": math.nan}
    if count > 1:
        found["stderr"] = float(known.std(ddof=1) / math.sqrt(count))
        drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
        tail = 100 * (1 - LEVEL) / 2
        found["low"], found["high"] = (float(v) for v in np.percentile(known[drawn].mean(1), [tail, 100 - tail]))
    return {**found, "samples": count}
