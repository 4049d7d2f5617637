"""Tables of the estimators' benches: a function of a results file's rows returns columns, lines and a note."""

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
        if DEFAULT in cell and not any(name.startswith(PEER) for name in cell):
            own = [f"{cell[name]['nmse']:.2g}" if name in cell else "" for name in (DEFAULT, *methods)]
            lines.append(
                [group, f"{budget:,}", *own, _percent(cell[DEFAULT], "sii"), f"{cell[DEFAULT]['seconds']:.2g}"]
            )
    columns = ["game", "evaluations", DEFAULT, *methods, "intervals that hold", "seconds"]
    return columns, lines, f"{NMSE}, mean; intervals and seconds are the default's. {_counts(rows)}"


def bias(rows: list[dict]) -> Table:
    """Slope of the estimates on the truth: 1 on average where an estimator is unbiased."""
    lines = [
        [
            row["group"],
            row["estimator"],
            f"{row['budget']:,}",
            f"{row['slope']:.4f} ± {row['slope_stderr']:.4f}",
            f"{(row['slope'] - 1) / row['slope_stderr']:+.1f}" if row["slope_stderr"] else "",
        ]
        for row in rows
    ]
    columns = ["game", "estimator", "evaluations", "slope", "standard errors from 1"]
    return columns, lines, f"Mean ± standard error. {_counts(rows)}"


def triples(rows: list[dict]) -> Table:
    """Interactions of order 3: the default beside the best of shapiq's estimators, and beside enumeration."""
    columns, lines, note = accuracy([row for row in rows if "difference" not in row])
    for row in rows:
        if "difference" in row:
            said = f"{row['difference']:.0e} from enumeration"
            lines.append([row["group"], f"all {row['budget']:,}", said, *[""] * (len(columns) - 3)])
    return columns, lines, note


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


def controls(rows: list[dict]) -> Table:
    """What is found where there is nothing, and of one pair among many."""
    lines = []
    for key in dict.fromkeys((row["game"], row["question"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["game"], row["question"], row["budget"]) == key]
        if key[1] == "estimated":
            largest, held = max(row["largest"] for row in own), min(row["held"] for row in own)
            said = f"largest SII {largest:.0e}, {100 * held:.0f} % of the intervals hold 0"
        else:
            ranks = [row["rank"] for row in own if row.get("rank")]
            found = len(own) - sum("refuses" in row for row in own) - len(ranks)
            said = f"{sum('refuses' in row for row in own)} of {len(own)} refused"
            said += f", ranks of the pair: {', '.join(map(str, ranks))}" if ranks else ""
            said += f", {found} accepted" if found else ""
        lines.append([key[0], "default" if key[1] == "estimated" else "screen", f"{key[2]:,}", said])
    return ["game", "asked", "evaluations", "answer"], lines, f"{len({row['seed'] for row in rows})} seeds."


def estimator(rows: list[dict]) -> Table:
    """Seconds and memory of the default call without its game."""
    lines = [
        [
            str(row["players"]),
            f"{row['evaluations']:,}",
            str(row["heads"]),
            f"{row['seconds']['median']:.2g} ({row['seconds']['q1']:.2g}–{row['seconds']['q3']:.2g})",
            f"{row['gb']:.2f} GB",
            f"{row['share_of_probe']:.1%}" if "share_of_probe" in row else "",
        ]
        for row in rows
    ]
    columns = ["players", "evaluations", "heads", "seconds", "memory", "share of a probe of MM-IMDb's shape"]
    return columns, lines, f"{rows[0]['pairs']} pairs, {rows[0]['threads']} threads; medians and quartiles."


def _cells(rows: list[dict]) -> list[tuple[str, int, dict[str, dict]]]:
    """Rows by estimator, for every group and budget in order."""
    found: dict[tuple[str, int], dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["group"], row["budget"]), {})[row["estimator"]] = row
    return [(*key, found[key]) for key in sorted(found)]


def _ratio(own: float, other: float) -> str:
    return f"{own / other:.2g}" if other else "0" if not own else "inf"


def _percent(row: dict, of: str) -> str:
    if f"coverage_{of}" not in row:
        return "not measured"
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


#: Tables by name, and the results file that each is of.
TABLES: dict[str, tuple[str, Callable[[list[dict]], Table]]] = {
    "accuracy": ("peers", accuracy),
    "coverage": ("peers", coverage),
    "kinds": ("kinds", kinds),
    "triples": ("triples", triples),
    "peers": ("peers", peers),
    "bias": ("bias", bias),
    "controls": ("controls", controls),
    "estimator": ("estimator", estimator),
}
