"""What a soak has counted, as a results file: ``make soak``, then ``python -m bench.soak build/soak.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.cells import Table
from bench.timing import write

#: What is said of every part.
PARTS = {
    "engines": "random models on every engine against the reference",
    "probes": "random games, enumerated against the definition, sampled twice",
    "files": "mutated files read in a process of its own",
    "kills": "commands killed, interrupted or let down at random moments, finished, compared with an undisturbed run",
    "sanitizers": "the extension under ASan and UBSan with Python tests, the host test under TSan",
}


def rows(content: dict) -> list[dict]:
    """One row a part, with everything that it counted."""
    return [{"part": part, "minutes": content["seconds"] / 60, **content["parts"][part]} for part in PARTS
            if part in content["parts"]]  # fmt: skip


def table(found: list[dict]) -> Table:
    """Cases, what was seen in them, and how many were wrong."""
    lines = []
    for row in found:
        lines.append([PARTS[row["part"]], f"{row['cases']:,}", _seen(row), str(len(row["wrong"]))])
    minutes = max((row["minutes"] for row in found), default=0.0)
    return ["what", "cases", "seen", "wrong"], lines, f"{minutes:.0f} minutes in all."


def _seen(row: dict) -> str:
    said = []
    if row["part"] in ("engines", "probes"):
        said.append(f"{row['comparisons']:,} comparisons")
        said += [f"{name} at most {100 * share:.2g} % of its bound" for name, share in sorted(row["worst"].items())]
    if row["part"] == "files":
        said += [f"{count:,} {name}" for name, count in sorted(row["outcomes"].items())]
        said.append(f"at most {row['worst']['seconds']:.1f} s and {row['worst']['MiB']:.0f} MiB")
    if row["part"] == "kills":
        said += [f"{name} {count}" for name, count in sorted(row["breaks"].items())]
        said.append(f"at most {row['worst']['seconds after Ctrl-C']:.2f} s of processor time after Ctrl-C")
    if row["part"] == "sanitizers":
        said += [f"{name}: {count}" for name, count in sorted(row["trials"].items())]
    said += [f"{100 * a / b:.1f} % of {b:,} intervals ({name}) hold the truth"
             for name, (a, b) in sorted(row.get("coverage", {}).items()) if name.endswith("of grids")]  # fmt: skip
    return "; ".join(said)


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"soak": ("soak", table)}


def main() -> None:
    """Write bench/results/soak.jsonl from a soak's own file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("soak", type=Path)
    print(write("soak", rows(json.loads(parser.parse_args().soak.read_text()))))


if __name__ == "__main__":
    main()
