"""Fill the tables of README.md and docs/accuracy.md from the files under bench/results.

    python -m bench.tables [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. ``--check`` changes nothing and fails if a table
is not what the results say.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bench.timing import read

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "accuracy.md")


def _machine(head: dict) -> str:
    machine = head["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"Measured on {where}, torch {machine['torch']}, {head['date']}."


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _range(values: dict, digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['q1']:.{digits}f}–{values['q3']:.{digits}f})"


def cpu() -> str:
    """Speed on the CPU, and what rounding is worth, of every candidate."""
    found = read("cpu-engine")
    if found is None:
        return "not measured"
    head, rows = found
    noise = {row["candidate"]: row["noise_share"] for row in rows if "noise_share" in row}
    rows = [row for row in rows if "ms_per_coalition" in row]
    most = max(row["threads"] for row in rows)
    table = [
        [
            row["shape"],
            row["candidate"],
            _range(row["ms_per_coalition"], 2),
            f"{row['times_naive']['median']:.1f}x",
            f"{row['times_naive_per_pair_sample']['median']:.1f}x",
            f"{row['times_batched_fp32']['median']:.1f}x",
            f"{row['scaling_from_one_thread']['median']:.2f}x" if row["scaling_from_one_thread"] else "",
            f"{row['share_of_gemm_rate']['median']:.0%}" if "share_of_gemm_rate" in row else "",
            f"{noise[row['candidate']]:.1e}" if row["candidate"] in noise else "",
        ]
        for row in rows
        if row["threads"] == most
    ]
    columns = ["shape", "", "ms per coalition", "against naive", "the same per pair-sample", "against batched fp32"]
    columns += [f"{most} threads against 1", "share of GEMM rate", "noise share"]
    facts = next((row for row in found[1] if "noise_share" in row), None)
    note = "Medians and quartiles. Products are counted as in the arithmetic used, against PyTorch's own GEMM."
    if facts:
        note += f" Noise: {facts['model']}, held-out accuracy {facts['accuracy']:.1%}."
    return f"{_markdown(columns, table)}\n\n{_machine(head)} {note}"


def accuracy() -> str:
    """nMSE at equal evaluations."""
    found = read("accuracy")
    if found is None:
        return "not measured"
    head, rows = found
    rows = [row for row in rows if "estimator" in row]
    budgets = sorted({row["budget"] for row in rows})
    named: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        named.setdefault((row["value"], row["estimator"]), {})[row["budget"]] = row["nmse"]
    table = [[value, name, *(f"{by[b]:.3f}" for b in budgets)] for (value, name), by in named.items()]
    some = rows[0]
    columns = ["value", "estimator", *(f"{b:,}" for b in budgets)]
    games = f"{some['games']} games x {some['seeds']} seeds, 16 tokens, 64 cross-modal pairs"
    note = f"nMSE against enumeration (0 is exact, 1 is what all zeros would score), mean over {games}."
    return f"{_markdown(columns, table)}\n\n{_machine(head)} {note}"


def coverage() -> str:
    """Coverage of the 95 % intervals."""
    found = read("accuracy")
    if found is None:
        return "not measured"
    head, rows = found
    rows = [row for row in rows if "coverage_budget" in row]
    table = [
        [
            row["value"],
            "adaptive" if row["adaptive"] else "uniform",
            f"{row['coverage_budget']:,}",
            f"{100 * row['coverage_sii']:.1f} %",
            f"{100 * row['coverage_max']:.1f} %",
            f"{100 * row['coverage_strict']:.1f} %",
        ]
        for row in rows
    ]
    columns = ["value", "allocation", "evaluations", "SII", "gap (max)", "gap (strict)"]
    note = f"{rows[0]['games']} games x {rows[0]['seeds']} seeds x 64 pairs."
    return f"{_markdown(columns, table)}\n\n{_machine(head)} {note}"


def memory() -> str:
    """Peak memory of a long run."""
    found = read("memory")
    if found is None:
        return "not measured"
    head, [row] = found
    columns = ["players", "evaluations", "peak memory", "seconds", "noise share"]
    cells = [
        str(row["players"]),
        f"{row['evaluations']:,}",
        f"{row['gb_peak']:.2f} GB",
        f"{row['seconds']:.0f}",
        f"{row['noise_share']:.1e}",
    ]
    return f"{_markdown(columns, [cells])}\n\n{_machine(head)}"


def peers() -> str:
    """nMSE at equal evaluations on several kinds of games, against shapiq's estimators."""
    found = read("peers")
    if found is None:
        return "not measured"
    head, rows = found
    rows = [row for row in rows if "estimator" in row]
    budgets = sorted({row["budget"] for row in rows})
    named: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        cell = f"{row['nmse']:.3g}" if "nmse" in row else f"refuses: {row['refuses']}"
        named.setdefault((row["kind"], row["estimator"]), {})[row["budget"]] = cell
    table = [[kind, name, *(by.get(b, "not measured") for b in budgets)] for (kind, name), by in sorted(named.items())]
    counts = sorted({f"{row['games']} x {row['seeds']}" for row in rows})
    columns = ["game", "estimator", *(f"{b:,}" for b in budgets)]
    return f"{_markdown(columns, table)}\n\n{_machine(head)} Mean over games x seeds: {', '.join(counts)}."


def intervals() -> str:
    """Coverage of the surrogate's 95 % intervals."""
    found = read("peers")
    rows = [row for row in found[1] if "coverage_budget" in row] if found is not None else []
    if not rows:
        return "not measured"

    def percent(row: dict, of: str) -> str:
        share = row.get(f"coverage_{of}")
        return "" if share is None else f"{100 * share:.1f} %"

    table = [
        [row["kind"], f"{row['coverage_budget']:,}", *(percent(row, of) for of in ("sii", "max", "strict"))]
        for row in rows
    ]
    note = f"{rows[0]['games']} games x {rows[0]['seeds']} seeds x 64 pairs."
    columns = ["game", "evaluations", "SII", "gap (max)", "gap (strict)"]
    return f"{_markdown(columns, table)}\n\n{_machine(found[0])} {note}"


TABLES = {
    "cpu": cpu,
    "accuracy": accuracy,
    "coverage": coverage,
    "memory": memory,
    "peers": peers,
    "intervals": intervals,
}


def filled(text: str) -> str:
    """``text`` with every marked table generated anew."""

    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Fill the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page in PAGES:
        text = page.read_text()
        if not check:
            page.write_text(filled(text))
        elif filled(text) != text:
            sys.exit(f"{page.name}: a table differs from bench/results; run python -m bench.tables")


if __name__ == "__main__":
    main()
