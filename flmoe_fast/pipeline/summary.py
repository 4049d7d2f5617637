"""Many explained samples of a model as a table, and two models side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas

from flmoe_fast.checks import ArgumentError
from flmoe_fast.pipeline.explain import Explanation
from flmoe_fast.pipeline.records import SampleRecord
from flmoe_fast.probes.result import InteractionResult

#: What was found for one sample.
Found = SampleRecord | Explanation | InteractionResult

#: What a summary says about each head, with a standard error over samples.
MEASURES = ("synergy", "substitution", "mean_abs_sii", "mean_gap", "full", "empty")


def summarize(records: Sequence[Found], level: float = 0.95) -> pandas.DataFrame:
    """What interactions a model has over a data set, a row a head.

    Parameters
    ----------
    records : N of one model
        What :func:`read_records` read of a run, or what :func:`explain` or :func:`interactions` returned for each
        sample.
    level : float
        Of the intervals that decide whether an interaction is seen.

    Returns
    -------
    DataFrame
        Index ``head``; ``samples``, and the mean over samples and its standard error (``..._stderr``) of ``synergy``
        and ``substitution`` (shares of a sample's probed pairs whose SII interval lies above or below zero),
        ``mean_abs_sii``, ``mean_gap``, and of the first head's value with all players (``full``) and none (``empty``),
        which results of :func:`interactions` do not know (NaN).
    """
    per_sample = _per_sample(records, level)
    rows = {}
    for head, table in per_sample.items():
        errors = {f"{name}_stderr": error for name, error in _errors(table).items()}
        rows[head] = {"samples": len(table), **table.mean(axis=0), **errors}
    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("head")


def compare(
    first: Sequence[Found], second: Sequence[Found], head: str | None = None, level: float = 0.95
) -> pandas.DataFrame:
    """Two models on the same samples: how much more of each measure the first has, sample by sample.

    Parameters
    ----------
    first, second : of each model
        As for :func:`summarize`. Records are matched by their id, and those that only one model has are left out; what
        has no id is matched by its place, and both need the same number.
    head : str, optional
        A head that both have; the first of each by default, usually the mixture.
    level : float
        As for :func:`summarize`.

    Returns
    -------
    DataFrame
        Index ``measure`` (see :func:`summarize`); ``first``, ``second``, their ``difference``, its standard error over
        samples (paired), and ``samples``.

    Raises
    ------
    ArgumentError
        No sample in both, other numbers of samples without ids, or a head that one lacks.
    """
    if all(isinstance(found, SampleRecord) for found in [*first, *second]):
        other = {_id(found): found for found in second}
        pairs = [(found, other[_id(found)]) for found in first if _id(found) in other]
    elif len(first) == len(second):
        pairs = list(zip(first, second))
    else:
        raise ArgumentError("second", f"{len(second)} samples", f"{len(first)}, as of the first, in the same order")
    if not pairs:
        raise ArgumentError("second", "no sample of the first", "records of the same samples")
    tables = []
    for records in zip(*pairs):
        found = _per_sample(records, level)
        if head is not None and head not in found:
            raise ArgumentError("head", repr(head), f"one of {', '.join(found)}")
        tables.append(found[head] if head is not None else next(iter(found.values())))
    differences = tables[0] - tables[1]
    means = zip(("first", "second", "difference"), (*tables, differences))
    columns = {name: table.mean(axis=0) for name, table in means}
    columns |= {"difference_stderr": pandas.Series(_errors(differences)), "samples": len(pairs)}
    return pandas.DataFrame(columns).loc[list(MEASURES)].rename_axis("measure")


def player_points(records: Sequence[SampleRecord], head: str | int | None = None) -> pandas.DataFrame:
    """Every probed player of every sample with its Shapley value, for :func:`beeswarm`.

    Records without Shapley values (``also = ["SV"]``) are left out.

    Returns
    -------
    DataFrame
        ``sample``, ``modality``, ``name``, ``value``, and ``feature``: the number of a table's column, else NaN.
        Columns of a table are called by their title, without the number.
    """
    rows = []
    for record in records:
        found = record.interactions.also.get(("SV", 1))
        if found is None:
            continue
        values = found.values.reshape(len(found.members), -1)[:, record.interactions.head(head)]
        for player, value in zip(found.members[:, 0].tolist(), values.tolist()):
            view = record.views[record.places[player][0]]
            name, feature = record.interactions.player_names[player], math.nan
            if view.kind == "table":
                title, equals, number = name.partition(" = ")
                name, feature = title, float(number) if equals else math.nan
            elif view.kind == "text":
                name = name.partition(" #")[0]
            rows.append((record.id, view.name, name, value, feature))
    return pandas.DataFrame(rows, columns=["sample", "modality", "name", "value", "feature"])


def _per_sample(records: Sequence[Found], level: float) -> dict[str, pandas.DataFrame]:
    """By head: a row a sample, a column a measure."""
    if not records:
        raise ArgumentError("records", "nothing", "at least one record")
    heads = _result(records[0]).heads
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in heads or ("value",)}
    for place, record in enumerate(records):
        result = _result(record)
        if result.heads != heads:
            raise ArgumentError("records", f"heads {result.heads} of sample {place}", f"{heads}, as of the first")
        full, empty = _ends(record)
        for number, name in enumerate(rows):
            low, high = result.interval(level, "sii", number)
            rows[name].append(
                {
                    "synergy": float((low > 0).mean()),
                    "substitution": float((high < 0).mean()),
                    "mean_abs_sii": float(np.nanmean(np.abs(result.column("sii", number)))),
                    "mean_gap": float(np.nanmean(result.column("gap", number))),
                    "full": full,
                    "empty": empty,
                }
            )
    return {name: pandas.DataFrame(parts) for name, parts in rows.items()}


def _id(found: Found) -> str | None:
    return found.id if isinstance(found, SampleRecord) else None


def _result(found: Found) -> InteractionResult:
    return found if isinstance(found, InteractionResult) else found.interactions


def _ends(found: Found) -> tuple[float, float]:
    """The value with all players and with none."""
    if isinstance(found, Explanation):
        return found.prediction["full"], found.prediction["empty"]
    return (found.full, found.empty) if isinstance(found, SampleRecord) else (math.nan, math.nan)


def _errors(table: pandas.DataFrame) -> dict[str, float]:
    """Standard error of the mean of every column; NaN for a single row."""
    return dict(table.std(axis=0, ddof=1) / math.sqrt(len(table)))
