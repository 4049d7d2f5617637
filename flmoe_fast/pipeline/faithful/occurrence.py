"""How often, and where, a model's tokens work together or replace each other, over many explained samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas

from flmoe_fast.checks import ArgumentError
from flmoe_fast.pipeline.records import SampleRecord


def occurrences(
    records: Sequence[SampleRecord], classes: Sequence[str], by: str = "class", level: float = 0.95
) -> pandas.DataFrame:
    """Interactions by head and class, or by head and pair of modalities.

    Parameters
    ----------
    records : N records of one model
    classes : C names
    by : "class" or "modalities"
        Samples are grouped by their explained class (a sample of several counts for each), or pairs by modalities.
    level : float
        Of the intervals that decide whether an interaction is seen.

    Returns
    -------
    pandas.DataFrame
        One row per head and group: ``samples``, ``pairs``, ``synergy`` and ``substitution`` (shares of pairs whose SII
        interval lies above or below zero), ``mean_sii``, ``backup`` (share of pairs whose gap interval lies above zero)
        and ``mean_gap``. Pairs were chosen by importance, so shares are of important tokens.
    """
    if not records:
        raise ArgumentError("records", "nothing", "at least one record")
    heads = records[0].interactions.heads
    rows: dict[tuple[str | None, str], list[dict]] = {}
    for record in records:
        result = record.interactions
        if result.heads != heads:
            raise ArgumentError("records", f"heads {result.heads} of {record.id}", f"{heads}, as of the first")
        names = [name for name, _ in record.groups]
        owner = np.array([m for m, _ in record.places])
        pair_names = np.array([f"{names[a]} x {names[b]}" for a, b in np.sort(owner[result.pairs], axis=1)])
        groups = [(classes[c], slice(None)) for c in record.target]
        if by == "modalities":
            groups = [(name, pair_names == name) for name in dict.fromkeys(pair_names)]
        for head in heads or (None,):
            low, high = result.interval(level, "sii", head)
            gap_low, _ = result.interval(level, "gap", head)
            sii, gap = result.column("sii", head), result.column("gap", head)
            for name, which in groups:
                rows.setdefault((head, name), []).append(
                    {
                        "pairs": len(sii[which]),
                        "synergy": int((low[which] > 0).sum()),
                        "substitution": int((high[which] < 0).sum()),
                        "sii": float(np.nansum(sii[which])),
                        "backup": int((gap_low[which] > 0).sum()),
                        "gap": float(np.nansum(gap[which])),
                    }
                )
    table = []
    for (head, name), parts in rows.items():
        total = {key: sum(part[key] for part in parts) for key in parts[0]}
        count = max(total["pairs"], 1)
        table.append(
            {
                "head": head,
                by: name,
                "samples": len(parts),
                "pairs": total["pairs"],
                "synergy": total["synergy"] / count,
                "substitution": total["substitution"] / count,
                "mean_sii": total["sii"] / count,
                "backup": total["backup"] / count,
                "mean_gap": total["gap"] / count,
            }
        )
    return pandas.DataFrame(table)


def where(records: Sequence[SampleRecord], head: str | int | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean synergy and mean substitution of every patch of the image modalities.

    Returns
    -------
    dict from modality to two arrays (rows, columns)
        Mean of max(SII, 0) and of max(-SII, 0) over the probed pairs with that patch; NaN for patches in no pair.
    """
    sums: dict[str, np.ndarray] = {}
    for record in records:
        result = record.interactions
        sii = result.column("sii", head)
        for pair, value in zip(result.pairs, sii):
            for player in pair:
                m, position = record.places[player]
                view = record.views[m]
                if view.grid is None:
                    continue
                kept = sums.setdefault(view.name, np.zeros((3, *view.grid)))
                row, column = divmod(position, view.grid[1])
                kept[:, row, column] += (max(value, 0.0), max(-value, 0.0), 1.0)
    maps = {}
    for name, (positive, negative, count) in sums.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            maps[name] = (positive / count, negative / count)
    return maps


def frequent_tokens(records: Sequence[SampleRecord], k: int = 10, head: str | int | None = None) -> pandas.DataFrame:
    """Named tokens of texts and tables by mean synergy and substitution, those in most probed pairs first.

    Returns
    -------
    pandas.DataFrame
        ``modality``, ``token``, ``pairs``, ``mean_synergy`` and ``mean_substitution``, at most ``k`` rows a modality.
    """
    sums: dict[tuple[str, str], np.ndarray] = {}
    for record in records:
        result = record.interactions
        for pair, value in zip(result.pairs, result.column("sii", head)):
            for player in pair:
                m, position = record.places[player]
                view = record.views[m]
                if view.kind != "image":
                    kept = sums.setdefault((view.name, view.tokens[position].strip()), np.zeros(3))
                    kept += (1.0, max(value, 0.0), max(-value, 0.0))
    rows = [
        {"modality": name, "token": token, "pairs": int(n), "mean_synergy": s / n, "mean_substitution": t / n}
        for (name, token), (n, s, t) in sums.items()
    ]
    columns = ["modality", "token", "pairs", "mean_synergy", "mean_substitution"]
    table = pandas.DataFrame(rows, columns=columns).sort_values("pairs", ascending=False, kind="stable")
    return table.groupby("modality", sort=False).head(k).reset_index(drop=True)
