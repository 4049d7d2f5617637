"""Interleaved timing, and rows that say on what they were measured."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from flmoe_fast.environment import environment

RESULTS = Path(__file__).parent / "results"
#: Seconds up to which a call is repeated before it is timed.
SHORT = 3.0


def interleave(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one unmeasured round.

    Candidates take turns within a round, so that a machine that slows down slows all of them; ratios are taken round
    by round. A short call is made once more before it is timed: what the others pushed out of the caches and of the
    memory comes back first, as it would for a call that follows its like.
    """
    short = set()
    for name, run in candidates.items():
        started = time.perf_counter()
        run()
        if time.perf_counter() - started < SHORT:
            short.add(name)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            if name in short:
                run()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high, "rounds": len(values)}


def write(name: str, rows: list[dict]) -> Path:
    """Write one result file: a line with the machine, then one line a row. Replaces the file of that name."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    head = {"machine": environment(), "commit": _commit(), "date": datetime.date.today().isoformat()}
    path.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    return path


def machine_line() -> dict[str, str]:
    """Where, when and on what a row that is appended to older ones was measured."""
    machine = environment()
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return {"machine": str(where), "commit": _commit(), "date": datetime.date.today().isoformat()}


def read(name: str) -> tuple[dict, list[dict]] | None:
    """Machine line and rows of a result file, or None if there is none."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return None
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    return head, rows


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "flmoe_fast", "csrc"], capture_output=True, text=True
        )
        return found.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
