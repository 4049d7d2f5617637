"""Fill the tables of README.md and of the pages under docs from the files under bench/results.

    python -m bench.tables [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. ``--check`` changes nothing and fails if a table
is not what the results say.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bench import (
    adapt,
    calls,
    checks,
    contexts,
    cpu,
    decoders,
    digits,
    explainers,
    gpu,
    hdxor,
    headline,
    memory,
    mixes,
    overheads,
    peers_tables,
    pipeline,
    runtimes,
    soak,
    zoo,
)
from bench.cells import markdown
from bench.findings import digits as findings_digits
from bench.findings import planted as findings_planted
from bench.findings import shares as findings_shares
from bench.findings import verdicts
from bench.timing import read

ROOT = Path(__file__).parent.parent
DOCS = ("measured", "accuracy", "precision", "models", "guarantees", "findings")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS))
BENCHES = (headline, cpu, contexts, memory, hdxor, digits, pipeline, adapt, mixes, gpu, explainers, peers_tables)
BENCHES += (
    calls,
    checks,
    overheads,
    runtimes,
    soak,
    zoo,
    findings_shares,
    findings_digits,
    findings_planted,
    verdicts,
    decoders,
)
TABLES = {name: table for bench in BENCHES for name, table in bench.TABLES.items()}


def text(name: str) -> str:
    """A table and what it was measured on; nothing of a results file that is not there or has no line for it."""
    results, table = TABLES[name]
    found = read(results)
    columns, lines, note = table(found[1]) if found else ([], [], "")
    if not lines:
        return "not measured"
    return f"{markdown(columns, lines)}\n\n{machine(found[0])} {note}".rstrip()


def machine(head: dict) -> str:
    """What, on what and when the rows below a results file's first line were measured."""
    where = head["machine"]
    on = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
    return f"Measured on {on}, torch {where['torch']}, {head['date']}."


def filled(page: str) -> str:
    """``page`` with every marked table generated anew."""

    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{text(match[1])}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> None:
    """Fill the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page in PAGES:
        now = page.read_text()
        if not check:
            page.write_text(filled(now))
        elif filled(now) != now:
            sys.exit(f"{page.name}: a table differs from bench/results; run python -m bench.tables")


if __name__ == "__main__":
    main()
