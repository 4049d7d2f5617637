"""Tables of bench/results/peers.jsonl: a function of its rows returns columns, lines and a note."""

from __future__ import annotations

from collections.abc import Callable

Table = tuple[list[str], list[list[str]], str]
#: The call without a method, and what the names of shapiq's estimators begin with.
DEFAULT, PEER = "default", "shapiq "
SCORES = {"sii": "SII", "max": "gap (max)", "sum": "gap (sum)", "strict": "gap (strict)", "ratio": "gap (ratio)"}
NMSE = "nMSE: squared error over the pairs relative to the sum of squares of the truth (0 is exact, 1 is all zeros)"


def accuracy(rows: list[dict]) -> Table:
    """The default beside the best of shapiq's estimators in each cell, by mean and by median."""
    lines = []
    for group, budget, cell in _cells(rows):
        peers = [row for name, row in cell.items() if name.startswith(PEER) and "nmse" in row]
        if DEFAULT not in cell or not peers:
            continue
        own = cell[DEFAULT]
        best, middle = (min(peers, key=lambda row: row[of]) for of in ("nmse", "nmse_median"))
        lines.append(
            [
                group,
                f"{budget:,}",
                f"{own['nmse']:.3g} ({own['nmse_median']:.3g})",
                f"{best['nmse']:.3g} ({middle['nmse_median']:.3g})",
                best["estimator"].removeprefix(PEER),
                f"{_ratio(own['nmse'], best['nmse'])} ({_ratio(own['nmse_median'], middle['nmse_median'])})",
                _percent(own, "sii"),
            ]
        )
    columns = ["game", "evaluations", "default", "best of shapiq", "which is", "default / best", "intervals that hold"]
    return columns, lines, f"{NMSE}, mean (median); 95 % intervals. {_counts(rows)}"


def coverage(rows: list[dict]) -> Table:
    """How many of the default's 95 % intervals hold the truth."""
    lines = []
    for group, budget, cell in _cells(rows):
        if DEFAULT in cell and "coverage_max" in cell[DEFAULT]:
            lines.append([group, f"{budget:,}", *(_percent(cell[DEFAULT], of) for of in SCORES)])
    note = "Of the intervals that are given; in brackets how many are not, where some are not. "
    return ["game", "evaluations", *SCORES.values()], lines, note + _counts(rows)


def kinds(rows: list[dict]) -> Table:
    """Our methods beside each other, and the default's intervals, where no peer was asked."""
    methods = sorted({row["estimator"] for row in rows if not row["estimator"].startswith(PEER)} - {DEFAULT})
    lines = []
    for group, budget, cell in _cells(rows):
        if DEFAULT in cell and len(cell) > 1:
            own = [f"{cell[name]['nmse']:.2g}" if name in cell else "" for name in (DEFAULT, *methods)]
            lines.append(
                [group, f"{budget:,}", *own, _percent(cell[DEFAULT], "sii"), f"{cell[DEFAULT]['seconds']:.2g}"]
            )
    columns = ["game", "evaluations", DEFAULT, *methods, "intervals that hold", "seconds"]
    return columns, lines, f"{NMSE}, mean; intervals and seconds are the default's. {_counts(rows)}"


def peers(rows: list[dict]) -> Table:
    """Every estimator in every cell."""
    budgets = sorted({row["budget"] for row in rows})
    named: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        named.setdefault((row["group"], row["estimator"]), {})[row["budget"]] = row
    lines = []
    for (group, name), by in sorted(named.items()):
        took = [row["seconds"] for row in by.values() if "seconds" in row]
        seconds = f"{min(took):.2g} to {max(took):.2g}" if took else ""
        lines.append([group, name, *(_error(by.get(budget)) for budget in budgets), seconds])
    return (
        ["game", "estimator", *(f"{b:,}" for b in budgets), "seconds"],
        lines,
        f"{NMSE}, mean (median). {_counts(rows)}",
    )


TABLES: dict[str, Callable[[list[dict]], Table]] = {
    "accuracy": accuracy,
    "coverage": coverage,
    "kinds": kinds,
    "peers": peers,
}


def _cells(rows: list[dict]) -> list[tuple[str, int, dict[str, dict]]]:
    """Rows by estimator, for every group and budget in order."""
    found: dict[tuple[str, int], dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["group"], row["budget"]), {})[row["estimator"]] = row
    return [(*key, found[key]) for key in sorted(found)]


def _ratio(own: float, other: float) -> str:
    return f"{own / other:.2g}" if other else "0" if not own else "inf"


def _percent(row: dict, of: str) -> str:
    held, withheld = row.get(f"coverage_{of}"), row.get(f"withheld_{of}", 0.0)
    given = "none" if held is None else f"{100 * held:.1f} %"
    return given + (f" ({100 * withheld:.0f} %)" if withheld >= 0.005 else "")


def _error(row: dict | None) -> str:
    """A cell's figures, or why there are none: the estimator said so, or nobody waited any longer."""
    if row is None:
        return "not measured"
    if "refuses" in row:
        return row["refuses"] if row["refuses"].startswith("stopped") else f"refuses: {row['refuses']}"
    return f"{row['nmse']:.3g} ({row['nmse_median']:.3g})"


def _counts(rows: list[dict]) -> str:
    counts = sorted({f"{row['games']} x {row['seeds']}" for row in rows})
    return f"Games x seeds: {', '.join(counts)}."
